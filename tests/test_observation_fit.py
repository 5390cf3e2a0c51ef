"""The variance that is stored with a decoder is that of training images under deterministic tokens."""

from collections.abc import Iterator

import pytest
import torch

import hf_vq
from hf_vq.observation_fit import fit_observation_variance

SMALL = {"hidden_channels": [8], "residual_channels": 8, "num_residual_blocks": 1, "codebook_size": 16, "image_size": 8}


def endless(pixels: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
    while True:
        for part in pixels.split(4):
            yield {"pixel_values": part}


@pytest.mark.parametrize("model_class", [hf_vq.SQVAEModel, hf_vq.VQVAEModel])
def test_it_is_the_mean_squared_error_of_each_channel(model_class: type):
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**SMALL)).train()
    pixels = torch.rand(10, 3, 8, 8) * 2 - 1
    fit_observation_variance(model, endless(pixels), images=10)
    assert model.training
    decoded = model.eval()(pixels).decoded_pixel_values
    torch.testing.assert_close(model.observation_variance, (decoded - pixels).square().mean(dim=(0, 2, 3)))
    # No other variance makes the images likelier (up to the width of a level).
    best = model.log_prob(pixels, model.encode(pixels).image_tokens).sum()
    for factor in (0.8, 1.25):
        model.observation_variance.mul_(factor)
        assert model.log_prob(pixels, model.encode(pixels).image_tokens).sum() < best
        model.observation_variance.div_(factor)


def test_a_mixture_has_no_variance_to_fit():
    model = hf_vq.SQVAEModel(hf_vq.SQVAEConfig(**SMALL, observation="logistic_mixture", num_mixtures=2))
    before = model.observation_variance.clone()
    fit_observation_variance(model, endless(torch.zeros(4, 3, 8, 8)), images=4)
    assert torch.equal(model.observation_variance, before)
