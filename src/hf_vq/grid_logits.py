"""Generation that stays on the grid."""

import torch
from torch import Tensor
from transformers import LogitsProcessor

from hf_vq.image_layout import ImageLayout

__all__ = ["ImageGridLogitsProcessor"]


class ImageGridLogitsProcessor(LogitsProcessor):
    """Lets a language model write whole images only.

    After image-start come exactly the tokens of a grid, row-ends where they belong, then image-end; outside of images
    no id of images but image-start. What may come is read from the sequence itself, so that beams, batches and caches
    of any kind need no bookkeeping.

    Args:
        layout: of the images.
        vocab_size: ids of text and images together; a model may score more, of which none comes.
        max_length: of the sequences, prompt included; an image that would not fit is not begun. None for no limit.
        allow_images: whether an image may begin.
    """

    def __init__(
        self, layout: ImageLayout, vocab_size: int, max_length: int | None = None, allow_images: bool = True
    ) -> None:
        self.layout, self.vocab_size = layout, vocab_size
        self.max_length, self.allow_images = max_length, allow_images
        self._rules: Tensor | None = None
        self._kinds = list(dict.fromkeys(layout.plan))
        self._kind_of_place = torch.tensor([self._kinds.index(ids) for ids in layout.plan])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores (B, V) of the ids after input_ids (B, S), -inf where an id must not come.

        Where earlier processors have left nothing that may come, whatever may come is as likely.

        Raises: ValueError if the model does not score the images' ids.
        """
        rules = self._rules_for(scores)
        fits = self.max_length is None or input_ids.shape[1] + self.layout.length <= self.max_length
        outside = len(rules) - (1 if self.allow_images and fits else 2)
        state = self._states(input_ids)
        kinds = self._kind_of_place.to(scores.device)
        allowed = rules[torch.where(state < 0, outside, kinds[state.clamp(min=0)])]
        kept = scores.masked_fill(~allowed, -torch.inf)
        nothing_left = kept.isneginf().all(dim=1, keepdim=True)
        return torch.where(nothing_left & allowed, 0.0, kept)

    def _states(self, input_ids: Tensor) -> Tensor:
        """(B,): how many ids of its last image a sequence has after image-start; -1 outside of images."""
        if input_ids.shape[1] == 0:
            return input_ids.new_full((len(input_ids),), -1)
        places = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
        begun = torch.where(input_ids == self.layout.start_id, places, 0).amax(1)
        since = input_ids.shape[1] - begun
        return torch.where((begun > 0) & (since < len(self.layout.plan)), since, -1)

    def _rules_for(self, scores: Tensor) -> Tensor:
        """(kinds + 2, V): what may come at each kind of place; outside of images without image-start; with it."""
        vocabulary = scores.shape[-1]
        if self._rules is None or self._rules.shape[1] != vocabulary or self._rules.device != scores.device:
            if self.vocab_size > vocabulary:
                raise ValueError(
                    f"the model scores {vocabulary} ids, and text and images have {self.vocab_size}: give it their "
                    f"embeddings by resize_embeddings"
                )
            in_images = torch.zeros(len(self._kinds), vocabulary, dtype=torch.bool)
            for rule, ids in zip(in_images, self._kinds, strict=True):
                rule[ids.start : ids.stop] = True
            text = torch.arange(vocabulary) < self.vocab_size
            text[[*self.layout.code_ids, *self.layout.marker_ids]] = False
            text_or_start = text.index_fill(0, torch.tensor(self.layout.start_id), True)
            self._rules = torch.cat([in_images, torch.stack([text, text_or_start])]).to(scores.device)
        return self._rules
