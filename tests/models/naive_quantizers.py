"""What the naive twins of all quantizers share: a loop per index, one number at a time, nothing of the package.

Latents (B, M * D, *grid) are read position by position in raster order (image, first grid axis, ...), and at each
position codebook by codebook: codebook m of M has the channels m * D to (m + 1) * D and the rows m * K to (m + 1) * K.
Numbers are 0-dim tensors, so that autograd differentiates the loops.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Naive(NamedTuple):
    """quantized (B, M * D, *grid), image_tokens (B, *grid[, M]), and the sum of the losses of all positions."""

    quantized: Tensor
    image_tokens: Tensor
    loss: Tensor


class Site(NamedTuple):
    """One latent (D,): that of codebook m at the n-th position, which is at `place` of image b."""

    latent: Tensor
    m: int
    n: int
    b: int
    place: tuple[int, ...]


# What one latent becomes: the vector (D,) for the decoder, the token, the loss.
Chosen = tuple[Tensor, int, Tensor]


def squared_norm(difference: Tensor) -> Tensor:
    """||v||^2, element by element."""
    total = difference.new_zeros(())
    for component in difference:
        total = total + component * component
    return total


def inner(left: Tensor, right: Tensor) -> Tensor:
    """The inner product, element by element."""
    total = left.new_zeros(())
    for one, other in zip(left, right, strict=True):
        total = total + one * other
    return total


def unit(vector: Tensor) -> Tensor:
    """v / ||v||."""
    return vector / torch.sqrt(squared_norm(vector))


def nearest(latent: Tensor, codebook: Tensor) -> int:
    """argmin_k ||z - e_k||, the first of equals."""
    best, least = 0, math.inf
    for k, code in enumerate(codebook):
        distance = squared_norm(latent - code).item()
        if distance < least:
            best, least = k, distance
    return best


def positions(latents: Tensor) -> list[tuple[int, ...]]:
    """(image, index on each grid axis) in raster order."""
    batch, _, *grid = latents.shape
    return list(itertools.product(range(batch), *(range(length) for length in grid)))


def sites(latents: Tensor, num_codebooks: int = 1) -> list[Site]:
    """Every latent, position by position, codebook by codebook."""
    dim = latents.shape[1] // num_codebooks
    found = []
    for n, (b, *place) in enumerate(positions(latents)):
        for m in range(num_codebooks):
            latent = torch.stack([latents[(b, m * dim + d, *place)] for d in range(dim)])
            found.append(Site(latent, m, n, b, tuple(place)))
    return found


def codebook_of(codebook: Tensor, m: int, num_codebooks: int) -> Tensor:
    """The rows (K, D) of codebook m out of (M * K, D)."""
    size = len(codebook) // num_codebooks
    return torch.stack([codebook[m * size + k] for k in range(size)])


def quantize(latents: Tensor, num_codebooks: int, one: Callable[[Site], Chosen]) -> Naive:
    """Every latent by itself, and the vectors and tokens back on the grid."""
    batch, channels, *grid = latents.shape
    vectors, tokens, loss = [], [], latents.new_zeros(())
    for site in sites(latents, num_codebooks):
        vector, token, own_loss = one(site)
        vectors.append(vector)
        tokens.append(token)
        loss = loss + own_loss
    on_grid = torch.cat(vectors).reshape(batch, *grid, channels)
    quantized = on_grid.permute(0, len(grid) + 1, *range(1, len(grid) + 1))
    shape = (batch, *grid) if num_codebooks == 1 else (batch, *grid, num_codebooks)
    return Naive(quantized, torch.tensor(tokens).reshape(shape), loss)


def perplexity(image_tokens: Tensor, num_codebooks: int = 1) -> float:
    """exp(entropy) of the histogram of each codebook's tokens; the mean over codebooks."""
    columns = image_tokens.reshape(-1, num_codebooks).tolist()
    values = []
    for m in range(num_codebooks):
        tokens = [row[m] for row in columns]
        shares = [tokens.count(token) / len(tokens) for token in set(tokens)]
        values.append(math.exp(-sum(share * math.log(share) for share in shares)))
    return sum(values) / num_codebooks
