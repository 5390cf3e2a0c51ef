"""A data set of images in units, each of which becomes one file: what is done, and done again, as a whole."""

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset

from hf_vq.datasets_io import ImageSource, shard_names
from hf_vq.held_out import count_rows, num_examples, row_groups
from hf_vq.readers import rows_of, rows_of_shard

__all__ = ["ImageUnit", "ImageUnits"]

_ROWS_AT_ONCE = 256

Piece = tuple[int, int, int | None]
"""First row or shard, the one after the last, and the number of rows."""


class ImageUnit(NamedTuple):
    """Neighbouring rows of a split.

    Attributes:
        split: its name.
        number: of this unit, counted from 0 in the order of the rows.
        total: units of the split.
        first, last: of a table the rows, of a stream the shards from `first` up to but not including `last`.
        num_rows: None where nobody knows before they are read.
    """

    split: str
    number: int
    total: int
    first: int
    last: int
    num_rows: int | None

    @property
    def name(self) -> str:
        """What to call its file, but for the suffix: "train-00000-of-00004"."""
        return f"{self.split}-{self.number:05d}-of-{self.total:05d}"


class ImageUnits:
    """The units of all splits of a data set, always the same ones.

    A unit is a file of the data set, or if that has more than `rows_per_file` rows and is Parquet, some of its row
    groups; of a table it is so many rows.

    Args:
        source: as `open_splits` gives it.
        rows_per_file: rows from which on a file is cut.
    """

    def __init__(self, source: ImageSource, rows_per_file: int) -> None:
        if rows_per_file < 1:
            raise ValueError(f"rows_per_file must be at least 1, got {rows_per_file}")
        self.source, self.splits = source, dict(source.splits)
        self._names: dict[str, list[str]] = {}
        self.units: list[ImageUnit] = []
        for name, dataset in source.splits.items():
            is_table = isinstance(dataset, Dataset)
            pieces = _of_table(dataset, rows_per_file) if is_table else self._of_stream(name, dataset, rows_per_file)
            self.units += [ImageUnit(name, number, len(pieces), *piece) for number, piece in enumerate(pieces)]

    @property
    def num_rows(self) -> int | None:
        """Of all units, None where nobody knows."""
        rows = [unit.num_rows for unit in self.units]
        return None if None in rows else sum(row for row in rows if row is not None)

    def hash(self) -> str:
        """sha256 of the units and of the version of every file: of what must not change under way."""
        return hashlib.sha256(repr((self.units, self.source.version)).encode()).hexdigest()

    def rows(self, unit: ImageUnit) -> Iterator[tuple[str, dict[str, Any]]]:
        """The rows of a unit in stored order, pictures undecoded, each with its place in words."""
        dataset = self.splits[unit.split]
        if isinstance(dataset, Dataset):
            for start in range(unit.first, unit.last, _ROWS_AT_ONCE):
                numbers = range(start, min(start + _ROWS_AT_ONCE, unit.last))
                yield from zip((f"row {number}" for number in numbers), rows_of(dataset[list(numbers)]), strict=True)
            return
        for shard in range(unit.first, unit.last):
            name = self._names[unit.split][shard] if unit.split in self._names else f"shard {shard}"
            cells = enumerate(rows_of_shard(dataset, shard, dataset.num_shards))
            yield from ((f"row {number} of {name}", row) for number, row in cells)

    def _of_stream(self, split: str, stream: IterableDataset, most: int) -> list[Piece]:
        """(first shard, last shard, rows) of each unit; notes the names of the shards."""
        files = shard_names(stream)
        if files is None:
            rows = num_examples(stream) if stream.num_shards == 1 else None
            return [(shard, shard + 1, rows) for shard in range(stream.num_shards)]
        count_rows(files)  # reads all footers at once
        if max(sum(row_groups(file)) for file in files) <= most:
            self._names[split] = files
            return [(shard, shard + 1, sum(row_groups(file))) for shard, file in enumerate(files)]
        self.splits[split] = stream.reshard()
        self._names[split] = [f"{file}, row group {g}" for file in files for g in range(len(row_groups(file)))]
        pieces, shard = list[Piece](), 0
        for file in files:
            for rows_of_groups in _filled(row_groups(file), most):
                pieces.append((shard, shard + len(rows_of_groups), sum(rows_of_groups)))
                shard += len(rows_of_groups)
        return pieces


def _of_table(table: Dataset, most: int) -> list[Piece]:
    ranges = [(first, min(first + most, len(table))) for first in range(0, len(table), most)]
    return [(first, last, last - first) for first, last in ranges]


def _filled(sizes: list[int], most: int) -> list[list[int]]:
    """Neighbouring sizes together, as long as their sum is not above `most`."""
    filled: list[list[int]] = [[]]
    for size in sizes:
        if filled[-1] and sum(filled[-1]) + size > most:
            filled.append([])
        filled[-1].append(size)
    return filled
