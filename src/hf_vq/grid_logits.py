"""Generation that stays on the grid."""

import torch
from torch import Tensor
from transformers import LogitsProcessor

from hf_vq.image_layout import ImageLayout

__all__ = ["ImageGridLogitsProcessor"]


class ImageGridLogitsProcessor(LogitsProcessor):
    """Lets a language model write whole images only.

    After image-start come exactly the tokens of a grid, row-ends where they belong, then image-end; outside of images
    no id of images but image-start.

    What may come is read from the sequence itself, so that beams, batches and caches of any kind need no bookkeeping.

    Args:
        layout: of the images.
        max_length: of the sequences, prompt included; an image that would not fit is not begun. None for no limit.
        allow_images: whether an image may begin.
    """

    def __init__(self, layout: ImageLayout, max_length: int | None = None, allow_images: bool = True) -> None:
        self.layout, self.max_length, self.allow_images = layout, max_length, allow_images
        self._allowed: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores (B, V) of the ids after input_ids (B, S), -inf where an id must not come.

        Raises: ValueError if the vocabulary does not hold the images' ids.
        """
        allowed = self._rules(scores)
        state = self._states(input_ids)
        may_begin = self.allow_images and (
            self.max_length is None or input_ids.shape[1] + self.layout.length <= self.max_length
        )
        outside = allowed[-1] if may_begin else allowed[-1] & (self._ids(scores) != self.layout.start_id)
        mask = torch.where((state < 0)[:, None], outside, allowed[state.clamp(min=0)])
        return scores.masked_fill(~mask, -torch.inf)

    def _states(self, input_ids: Tensor) -> Tensor:
        """(B,): how many ids of its last image a sequence has after image-start; -1 outside of images."""
        places = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
        begun = torch.where(input_ids == self.layout.start_id, places, 0).amax(1)
        since = input_ids.shape[1] - begun
        return torch.where((begun > 0) & (since < len(self.layout.plan)), since, -1)

    def _rules(self, scores: Tensor) -> Tensor:
        """(places of an image + 1, V): what may come at each place after image-start, and last outside of images."""
        vocabulary = scores.shape[-1]
        if self._allowed is None or self._allowed.shape[1] != vocabulary or self._allowed.device != scores.device:
            ids = [*self.layout.code_ids, *self.layout.marker_ids]
            if max(ids) >= vocabulary:
                raise ValueError(
                    f"the model scores {vocabulary} ids, and images have ids up to {max(ids)}: give the model their "
                    f"embeddings by resize_embeddings"
                )
            rules = torch.zeros(len(self.layout.plan) + 1, vocabulary, dtype=torch.bool)
            for rule, allowed in zip(rules, self.layout.plan, strict=False):
                rule[allowed.start : allowed.stop] = True
            rules[-1] = True
            rules[-1, [token_id for token_id in ids if token_id != self.layout.start_id]] = False
            self._allowed = rules.to(scores.device)
        return self._allowed

    @staticmethod
    def _ids(scores: Tensor) -> Tensor:
        return torch.arange(scores.shape[-1], device=scores.device)
