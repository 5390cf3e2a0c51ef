"""QuantizerCallback: what it does to a model's plan, and when it leaves it alone."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments, set_seed

import hf_vq


def begin(model: hf_vq.SQVAEModel, max_steps: int = 500, accumulation: int = 1, n_gpu: int = 1, done: int = 0) -> None:
    arguments = SimpleNamespace(gradient_accumulation_steps=accumulation, n_gpu=n_gpu)
    state = TrainerState(max_steps=max_steps, global_step=done)
    hf_vq.QuantizerCallback().on_train_begin(arguments, state, TrainerControl(), model=model)


def make(**fields) -> hf_vq.SQVAEModel:
    return hf_vq.SQVAEModel(hf_vq.SQVAEConfig(hidden_channels=[8], residual_channels=8, **fields))


def test_a_new_model_anneals_over_the_planned_steps():
    model = make()
    begin(model)
    assert model.quantizer.temperature.decay_steps == model.config.temperature_decay_steps == 500


def test_a_plan_of_the_users_own_stays():
    model = make(temperature_decay_steps=3)
    begin(model)
    assert model.quantizer.temperature.decay_steps == model.config.temperature_decay_steps == 3


def test_a_trained_model_keeps_the_temperature_it_reached():
    model = make()
    model.quantizer.temperature.steps += 10_000
    reached = model.quantizer.temperature()
    begin(model, max_steps=20_000)
    assert model.quantizer.temperature() == reached


def test_a_resumed_run_keeps_its_plan():
    model = make()
    model.quantizer.temperature.steps += 100
    begin(model, done=100)
    assert model.quantizer.temperature.decay_steps == 500


def test_accumulation_needs_the_lagged_likelihood():
    model = make()
    begin(model, accumulation=4)
    assert model.config.variance_update == "lagged"
    model = make(variance_update="learned")
    begin(model, accumulation=4)
    assert model.config.variance_update == "learned"


def test_a_model_without_temperature_is_fine():
    begin(hf_vq.VQVAEModel(hf_vq.VQVAEConfig(hidden_channels=[8], residual_channels=8)))


def test_data_parallel_is_refused():
    with pytest.raises(ValueError, match="drives 2 GPUs"):
        begin(make(), n_gpu=2)


def test_one_step_of_the_optimizer_is_one_of_the_model():
    model = make()
    hf_vq.QuantizerCallback().on_optimizer_step(SimpleNamespace(), TrainerState(), TrainerControl(), model=model)
    assert model.quantizer.temperature.steps == 1


# A real run of Trainer, with accumulation.

STEPS, ACCUMULATION, BATCH, CODEBOOKS = 3, 2, 8, 2
TINY = {"num_channels": 1, "image_size": 8, "hidden_channels": [8], "residual_channels": 8, "num_residual_blocks": 1}
QUANTIZERS: dict[str, dict[str, Any]] = {
    "gradient": {"quantizer": "gradient", "gradient_estimator": "rotation"},
    "ema": {"quantizer": "ema", "codebook_size": 16},
    "cured": {"quantizer": "ema", "codebook_size": 16, "codebook_init": "kmeans", "revive_below": 0.1},
    "soft_em": {"quantizer": "soft_em", "codebook_size": 16, "normalize_codes": True},
    "linear": {"quantizer": "gradient", "codebook_size": 16, "codebook_transform": "linear"},
    "fsq": {"quantizer": "fsq", "levels": [4, 4]},
    "gaussian_I": {"variance_form": "sum", "dequantization_noise": True},
    "gaussian_II": {"covariance": "per_sample"},
    "gaussian_III": {"covariance": "per_latent", "variance_update": "learned"},
    "gaussian_IV": {"covariance": "diagonal"},
    "vmf": {"quantizer": "vmf"},
}


@pytest.fixture(scope="module")
def digits() -> list[dict[str, torch.Tensor]]:
    """Scikit-learn's handwritten digits as pixel_values (1, 8, 8) in [-1, 1]."""
    return [{"pixel_values": torch.tensor(image)[None].float() / 8 - 1} for image in load_digits().images]


@pytest.mark.parametrize("name", QUANTIZERS)
def test_trainer_moves_every_quantizer_once_a_step(name: str, digits: list[dict[str, torch.Tensor]], tmp_path: Path):
    set_seed(0)
    is_vqvae = QUANTIZERS[name].get("quantizer", "vmf") != "vmf"
    config_class, model_class = (
        (hf_vq.VQVAEConfig, hf_vq.VQVAEModel) if is_vqvae else (hf_vq.SQVAEConfig, hf_vq.SQVAEModel)
    )
    model = model_class(config_class(**TINY, **QUANTIZERS[name], num_codebooks=CODEBOOKS))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        max_steps=STEPS,
        learning_rate=1e-3,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        prediction_loss_only=True,
        remove_unused_columns=False,
    )
    callback = hf_vq.QuantizerCallback()
    trainer = Trainer(model, arguments, train_dataset=digits, eval_dataset=digits[:16], callbacks=[callback])
    trainer.train()
    check_steps(model, before)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(model(stacked(digits[:16])).loss.item(), rel=1e-5)
    check_tokens(model.eval(), stacked(digits[:16]))


def check_steps(model: Any, before: dict[str, torch.Tensor]) -> None:
    """What counts steps has counted those of the optimizer, and what should have moved has."""
    quantizer = model.quantizer
    assert (model.observation_variance != before["observation_variance"]).all() and not model.pending_error.any()
    if hasattr(quantizer, "temperature"):
        assert quantizer.temperature.steps == STEPS and quantizer.temperature.decay_steps == STEPS
        assert model.config.variance_update in ("lagged", "learned")
    if getattr(quantizer, "care", None) is not None:
        assert quantizer.care.steps == STEPS
    elif hasattr(quantizer, "cluster_size"):
        # Every step sees 16 positions of every image of every micro-batch, in each codebook.
        seen = CODEBOOKS * BATCH * ACCUMULATION * 16
        expected = seen * (1 - quantizer.decay**STEPS)
        assert quantizer.cluster_size.sum().item() == pytest.approx(expected, rel=1e-5)
    name = "quantizer.transform" if "quantizer.transform" in before else "quantizer.codebook.weight"
    moved = (model.state_dict()[name] != before[name]).view(CODEBOOKS, -1)
    assert moved.any(dim=1).all() or model.config.quantizer == "fsq"


def stacked(rows: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    return torch.stack([row["pixel_values"] for row in rows])


@torch.no_grad()
def check_tokens(model: Any, pixel_values: torch.Tensor) -> None:
    """Decoding the tokens, on their grid or flat, gives what the forward gives."""
    tokens, decoded = model.encode(pixel_values).image_tokens, model(pixel_values).decoded_pixel_values
    assert tokens.shape == (16, 4, 4, CODEBOOKS)
    torch.testing.assert_close(model.decode(tokens).pixel_values, decoded)
    assert torch.equal(model.decode(tokens.flatten(1)).pixel_values, model.decode(tokens).pixel_values)
