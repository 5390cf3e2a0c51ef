"""log_prob: the likelihood of an 8-bit image given its tokens, against the error function."""

import math

import pytest
import torch
from tiny_models import make_images, make_model
from torch import Tensor

from hf_vq.models.modeling_autoencoder import AutoencoderModel


def bin_probability(value: int, mean: float, scale: float) -> float:
    """P(8-bit value) of a Gaussian on [-1, 1] with open ends, by math.erfc on the side of the smaller tail."""

    def tail(x: float) -> float:
        return math.erfc(x / scale / math.sqrt(2)) / 2

    center = value / 127.5 - 1 - mean
    lower, upper = (-math.inf if value == 0 else center - 1 / 255), (math.inf if value == 255 else center + 1 / 255)
    return tail(lower) - tail(upper) if lower > 0 else tail(-upper) - tail(-lower)


@pytest.mark.parametrize("variance", [1e-6, 1e-3, 0.25, 40.0])
def test_log_prob_equals_the_error_function(variance: float):
    model = make_model("ema")
    images = make_images(3)
    tokens = model.encode(images).image_tokens
    with torch.no_grad():
        means = model.decode(tokens).pixel_values.double()
        # Near the means, where the tails of a narrow Gaussian still have digits.
        nearby = (means + math.sqrt(variance) * torch.randn(means.shape).clamp(-3, 3)).clamp(-1, 1)
    values = ((nearby + 1) * 127.5).round().long()
    model.observation_variance.fill_(variance)
    actual = model.log_prob(values.float() / 127.5 - 1, tokens)
    scale = math.sqrt(model.observation_variance.mean().item())
    assert actual.shape == (3,) and actual.dtype == torch.float64
    for i in range(3):
        pairs = zip(values[i].flatten().tolist(), means[i].flatten().tolist(), strict=True)
        expected = sum(math.log(bin_probability(value, mean, scale)) for value, mean in pairs)
        assert actual[i].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("variance", [1e-4, 0.02, 0.25, 10.0])
def test_the_probabilities_of_the_256_values_sum_to_one(variance: float):
    # Float64: a float32 reconstruction depends on its batch in the last digits.
    model = make_model("gaussian").double()
    model.observation_variance.fill_(variance)
    images = make_images(1, dtype=torch.float64)
    tokens = model.encode(images).image_tokens
    base = model.log_prob(images, tokens)
    # One element takes every value; the others stay, and cancel.
    rest = base - model_element(model, images, tokens)
    every = images.repeat(256, 1, 1, 1)
    every[:, 1, 3, 5] = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    log_probabilities = model.log_prob(every, tokens.repeat(256, 1, 1)) - rest
    assert log_probabilities.exp().sum().item() == pytest.approx(1, abs=1e-9)


def model_element(model: AutoencoderModel, images: Tensor, tokens: Tensor) -> Tensor:
    """log P of element (1, 3, 5) of the only image."""
    mean = model.decode(tokens).pixel_values[0, 1, 3, 5].item()
    value = round((images[0, 1, 3, 5].item() + 1) * 127.5)
    probability = bin_probability(value, mean, math.sqrt(model.observation_variance.mean().item()))
    return torch.tensor(math.log(probability), dtype=torch.float64)


@pytest.mark.parametrize("variance", [1e-30, 1e-12, 1e-4, 1e8])
def test_log_prob_is_finite_far_in_the_tails(variance: float):
    model, images = make_model("gradient"), make_images(2)
    model.observation_variance.fill_(variance)
    tokens = model.encode(images).image_tokens
    for pictures in (images, torch.ones_like(images), -torch.ones_like(images)):
        assert torch.isfinite(model.log_prob(pictures, tokens)).all()
