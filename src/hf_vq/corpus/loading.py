"""Rows of units, decoded and processed where they are loaded: in loader workers, or here."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from datasets import Features
from torch.utils.data import get_worker_info

from hf_vq.corpus.transform import PixelBatches, ProcessImages
from hf_vq.corpus.units import ImageUnit, ImageUnits
from hf_vq.decoding import decode_image

__all__ = ["LoadedRows", "UnitBatches"]

Placed = tuple[str, dict[str, Any]]
"""A row, and before it its place in words."""


class LoadedRows(NamedTuple):
    """Some rows of a unit, ready for the model."""

    unit: int
    pixels: PixelBatches
    columns: dict[str, list[Any]]
    bad: dict[str, str]
    is_last: bool

    @property
    def num_images(self) -> int:
        """Good and bad."""
        return sum(len(numbers) for numbers, _ in self.pixels) + len(self.bad)


class UnitBatches(torch.utils.data.IterableDataset):
    """What a loader worker runs: every `num_workers`-th unit, decoded and processed."""

    def __init__(
        self,
        units: ImageUnits,
        wanted: Sequence[ImageUnit],
        process: ProcessImages,
        kept: dict[str, Features],
        batch_size: int,
    ) -> None:
        self.units, self.wanted, self.process, self.kept = units, wanted, process, kept
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[LoadedRows]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in range(first, len(self.wanted), step):
            yield from self._read(number)

    def _read(self, number: int) -> Iterator[LoadedRows]:
        unit = self.wanted[number]
        rows = self.units.rows(unit)
        batch = list(islice(rows, self.batch_size))
        while True:
            following = list(islice(rows, self.batch_size))
            pixels, good, bad = self._prepare(batch)
            columns = {name: [row[name] for row in good] for name in self.kept[unit.split]}
            yield LoadedRows(number, pixels, columns, bad, not following)
            if not following:
                return
            batch = following

    def _prepare(self, batch: list[Placed]) -> tuple[PixelBatches, list[dict[str, Any]], dict[str, str]]:
        """Pictures for the model, the rows they belong to, and why others have none: place -> reason."""
        good, bad = _sorted_out(batch, lambda row: decode_image(row["image"]))
        try:
            return self.process([image for _, image in good]) if good else [], [row for (_, row), _ in good], bad
        except ValueError:
            # The processor cannot use one of them: which?
            usable, unusable = _sorted_out([placed for placed, _ in good], self._processed)
            images = [image for _, image in usable]
            return self.process(images) if images else [], [row for (_, row), _ in usable], bad | unusable

    def _processed(self, row: dict[str, Any]) -> Any:
        """The picture of a row, if the processor takes it."""
        image = decode_image(row["image"])
        self.process([image])
        return image


def _sorted_out(
    batch: list[Placed], take: Callable[[dict[str, Any]], Any]
) -> tuple[list[tuple[Placed, Any]], dict[str, str]]:
    """Rows with what `take` makes of them, and why it makes nothing of others: place -> reason."""
    good, bad = list[tuple[Placed, Any]](), dict[str, str]()
    for place, row in batch:
        try:
            good.append(((place, row), take(row)))
        except ValueError as error:
            bad[_named(place, row["image"])] = str(error)
    return good, bad


def _named(place: str, cell: Any) -> str:
    path = cell.get("path") if isinstance(cell, dict) else None
    return f"{place} ({path})" if path else place
