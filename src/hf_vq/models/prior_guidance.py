"""Sampling guided away from the null class."""

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor


class ClassGuidance(LogitsProcessor):
    """Scores moved from those of the null class to those of the class, and beyond: null + scale * (class - null).

    In log probabilities (Ho and Salimans 2022, arXiv 2207.12598; for tokens Sanchez et al. 2023, arXiv 2306.17806).

    The null class reads the same tokens with a cache of its own; where they are not those of the step before and one
    more, as beams change places, it reads them again from the start.

    Args:
        prior: the prior.
        scale: 1 changes nothing, more comes closer to the class.
    """

    def __init__(self, prior: Any, scale: float) -> None:
        self.prior, self.scale = prior, scale
        self.seen: Tensor | None = None
        self.cache: Any = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores (B, K + 1) given the class, and input_ids (B, L) so far, to guided scores."""
        goes_on = self.seen is not None and torch.equal(input_ids[:, :-1], self.seen)
        if not goes_on:
            self.cache = self.prior.new_cache()
        unread = input_ids[:, -1:] if goes_on else input_ids
        null = self.prior(unread, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        self.seen = input_ids
        # The start token keeps its score: of the lowest finite numbers differences are not finite.
        null, own = null[:, :-1].to(scores).log_softmax(dim=-1), scores[:, :-1].log_softmax(dim=-1)
        return torch.cat([null + self.scale * (own - null), scores[:, -1:]], dim=1)


__all__ = ["ClassGuidance"]
