"""What a prior trains on."""

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine import ResumableBatches
from hf_vq.token_batches import TokenBatches

REMEMBERED_TOKENS = 2**27


class SequenceBatches(TokenBatches):
    """Sequences: input_ids, labels and perhaps class_labels; endless, and resumable as `batches` are.

    An image is encoded once: when it comes again, it is known by its pixels. Beyond `REMEMBERED_TOKENS` none are added.

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
        made: Any = super().tokens_of(pixel_values[list(new.values())]).cpu().numpy() if new else ()
        found = {key: tokens.astype(np.int32) for key, tokens in zip(new, made, strict=True)}
        tokens = np.stack([found[key] if key in found else self.known[key] for key in keys])
        if len(self.known) * tokens[0].size < REMEMBERED_TOKENS:
            self.known |= found
        return torch.from_numpy(tokens).long()

    def state_dict(self) -> dict[str, Any]:
        """Where `batches` stand."""
        state: dict[str, Any] = self.batches.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after the batch at which `state` was taken."""
        self.batches.load_state_dict(state)
