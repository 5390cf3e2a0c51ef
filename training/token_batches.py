"""What a prior is trained and measured on: tokens, made on the fly from images or read from a token data set."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_vq.canonical import canonical
from hf_vq.streams import ToPixelValues, TrainBatches


class TokenBatches:
    """Batches of image tokens: those of a token data set as they are, those of images made by a tokenizer.

    Args:
        batches: yields pixel_values or image_tokens, and perhaps class_labels.
        tokenizer: a tokenizer's model.
        keep_images: whether the pixel_values come along.
    """

    def __init__(self, batches: Any, tokenizer: Any, keep_images: bool = False) -> None:
        self.batches, self.tokenizer, self.keep_images = batches, tokenizer, keep_images

    @property
    def num_images(self) -> int | None:
        """How many images come, None if nobody knows."""
        return getattr(self.batches, "num_images", None)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.batches:
            yield batch if "image_tokens" in batch else self._encoded(**batch)

    def _encoded(self, pixel_values: Tensor, **others: Tensor) -> dict[str, Tensor]:
        pixel_values = pixel_values.to(self.tokenizer.device, non_blocking=True)
        with canonical(self.tokenizer):
            image_tokens = self.tokenizer.encode(pixel_values).image_tokens
        kept = {"pixel_values": pixel_values} if self.keep_images else {}
        return {"image_tokens": image_tokens, **kept, **others}


class SequenceBatches(TokenBatches):
    """What a prior trains on: input_ids, labels and perhaps class_labels; endless, and resumable as `batches` are.

    Args:
        batches: `TrainBatches` of images or of their tokens.
        tokenizer: a tokenizer's model.
        start: id of the start token.
    """

    def __init__(self, batches: TrainBatches, tokenizer: Any, start: int) -> None:
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


class ToLabelledPixelValues(ToPixelValues):
    """Rows to pixel_values and class_labels.

    Args:
        processor: an image processor.
        label_column: where the labels are.
    """

    def __init__(self, processor: Any, label_column: str) -> None:
        super().__init__(processor)
        self.label_column = label_column

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return super().__call__(rows) | {"class_labels": torch.tensor([row[self.label_column] for row in rows])}
