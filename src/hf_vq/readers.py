"""Where the next rows come from: readers over tables and streams whose whole state is a few integers.

A data set is dealt to the processes of a run (`rank` of `world_size`), and a process deals its part to its readers, one
for each loader worker. A reader hands out raw rows with `take` until its part of the data is used up; with a seed, its
part is shuffled and never used up. `cursor` is where it stands: a reader opened at a cursor continues there exactly.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
from datasets import Dataset, IterableDataset

from hf_vq.datasets_io import ImageDataset, shard_names

Cursor = dict[str, int]

SHUFFLE_BLOCK = 2048
"""Rows of a stream that are shuffled among each other, next to the order of its shards."""

_MAX_SHARDS = 1024
_MAX_EMPTY_EPOCHS = 100
_ROWS_AT_ONCE = 256


class Row(NamedTuple):
    """A row of the data set, its picture still encoded; its shard, and its number there."""

    cells: dict[str, Any]
    shard: int
    number: int


class Part(NamedTuple):
    """The part of a data set that one reader reads."""

    rank: int = 0
    world_size: int = 1
    reader: int = 0
    num_readers: int = 1


class Reader(Protocol):
    """Hands out rows one after the other."""

    cursor: Cursor

    def take(self, count: int) -> list[Row]:
        """The next rows: at least one and at most `count`; none at the end of the data."""

    def where(self, row: Row) -> str:
        """The row's place in the data set, for messages."""


class TableReader:
    """Rows of a data set with a length.

    The permutations of all epochs, back to back, are one endless sequence. Rank r owns its positions r, r + world_size,
    ..., so that the batches of all ranks, or successive ones of one rank, make up one larger batch. Batch j of a rank
    belongs to its reader j modulo `num_readers`.
    """

    def __init__(self, table: Dataset, part: Part, batch_size: int, seed: int | None, cursor: Cursor | None = None):
        self.table = table
        self.part = part
        self.batch_size = batch_size
        self.seed = seed
        self.cursor = dict(cursor) if cursor else {"taken": 0}
        self._orders: dict[int, np.ndarray] = {}

    def take(self, count: int) -> list[Row]:
        taken = self.cursor["taken"]
        positions = [self._position(index) for index in range(taken, taken + count)]
        if self.seed is None:
            positions = [position for position in positions if position < len(self.table)]
        if not positions:
            return []
        self.cursor["taken"] += len(positions)
        numbers = [self._number(*divmod(position, len(self.table))) for position in positions]
        rows = rows_of(self.table[numbers])
        return [Row(cells, 0, number) for cells, number in zip(rows, numbers, strict=True)]

    def where(self, row: Row) -> str:
        return f"row {row.number}"

    def _position(self, taken: int) -> int:
        batch, offset = divmod(taken, self.batch_size)
        batch = batch * self.part.num_readers + self.part.reader
        return (batch * self.batch_size + offset) * self.part.world_size + self.part.rank

    def _number(self, epoch: int, position: int) -> int:
        if self.seed is None:
            return position
        if epoch not in self._orders:
            # Positions only grow, so that older orders are not needed again.
            self._orders = {old: order for old, order in self._orders.items() if old >= epoch - 1}
            self._orders[epoch] = np.random.default_rng([self.seed, epoch]).permutation(len(self.table))
        return int(self._orders[epoch][position])


