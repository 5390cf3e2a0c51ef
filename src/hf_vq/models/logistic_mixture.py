"""A distribution of 8-bit pixels whose channels depend on each other: discretised logistic mixtures.

PixelCNN++ (Salimans et al. 2017, arXiv 1701.05517, Sections 2.1 and 2.2). Letters: B images, C channels, n components.
Component i gives channel c of a pixel a logistic distribution around mean_ic + sum_{d < c} coefficient_icd * x_d, of
which each level gets the mass of its bin; the bins of 0 and 255 reach to infinity.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .levels import HALF_BIN, LEVELS, to_levels

LEAST_LOG_SCALE, MOST_LOG_SCALE = -7.0, 7.0


class LogisticMixture(NamedTuple):
    """Mixtures for the pixels of images.

    Attributes:
        log_weights: (B, n, H, W), of the components; they sum to 1.
        means: (B, n, C, H, W), in the units of pixel_values, before what earlier channels add.
        log_scales: (B, n, C, H, W).
        coefficients: (B, n, C * (C - 1) / 2, H, W), of channel d in the mean of channel c: (1, 0), (2, 0), (2, 1) ...
    """

    log_weights: Tensor
    means: Tensor
    log_scales: Tensor
    coefficients: Tensor

    def component_means(self, pixel_values: Tensor) -> list[Tensor]:
        """Of each channel the means (B, n, H, W) of its components, given pixel_values (B, C, H, W) of those before."""
        return [self._mean(channel, pixel_values.unsqueeze(1).unbind(2)) for channel in range(self.means.shape[2])]

    def _mean(self, channel: int, earlier: "tuple[Tensor, ...] | list[Tensor]") -> Tensor:
        first = channel * (channel - 1) // 2
        own = [self.coefficients[:, :, first + place] * earlier[place] for place in range(channel)]
        return sum(own, start=self.means[:, :, channel])

    def mean(self) -> Tensor:
        """The mean image (B, C, H, W), within [-1, 1]."""
        means: list[Tensor] = []
        for channel in range(self.means.shape[2]):
            means.append(self._mean(channel, means))
        return (self.log_weights.exp().unsqueeze(2) * torch.stack(means, dim=2)).sum(dim=1).clamp(-1, 1)

    def log_prob(self, pixel_values: Tensor) -> Tensor:
        """log P(8-bit image) in nats, (B,), for pixel_values (B, C, H, W), multiples of 2/255 from -1 to 1."""
        levels = to_levels(pixel_values).unsqueeze(1)
        joint = self.log_weights
        for channel, mean in enumerate(self.component_means(pixel_values)):
            joint = joint + log_mass(levels[:, :, channel], mean, self.log_scales[:, :, channel])
        return joint.logsumexp(dim=1).flatten(1).sum(dim=1)

    def level_log_probs(self, pixel_values: Tensor, channel: int) -> Tensor:
        """log P of each of the 256 levels of one channel given the channels before it, (B, 256, H, W)."""
        levels, means = to_levels(pixel_values).unsqueeze(1), self.component_means(pixel_values)
        weights = self.log_weights
        for earlier in range(channel):
            weights = weights + log_mass(levels[:, :, earlier], means[earlier], self.log_scales[:, :, earlier])
        weights = weights.log_softmax(dim=1).unsqueeze(1)
        every = torch.arange(LEVELS, device=means[0].device).view(1, -1, 1, 1, 1)
        masses = log_mass(every, means[channel].unsqueeze(1), self.log_scales[:, :, channel].unsqueeze(1))
        return (weights + masses).logsumexp(dim=2)


def num_parameters(num_channels: int, num_components: int) -> int:
    """Numbers per pixel that `to_mixture` takes."""
    return num_components * (1 + 2 * num_channels + num_channels * (num_channels - 1) // 2)


def to_mixture(parameters: Tensor, num_channels: int) -> LogisticMixture:
    """What a decoder gives, (B, P, H, W), as mixtures, in float32 or wider."""
    parameters = parameters.to(torch.promote_types(parameters.dtype, torch.float32))
    components = parameters.unflatten(1, (-1, num_parameters(num_channels, 1)))
    logits, means, log_scales, coefficients = components.tensor_split(
        [1, 1 + num_channels, 1 + 2 * num_channels], dim=2
    )
    return LogisticMixture(
        log_weights=logits.squeeze(2).log_softmax(dim=1),
        means=means,
        log_scales=log_scales.clamp(LEAST_LOG_SCALE, MOST_LOG_SCALE),
        coefficients=coefficients.tanh(),
    )


def log_mass(levels: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log of the mass that logistic distributions give to the bins of levels; all shapes broadcast."""
    # sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b)): no difference of numbers near each other.
    precision = (-log_scale).exp()
    centred = levels / 127.5 - 1 - mean
    below_upper = F.logsigmoid((centred + HALF_BIN) * precision)
    above_lower = F.logsigmoid(-(centred - HALF_BIN) * precision)
    inside = below_upper + above_lower + torch.log(-torch.expm1(-2 * HALF_BIN * precision))
    return torch.where(levels <= 0, below_upper, torch.where(levels >= LEVELS - 1, above_lower, inside))


__all__ = ["LogisticMixture", "num_parameters", "to_mixture"]
