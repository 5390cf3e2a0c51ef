"""The warning of a codebook that collapses: when it comes, what it says, and that transformers' Trainer gives it."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

import hf_vq
from hf_vq.code_health import collapse_warning

TINY = {"image_size": 8, "num_channels": 1, "hidden_channels": [8], "residual_channels": 8, "num_residual_blocks": 1}


def counts_of(*used: int, codebook_size: int = 64) -> torch.Tensor:
    """Counts (M, K) in which the first codes of each codebook occur equally often: the perplexity is their number."""
    return torch.stack([(torch.arange(codebook_size) < number).long() * 7 for number in used])


@pytest.mark.parametrize(
    ("used", "below", "warned"),
    [((6,), 0.1, True), ((7,), 0.1, False), ((1,), 0.0, False), ((63,), 1.0, True), ((64, 3), 0.1, True)],
    ids=["under", "over", "never", "all", "one-codebook"],
)
def test_it_comes_under_the_share(used: tuple[int, ...], below: float, warned: bool):
    assert (collapse_warning(counts_of(*used), hf_vq.VQVAEConfig(), below) is not None) == warned


def test_it_says_the_numbers_and_the_ways_out():
    counts = counts_of(60, 3)
    counts[1, 0] = 10**9
    warning = collapse_warning(counts, hf_vq.VQVAEConfig(quantizer="ema"), 0.25)
    for part in ("perplexity of codebook 1 is 1,", "under 0.25 x 64 codes, of which 3 occur", "index collapse"):
        assert part in warning
    for way in ("codebook_init: kmeans", "revive_below: 0.1", "hf_sqvae"):
        assert way in warning


@pytest.mark.parametrize(
    ("config", "proposed", "kept_quiet"),
    [
        (hf_vq.VQVAEConfig(codebook_init="kmeans"), ["revive_below"], ["kmeans"]),
        (hf_vq.VQVAEConfig(codebook_init="kmeans", revive_below=0.1), ["hf_sqvae"], ["kmeans", "revive_below"]),
        (
            hf_vq.VQVAEConfig(quantizer="gradient", codebook_transform="linear"),
            ["hf_sqvae"],
            ["kmeans", "revive_below"],
        ),
        (hf_vq.VQVAEConfig(quantizer="fsq", levels=[8, 8]), ["fewer levels"], ["kmeans", "revive_below"]),
        (hf_vq.SQVAEConfig(), ["initial_variance", "temperature"], ["kmeans", "revive_below", "hf_sqvae"]),
    ],
    ids=["kmeans", "kmeans-revival", "linear", "fsq", "sqvae"],
)
def test_it_proposes_what_the_config_can_take_and_has_not(config: Any, proposed: list[str], kept_quiet: list[str]):
    warning = collapse_warning(counts_of(1), config)
    assert all(word in warning for word in proposed) and not any(word in warning for word in kept_quiet)


class Recorder(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def warnings_of_the_callback() -> Any:
    # transformers keeps its loggers from the root, where caplog listens.
    recorder, logger = Recorder(), logging.getLogger("hf_vq.callbacks")
    logger.addHandler(recorder)
    yield recorder.messages
    logger.removeHandler(recorder)


def train_with_trainer(model: Any, folder: Path, **settings: Any) -> None:
    """Four steps on noise, with an evaluation after every second."""
    images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    data = Dataset.from_dict({"pixel_values": images.tolist()}).with_format("torch")
    arguments = TrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=4, eval_strategy="steps", eval_steps=2, use_cpu=True,
        save_strategy="no", report_to="none", disable_tqdm=True, prediction_loss_only=True, learning_rate=0.0,
    )  # fmt: skip
    callback = hf_vq.QuantizerCallback(**settings)
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data, callbacks=[callback])
    trainer.train()
    trainer.evaluate()  # after training nobody counts, and nobody warns


@pytest.mark.parametrize("below", [1.0, 0.0], ids=["warn", "never"])
def test_trainer_warns_once_for_each_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings_of_the_callback: list[str], below: float
):
    torch.manual_seed(0)
    judged: list[torch.Tensor] = []

    def judge(code_counts: torch.Tensor, *rest: Any) -> str | None:
        judged.append(code_counts)
        return collapse_warning(code_counts, *rest)

    monkeypatch.setattr("hf_vq.callbacks.collapse_warning", judge)
    model = hf_vq.VQVAEModel(hf_vq.VQVAEConfig(codebook_size=64, **TINY))
    seen = []
    handle = model.quantizer.register_forward_hook(
        lambda module, _, output: None if module.training else seen.append(output.image_tokens.flatten())
    )
    train_with_trainer(model, tmp_path, warn_perplexity_below=below)
    handle.remove()
    assert [line.split(":")[0] for line in warnings_of_the_callback] == (["step 2", "step 4"] if below else [])
    assert len(seen) == 3 and len(model.quantizer._forward_hooks) == 0
    # Each evaluation is judged by its own tokens, and by none of those that were trained on.
    expected = [torch.bincount(tokens, minlength=64)[None] for tokens in seen[:2]]
    assert [counts.tolist() for counts in judged] == [counts.tolist() for counts in expected]
    if below:
        assert f"of which {len(seen[1].unique())} occur" in warnings_of_the_callback[1]
