"""Images as stretches of a language model's sequence: which id stands where, and where the images of a sequence are.

An image is image-start, its h * w * M tokens in raster order with the codebook fastest, and image-end; with row-ends
also one after each row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

__all__ = ["ImageLayout", "Span"]


class Span(NamedTuple):
    """An image in a sequence.

    Attributes:
        start: place of its image-start.
        stop: place after its image-end.
        image_tokens: its tokens, in [0, K), raster order, codebook fastest.
    """

    start: int
    stop: int
    image_tokens: list[int]


@dataclass(frozen=True)
class ImageLayout:
    """The ids of a vocabulary that belong to images, and their order.

    Attributes:
        start_id, end_id: of image-start and image-end.
        row_end_id: of row-end; None for no row-ends.
        first_id: of token 0 of codebook 0; token k of codebook m has first_id + m * codebook_size + k.
        codebook_size, num_codebooks: of the image tokenizer.
        grid_size: (h, w).
    """

    start_id: int
    end_id: int
    row_end_id: int | None
    first_id: int
    codebook_size: int
    num_codebooks: int
    grid_size: tuple[int, int]

    @property
    def length(self) -> int:
        """Ids of an image, from image-start to image-end."""
        return len(self.plan) + 1

    @cached_property
    def plan(self) -> tuple[range, ...]:
        """What may follow image-start, place by place: the ids of a codebook, or of one marker; image-end is last."""
        of_position = [self.ids_of(codebook) for codebook in range(self.num_codebooks)]
        row = of_position * self.grid_size[1] + ([_only(self.row_end_id)] if self.row_end_id is not None else [])
        return (*row * self.grid_size[0], _only(self.end_id))

    @property
    def first_ids(self) -> dict[str, int | None]:
        """Where its ids begin, by name."""
        return {name: getattr(self, name) for name in ("start_id", "end_id", "row_end_id", "first_id")}

    def ids_of(self, codebook: int) -> range:
        """The ids of a codebook's tokens."""
        first = self.first_id + codebook * self.codebook_size
        return range(first, first + self.codebook_size)

    @property
    def code_ids(self) -> range:
        """The ids of all image tokens."""
        return range(self.first_id, self.first_id + self.codebook_size * self.num_codebooks)

    @property
    def marker_ids(self) -> list[int]:
        """The ids of image-start, image-end and row-end."""
        return [self.start_id, self.end_id, *([] if self.row_end_id is None else [self.row_end_id])]

    def owns(self, token_id: int) -> bool:
        """Whether an id belongs to images."""
        return token_id in self.code_ids or token_id in self.marker_ids

    def wrap(self, image_tokens: Sequence[int] | np.ndarray) -> list[int]:
        """The ids of an image, from image-start to image-end.

        Args:
            image_tokens: h * w * M tokens in [0, K), raster order, codebook fastest; or (h, w[, M]).

        Raises: ValueError for another number or order of tokens, or one out of range.
        """
        array = np.asarray(image_tokens)
        codes = self.num_codebooks * self.grid_size[0] * self.grid_size[1]
        grid = (*self.grid_size, *([self.num_codebooks] if self.num_codebooks > 1 else []))
        if array.shape not in ((codes,), grid):
            raise ValueError(
                f"an image of {self._grid} has {codes} tokens, flat or so shaped, and these are of shape {array.shape}"
            )
        tokens = array.ravel().tolist()
        if odd := [token for token in tokens if not 0 <= token < self.codebook_size]:
            raise ValueError(f"image tokens lie in [0, {self.codebook_size}), and one is {odd[0]}")
        coming = iter(tokens)
        body = [ids[next(coming)] if ids[0] in self.code_ids else ids[0] for ids in self.plan]
        return [self.start_id, *body]

    def spans(self, ids: Sequence[int]) -> list[Span]:
        """The images of a sequence, in order.

        Raises: ValueError where an image is cut short, or an id of images stands outside of one.
        """
        spans, place = [], 0
        while place < len(ids):
            if ids[place] == self.start_id:
                spans.append(self._span(ids, place))
                place = spans[-1].stop
            elif self.owns(ids[place]):
                raise ValueError(f"id {ids[place]} at place {place} belongs in an image, and none has begun there")
            else:
                place += 1
        return spans

    def _span(self, ids: Sequence[int], start: int) -> Span:
        body = ids[start + 1 : start + self.length]
        for offset, (found, allowed) in enumerate(zip(body, self.plan, strict=False), start=1):
            if found not in allowed:
                raise ValueError(
                    f"the image that begins at place {start} is not a {self._grid} grid: its id {offset} is {found}, "
                    f"and {_named(allowed)} was to come"
                )
        if len(body) < len(self.plan):
            raise ValueError(
                f"the image that begins at place {start} is cut off after {len(body)} of {len(self.plan)} ids: give "
                f"it room (a longer max_length, or no truncation)"
            )
        tokens = [
            found - allowed[0] for found, allowed in zip(body, self.plan, strict=True) if allowed[0] in self.code_ids
        ]
        return Span(start, start + self.length, tokens)

    @property
    def _grid(self) -> str:
        codebooks = f" x {self.num_codebooks}" if self.num_codebooks > 1 else ""
        return f"{self.grid_size[0]} x {self.grid_size[1]}{codebooks}"


def _only(token_id: int) -> range:
    return range(token_id, token_id + 1)


def _named(ids: range) -> str:
    return str(ids[0]) if len(ids) == 1 else f"one of {ids[0]} to {ids[-1]}"
