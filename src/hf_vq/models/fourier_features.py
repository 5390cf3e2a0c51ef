"""Vectors of a codebook as vectors of any width, alike where the codes are close."""

import math

import torch
from torch import Tensor

TYPICAL_EXPONENT = 4.0


def fourier_features(vectors: Tensor, width: int) -> Tensor:
    """Random Fourier features (Rahimi and Recht 2007): (K, D) to (K, width), of unit variance.

    The product of two of them, over the width, is about exp(-distance^2 / 2), where distances are measured so that two
    codes have on average exp(-4): neighbours look alike, strangers do not.
    """
    centred = vectors - vectors.mean(dim=0)
    # The mean squared distance of two codes is twice the variance of all components together.
    spread = 2 * centred.square().sum(dim=1).mean().clamp(min=torch.finfo(vectors.dtype).eps)
    scaled = centred * (2 * TYPICAL_EXPONENT / spread).sqrt()
    frequencies = torch.randn(vectors.shape[1], width, dtype=vectors.dtype, device=vectors.device)
    phases = 2 * math.pi * torch.rand(width, dtype=vectors.dtype, device=vectors.device)
    return math.sqrt(2) * (scaled @ frequencies + phases).cos()


__all__ = ["fourier_features"]
