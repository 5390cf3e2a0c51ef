"""`train.py --push_to_hub`: from training to a fresh process that loads by name."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recipes import TRAIN, flags, settings_of

from hub_server import HubServer

DIGITS = {"dataset_name": "digits", "push_to_hub": True, "max_train_steps": 4, "checkpointing_steps": 4}
PRIOR = {"hidden_size": 16, "num_hidden_layers": 1}

PULL = """
import sys
import hf_vq
from transformers import AutoModelForCausalLM, pipeline

tok = hf_vq.ImageTokenizer.from_pretrained(sys.argv[1])
print(tok.verify())
pipe = pipeline("unconditional-image-generation", model=sys.argv[2])
images = pipe(class_labels=[0, 9])
config = AutoModelForCausalLM.from_pretrained(sys.argv[2]).config
print(config.tokenizer_name_or_path, config.tokenizer_revision, [image.size for image in images])
"""


@pytest.fixture
def push(hub_environment: dict[str, str], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs train.py with these settings in a process that speaks to the Hub."""

    def run(name: str, config: dict[str, Any] | None = None, **settings: Any) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, str(TRAIN), *flags(tmp_path / name, **(DIGITS | settings))]
        if config is not None:
            words[words.index("--config_overrides") + 1] = str(config)
        return subprocess.run(words, env=hub_environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)

    return run


def test_a_tokenizer_and_its_prior_from_training_to_a_fresh_process(
    hub: HubServer, push: Callable[..., Any], run_with_hub: Callable[..., str], tmp_path: Path
):
    pushed = push("tok", hub_model_id="org/tok", hub_license="mit")
    assert pushed.returncode == 0, pushed.stderr
    head = hub.repositories["org/tok"].head()
    assert f"commit {head.oid}" in pushed.stdout
    assert {"README.md", "evaluation.json", "reference_tokens.safetensors", "pictures/reconstructions.png"} <= set(
        head.files
    )
    of_prior = {"task": "prior", "config": PRIOR, "tokenizer_name_or_path": tmp_path / "tok"}
    pushed = push("prior", hub_model_id="org/prior", tokenizer_repo_id="org/tok", **of_prior)
    assert pushed.returncode == 0, pushed.stderr
    assert run_with_hub(PULL, "org/tok", "org/prior") == (
        f"all 2,048 tokens are the published ones\norg/tok {head.oid} [(32, 32), (32, 32)]\n"
    )
    assert "pictures/samples.png" in hub.repositories["org/prior"].head().files
    assert hub.token not in (tmp_path / "tok" / "run.yaml").read_text()


def test_what_stands_in_the_way_shows_before_the_training(hub: HubServer, push: Callable[..., Any], tmp_path: Path):
    push("tok", hub_model_id="org/tok")
    of_prior = {"task": "prior", "config": PRIOR, "tokenizer_name_or_path": tmp_path / "tok"}
    refused = push("prior", hub_model_id="org/prior", **of_prior)
    assert refused.returncode != 0 and "where nobody else finds it" in refused.stderr
    assert not (tmp_path / "prior").exists() and "org/prior" not in hub.repositories
    refused = push("again", hub_model_id="org/again", hub_token=hub.strangers_token)
    assert refused.returncode != 0 and not (tmp_path / "again").exists()


def test_a_run_is_its_own_recipe(push: Callable[..., Any], hub_environment: dict[str, str], tmp_path: Path):
    """run.yaml, which the card names, is taken by --config."""
    push("first", push_to_hub=False)
    words = ["--config", str(tmp_path / "first" / "run.yaml"), "--output_dir", str(tmp_path / "second")]
    ran = subprocess.run([sys.executable, str(TRAIN), *words], env=hub_environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    first, second = (settings_of(tmp_path / name) for name in ("first", "second"))
    assert first | {"output_dir": ""} == second | {"output_dir": ""}
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]
