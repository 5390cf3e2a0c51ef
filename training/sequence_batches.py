"""What a prior trains on."""

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine import ResumableBatches
from hf_vq.token_batches import TokenBatches

REMEMBERED_BYTES = 2**29
OVERHEAD = 256
"""Bytes that remembering an image takes beside its tokens, about."""
ENCODED_AT_ONCE = 16


class SequenceBatches(TokenBatches):
    """Sequences: input_ids, labels and perhaps class_labels; endless, and resumable as `batches` are.

    An image is encoded once: when it comes again, it is known by its pixels. Beyond `REMEMBERED_BYTES` none are added.

    Args:
        batches: `TrainBatches` of images or of their tokens.
        tokenizer: a tokenizer's model.
        start: id of the start token.
    """

    def __init__(self, batches: ResumableBatches, tokenizer: Any, start: int) -> None:
        super().__init__(batches, tokenizer)
        self.start = start
        self.known: dict[bytes, np.ndarray] = {}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in super().__iter__():
            input_ids = nn.functional.pad(batch.pop("image_tokens").flatten(1), (1, 0), value=self.start)
            yield {"input_ids": input_ids, "labels": input_ids, **batch}

    def tokens_of(self, pixel_values: Tensor) -> Tensor:
        # Both sides are in main memory: only what is new goes to the tokenizer.
        keys = [blake2b(image.numpy().tobytes(), digest_size=16).digest() for image in pixel_values]
        new = {key: index for index, key in enumerate(keys) if key not in self.known}
        made = self._encode_in_equal_parts(pixel_values[list(new.values())]) if new else []
        found = dict(zip(new, made, strict=True))
        tokens = np.stack([found[key] if key in found else self.known[key] for key in keys])
        if len(self.known) * (tokens[0].nbytes + OVERHEAD) < REMEMBERED_BYTES:
            self.known |= found
        return torch.from_numpy(tokens).long()

    def _encode_in_equal_parts(self, pixel_values: Tensor) -> list[np.ndarray]:
        """The tokens of images, in batches of one size: in others sums are rounded otherwise, and a run that goes on
        after a stop knows fewer images than one that went through. A token between two codes is the same in both."""
        made: list[np.ndarray] = []
        for part in pixel_values.split(ENCODED_AT_ONCE):
            filled = torch.cat([part, part[:1].expand(ENCODED_AT_ONCE - len(part), -1, -1, -1)])
            made.extend(super().tokens_of(filled)[: len(part)].cpu().numpy().astype(np.int32))
        return made

    def state_dict(self) -> dict[str, Any]:
        """Where `batches` stand."""
        state: dict[str, Any] = self.batches.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after the batch at which `state` was taken."""
        self.batches.load_state_dict(state)
