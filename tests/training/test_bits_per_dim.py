"""The curve of bits per dim: a training of every kind on noise, its table and its picture."""

from pathlib import Path

import bits_per_dim
import pytest
import torch
from PIL import Image

SMALL = {"hidden_channels": [8, 8], "residual_channels": 8, "num_residual_blocks": 1, "codebook_dim": 4}
PLAN = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3}
NUMBERS = {
    "bits_per_dim_mixture": 5.25,
    "bits_per_dim_gaussian": 6.0,
    "bits_per_dim_of_tokens": 0.156,
    "bits_per_token": 7.5,
    "token_entropy": 8.75,
    "psnr": 25.5,
}


def test_a_training_bounds_what_it_was_measured_on(monkeypatch: pytest.MonkeyPatch):
    pixels = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    monkeypatch.setattr(bits_per_dim, "load_pixels", lambda name, split: pixels)
    seen: list[int] = []
    numbers = bits_per_dim.train(
        seen.append,
        {"dataset_name": "noise", "limit": 16},
        {"model": {**bits_per_dim.TOKENIZER, **SMALL, "codebook_size": 16, "num_codebooks": 2}, "plan": PLAN},
        PLAN,
        {"model": {"hidden_size": 16, "num_hidden_layers": 1}, "plan": PLAN},
        seed=0,
    )
    assert sum(seen) == 48 and numbers["num_images"] == 16
    assert 2 < numbers["bits_per_token"] < 8
    assert numbers["bits_per_dim_of_tokens"] == pytest.approx(numbers["bits_per_token"] * 128 / 3072)
    # Nobody codes noise in fewer than 8 bits a level.
    for kind in ("gaussian", "mixture"):
        assert 8 <= numbers[f"bits_per_dim_{kind}"] < 12


def test_the_second_decoder_has_the_same_tokens():
    first = bits_per_dim.VQVAEModel(bits_per_dim.VQVAEConfig(**{**bits_per_dim.TOKENIZER, **SMALL})).eval()
    second = bits_per_dim.with_other_decoder(first, observation="logistic_mixture")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(second.train().encode(images).image_tokens, first.encode(images).image_tokens)
    trained = {name.partition(".")[0] for name, parameter in second.named_parameters() if parameter.requires_grad}
    assert trained == {"decoder"}


def test_the_table_and_the_picture(tmp_path: Path):
    results = dict.fromkeys(bits_per_dim.trainings("org/data", 64), NUMBERS)
    assert list(results) == [f"codebooks-{codebooks}" for codebooks in (1, 2, 4, 10)]
    assert "| 4 | 5.250 | 6.000 | 0.156 | 7.50 | 8.75 | 25.50 |" in bits_per_dim.table(results)
    bits_per_dim.draw(tmp_path / "curve.png", results)
    with Image.open(tmp_path / "curve.png") as picture:
        assert min(picture.size) > 400
