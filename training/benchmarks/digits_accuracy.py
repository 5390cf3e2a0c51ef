"""Do the reconstructed digits still read as what they are?

    python training/benchmarks/digits_accuracy.py output/sqvae-digits

A classifier fitted on the real training digits reads the test digits and their reconstructions; prints both
accuracies and their ratio.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from PIL.Image import Image
from sklearn.svm import SVC

from digits import load_digits_images
from hf_vq import ImageTokenizer
from hf_vq.streams import decode_image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a tokenizer trained on the digits")
    tokenizer = ImageTokenizer.from_pretrained(parser.parse_args().model)

    splits = load_digits_images(validation_size=0)
    reader = SVC(gamma=1e-3).fit(*rows(splits.train))
    images, labels = pictures(splits.test), splits.test["label"]  # type: ignore[index]  # there is one
    reconstructions = tokenizer.batch_decode(tokenizer(images).input_ids)
    real, kept = (reader.score(features(seen), labels) for seen in (images, reconstructions))
    print(
        f"accuracy on {len(images)} test digits {real:.4f}, on their reconstructions {kept:.4f}: kept {kept / real:.4f}"
    )


def pictures(table: Any) -> list[Image]:
    """The images of a table."""
    return [decode_image(cell) for cell in table["image"]]


def rows(table: Any) -> tuple[np.ndarray, list[int]]:
    """Features and labels of a table."""
    return features(pictures(table)), table["label"]


def features(images: list[Image]) -> np.ndarray:
    """8-bit pictures as rows, on the data set's own scale of 0 to 16."""
    return np.stack([np.asarray(image, dtype=np.float64).ravel() for image in images]) * 16 / 255


if __name__ == "__main__":
    main()
