"""The README's code runs as it stands, from an installed wheel."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import hf_vq

pytestmark = pytest.mark.slow

REPORT = """
import json
assert "/site/" in hf_vq.__file__, hf_vq.__file__
print("REPORT", json.dumps([line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]))
"""


def block(repository: Path, name: str) -> str:
    """The fenced code directly below `<!-- test: NAME -->`."""
    text = (repository / "README.md").read_text(encoding="utf-8")
    return re.search(rf"<!-- test: {name} -->\n```python\n(.*?)```", text, re.DOTALL)[1]


@pytest.fixture(scope="session")
def site(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    built = subprocess.run([*pip, "wheel", "--no-deps", "-w", folder, repository], capture_output=True, text=True)
    if built.returncode:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"the wheel cannot be built here:\n{built.stderr}")
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True)
    return folder / "site"


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with digits as `pictures/train` (256, so that no batch is short) and `pictures/test` (64)."""
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("digits")
    for index, image in enumerate(load_digits().images[:320]):
        name = folder / "pictures" / ("test" if index % 5 == 0 else "train") / f"{index:04d}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.rint(image * 255 / 16).astype(np.uint8)).save(name)
    return folder


def run(code: str, site: Path, folder: Path) -> list[float]:
    """Runs code that trains; returns the evaluation losses."""
    environment = os.environ | {"PYTHONPATH": str(site), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code + REPORT]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.split("REPORT")[1])


def test_the_wheel_ships_the_library_alone(site: Path):
    assert (site / "hf_vq" / "py.typed").is_file()
    assert (site / "hf_vq" / "models" / "quantizers.py").is_file()
    assert not any((site / name).exists() for name in ("training", "tests", "engine.py"))


def test_trainer_trains_and_evaluates(repository: Path, site: Path, digits: Path):
    losses = run(block(repository, "trainer"), site, digits)
    assert len(losses) == 3
    assert losses[2] < losses[1] < losses[0]
    assert len(hf_vq.ImageTokenizer.from_pretrained(digits / "vqvae").encode(digits / "pictures/test/0000.png")) == 64


def test_accumulation_in_trainer_equals_the_joint_batch(repository: Path, site: Path, digits: Path):
    # Adam's first steps are the signs of gradients, in which the rounding of a sum can show.
    code = block(repository, "trainer").replace("num_train_epochs=3", 'num_train_epochs=1, optim="sgd"')
    accumulated = code.replace("batch_size=64", "batch_size=16, gradient_accumulation_steps=4")
    assert "sgd" in accumulated != code
    once, four_times = run(code, site, digits), run(accumulated, site, digits)
    assert four_times == pytest.approx(once, rel=1e-5)


@pytest.mark.uninitialised_memory
def test_what_is_exported_gives_the_tokens_of_any_batch(repository: Path):
    model = hf_vq.SQVAEModel(hf_vq.SQVAEConfig(image_size=16, hidden_channels=[8, 8], residual_channels=8))
    names = {"model": model, "pixel_values": torch.rand(2, 3, 16, 16) * 2 - 1}
    exec(block(repository, "export"), names)
    for count in (1, 5):
        pixel_values = torch.rand(count, 3, 16, 16) * 2 - 1
        assert torch.equal(names["program"].module()(pixel_values), model.encode(pixel_values).image_tokens)
