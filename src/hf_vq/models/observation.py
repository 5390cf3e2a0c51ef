"""Distributions of an 8-bit image given its tokens."""

import math

import torch
from torch import Tensor

from .levels import HALF_BIN, LEVELS, to_levels


def gaussian_log_prob(pixel_values: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """log P(8-bit image) in nats, (B,): a Gaussian per element, integrated over each value's bin.

    The bins of 0 and 255 reach to infinity, so that the 256 probabilities of an element sum to one.

    Args:
        pixel_values: (B, C, H, W), multiples of 2/255 from -1 to 1; taken to the nearest 8-bit level.
        mean: (B, C, H, W), in the same units.
        variance: () or (C,), in the same units squared.
    """
    return log_mass(to_levels(pixel_values.double()), mean, variance.view(-1, 1, 1)).flatten(1).sum(1)


def gaussian_level_log_probs(mean: Tensor, variance: Tensor, channel: int) -> Tensor:
    """log P of each of the 256 levels of one channel, (B, 256, H, W); see `gaussian_log_prob`."""
    every = torch.arange(LEVELS, device=mean.device, dtype=torch.float64).view(1, -1, 1, 1)
    own = variance if variance.ndim == 0 else variance[channel]
    return log_mass(every, mean[:, channel].unsqueeze(1), own)


def log_mass(levels: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """log of the mass that Gaussians give to the bins of levels, in float64; all shapes broadcast."""
    distance, scale = levels / 127.5 - 1 - mean.double(), variance.double().sqrt()
    lower = torch.where(levels <= 0, -math.inf, (distance - HALF_BIN) / scale)
    upper = torch.where(levels >= LEVELS - 1, math.inf, (distance + HALF_BIN) / scale)
    return log_normal_mass(lower, upper)


def log_normal_mass(lower: Tensor, upper: Tensor) -> Tensor:
    """log(Phi(upper) - Phi(lower)) of the standard normal, for lower < upper, without cancellation in the tails."""
    # Phi(b) - Phi(a) = Phi(-a) - Phi(-b): the tail below zero is the one with digits to spare.
    flip = lower > 0
    lower, upper = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
    log_upper = torch.special.log_ndtr(upper)
    return log_upper + torch.log(-torch.expm1(torch.special.log_ndtr(lower) - log_upper))


__all__ = ["gaussian_level_log_probs", "gaussian_log_prob"]
