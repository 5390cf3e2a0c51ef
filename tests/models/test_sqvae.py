"""The SQ-VAE's objective: the decoder's variance in its three forms, and what moves in step()."""

import math

import pytest
import torch
from tiny_models import BODY, make_images, make_model
from torch import Tensor

from hf_vq import SQVAEConfig, SQVAEModel
from hf_vq.models import quantizers

ELEMENTS = 3 * 8 * 8


def make_double(update: str, **settings: object) -> SQVAEModel:
    return make_model("gaussian", variance_update=update, **settings).double().train()


def squared_error(model: SQVAEModel, images: Tensor) -> Tensor:
    """S, the squared error per image, of a forward with the same noise."""
    torch.manual_seed(0)
    return (model(images, return_loss=True).decoded_pixel_values - images).square().sum() / len(images)


def reconstruction_loss(model: SQVAEModel, images: Tensor) -> Tensor:
    torch.manual_seed(0)
    return model(images).reconstruction_loss


def assert_same_in_value_and_gradient(actual: Tensor, expected: Tensor, model: SQVAEModel) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    pairs = [torch.autograd.grad(value, parameters, allow_unused=True) for value in (actual, expected)]
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
    assert any(gradient is not None and gradient.abs().max() > 1e-3 for gradient in pairs[0])


def test_batch_is_the_authors_formula():
    model, images = make_double("batch"), make_images(4, dtype=torch.float64)
    expected = ELEMENTS / 2 * squared_error(model, images).log()
    assert_same_in_value_and_gradient(reconstruction_loss(model, images), expected, model)


def test_lagged_is_linear_in_the_error_around_the_last_step():
    model, images = make_double("lagged"), make_images(4, dtype=torch.float64)
    for last in (0.25, 0.07):
        model.observation_variance.fill_(last)
        s, s0 = squared_error(model, images), ELEMENTS * last
        expected = ELEMENTS / 2 * (s / s0 + math.log(s0) - 1)
        assert_same_in_value_and_gradient(reconstruction_loss(model, images), expected, model)


def test_lagged_equals_batch_where_the_error_stands_still():
    lagged, batch, images = make_double("lagged"), make_double("batch"), make_images(4, dtype=torch.float64)
    lagged.observation_variance.copy_(squared_error(lagged, images) / ELEMENTS)
    torch.testing.assert_close(reconstruction_loss(lagged, images), reconstruction_loss(batch, images))


def test_learned_is_equation_8():
    model, images = make_double("learned"), make_images(4, dtype=torch.float64)
    assert model.log_observation_variance.item() == pytest.approx(math.log(0.25))
    with torch.no_grad():
        model.log_observation_variance.fill_(-1.7)
    variance = model.log_observation_variance.exp()
    expected = squared_error(model, images) / (2 * variance) + ELEMENTS / 2 * variance.log()
    assert_same_in_value_and_gradient(reconstruction_loss(model, images), expected, model)
    model.step()
    assert model.observation_variance.item() == pytest.approx(math.exp(-1.7))


@pytest.mark.parametrize("update", ["batch", "lagged"])
def test_step_keeps_the_training_error_of_all_images_since_the_last(update: str):
    model = make_double(update)
    squares = []
    for images in (make_images(4, dtype=torch.float64), make_images(2, seed=2, dtype=torch.float64)):
        squares.append((model(images).decoded_pixel_values - images).square().flatten())
    assert model.observation_variance.item() == 0.25
    model.eval()(make_images(8, seed=3, dtype=torch.float64))
    model.step()
    torch.testing.assert_close(model.observation_variance, torch.cat(squares).mean().detach())


