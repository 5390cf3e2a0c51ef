"""From the trunk's output at a position to scores of the codes there: one codebook, or several one after the other.

Letters: B sequences, P positions, M codebooks of K codes, W the trunk's width. Slots are the P * M tokens of P
positions, codebook fastest.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ScoreHead(nn.Module):
    """A position's only token: a linear map of the trunk's output."""

    def __init__(self, hidden_size: int, codebook_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.scores = nn.Linear(hidden_size, codebook_size)

    def tables(self) -> list[list[Tensor]]:
        """For each codebook the weights with a row (W,) for each of its K codes."""
        return [[self.scores.weight]]

    def forward(self, hidden: Tensor, codes: Tensor, first: int) -> Tensor:
        """hidden (B, P, W) to scores (B, P - first, K) from position `first` on; codes are not looked at."""
        return self.scores(self.norm(hidden[:, first:]))


class DepthHead(nn.Module):
    """A position's M tokens, each given those before it: embeddings of these join the trunk's output in a small MLP."""

    def __init__(self, hidden_size: int, codebook_size: int, num_codebooks: int) -> None:
        super().__init__()
        self.codebook_size, self.num_codebooks = codebook_size, num_codebooks
        # The last codebook's codes are never before another.
        self.earlier = nn.Embedding((num_codebooks - 1) * codebook_size, hidden_size)
        self.codebook = nn.Embedding(num_codebooks, hidden_size)
        self.norm_in, self.norm_out = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.widen, self.narrow = nn.Linear(hidden_size, 4 * hidden_size), nn.Linear(4 * hidden_size, hidden_size)
        self.scores: Any = nn.ModuleList(nn.Linear(hidden_size, codebook_size) for _ in range(num_codebooks))

    def tables(self) -> list[list[Tensor]]:
        """For each codebook the weights with a row (W,) for each of its K codes."""
        earlier = [[rows] for rows in self.earlier.weight.split(self.codebook_size)]
        return [[head.weight, *rows] for head, rows in zip(self.scores, [*earlier, []], strict=True)]

    def forward(self, hidden: Tensor, codes: Tensor, first: int) -> Tensor:
        """Scores (B, P * M - first, K) of the slots from `first` on.

        Args:
            hidden: (B, P, W).
            codes: (B, P, M); those that no slot asked for comes after may hold anything in [0, K).
        """
        slots = (hidden.unsqueeze(2) + self.before(codes) + self.codebook.weight).flatten(1, 2)[:, first:]
        slots = slots + self.narrow(F.gelu(self.widen(self.norm_in(slots))))
        slots = self.norm_out(slots)
        logits = slots.new_empty(*slots.shape[:2], self.codebook_size)
        for codebook, scores in enumerate(self.scores):
            own = slice((codebook - first) % self.num_codebooks, None, self.num_codebooks)
            logits[:, own] = scores(slots[:, own])
        return logits

    def before(self, codes: Tensor) -> Tensor:
        """The sum of the embeddings of the codes before each, (B, P, M, W)."""
        offsets = torch.arange(self.num_codebooks - 1, device=codes.device) * self.codebook_size
        sums = self.earlier(codes[..., :-1] + offsets).cumsum(dim=2)
        return F.pad(sums, (0, 0, 1, 0))


__all__ = ["DepthHead", "ScoreHead"]
