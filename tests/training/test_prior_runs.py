"""Stage 2 by `train.py`: from images and from their tokens, killed and resumed, and with a decoder of its own."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import TINY, assert_same_run, config_of, flags, log_of, run, train, write_parquet
from transformers import AutoModelForCausalLM, pipeline

import hf_vq
from hf_vq.token_data import TokenDescription
from token_files import write_token_data

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "dropout": 0.1}
CODES = TINY["codebook_size"]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A folder with a tokenizer of 8x8 pictures in colour: 4x4 tokens of 16 codes."""
    return save_tokenizer(tmp_path / "tok")


def save_tokenizer(folder: Path, seed: int = 0, **fields: Any) -> Path:
    torch.manual_seed(seed)
    config = hf_vq.SQVAEConfig(image_size=8, **TINY, **fields)
    processor = hf_vq.VQImageProcessor.for_config(config)
    hf_vq.ImageTokenizer(hf_vq.SQVAEModel(config), processor).save_pretrained(folder)
    return folder


def of_prior(tokenizer: Path, **settings: Any) -> dict[str, Any]:
    """Settings of a prior over the tokens of a tokenizer."""
    plain = {"task": "prior", "tokenizer_name_or_path": tokenizer, "config_overrides": SMALL, "streaming": True}
    return {**plain, "validation_size": 5, **settings}


def describe(tokenizer: Path, **changes: Any) -> TokenDescription:
    model = hf_vq.SQVAEModel.from_pretrained(tokenizer)
    facts = {"codebook_size": CODES, "num_codebooks": 1, "grid_size": (4, 4), "tokenizer_name_or_path": "org/tok"}
    return TokenDescription(**{**facts, "tokenizer_fingerprint": model.fingerprint(), **changes})


