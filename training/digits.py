"""The embedded data set: scikit-learn's 1,797 handwritten digits, 8 x 8 grey, so that a first run needs no network."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from hf_vq.streams import ImageSplits, decode_image

TEST_SIZE = 360


def load_digits_images(validation_size: int | None = None) -> ImageSplits:
    """The digits as 8-bit images (value * 255 / 16, rounded) and labels, 1,437 to train and 360 to test, stratified.

    Args:
        validation_size: rows held out from the training split, a tenth by default.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = np.rint(digits.images * 255 / 16).astype(np.uint8)
    train, test = train_test_split(np.arange(len(pixels)), test_size=TEST_SIZE, stratify=digits.target, random_state=0)
    held_out = len(train) // 10 if validation_size is None else validation_size
    if not 0 <= held_out < len(train):
        raise ValueError(f"validation_size must lie in [0, {len(train)}) for the digits, got {held_out}")
    order = np.random.default_rng(0).permutation(train)
    rows = {"train": np.sort(order[held_out:]), "validation": np.sort(order[:held_out]), "test": np.sort(test)}
    tables = {name: _table(pixels[chosen], digits.target[chosen]) for name, chosen in rows.items() if len(chosen)}
    return ImageSplits(tables["train"], tables.get("validation"), tables["test"])


def fit_reader() -> Any:
    """An SVC fitted on the real training digits; it reads rows of `features`."""
    from sklearn.svm import SVC

    table: Any = load_digits_images(validation_size=0).train
    return SVC(gamma=1e-3).fit(features([decode_image(cell) for cell in table["image"]]), table["label"])


def features(images: Sequence[PILImage.Image]) -> np.ndarray:
    """8-bit pictures as rows, on the data set's own scale of 0 to 16."""
    return np.stack([np.asarray(image, dtype=np.float64).ravel() for image in images]) * 16 / 255


def _table(pixels: np.ndarray, labels: np.ndarray) -> Dataset:
    features = Features({"image": Image(decode=False), "label": ClassLabel(num_classes=10)})
    images = [{"bytes": _png(image), "path": None} for image in pixels]
    return Dataset.from_dict({"image": images, "label": labels.tolist()}, features=features)


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PILImage.fromarray(image).save(buffer, format="png")
    return buffer.getvalue()
