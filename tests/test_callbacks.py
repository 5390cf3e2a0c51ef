"""QuantizerCallback: what it does to a model's plan, and when it leaves it alone."""

from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

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
