"""The README's code runs as it stands, from an installed wheel."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

import hf_vq
from corpora import make_tokenizer
from hf_vq.publishing import publish
from hf_vq.reference_tokens import save_reference_tokens
from test_docs import leave_models_and_pictures

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


def test_image_tokens_go_into_a_language_model(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    leave_models_and_pictures(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {name: Image.open(f"{name}.png") for name in ("cat", "dog")}
    exec(block(repository, "bridge"), names)
    names["loss"].backward()
    assert len(names["bridge"].layout.spans(names["batch"]["input_ids"][0].tolist())) == 1


def test_the_quick_start(repository: Path, site: Path, tmp_path: Path):
    (tmp_path / "model_cards").symlink_to(repository / "model_cards")
    Image.effect_noise((50, 40), 80).convert("RGB").save(tmp_path / "photo.jpg")
    shown = "\nprint(len(ids), max(ids) < 512, image.size)"
    assert run_python(block(repository, "quick start") + shown, tmp_path, PYTHONPATH=str(site)) == "64 True (32, 32)\n"


@pytest.fixture
def published(hub_api: HfApi, tmp_path: Path) -> str:
    """A tokenizer on the Hub, by the README's name."""
    tok = make_tokenizer()
    tok.save_pretrained(tmp_path / "run")
    images = torch.randint(0, 256, (32, 3, 8, 8), dtype=torch.uint8)
    save_reference_tokens(tmp_path / "run", tok.model, tok.processor, images)
    publish(tmp_path / "run", "org/sqvae-digits")
    return "org/sqvae-digits"


def test_by_name_from_the_hub(
    repository: Path, site: Path, tmp_path: Path, published: str, hub_environment: dict[str, str]
):
    code = block(repository, "by name")
    environment = hub_environment | {"PYTHONPATH": str(site)}
    assert run_python(code, tmp_path, **environment) == "all 128 tokens are the published ones\n"
    dataset = "from datasets import Dataset\nfrom PIL import Image\n"
    dataset += "dataset = Dataset.from_dict({'image': [Image.new('RGB', (9, 9), c) for c in ('red', 'blue')]})\n"
    shown = "\nprint(tokens.column_names, [len(ids) for ids in tokens['image_tokens']])"
    mapped = run_python(code + dataset + block(repository, "map") + shown, tmp_path, **environment)
    assert mapped.splitlines()[-1] == "['image_tokens'] [4, 4]"


def test_remote_code_needs_only_transformers_torch_and_pillow(
    repository: Path, tmp_path: Path, published: str, hub_environment: dict[str, str]
):
    """In an environment that holds these three and what they require, and nothing else."""
    link_packages(tmp_path / "packages", {"transformers", "torch", "pillow"})
    code = f"import sys\nsys.path.append({str(tmp_path / 'packages')!r})\n" + block(repository, "remote code")
    code += """
import importlib.util
from PIL import Image
absent = [name for name in ("hf_vq", "datasets", "accelerate", "pyarrow") if importlib.util.find_spec(name) is None]
image_tokens = model.encode(processor(Image.new("RGB", (9, 9)), return_tensors="pt").pixel_values).image_tokens
print(absent, tuple(image_tokens.shape))
"""
    shown = run_python(code, tmp_path, "-I", "-S", **hub_environment)
    assert shown == "['hf_vq', 'datasets', 'accelerate', 'pyarrow'] (1, 2, 2)\n"


def run_python(code: str, folder: Path, *flags: str, **environment: str) -> str:
    """What code prints, run in a folder."""
    ran = subprocess.run(
        [sys.executable, *flags, "-c", code], cwd=folder, env=os.environ | environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def link_packages(folder: Path, names: set[str]) -> None:
    """Links to installed distributions and, without extras, to all that they require."""
    folder.mkdir()
    seen: set[str] = set()
    while names:
        name = names.pop()
        seen.add(name)
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(distribution.locate_file(top))
        for requirement in map(Requirement, distribution.requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                names |= {canonicalize_name(requirement.name)} - seen
