"""Finite scalar quantization: a grid instead of a codebook (FSQ, Mentzer et al. 2023, arXiv 2309.15505)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .quantizers import Quantizer, RowOutput, pick

# The outermost levels must be reachable by a finite latent.
STRETCH = 1 + 1e-3


class FiniteScalarQuantizer(Quantizer):
    """Each component is squashed to (-1, 1) and rounded to one of L values; the codes are all combinations.

    Component i becomes round(tanh(z + atanh(o / h)) h - o) / floor(L / 2), with h = (L - 1) / 2 * 1.001 and o = 1/2 for
    an even L, 0 for an odd one. Rounding passes gradients straight through. There is nothing to learn and no loss:
    choose it where a codebook would be large (from about 2^11 codes on), or to have no codebook to worry about. Codes
    count the levels of the first component fastest.

    Args:
        levels: L of each component; K is their product and D their number.
        num_codebooks: M groups of D components each.
    """

    def __init__(self, levels: Sequence[int], num_codebooks: int = 1) -> None:
        super().__init__(math.prod(levels), len(levels), num_codebooks)
        self.levels = tuple(levels)
        self.codebook.weight.requires_grad_(False)

    def quantize_rows(self, rows: Tensor, variance: Tensor | None = None) -> RowOutput:
        bounded = self.bound(rows)
        steps = bounded.round()
        codes = self.to_codes(steps)
        if self.training:
            vectors = (bounded + (steps - bounded).detach()) / self.half_widths(rows)
        else:
            vectors = pick(self.vectors(), codes).to(rows.dtype)
        return RowOutput(vectors, codes, rows.new_zeros(rows.shape[:2]))

    def search_rows(self, rows: Tensor, variance: Tensor | None = None) -> Tensor:
        return self.to_codes(self.bound(rows).round())

    def comparable(self, rows: Tensor) -> Tensor:
        """Squashed, in the units of the codebook."""
        return self.bound(rows) / self.half_widths(rows)

    def bound(self, rows: Tensor) -> Tensor:
        """Rows (M, N, D) squashed so that rounding gives L values, from -floor(L / 2) up."""
        levels = rows.new_tensor(self.levels)
        half = (levels - 1) / 2 * STRETCH
        offset = (levels % 2 == 0) / 2
        return (rows + (offset / half).atanh()).tanh() * half - offset

    def to_codes(self, steps: Tensor) -> Tensor:
        """Rounded components (M, N, D) as codes (M, N)."""
        digits = steps.detach() + self.half_widths(steps)
        # A latent that is NaN must reach the loss, which tells of it, and not an index.
        digits = digits.nan_to_num(0.0).long()
        return (digits * self.place_values(digits)).sum(dim=-1)

    def half_widths(self, like: Tensor) -> Tensor:
        """floor(L / 2) of each component, (D,)."""
        return like.new_tensor([level // 2 for level in self.levels])

    def place_values(self, like: Tensor) -> Tensor:
        """What a step of each component adds to the code, (D,)."""
        return like.new_tensor([math.prod(self.levels[:place]) for place in range(len(self.levels))])

    def initial_state(self) -> dict[str, Tensor]:
        """The grid of all codes, in their order, for each codebook."""
        codes = torch.arange(self.codebook_size, device=self.codebook.weight.device)[:, None]
        levels, places = codes.new_tensor(self.levels), self.place_values(codes)
        grid = (codes // places % levels - levels // 2) / (levels // 2)
        return {"codebook.weight": grid.to(self.codebook.weight.dtype).repeat(self.num_codebooks, 1)}


__all__ = ["FiniteScalarQuantizer"]
