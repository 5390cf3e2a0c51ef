"""What a prior trains on."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from engine import ResumableBatches
from hf_vq.token_batches import TokenBatches


class SequenceBatches(TokenBatches):
    """Sequences: input_ids, labels and perhaps class_labels; endless, and resumable as `batches` are.

    Args:
        batches: `TrainBatches` of images or of their tokens.
        tokenizer: a tokenizer's model.
        start: id of the start token.
    """

    def __init__(self, batches: ResumableBatches, tokenizer: Any, start: int) -> None:
        super().__init__(batches, tokenizer)
        self.start = start

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in super().__iter__():
            input_ids = nn.functional.pad(batch.pop("image_tokens").flatten(1), (1, 0), value=self.start)
            yield {"input_ids": input_ids, "labels": input_ids, **batch}

    def state_dict(self) -> dict[str, Any]:
        """Where `batches` stand."""
        state: dict[str, Any] = self.batches.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after the batch at which `state` was taken."""
        self.batches.load_state_dict(state)
