"""The embedded data set."""

import io
import socket
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from digits import load_digits_images


def pictures(dataset: Dataset) -> np.ndarray:
    """The decoded pictures, (N, 8, 8) uint8."""
    return np.stack([np.asarray(Image.open(io.BytesIO(cell["bytes"]))) for cell in dataset["image"]])


def counted(*datasets: Dataset) -> Counter[tuple[bytes, int]]:
    return Counter(
        (picture.tobytes(), label)
        for dataset in datasets
        for picture, label in zip(pictures(dataset), dataset["label"], strict=True)
    )


def test_sizes():
    splits = load_digits_images()
    assert [len(split) for split in splits[:3]] == [1437 - 143, 143, 360]
    without = load_digits_images(validation_size=0)
    assert len(without.train) == 1437 and without.validation is None and len(without.test) == 360


def test_the_test_split_is_scikit_learns_stratified_one():
    digits = load_digits()
    rows = np.arange(1797)
    train, test = train_test_split(rows, test_size=360, stratify=digits.target, random_state=0)
    splits = load_digits_images(validation_size=0)
    for split, chosen in ((splits.train, train), (splits.test, test)):
        chosen = np.sort(chosen)
        assert np.array_equal(split["label"], digits.target[chosen])
        # 16 steps of 15.9375, exact in floating point; no value but 8 lies halfway, and 127.5 rounds to 128
        assert np.array_equal(pictures(split), np.rint(digits.images[chosen] * 15.9375))
    share = np.bincount(splits.test["label"]) / np.bincount(digits.target)
    assert np.allclose(share, 360 / 1797, atol=0.005)


def test_pictures_are_grey_and_use_the_whole_range():
    cell = load_digits_images().train[0]["image"]
    picture = Image.open(io.BytesIO(cell["bytes"]))
    assert (picture.mode, picture.size) == ("L", (8, 8))
    values = np.unique(pictures(load_digits_images().test))
    assert values.min() == 0 and values.max() == 255 and 128 in values and len(values) == 17


def test_held_out_rows_come_from_the_training_rows_only():
    whole, splits = load_digits_images(validation_size=0), load_digits_images(validation_size=200)
    assert len(splits.validation) == 200
    assert counted(splits.train, splits.validation) == counted(whole.train)
    assert counted(splits.test) == counted(whole.test)
    # drawn from all of them, not from one end
    assert len(set(splits.validation["label"])) == 10


def test_the_same_rows_every_time_without_a_network(monkeypatch: pytest.MonkeyPatch):
    first = load_digits_images()

    def unplugged(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", unplugged)
    np.random.seed(7)
    second = load_digits_images()
    for one, other in zip(first[:3], second[:3], strict=True):
        assert one[:] == other[:]


@pytest.mark.parametrize("size", [-1, 1437])
def test_too_many_held_out_rows_are_refused(size: int):
    with pytest.raises(ValueError, match=f"validation_size must lie in .*1437.* got {size}"):
        load_digits_images(size)
