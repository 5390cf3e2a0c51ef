"""Sequences as a language model reads them: ids, what is to be learned of each, and all of a batch to one length."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from transformers import BatchFeature

__all__ = ["IGNORED", "Piece", "Row", "check_labels", "make_row", "pad_rows"]

IGNORED = -100
LABELS = {"all": (True, False), "image": (True,), "text": (False,)}
"""What labels are wanted -> of which pieces, by `is_image`."""


class Piece(NamedTuple):
    """Ids that belong together: a stretch of text, or a whole image; `train` is whether labels may come of them."""

    ids: list[int]
    is_image: bool = False
    train: bool = True


class Row(NamedTuple):
    """A sequence: its ids, and beside each its label, the id itself or -100."""

    ids: list[int]
    labels: list[int]


def check_labels(labels: str | None) -> None:
    """Raises a ValueError for labels that are none of `LABELS`, nor None."""
    if labels is not None and not (isinstance(labels, str) and labels in LABELS):
        raise ValueError(f"labels must be one of {', '.join(LABELS)} or None, and is {labels!r}")


def make_row(pieces: Iterable[Piece], labels: str | None) -> Row:
    """The row of pieces, whose labels `check_labels` has let pass."""
    wanted = () if labels is None else LABELS[labels]
    row = Row([], [])
    for piece in pieces:
        row.ids.extend(piece.ids)
        row.labels.extend(piece.ids if piece.train and piece.is_image in wanted else [IGNORED] * len(piece.ids))
    return row


def pad_rows(
    rows: list[Row], tokenizer: Any, with_labels: bool, return_tensors: str | None, **padding: Any
) -> BatchFeature:
    """input_ids, attention_mask and perhaps labels, as the text tokenizer pads.

    Args:
        rows: of a batch.
        tokenizer: of the text.
        with_labels: whether labels are wanted; those of padding are -100.
        return_tensors: "pt" or "np"; None for lists.
        padding: padding, padding_side, max_length, pad_to_multiple_of.
    """
    ids = [row.ids for row in rows]
    data = dict(tokenizer.pad({"input_ids": ids}, return_attention_mask=True, **padding))
    if with_labels:
        is_left = (padding.get("padding_side") or tokenizer.padding_side) == "left"
        gaps = [[IGNORED] * (len(padded) - len(own)) for padded, own in zip(data["input_ids"], ids, strict=True)]
        data["labels"] = [
            gap + row.labels if is_left else row.labels + gap for gap, row in zip(gaps, rows, strict=True)
        ]
    return BatchFeature(data, tensor_type=return_tensors)
