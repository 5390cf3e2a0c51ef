"""Every model in model_cards/ loads, is the one that was measured, and keeps its numbers on real images."""

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import token_equality
import torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, pipeline

import hf_vq
import results
import short_runs
from hf_vq.evaluation import evaluate, weights_hash
from hf_vq.models.prior_tokenizer import load_tokenizer
from hf_vq.streams import EvaluationBatches, ToPixelValues, load_images
from result_rows import Run, prior_row, tokenizer_row

MODEL_CARDS = Path(__file__).parent.parent / "model_cards"
CARDS = {path.parent.name: path.parent for path in sorted(MODEL_CARDS.glob("*/config.json"))}
CONFIGS = {name: json.loads((card / "config.json").read_text(encoding="utf-8")) for name, card in CARDS.items()}
PRIORS = [name for name, config in CONFIGS.items() if "tokenizer_fingerprint" in config]
TOKENIZERS = [name for name in CARDS if name not in PRIORS]
OF_TOKENIZERS = {"psnr", "psnr_of_mse", "ssim", "perplexity", "usage", "split", "protocol"}
OF_PRIORS = {"bits_per_token", "token_entropy", "position_entropy", "bits_per_dim", "split", "protocol"}
CODE = Path(hf_vq.models.__file__).parent
MIB = 2**20


def measured(card: Path) -> dict[str, Any]:
    """The numbers that lie beside a model."""
    evaluation: dict[str, Any] = json.loads((card / "evaluation.json").read_text(encoding="utf-8"))
    return evaluation


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_is_the_one_that_was_measured(name: str):
    tok = hf_vq.ImageTokenizer.from_pretrained(CARDS[name])
    evaluation = measured(CARDS[name])
    assert weights_hash(tok.model) == evaluation["weights_sha256"]
    assert tok.model.fingerprint() == evaluation["fingerprint"]
    assert evaluation.keys() >= OF_TOKENIZERS and evaluation["num_images"] == 10_000
    refined = CARDS[name] / "evaluation-refined.json"
    if refined.exists():
        numbers = json.loads(refined.read_text(encoding="utf-8"))
        assert numbers["weights_sha256"] == evaluation["weights_sha256"] and numbers["num_images"] == 10_000
        assert numbers["psnr"] > evaluation["psnr"]
    verification = tok.verify()
    assert verification.num_tokens > 0 and verification.share_differing <= 0.01
    assert verification.largest_margin < 1e-3


@pytest.mark.parametrize("name", PRIORS)
def test_a_prior_is_the_one_that_was_measured_and_finds_its_tokenizer(name: str):
    prior = AutoModelForCausalLM.from_pretrained(CARDS[name])
    evaluation = measured(CARDS[name])
    assert weights_hash(prior) == evaluation["weights_sha256"]
    assert evaluation.keys() >= OF_PRIORS and evaluation["num_images"] == 10_000
    tokenizer, _ = load_tokenizer(prior.config)
    assert weights_hash(tokenizer) == evaluation["tokenizer_weights_sha256"]
    pipe = pipeline("unconditional-image-generation", model=str(CARDS[name]))
    assert pipe(class_labels=[0])[0].size == (tokenizer.config.image_size,) * 2


def test_the_folders_are_small_and_whole():
    sizes = {name: sum(path.stat().st_size for path in card.rglob("*")) for name, card in CARDS.items()}
    assert max(sizes.values()) <= 10 * MIB and sum(sizes.values()) <= 30 * MIB
    for card in CARDS.values():
        assert {"README.md", "run.yaml", "metrics.jsonl", "pictures"} <= {path.name for path in card.iterdir()}


@pytest.mark.parametrize("name", CARDS)
def test_a_folder_loads_with_its_own_code_which_is_the_packages(name: str):
    code = sorted(CARDS[name].glob("*.py"))
    assert code and all(file.is_symlink() and file.resolve() == CODE / file.name for file in code)
    auto = "AutoModelForCausalLM" if name in PRIORS else "AutoModel"
    lines = ["import sys; sys.modules['hf_vq'] = None", f"from transformers import {auto}"]
    lines += [f"print(type({auto}.from_pretrained({str(CARDS[name])!r}, trust_remote_code=True)).__module__)"]
    finished = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert finished.stdout.startswith("transformers_modules.")


@pytest.mark.parametrize("name", CARDS)
def test_the_table_of_results_says_what_the_folder_says(name: str):
    run = Run.read(CARDS[name])
    cells = prior_row([run]) if run.is_prior else tokenizer_row([run])
    assert results.printed_row(results.RESULTS, name) == {head: cell.strip() for head, cell in cells.items()}
    if run.refined:
        cells = tokenizer_row([run.refined])
        assert results.printed_row(results.RESULTS, run.refined.name) == {h: cell.strip() for h, cell in cells.items()}


def test_the_cifar10_tokenizer_keeps_its_numbers(shared_data: Path):
    card = CARDS["sqvae-cifar10"]
    model, processor = AutoModel.from_pretrained(card), AutoImageProcessor.from_pretrained(card)
    test = load_images(str(shared_data / "cifar10"), streaming=True, validation_size=0).test
    batches = EvaluationBatches(test, ToPixelValues(processor), 250)
    metrics = evaluate(model, processor, islice(batches, 4)).metrics
    whole = measured(card)
    # A thousand images stand for ten thousand: the deviation of psnr over images is about 3 dB.
    assert metrics["psnr"] == pytest.approx(whole["psnr"], abs=0.3)
    assert metrics["perplexity"] == pytest.approx(whole["perplexity"], rel=0.05)


def test_refined_tokens_of_real_images_are_better_and_the_same_in_any_batch(shared_data: Path):
    tok = hf_vq.ImageTokenizer.from_pretrained(CARDS["sqvae-cifar10"])
    test = load_images(str(shared_data / "cifar10"), streaming=True, validation_size=0).test
    batches = list(islice(EvaluationBatches(test, ToPixelValues(tok.processor), 32), 2))
    plain, refined = (evaluate(tok.model, tok.processor, batches, refine=rounds).metrics for rounds in (0, 2))
    assert refined["psnr"] > plain["psnr"] + 0.3
    pixel_values = batches[0]["pixel_values"]
    together, alone = (tok.model.encode(part, refine=2).image_tokens for part in (pixel_values, pixel_values[:1]))
    assert (together[:1] != alone).sum() <= 1


def test_the_cifar10_tokenizer_gives_the_same_tokens_in_any_batch_on_any_number_of_threads(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(short_runs, "PIXELS_DIR", tmp_path)
    card = CARDS["sqvae-cifar10"]
    try:
        token_equality.main([str(card), "--dataset_name", str(shared_data / "cifar10"), "--limit", "100"])
    finally:
        torch.set_num_threads(1)
    table = capsys.readouterr().out
    assert all(f"| {way} | 6,400 | " in table for way in ("2 | 256", "1 | 1", "2 | 1"))