def test_micro_batches_of_lagged_have_the_gradient_of_their_joint_batch(monkeypatch: pytest.MonkeyPatch):
    model, images = make_double("lagged"), make_images(8, dtype=torch.float64)
    gumbel = torch.randn(8 * 4, 12, dtype=torch.float64)
    monkeypatch.setattr(quantizers, "gumbel_noise", lambda like: gumbel)
    joint = model(images).loss
    parts = iter(gumbel.chunk(4))
    monkeypatch.setattr(quantizers, "gumbel_noise", lambda like: next(parts))
    split = sum(model(micro_batch).loss for micro_batch in images.chunk(4)) / 4
    assert_same_in_value_and_gradient(split, joint, model)


@pytest.mark.parametrize("update", ["batch", "lagged", "learned"])
def test_in_evaluation_an_image_does_not_feel_its_batch_mates(update: str):
    model, images = make_double(update).eval(), make_images(6, dtype=torch.float64)
    model.observation_variance.fill_(0.11)
    alone = [model(image[None]) for image in images]
    for name in ("loss", "reconstruction_loss", "embedding_loss"):
        together = getattr(model(images), name)
        torch.testing.assert_close(together, torch.stack([getattr(output, name) for output in alone]).mean())
    for output, tokens in zip(alone, model(images).image_tokens, strict=True):
        assert torch.equal(output.image_tokens[0], tokens)


@pytest.mark.parametrize("update", ["batch", "lagged"])
def test_evaluation_uses_the_stored_variance(update: str):
    model, images = make_double(update).eval(), make_images(4, dtype=torch.float64)
    model.observation_variance.fill_(0.11)
    error = (model(images).decoded_pixel_values - images).square().mean()
    expected = ELEMENTS / 2 * (error / 0.11 + math.log(ELEMENTS * 0.11) - 1)
    torch.testing.assert_close(reconstruction_loss(model, images), expected)


@pytest.mark.parametrize("family", ["gradient", "ema", "gaussian", "gaussian-noisy-learned"])
def test_evaluation_runs_no_collective(family: str, monkeypatch: pytest.MonkeyPatch):
    def collective(*args: object, **kwargs: object) -> None:
        raise AssertionError("a collective ran")

    model, images = make_model(family), make_images(2)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", collective)
    encoded = model.encode(images)
    model.decode(encoded.image_tokens)
    model.log_prob(images, encoded.image_tokens)
    model(images)
    with pytest.raises(AssertionError, match="a collective ran"):
        model.step()


def test_the_loss_is_in_nats_per_image_summed_over_positions():
    model = make_double("lagged").eval()
    images = make_images(2, dtype=torch.float64)
    output = model(images)
    latents = model.encode(images).last_hidden_state
    rows = latents.permute(0, 2, 3, 1).flatten(0, 2)
    log_posterior = model.quantizer.log_posterior(rows)
    distance = (latents - model.encode(images).quantized_last_hidden_state).square().sum()
    entropy = -(log_posterior.exp() * log_posterior).sum()
    expected = (distance / (2 * model.quantizer.variance()) - entropy) / len(images)
    torch.testing.assert_close(output.embedding_loss, expected)
    torch.testing.assert_close(output.loss, output.reconstruction_loss + output.embedding_loss)


@pytest.mark.parametrize(("form", "expected"), [("product", 20.0), ("sum", 21.0)])
def test_the_variance_starts_where_the_config_says(form: str, expected: float):
    model = SQVAEModel(SQVAEConfig(**BODY, variance_form=form, initial_variance=20.0, temperature_start=0.9))
    assert model.quantizer.variance().item() == pytest.approx(expected)
    assert model.quantizer.temperature().item() == pytest.approx(0.9)


def test_step_advances_the_temperature_and_the_forward_does_not():
    model = make_model("gaussian", temperature_start=1.0, temperature_end=0.25, temperature_decay_steps=2).train()
    seen = []
    for _ in range(4):
        model(make_images(1))
        seen.append(model.quantizer.temperature().item())
        model.step()
    assert seen == pytest.approx([1.0, 0.5, 0.25, 0.25])


def test_every_parameter_learns():
    model = make_model("gaussian-noisy-learned").train()
    model(make_images(4)).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
