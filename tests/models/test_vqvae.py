"""The VQ-VAE's objective: what is divided by what, and what moves in step()."""

import pytest
import torch
from tiny_models import BODY, FAMILIES, VECTOR_QUANTIZERS, make_images, make_model
from transformers.utils import ModelOutput

from hf_vq import VQVAEConfig, VQVAEModel

# What multiplies the squared distance of latents and codes in the loss: the codebook term, and beta = 0.4.
WEIGHTS = {name: 0.0 if name == "fsq" else 0.4 if name.startswith("ema") else 1.4 for name in VECTOR_QUANTIZERS}


@pytest.mark.parametrize(("family", "weight"), [item for item in WEIGHTS.items() if item[0] != "soft_em"])
def test_the_loss_is_the_squared_error_over_the_data_variance_and_the_quantizer(family: str, weight: float):
    images = make_images(4)
    beta = {} if family == "fsq" else {"commitment_weight": 0.4}
    model = make_model(family, data_variance=0.3, **beta).train()
    output = model(images)
    error = (output.decoded_pixel_values - images).square().mean()
    encoded = model.encode(images)
    latents = encoded.last_hidden_state
    if model.config.normalize_codes:
        latents = torch.nn.functional.normalize(latents, dim=1)
    distance = (latents - encoded.quantized_last_hidden_state).square().mean()
    torch.testing.assert_close(output.reconstruction_loss, error / 0.3)
    torch.testing.assert_close(output.embedding_loss, distance * weight)
    torch.testing.assert_close(output.loss, output.reconstruction_loss + output.embedding_loss)


@pytest.mark.parametrize("family", VECTOR_QUANTIZERS)
def test_everything_that_is_trained_gets_a_gradient(family: str):
    model = make_model(family).train()
    model(make_images(8)).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
    quantizer = {name for name in trained if name.startswith("quantizer.")}
    learned = {"linear": {"quantizer.transform"}}.get(family, {"quantizer.codebook.weight"})
    assert quantizer == (learned if model.config.quantizer == "gradient" else set())


def test_the_gradient_codebook_learns_by_its_own_loss_and_the_other_by_averages():
    images = make_images(4)
    learned, averaged = make_model("gradient").train(), make_model("ema").train()
    learned(images).loss.backward()
    averaged(images).loss.backward()
    assert learned.quantizer.codebook.weight.grad.abs().sum() > 0
    assert averaged.quantizer.codebook.weight.grad is None
    before = averaged.quantizer.codebook.weight.clone()
    averaged.step()
    assert not torch.equal(averaged.quantizer.codebook.weight, before)
    for model in (learned, averaged):
        missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing


@pytest.mark.parametrize("quantizer", VECTOR_QUANTIZERS)
def test_step_keeps_the_training_error_of_all_images_since_the_last(quantizer: str):
    model = make_model(quantizer).train()
    assert model.observation_variance.mean().item() == 0.25
    model.step()
    assert model.observation_variance.mean().item() == 0.25, "nothing was seen"
    squares = []
    for images in (make_images(4), make_images(2, seed=2)):
        squares.append((model(images).decoded_pixel_values - images).square().flatten())
    model.eval()(make_images(8, seed=3))
    model.step()
    torch.testing.assert_close(model.observation_variance.mean(), torch.cat(squares).mean().detach())
    kept = model.observation_variance.clone()
    model.step()
    assert torch.equal(model.observation_variance, kept)


def test_the_codebook_starts_at_the_paper_codes_scale():
    torch.manual_seed(0)
    codes = VQVAEModel(VQVAEConfig(**BODY)).quantizer.codebook.weight
    assert 0.5 / 12 < codes.abs().max() <= 1 / 12


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_comes_first_where_outputs_are_tuples(family: str):
    model, images = make_model(family), make_images(2)
    output = model(images)
    assert isinstance(output, ModelOutput)
    assert torch.equal(output[0], output.loss) and torch.equal(model(images, return_dict=False)[0], output.loss)
    without = model(images, return_loss=False)
    assert without.loss is None and torch.equal(without.decoded_pixel_values, output.decoded_pixel_values)
