"""The randomness of quantizers, each kind drawn in one small function."""

import torch
from torch import Tensor


def gumbel_noise(like: Tensor) -> Tensor:
    """Standard Gumbel noise in the shape of `like`."""
    # Uniform numbers and two logarithms take a quarter of the time of `exponential_`.
    uniform = torch.rand(like.shape, dtype=like.dtype, device=like.device).clamp_(min=torch.finfo(like.dtype).tiny)
    return uniform.log_().neg_().log_().neg_()


def gaussian_noise(like: Tensor) -> Tensor:
    """Standard normal noise in the shape of `like`."""
    return torch.randn_like(like)


def uniform_noise(like: Tensor, samples: int, generator: torch.Generator | None = None) -> Tensor:
    """Uniform numbers in [0, 1), `samples` for each row of `like` (..., D): (..., samples)."""
    return torch.empty(*like.shape[:-1], samples, dtype=like.dtype, device=like.device).uniform_(generator=generator)


__all__ = ["gaussian_noise", "gumbel_noise", "uniform_noise"]
