"""The discretised mixture against its naive twin, and that its probabilities sum to one."""

import math

import pytest
import torch
from torch import Tensor

from hf_vq.models.logistic_mixture import LEAST_LOG_SCALE, LogisticMixture, num_parameters, to_mixture

COMPONENTS = 3


def make_mixture(channels: int, scale: float = 1.0, seed: int = 0) -> LogisticMixture:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, num_parameters(channels, COMPONENTS), 2, 3)
    return to_mixture(scale * torch.randn(shape, generator=generator, dtype=torch.float64), channels)


def make_images(channels: int, seed: int = 1) -> Tensor:
    levels = torch.randint(256, (2, channels, 2, 3), generator=torch.Generator().manual_seed(seed))
    levels[0, :, 0, 0], levels[1, :, 0, 0] = 0, 255
    return levels.double() / 127.5 - 1


def naive_log_prob(mixture: LogisticMixture, image: Tensor, batch: int, y: int, x: int) -> float:
    """Of one pixel, by the cumulative distribution itself."""
    sigmoid = lambda value: 1 / (1 + math.exp(-value))  # noqa: E731  as in the paper
    total, channels = 0.0, image.shape[1]
    for i in range(COMPONENTS):
        probability, place = mixture.log_weights[batch, i, y, x].exp().item(), 0
        for c in range(channels):
            mean = mixture.means[batch, i, c, y, x].item()
            for d in range(c):
                mean += mixture.coefficients[batch, i, place, y, x].item() * image[batch, d, y, x].item()
                place += 1
            scale = math.exp(mixture.log_scales[batch, i, c, y, x].item())
            value = image[batch, c, y, x].item()
            upper = 1.0 if value > 0.999 else sigmoid((value + 1 / 255 - mean) / scale)
            lower = 0.0 if value < -0.999 else sigmoid((value - 1 / 255 - mean) / scale)
            probability *= upper - lower
        total += probability
    return math.log(total)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_it_equals_the_loops(channels: int):
    mixture, images = make_mixture(channels), make_images(channels)
    expected = [
        sum(naive_log_prob(mixture, images, batch, y, x) for y in range(2) for x in range(3)) for batch in range(2)
    ]
    torch.testing.assert_close(mixture.log_prob(images), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("scale", [0.1, 1.0, 20.0])
def test_the_256_probabilities_of_a_channel_sum_to_one_and_make_up_the_image(channels: int, scale: float):
    mixture, images = make_mixture(channels, scale), make_images(channels)
    levels = ((images + 1) * 127.5).round().long()
    total = torch.zeros(2, dtype=torch.float64)
    for channel in range(channels):
        log_probs = mixture.level_log_probs(images, channel)
        torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(2, 2, 3, dtype=torch.float64))
        total += log_probs.gather(1, levels[:, channel : channel + 1]).flatten(1).sum(1)
    torch.testing.assert_close(mixture.log_prob(images), total)


def test_the_mean_is_that_of_draws():
    mixture = make_mixture(3, scale=0.3)
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    # The first channel depends on nothing, and few bins lie beyond the ends.
    narrow = mixture._replace(log_scales=mixture.log_scales - 4)
    probabilities = narrow.level_log_probs(torch.zeros(2, 3, 2, 3, dtype=torch.float64), 0).exp()
    expected = (probabilities * levels.view(1, -1, 1, 1)).sum(1)
    torch.testing.assert_close(narrow.mean()[:, 0], expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_gradients_are_finite_however_wrong_the_means(factor: float):
    parameters = (factor * torch.randn(1, num_parameters(3, COMPONENTS), 2, 3)).requires_grad_()
    loss = -to_mixture(parameters, 3).log_prob(make_images(3)[:1].float())
    loss.sum().backward()
    assert loss.isfinite().all() and parameters.grad.isfinite().all()
    assert to_mixture(parameters, 3).log_scales.min() >= LEAST_LOG_SCALE


def test_the_gradient_is_that_of_finite_differences():
    shape = (1, num_parameters(3, 2), 1, 2)
    parameters = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    images = make_images(3)[:1, :, :1, :2]
    assert torch.autograd.gradcheck(lambda p: to_mixture(p, 3).log_prob(images), (parameters,))
