"""From a data set of images to batches of tensors: sharded, shuffled, exactly resumable, decoded where they are made.

`load_images` opens the data, `TrainBatches` and `EvaluationBatches` deal them to the processes of a run and to the
loader workers of each. Nothing here knows of models or of what starts the processes.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from datasets import IterableDataset
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from hf_vq.datasets_io import ImageDataset, ImageSplits, describe_tokens, load_images, num_examples
from hf_vq.decoding import BadImageError, decode_image
from hf_vq.readers import Cursor, Part, Reader, Row, count_readers, open_reader

__all__ = [
    "BadImageError",
    "EvaluationBatches",
    "ImageSplits",
    "ToPixelValues",
    "TrainBatches",
    "decode_image",
    "describe_tokens",
    "load_images",
    "num_examples",
]

logger = logging.getLogger(__name__)

Transform = Callable[[list[dict[str, Any]]], dict[str, Tensor]]


@dataclass
class ToPixelValues:
    """The transform for image models: rows to {"pixel_values": (B, C, H, W)} by an image processor."""

    processor: Any

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {"pixel_values": self.processor([row["image"] for row in rows], return_tensors="pt")["pixel_values"]}


class _Loaded(NamedTuple):
    """A batch, where its reader stands after it, and the bad examples met on the way: place -> reason."""

    batch: dict[str, Tensor] | None
    reader: int
    cursor: Cursor
    bad: dict[str, str]


class _BatchMaker(torch.utils.data.IterableDataset):
    """What a loader worker runs: it reads, decodes and transforms the batches of one reader."""

    def __init__(self, owner: "_Batches", cursors: list[Cursor | None], first: int):
        self.owner = owner
        self.cursors = cursors
        self.first = first

    def __iter__(self) -> Iterator[_Loaded]:
        worker = get_worker_info()
        # The loader asks its worker 0 first, so worker 0 takes up the reader whose turn it is.
        index = (self.first + (worker.id if worker else 0)) % len(self.cursors)
        reader = self.owner._open_reader(index, self.cursors[index])
        while True:
            rows, bad = self._read_batch(reader)
            if not rows and not bad:
                return
            yield _Loaded(self.owner.transform(rows) if rows else None, index, dict(reader.cursor), bad)

    def _read_batch(self, reader: Reader) -> tuple[list[dict[str, Any]], dict[str, str]]:
        rows: list[dict[str, Any]] = []
        bad: dict[str, str] = {}
        failures_in_a_row = 0
        while len(rows) < self.owner.batch_size and (taken := reader.take(self.owner.batch_size - len(rows))):
            for row in taken:
                try:
                    rows.append(_with_picture(row.cells))
                    failures_in_a_row = 0
                except BadImageError as error:
                    bad[_place(reader, row)] = str(error)
                    failures_in_a_row += 1
                    # A small data set with nothing but bad examples would be read for ever.
                    self.owner._check(max(len(bad), failures_in_a_row), bad)
        return rows, bad


def _with_picture(cells: dict[str, Any]) -> dict[str, Any]:
    return {**cells, "image": decode_image(cells["image"])} if "image" in cells else cells


def _place(reader: Reader, row: Row) -> str:
    cell = row.cells["image"]
    path = cell.get("path") if isinstance(cell, dict) else None
    return reader.where(row) + (f" ({path})" if path else "")


class _Batches:
    """What training and evaluation share: the readers of one process, and the count of bad examples."""

    def __init__(
        self,
        dataset: ImageDataset,
        transform: Transform,
        batch_size: int,
        *,
        seed: int | None,
        rank: int,
        world_size: int,
        num_workers: int,
        max_bad_examples: int,
    ):
        if batch_size < 1 or num_workers < 0 or not 0 <= rank < world_size:
            raise ValueError(f"cannot batch with {batch_size=}, {num_workers=}, {rank=}, {world_size=}")
        if max_bad_examples < 0:
            raise ValueError(f"max_bad_examples must be 0 or more, and is {max_bad_examples}")
        if num_examples(dataset) == 0:
            raise ValueError("the data set has no rows")
        self.dataset = dataset
        self.transform = transform
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.num_workers = num_workers
        self.num_readers = count_readers(dataset, num_workers, world_size)
        self.max_bad_examples = max_bad_examples
        self._bad: list[str] = []

    @property
    def bad_examples(self) -> int:
        """Examples of this process that could not be decoded; one that comes again in a later epoch counts once."""
        return len(self._bad)

    def _open_reader(self, index: int, cursor: Cursor | None) -> Reader:
        part = Part(self.rank, self.world_size, index, self.num_readers)
        return open_reader(self.dataset, part, self.batch_size, self.seed, cursor)

    def _load(self, cursors: list[Cursor | None], first: int) -> Iterator[_Loaded]:
        maker = _BatchMaker(self, list(cursors), first)
        workers = self.num_readers if self.num_workers else 0
        # With a generator of its own the loader leaves torch's global one alone.
        for loaded in DataLoader(maker, batch_size=None, num_workers=workers, generator=torch.Generator()):
            self._count(loaded.bad)
            yield loaded

    def _count(self, bad: dict[str, str]) -> None:
        for place, reason in bad.items():
            if place not in self._bad:
                self._bad.append(place)
                logger.warning("skipped a bad example, %s: %s", place, reason)
        self._check(self.bad_examples, bad)

    def _check(self, count: int, bad: dict[str, str]) -> None:
        if count > self.max_bad_examples:
            place, reason = list(bad.items())[-1]
            raise ValueError(
                f"more than max_bad_examples={self.max_bad_examples} examples could not be decoded, the last one at "
                f"{place}: {reason}. Repair or remove them, or raise max_bad_examples"
            )


class TrainBatches(_Batches):
    """Endless shuffled batches of one process; `state_dict` after any batch continues with the next one exactly.

    Batches are always full and run across the end of an epoch. In each epoch every example comes once, in one of the
    processes. The batches of a table (data with a length) are contiguous pieces of one sequence, whatever
    `num_workers`; of a stream, loader workers read different shards.

    Args:
        dataset: rows as `load_images` gives them, with an undecoded picture in "image" or without pictures.
        transform: from rows, whose "image", if any, is now a PIL image, to a dict of tensors; it runs in the loader
            workers, and must be deterministic if continued runs are to equal uninterrupted ones.
        batch_size: examples in a batch of this process.
        seed: of the order, alike in all processes.
        rank: this process, in [0, world_size).
        world_size: number of processes.
        num_workers: loader workers of this process, 0 for none; a stream uses at most one for each of its shards.
        max_bad_examples: how many examples of this process may fail to decode (they are logged and skipped).
    """

    def __init__(
        self,
        dataset: ImageDataset,
        transform: Transform,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        max_bad_examples: int = 100,
    ):
        super().__init__(
            dataset,
            transform,
            batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
            max_bad_examples=max_bad_examples,
        )
        self._cursors: list[Cursor | None] = [None] * self.num_readers
        self._next_reader = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Batches from where the last iteration stopped, or from where `load_state_dict` points."""
        for loaded in self._load(self._cursors, self._next_reader):
            self._cursors[loaded.reader] = loaded.cursor
            self._next_reader = (loaded.reader + 1) % self.num_readers
            if loaded.batch is not None:
                yield loaded.batch

    def state_dict(self) -> dict[str, Any]:
        """Where this process stands after the batch it got last, in plain JSON."""
        return {
            "layout": self._layout(),
            "cursors": [cursor and dict(cursor) for cursor in self._cursors],
            "next_reader": self._next_reader,
            "bad_examples": list(self._bad),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch at which `state` was taken; iterate anew after it.

        Raises:
            ValueError: the state belongs to other data or to another way of dealing them.
        """
        saved, layout = state["layout"], self._layout()
        changed = [
            f"{key} was {saved.get(key)}, is {value}" for key, value in layout.items() if saved.get(key) != value
        ]
        if changed:
            raise ValueError(f"cannot continue in the data, since {'; '.join(changed)}: restore it or start anew")
        self._cursors = [cursor and dict(cursor) for cursor in state["cursors"]]
        self._next_reader = state["next_reader"]
        self._bad = list(state["bad_examples"])

    def _layout(self) -> dict[str, int | None]:
        return {
            "seed": self.seed,
            "rank": self.rank,
            "world_size": self.world_size,
            "batch_size": self.batch_size,
            "loader_workers": self.num_readers,
            "num_examples": num_examples(self.dataset),
        }


class EvaluationBatches(_Batches):
    """The data set once, in order; every example comes exactly once in one of the processes, the last batch is short.

    Process r of a table gets rows r, r + world_size, ...; of a stream, its shards. With loader workers, the batches of
    a stream's shards alternate. Each iteration starts from the beginning, and counts bad examples anew. For the
    arguments see `TrainBatches`.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        transform: Transform,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        max_bad_examples: int = 100,
    ):
        super().__init__(
            dataset,
            transform,
            batch_size,
            seed=None,
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
            max_bad_examples=max_bad_examples,
        )

    @property
    def num_images(self) -> int | None:
        """How many images this process gets, the bad ones among them; None where the shares of a stream are unknown."""
        total = num_examples(self.dataset)
        if total is None or (isinstance(self.dataset, IterableDataset) and self.world_size > 1):
            return None
        return len(range(self.rank, total, self.world_size))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self._bad.clear()
        for loaded in self._load([None] * self.num_readers, 0):
            if loaded.batch is not None:
                yield loaded.batch
