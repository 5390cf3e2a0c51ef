"""The curve of bits per dim: a training of every kind on noise, its table and its picture."""

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

BENCHMARKS = Path(__file__).resolve().parents[2] / "training" / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.insert(0, str(BENCHMARKS))

import bits_per_dim  # noqa: E402  the path comes first

SMALL = {"hidden_channels": [8, 8], "residual_channels": 8, "num_residual_blocks": 1}
PLAN = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3}


@pytest.mark.parametrize("observation", ["gaussian", "logistic_mixture"])
def test_a_training_bounds_what_it_was_measured_on(observation: str, monkeypatch: pytest.MonkeyPatch):
    pixels = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    monkeypatch.setattr(bits_per_dim, "load_pixels", lambda name, split: pixels)
    seen: list[int] = []
    model = {**bits_per_dim.TOKENIZER, **SMALL, "codebook_size": 16, "num_codebooks": 2, "observation": observation}
    numbers = bits_per_dim.train(
        seen.append,
        {"dataset_name": "noise", "limit": 16},
        {"model": model, "plan": PLAN},
        {"model": {"hidden_size": 16, "num_hidden_layers": 1}, "plan": PLAN},
        seed=0,
    )
    assert sum(seen) == 32 and numbers["num_images"] == 16
    assert 2 < numbers["bits_per_token"] < 8
    # Nobody codes noise in fewer than 8 bits a level.
    assert 8 <= numbers["bits_per_dim"] < 12


def test_the_table_and_the_picture(tmp_path: Path):
    numbers = {"bits_per_dim": 5.25, "bits_per_token": 7.5, "token_entropy": 8.75}
    results = dict.fromkeys(bits_per_dim.trainings("org/data", 64), numbers)
    mixtures = [f"logistic_mixture-{codebooks}" for codebooks in (1, 2, 4, 10)]
    assert list(results) == [*mixtures, "gaussian-1", "gaussian-10"]
    text = bits_per_dim.table(results)
    assert "| logistic mixture | 1 | 5.250 | 0.156 | 7.50 | 8.75 |" in text
    assert "| gaussian | 10 | 5.250 | 1.562 | 7.50 | 8.75 |" in text
    bits_per_dim.draw(tmp_path / "curve.png", results)
    with Image.open(tmp_path / "curve.png") as picture:
        assert min(picture.size) > 400