class StreamReader:
    """Rows of a stream: its shards in a new order in each epoch, rows shuffled within blocks of `block_size`.

    Each rank reads whole shards, equally many; those left over are read by all ranks, each keeping every
    `world_size`-th row. Continuing re-reads one shard at most. The cursor tells the epoch, the number of the current
    block, the shard (counted in the order of the epoch) and row at which it begins, and the rows taken from it.
    """

    def __init__(self, stream: IterableDataset, part: Part, seed: int | None, cursor: Cursor | None = None):
        self.stream = stream
        self.part = part
        self.seed = seed
        self.block_size = SHUFFLE_BLOCK
        self.cursor = dict(cursor) if cursor else _start_of_epoch(0)
        names = shard_names(stream) or []
        self._names = names if len(names) == _num_shards(stream) else None
        self._open_epoch()

    def take(self, count: int) -> list[Row]:
        while self.cursor["taken"] >= len(self._block):
            if not (self._next_block() or self._next_epoch()):
                return []
        rows = self._block[self.cursor["taken"] :][:count]
        self.cursor["taken"] += len(rows)
        return rows

    def where(self, row: Row) -> str:
        return f"row {row.number} of {self._names[row.shard] if self._names else f'shard {row.shard}'}"

    def _next_block(self) -> bool:
        shard, row = self._block_end
        self.cursor.update(block=self.cursor["block"] + 1, shard=shard, row=row, taken=0)
        self._read_block()
        return bool(self._block)

    def _next_epoch(self) -> bool:
        if self.seed is None:
            return False
        # Where shards are empty, a reader may get nothing in one epoch and something in the next.
        for epoch in range(self.cursor["epoch"] + 1, self.cursor["epoch"] + 1 + _MAX_EMPTY_EPOCHS):
            self.cursor = _start_of_epoch(epoch)
            self._open_epoch()
            if self._block:
                return True
        raise ValueError(f"process {self.part.rank} of {self.part.world_size} gets no rows: use fewer processes")

    def _open_epoch(self) -> None:
        order = np.arange(_num_shards(self.stream))
        if self.seed is not None:
            np.random.default_rng([self.seed, self.cursor["epoch"]]).shuffle(order)
        dealt = len(order) - len(order) % self.part.world_size
        self._shared = set(order[dealt:].tolist())
        shards = [*order[:dealt][self.part.rank :: self.part.world_size].tolist(), *order[dealt:].tolist()]
        self._shards = shards[self.part.reader :: self.part.num_readers]
        self._rows = self._read_rows(self.cursor["shard"], self.cursor["row"])
        self._read_block()

    def _read_block(self) -> None:
        block = list(islice(self._rows, self.block_size))
        self._block_end = self._place_after(block[-1]) if block else (len(self._shards), 0)
        if self.seed is not None:
            place = self.cursor["epoch"], self.part.rank, self.part.reader, self.cursor["block"]
            order = np.random.default_rng([self.seed, *place]).permutation(len(block))
            block = [block[index] for index in order]
        self._block = block

    def _place_after(self, row: Row) -> tuple[int, int]:
        return self._shards.index(row.shard), row.number + 1

    def _read_rows(self, first: int, start: int) -> Iterator[Row]:
        """The rows of this reader's shards in stored order, from row `start` of its shard number `first`."""
        for shard in self._shards[first:]:
            step, offset = (self.part.world_size, self.part.rank) if shard in self._shared else (1, 0)
            for number, cells in enumerate(rows_of_shard(self.stream, shard, _num_shards(self.stream))):
                if number >= start and number % step == offset:
                    yield Row(cells, shard, number)
            start = 0


def count_readers(dataset: ImageDataset, num_workers: int, world_size: int) -> int:
    """How many readers a process opens: one for each loader worker, but of a stream no more than it has shards."""
    if isinstance(dataset, IterableDataset):
        num_workers = min(num_workers, _num_shards(dataset) // world_size)
    return max(1, num_workers)


def open_reader(
    dataset: ImageDataset, part: Part, batch_size: int, seed: int | None, cursor: Cursor | None = None
) -> Reader:
    """The reader of `part` of `dataset`, at `cursor` or at its beginning; endless and shuffled if there is a seed."""
    if isinstance(dataset, IterableDataset):
        return StreamReader(dataset, part, seed, cursor)
    return TableReader(dataset, part, batch_size, seed, cursor)


def _start_of_epoch(epoch: int) -> Cursor:
    return {"epoch": epoch, "block": 0, "shard": 0, "row": 0, "taken": 0}


def rows_of_shard(stream: IterableDataset, shard: int, num_shards: int) -> Iterator[dict[str, Any]]:
    """The rows of one of `num_shards` shards in stored order."""
    # Iterating over a stream divides it among the loader's workers once more; iterating by batches does not.
    for columns in stream.shard(num_shards, shard, contiguous=False).iter(_ROWS_AT_ONCE):
        yield from rows_of(columns)


def rows_of(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """A batch of columns as rows."""
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _num_shards(stream: IterableDataset) -> int:
    # More shards than this, as where each file is one, are read in groups: opening one takes time in their number.
    return min(stream.num_shards, _MAX_SHARDS)
