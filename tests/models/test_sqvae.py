"""The SQ-VAE's objective: the decoder's variance in its three forms, and what moves in step()."""

import math

import naive_stochastic_quantizers as loops
import pytest
import torch
from tiny_models import BODY, FAMILIES, STOCHASTIC_QUANTIZERS, make_images, make_model
from torch import Tensor

from hf_vq import SQVAEConfig, SQVAEModel
from hf_vq.models import stochastic_quantizers

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
    assert model.log_observation_variance.mean().item() == pytest.approx(math.log(0.25))
    with torch.no_grad():
        model.log_observation_variance.fill_(-1.7)
    variance = model.log_observation_variance.exp()
    expected = squared_error(model, images) / (2 * variance) + ELEMENTS / 2 * variance.log()
    assert_same_in_value_and_gradient(reconstruction_loss(model, images), expected, model)
    model.step()
    assert model.observation_variance.mean().item() == pytest.approx(math.exp(-1.7))


@pytest.mark.parametrize("update", ["batch", "lagged"])
def test_step_keeps_the_training_error_of_all_images_since_the_last(update: str):
    model = make_double(update)
    squares = []
    for images in (make_images(4, dtype=torch.float64), make_images(2, seed=2, dtype=torch.float64)):
        squares.append((model(images).decoded_pixel_values - images).square().flatten())
    assert model.observation_variance.mean().item() == 0.25
    model.eval()(make_images(8, seed=3, dtype=torch.float64))
    model.step()
    torch.testing.assert_close(model.observation_variance.mean(), torch.cat(squares).mean().detach())


def test_micro_batches_of_lagged_have_the_gradient_of_their_joint_batch(monkeypatch: pytest.MonkeyPatch):
    model, images = make_double("lagged"), make_images(8, dtype=torch.float64)
    gumbel = torch.randn(1, 8 * 4, 12, dtype=torch.float64)
    monkeypatch.setattr(stochastic_quantizers, "gumbel_noise", lambda like: gumbel)
    joint = model(images).loss
    parts = iter(gumbel.chunk(4, dim=1))
    monkeypatch.setattr(stochastic_quantizers, "gumbel_noise", lambda like: next(parts))
    split = sum(model(micro_batch).loss for micro_batch in images.chunk(4)) / 4
    assert_same_in_value_and_gradient(split, joint, model)


@pytest.mark.parametrize("update", ["batch", "lagged", "learned"])
@pytest.mark.parametrize("family", STOCHASTIC_QUANTIZERS)
def test_in_evaluation_an_image_does_not_feel_its_batch_mates(family: str, update: str):
    model = make_model(family, variance_update=update).double().eval()
    images = make_images(6, dtype=torch.float64)
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


@pytest.mark.parametrize("family", FAMILIES)
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


@pytest.mark.parametrize("family", STOCHASTIC_QUANTIZERS)
def test_the_loss_is_in_nats_per_image_summed_over_positions(family: str):
    model = make_model(family).double().eval()
    images = make_images(2, dtype=torch.float64)
    output, config, codebook = model(images), model.config, model.quantizer.codebook.weight
    latents, log_variance = model.encoder(images)
    s = torch.tensor(math.log(config.initial_variance), dtype=torch.float64)
    if config.quantizer == "vmf":
        kappa = loops.concentration(config.variance_form, s)
        expected = loops.directional_quantizer(latents, codebook, kappa, None)
    else:
        own = {name: getattr(config, name) for name in ("covariance", "num_codebooks")}
        own |= {"form": config.variance_form, "log_variance": log_variance}
        expected = loops.gaussian_quantizer(latents, codebook, s, None, **own)
    assert torch.equal(output.image_tokens, expected.image_tokens)
    torch.testing.assert_close(output.embedding_loss, expected.loss)
    torch.testing.assert_close(output.loss, output.reconstruction_loss + output.embedding_loss)


@pytest.mark.parametrize("family", STOCHASTIC_QUANTIZERS)
def test_only_what_depends_on_the_image_has_a_variance_head(family: str):
    model = make_model(family)
    latents, log_variance = model.encoder(make_images(2))
    if model.config.covariance == "global":
        assert log_variance is None
    else:
        assert log_variance.shape == latents.shape and log_variance.std() > 0


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_without_a_projection_the_variance_head_is_a_residual_block_of_its_own(norm: str):
    own = {"latent_projection": False, "codebook_dim": 8, "norm": norm, "num_residual_blocks": 2}
    plain, headed = make_model("gaussian", **own), make_model("gaussian-diagonal", **own)
    body, head = plain.encoder.state_dict(), headed.encoder.state_dict()
    extra = sum(tensor.numel() for name, tensor in head.items() if name not in body)
    assert set(body) < set(head)
    assert extra == sum(tensor.numel() for tensor in plain.encoder.blocks[-1].state_dict().values())


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


@pytest.mark.parametrize("initial", [20.0, 0.05])
@pytest.mark.parametrize("form", ["product", "sum"])
def test_kappa_starts_where_the_config_says(form: str, initial: float):
    model = make_model("vmf", variance_form=form, initial_variance=initial)
    kappa = 1 / initial if form == "product" else 1 + 1 / initial
    assert model.scalars()["dequantization_variance"].item() == pytest.approx(1 / kappa)


def test_the_scalars_are_those_of_the_log():
    model = make_model("gaussian", initial_variance=0.3, variance_form="sum")
    scalars = {name: value.item() for name, value in model.scalars().items()}
    assert scalars == pytest.approx({"observation_variance": 0.25, "dequantization_variance": 1.3, "temperature": 1.0})
    assert set(make_model("gaussian-per_latent").scalars()) == {"observation_variance", "temperature"}
    assert set(make_model("ema").scalars()) == {"observation_variance"}


@pytest.mark.parametrize("family", STOCHASTIC_QUANTIZERS)
def test_every_parameter_learns(family: str):
    model = make_model(family).train()
    model(make_images(4)).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
