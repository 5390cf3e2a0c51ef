"""Every model in model_cards/ loads, is the one that was measured, and keeps its numbers on real images."""

import json
from itertools import islice
from pathlib import Path

import pytest
import token_equality
import torch
from transformers import AutoImageProcessor, AutoModel

import hf_vq
import short_runs
from hf_vq.evaluation import evaluate
from hf_vq.streams import EvaluationBatches, ToPixelValues, load_images

CARDS = sorted(path.parent for path in (Path(__file__).parent.parent / "model_cards").glob("*/config.json"))


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_card_holds_the_model_that_was_measured(card: Path):
    model, processor = AutoModel.from_pretrained(card), AutoImageProcessor.from_pretrained(card)
    measured = json.loads((card / "evaluation.json").read_text(encoding="utf-8"))
    assert model.fingerprint() == measured["fingerprint"]
    assert type(processor) is hf_vq.VQImageProcessor
    assert {"psnr", "psnr_of_mse", "ssim", "perplexity", "usage", "split", "protocol"} <= measured.keys()


def test_the_cifar10_tokenizer_keeps_its_numbers(shared_data: Path):
    card = CARDS[[card.name for card in CARDS].index("sqvae-cifar10")]
    model, processor = AutoModel.from_pretrained(card), AutoImageProcessor.from_pretrained(card)
    test = load_images(str(shared_data / "cifar10"), streaming=True, validation_size=0).test
    batches = EvaluationBatches(test, ToPixelValues(processor), 250)
    metrics = evaluate(model, processor, islice(batches, 4)).metrics
    measured = json.loads((card / "evaluation.json").read_text(encoding="utf-8"))
    # A thousand images stand for ten thousand: the deviation of psnr over images is about 3 dB.
    assert metrics["psnr"] == pytest.approx(measured["psnr"], abs=0.3)
    assert metrics["perplexity"] > 330


def test_the_cifar10_tokenizer_gives_the_same_tokens_in_any_batch_on_any_number_of_threads(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(short_runs, "PIXELS_DIR", tmp_path)
    card = CARDS[[card.name for card in CARDS].index("sqvae-cifar10")]
    try:
        token_equality.main([str(card), "--dataset_name", str(shared_data / "cifar10"), "--limit", "100"])
    finally:
        torch.set_num_threads(1)
    table = capsys.readouterr().out
    assert all(f"| {way} | 6,400 | " in table for way in ("2 | 256", "1 | 1", "2 | 1"))
