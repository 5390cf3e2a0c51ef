"""A classifier of real images reads images, reconstructions and samples; it is trained once."""

import json
from pathlib import Path
from typing import Any

import class_accuracy
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

import hf_vq
import short_runs

CLASSES = ["dark", "light"]
FEATURES = Features({"image": Image(), "label": ClassLabel(names=CLASSES)})


def pictures(count: int, seed: int) -> Dataset:
    """Noise, dark or light: what any classifier can tell apart."""
    generator = np.random.default_rng(seed)
    labels = [row % 2 for row in range(count)]
    cells = [
        PILImage.fromarray(generator.integers(128 * label, 128 * label + 127, (8, 8, 3), dtype=np.uint8))
        for label in labels
    ]
    return Dataset.from_dict({"image": cells, "label": labels}, features=FEATURES)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A labelled data set of 8x8 pictures, and a short training on it."""
    for split, count in (("train", 256), ("test", 40)):
        (tmp_path / "data").mkdir(exist_ok=True)
        pictures(count, seed=count).to_parquet(tmp_path / "data" / f"{split}-00000.parquet")
    monkeypatch.setattr(short_runs, "PIXELS_DIR", tmp_path / "pixels")
    for name, value in {"BATCH_SIZE": 16, "EPOCHS": 12, "WIDTHS": (4, 8)}.items():
        monkeypatch.setattr(class_accuracy, name, value)
    return tmp_path / "data"


def save_models(folder: Path) -> tuple[str, str]:
    """A tokenizer and a prior over its tokens."""
    tiny: dict[str, Any] = {"codebook_size": 16, "hidden_channels": [8], "residual_channels": 8}
    config = hf_vq.VQVAEConfig(image_size=8, num_residual_blocks=1, **tiny)
    model = hf_vq.VQVAEModel(config)
    hf_vq.ImageTokenizer(model, hf_vq.VQImageProcessor.for_config(config)).save_pretrained(folder / "tok")
    of_prior: dict[str, Any] = {"codebook_size": 16, "grid_size": 4, "num_classes": 2, "hidden_size": 16}
    prior = hf_vq.TransformerPrior(hf_vq.TransformerPriorConfig(num_hidden_layers=1, **of_prior))
    prior.save_pretrained(folder / "prior")
    return str(folder / "tok"), str(folder / "prior")


def test_everything_is_read_and_the_classifier_is_trained_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    tokenizer, prior = save_models(tmp_path)
    output = tmp_path / "output"
    options = ["--dataset_name", str(data), "--output_dir", str(output), "--samples", "3"]
    class_accuracy.main([tokenizer, "--prior", prior, "--guidance_scale", "1", "2", *options])
    told = json.loads((output / "accuracy.json").read_text())
    first = {what: share["accuracy"] for what, share in told["read"].items()}
    assert told["read"]["samples, guidance 2"]["num_images"] == 6 and told["prior"] == prior
    assert first.keys() == {"test images", "their reconstructions", "samples, guidance 1", "samples, guidance 2"}
    assert first["test images"] > 0.9 and all(0 <= share <= 1 for share in first.values())
    assert "| test images | " in capsys.readouterr().out

    monkeypatch.delattr(class_accuracy, "train_classifier")
    class_accuracy.main([tokenizer, *options])
    again = json.loads((output / "accuracy.json").read_text())["read"]
    assert again["test images"]["accuracy"] == first["test images"]


def test_pictures_in_folders_keep_their_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(short_runs, "PIXELS_DIR", tmp_path / "pixels")
    for label, name in enumerate(CLASSES):
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        for number in range(3):
            PILImage.new("RGB", (8, 8), (200 * label,) * 3).save(tmp_path / "data" / "train" / name / f"{number}.png")
    pixels = short_runs.load_pixels(str(tmp_path / "data"), "train")
    labels, names = class_accuracy.load_labels(str(tmp_path / "data"), "train")
    assert names == CLASSES and torch.equal(labels, pixels[:, 0, 0, 0] // 200) and labels.sum() == 3


def test_the_standard_error_is_that_of_a_share():
    assert class_accuracy.Share(0.5, 100).standard_error == pytest.approx(0.05)


def test_each_image_moves_by_itself_and_none_by_more_than_the_padding():
    point = torch.zeros(64, 1, 16, 16, dtype=torch.uint8)
    point[:, :, 8, 4] = 255
    moved = class_accuracy.moved(point, torch.Generator().manual_seed(0))
    assert moved.shape == point.shape and moved.dtype == torch.uint8
    _, _, rows, columns = moved.nonzero(as_tuple=True)
    assert len(rows) == 64 and set(rows.tolist()) == set(range(4, 13))
    assert set(columns.tolist()) == set(range(0, 9)) | set(range(7, 16))  # where it was, and its mirror image