def check(tmp_path: Path, processes: int = 1, **settings: Any) -> Path:
    """Trains with and without a kill, compares, and returns the folder of the uninterrupted run."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(whole, processes=processes, **settings)
    assert run(flags(killed, **settings), processes=processes, kill_at=7).status == -signal.SIGKILL
    train(killed, processes=processes, resume_from_checkpoint="latest", **settings)
    assert_same_run(whole, killed)
    return whole


@pytest.mark.parametrize("model_type", ["hf_vq_transformer_prior", "hf_vq_pixelcnn"])
def test_killed_and_resumed_on_images(tmp_path: Path, tokenizer: Path, model_type: str):
    write_parquet(tmp_path / "data")
    settings = of_prior(tokenizer, dataset_name=tmp_path / "data", model_type=model_type)
    whole = check(tmp_path, **settings)
    assert config_of(whole)["num_classes"] == 0
    last = log_of(whole)[-1]
    assert {"eval_bits_per_token", "eval_bits_per_dim", "eval_token_entropy"} < set(last)
    assert (whole / "pictures" / "step-000010-samples.png").exists()
    measured = json.loads((whole / "evaluation.json").read_text())
    assert 0 < measured["bits_per_token"] < 6 and measured["bits_per_dim"] > 0
    assert measured["tokenizer_fingerprint"] == hf_vq.SQVAEModel.from_pretrained(tokenizer).fingerprint()


@pytest.mark.parametrize("workers", [0, 2], ids=["no_workers", "two_workers"])
def test_killed_and_resumed_on_tokens(tmp_path: Path, tokenizer: Path, workers: int):
    write_token_data(tmp_path / "data", describe(tokenizer))
    settings = of_prior(tokenizer, dataset_name=tmp_path / "data", dataloader_num_workers=workers)
    whole = check(tmp_path, **settings)
    assert config_of(whole)["num_classes"] == 3
    last = log_of(whole)[-1]
    assert {"eval_bits_per_token", "eval_bits_per_token_of_class"} < set(last) and "eval_bits_per_dim" not in last
    assert json.loads((whole / "evaluation.json").read_text())["bits_per_dim"] is None


def test_killed_and_resumed_in_two_processes(tmp_path: Path, tokenizer: Path):
    write_token_data(tmp_path / "data", describe(tokenizer))
    check(tmp_path, processes=2, **of_prior(tokenizer, dataset_name=tmp_path / "data", gradient_accumulation_steps=2))


def test_a_table_of_tokens_of_several_codebooks(tmp_path: Path):
    tokenizer = save_tokenizer(tmp_path / "tok", num_codebooks=2)
    write_token_data(tmp_path / "data", describe(tokenizer, num_codebooks=2))
    train(tmp_path / "run", **of_prior(tokenizer, dataset_name=tmp_path / "data", streaming=None, validation_size=5))
    prior = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert prior.image_tokens(prior.generate(class_labels=[0])).shape == (1, 4, 4, 2)


def test_the_prior_finds_its_tokenizer_from_anywhere(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch):
    write_parquet(tmp_path / "data")
    train(tmp_path / "run", **of_prior(tokenizer, dataset_name=tmp_path / "data", max_train_steps=2))
    assert config_of(tmp_path / "run")["tokenizer_name_or_path"] == "../tok"
    monkeypatch.chdir("/")
    (image,) = pipeline("unconditional-image-generation", model=str(tmp_path / "run"), device="cpu")()
    assert image.size == (8, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_fingerprint": "0" * 64}, r"made by the tokenizer org/tok, and \S*/tok is another: fingerprint 00"),
        ({"codebook_size": 15}, "codebook_size 15 there and 16 here"),
        ({"grid_size": (2, 2)}, r"grid_size \[2, 2\] there and \[4, 4\] here"),
        ({"grid_size": None}, "grids of several sizes"),
    ],
    ids=["fingerprint", "codes", "grid", "grids"],
)
def test_tokens_of_another_tokenizer_are_refused(
    tmp_path: Path, tokenizer: Path, changes: dict[str, Any], message: str
):
    write_token_data(tmp_path / "data", describe(tokenizer, **changes))
    finished = run(flags(tmp_path / "run", **of_prior(tokenizer, dataset_name=tmp_path / "data")))
    assert finished.status == 1 and "Traceback" not in finished.output
    assert re.search(message, finished.output), finished.output


def test_a_decoder_of_its_own_leaves_the_tokens(tmp_path: Path, tokenizer: Path):
    write_parquet(tmp_path / "data")
    settings = {"dataset_name": tmp_path / "data", "streaming": True, "validation_size": 5, "train_only": "decoder"}
    mixture = {"observation": "logistic_mixture", "num_mixtures": 2}
    (tokenizer / "run.yaml").write_text("seed: 5\n")
    train(tmp_path / "run", model_name_or_path=tokenizer, **settings | {"config_overrides": mixture})
    before, after = (hf_vq.SQVAEModel.from_pretrained(folder) for folder in (tokenizer, tmp_path / "run"))
    assert after.fingerprint() == before.fingerprint() and after.config.observation == "logistic_mixture"
    pixels = torch.rand(2, 3, 8, 8) * 2 - 1
    assert torch.equal(after.encode(pixels).image_tokens, before.encode(pixels).image_tokens)
    assert (tmp_path / "run" / "started_from" / "run.yaml").read_text() == "seed: 5\n"
    assert not torch.equal(after.decoder.from_latents[0].weight, before.decoder.from_latents[0].weight)


def test_what_would_change_the_tokens_is_refused(tmp_path: Path, tokenizer: Path):
    write_parquet(tmp_path / "data")
    settings = {"dataset_name": tmp_path / "data", "train_only": "decoder", "model_name_or_path": tokenizer}
    finished = run(flags(tmp_path / "run", **settings, config_overrides={"codebook_size": 8}))
    assert finished.status == 1 and "Traceback" not in finished.output
    assert "train_only decoder leaves the tokens as they are" in finished.output


# Fine-tuning, and where the tokenizer lies.


@pytest.fixture
def trained(tmp_path: Path, tokenizer: Path) -> Path:
    """A prior of three classes, after two steps on tokens."""
    write_token_data(tmp_path / "tokens", describe(tokenizer))
    train(tmp_path / "trained", **of_prior(tokenizer, dataset_name=tmp_path / "tokens", max_train_steps=2))
    return tmp_path / "trained"


def test_the_class_names_stay_with_the_prior(trained: Path):
    assert config_of(trained)["id2label"] == {"0": "cat", "1": "dog", "2": "fish"}


def test_fine_tuned_on_images_without_labels(tmp_path: Path, tokenizer: Path, trained: Path):
    write_parquet(tmp_path / "data")
    (tmp_path / "deep").mkdir()
    settings = of_prior(tokenizer, dataset_name=tmp_path / "data", max_train_steps=2, config_overrides=None)
    train(tmp_path / "deep" / "run", model_name_or_path=trained, **settings)
    config = config_of(tmp_path / "deep" / "run")
    assert config["num_classes"] == 3 and config["tokenizer_name_or_path"] == "../../tok"
    assert pipeline("unconditional-image-generation", model=str(tmp_path / "deep" / "run"), device="cpu")("cat")


def test_data_of_other_classes_are_refused(tmp_path: Path, tokenizer: Path):
    write_parquet(tmp_path / "data")
    train(tmp_path / "plain", **of_prior(tokenizer, dataset_name=tmp_path / "data", max_train_steps=2))
    write_token_data(tmp_path / "tokens", describe(tokenizer))
    settings = of_prior(tokenizer, dataset_name=tmp_path / "tokens", max_train_steps=2, config_overrides=None)
    finished = run(flags(tmp_path / "run", model_name_or_path=tmp_path / "plain", **settings))
    assert finished.status == 1 and "Traceback" not in finished.output
    assert "the prior has num_classes 0, and 'label' of the data has 3" in finished.output
    train(tmp_path / "run", model_name_or_path=tmp_path / "plain", label_column="none", **settings)


def test_a_tokenizer_in_a_hidden_folder_is_found(tmp_path: Path):
    tokenizer = save_tokenizer(tmp_path / "run" / ".tok")
    write_parquet(tmp_path / "data")
    train(tmp_path / "run", **of_prior(tokenizer, dataset_name=tmp_path / "data", max_train_steps=2))
    assert config_of(tmp_path / "run")["tokenizer_name_or_path"] == "./.tok"
    assert pipeline("unconditional-image-generation", model=str(tmp_path / "run"), device="cpu")()
