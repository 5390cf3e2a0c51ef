"""Batches of image tokens and class labels: made on the fly from images, or read from a token data set."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel
from torch import Tensor

from hf_vq.canonical import canonical
from hf_vq.models.configuration_prior import NO_CLASS
from hf_vq.streams import ToPixelValues
from hf_vq.token_data import TOKEN_COLUMN, TokenDescription

__all__ = ["ToImageTokens", "ToLabelledPixelValues", "TokenBatches", "find_classes", "labels_of"]


@dataclass
class ToImageTokens:
    """The transform for priors: rows of one grid to {"image_tokens": (B, h, w[, M])} and, if known, class_labels.

    Args:
        description: of the data set.
        label_column: where the labels are, None for none.
    """

    description: TokenDescription
    label_column: str | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = {"image_tokens": self._tokens([row[TOKEN_COLUMN] for row in rows])}
        if self.label_column is not None:
            batch["class_labels"] = labels_of(rows, self.label_column)
        return batch

    def _tokens(self, cells: list[Any]) -> Tensor:
        shape = self.description.token_shape
        expected = math.prod(shape)
        lengths = {0 if cell is None else len(cell) for cell in cells}
        if lengths != {expected}:
            raise ValueError(
                f"a row of {TOKEN_COLUMN} has {min(lengths - {expected})} tokens, and grid "
                f"{self.description.grid_size} with {self.description.num_codebooks} codebooks has {expected}"
            )
        return torch.from_numpy(np.array(cells, dtype=np.int64)).view(len(cells), *shape)


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
        return super().__call__(rows) | {"class_labels": labels_of(rows, self.label_column)}


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
        if self.keep_images:
            pixel_values = pixel_values.to(self.tokenizer.device, non_blocking=True)
            others["pixel_values"] = pixel_values
        return {"image_tokens": self.tokens_of(pixel_values), **others}

    def tokens_of(self, pixel_values: Tensor) -> Tensor:
        """Canonical tokens (B, h, w[, M])."""
        with canonical(self.tokenizer):
            there = pixel_values.to(self.tokenizer.device, non_blocking=True)
            tokens: Tensor = self.tokenizer.encode(there).image_tokens
        return tokens


def labels_of(rows: list[dict[str, Any]], label_column: str) -> Tensor:
    """The labels (B,) of rows; where there is none, -1, which is no class."""
    return torch.tensor([NO_CLASS if row[label_column] is None else row[label_column] for row in rows])


def find_classes(dataset: Any, label_column: str | None) -> tuple[str | None, list[str]]:
    """The column of the class labels and the names of the classes; (None, []) where there are none.

    Raises: ValueError if the column asked for does not hold classes.
    """
    features = dataset.features or {}
    columns = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    if label_column == "none" or (label_column is None and len(columns) != 1):
        return None, []
    column = label_column or columns[0]
    if column not in columns:
        found = ", ".join(columns) or "none"
        raise ValueError(f"label_column {column!r} holds no class labels; columns that do: {found}")
    return column, list(features[column].names)
