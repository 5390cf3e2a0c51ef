"""The example of a language model on digits, and on a data set of tokens: two steps of it."""

import json
from pathlib import Path
from typing import Any

import language_model
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoProcessor

import hf_vq
from hf_vq.token_data import TokenDescription
from token_files import write_token_data

TINY: dict[str, Any] = {"codebook_size": 16, "hidden_channels": [8], "residual_channels": 8, "num_residual_blocks": 1}


def save_tokenizer(folder: Path, num_channels: int) -> Any:
    """Of 8x8 pictures: 4x4 tokens of 16 codes."""
    torch.manual_seed(0)
    config = hf_vq.SQVAEConfig(image_size=8, num_channels=num_channels, **TINY)
    tokenizer = hf_vq.ImageTokenizer(hf_vq.SQVAEModel(config).eval(), hf_vq.VQImageProcessor.for_config(config))
    tokenizer.save_pretrained(folder)
    return tokenizer


def run(tmp_path: Path, **settings: Any) -> dict[str, float]:
    usual: dict[str, Any] = {"image_tokenizer": tmp_path / "tok", "output_dir": tmp_path / "out", "max_steps": 2}
    given = {**usual, "batch_size": 4, "samples": 2, **settings}
    language_model.main([part for name, value in given.items() for part in (f"--{name}", str(value))])
    return json.loads((tmp_path / "out" / "measured.json").read_text())


def test_digits_are_learned_drawn_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    save_tokenizer(tmp_path / "tok", num_channels=1)
    monkeypatch.setattr(language_model, "share_cores", lambda: None)
    found = run(tmp_path)
    assert set(found) == {"test images named right", "of 20 drawn digits, what the caption says"}
    assert all(0 <= share <= 1 for share in found.values())
    assert (tmp_path / "out" / "drawn.png").stat().st_size > 0
    assert "A sequence: a photo of a nine" in capsys.readouterr().out
    bridge, model = (
        AutoProcessor.from_pretrained(tmp_path / "out"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
    )
    assert model.config.image_tokenizer_fingerprint == bridge.image_tokenizer_fingerprint


def test_tokens_that_are_there_take_the_place_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tokenizer = save_tokenizer(tmp_path / "tok", num_channels=3)
    fingerprint = tokenizer.model.fingerprint()
    description = TokenDescription(16, 1, (4, 4), tokenizer_fingerprint=fingerprint)
    write_token_data(tmp_path / "tokens", description)
    monkeypatch.setattr(language_model, "share_cores", lambda: None)
    found = run(tmp_path, dataset_name=tmp_path / "tokens", samples=1)
    assert set(found) == {"test images named right"}
    assert AutoProcessor.from_pretrained(tmp_path / "out").layout.codebook_size == 16


def test_who_has_no_tokenizer_yet_is_told_how_to_make_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        language_model.main([])
    assert "accelerate launch training/train.py makes it" in capsys.readouterr().err
