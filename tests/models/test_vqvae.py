"""The VQ-VAE's objective: what is divided by what, and what moves in step()."""

import pytest
import torch
from tiny_models import BODY, make_images, make_model
from transformers.utils import ModelOutput

from hf_vq import VQVAEConfig, VQVAEModel


@pytest.mark.parametrize("quantizer", ["gradient", "ema"])
def test_the_loss_is_the_squared_error_over_the_data_variance_and_the_quantizer(quantizer: str):
    images = make_images(4)
    model = make_model(quantizer, data_variance=0.3, commitment_weight=0.4).train()
    output = model(images)
    error = (output.decoded_pixel_values - images).square().mean()
    encoded = model.encode(images)
    distance = (encoded.last_hidden_state - encoded.quantized_last_hidden_state).square().mean()
    torch.testing.assert_close(output.reconstruction_loss, error / 0.3)
    torch.testing.assert_close(output.embedding_loss, distance * (1.4 if quantizer == "gradient" else 0.4))
    torch.testing.assert_close(output.loss, output.reconstruction_loss + output.embedding_loss)


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


@pytest.mark.parametrize("quantizer", ["gradient", "ema"])
def test_step_keeps_the_training_error_of_all_images_since_the_last(quantizer: str):
    model = make_model(quantizer).train()
    assert model.observation_variance.item() == 0.25
    model.step()
    assert model.observation_variance.item() == 0.25, "nothing was seen"
    squares = []
    for images in (make_images(4), make_images(2, seed=2)):
        squares.append((model(images).decoded_pixel_values - images).square().flatten())
    model.eval()(make_images(8, seed=3))
    model.step()
    torch.testing.assert_close(model.observation_variance, torch.cat(squares).mean().detach())
    kept = model.observation_variance.clone()
    model.step()
    assert torch.equal(model.observation_variance, kept)


def test_the_codebook_starts_at_the_paper_codes_scale():
    torch.manual_seed(0)
    codes = VQVAEModel(VQVAEConfig(**BODY)).quantizer.codebook.weight
    assert 0.5 / 12 < codes.abs().max() <= 1 / 12


@pytest.mark.parametrize("family", ["gradient", "ema", "gaussian"])
def test_the_loss_comes_first_where_outputs_are_tuples(family: str):
    model, images = make_model(family), make_images(2)
    output = model(images)
    assert isinstance(output, ModelOutput)
    assert torch.equal(output[0], output.loss) and torch.equal(model(images, return_dict=False)[0], output.loss)
    without = model(images, return_loss=False)
    assert without.loss is None and torch.equal(without.decoded_pixel_values, output.decoded_pixel_values)
