"""Bulk tokenization: data sets of images, of any size, become data sets of their tokens.

    units of the data set (image_units.py) -> decoded and processed in loader workers -> tokens where the model is
    -> Parquet files (token_writer.py), one for each unit, which appear whole

What is done is skipped when the same command runs again. Many machines share the units by Ray (corpus_ray.py).
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Features
from torch.utils.data import DataLoader, get_worker_info

from hf_vq.decoding import decode_image
from hf_vq.files import replace_file
from hf_vq.image_units import ImageUnit, ImageUnits
from hf_vq.token_writer import TokenFile, bad_examples_of, token_features, token_table
from hf_vq.tokenize_images import PixelBatches, ProcessImages, TokenizeImages

__all__ = ["Corpus"]

logger = logging.getLogger(__name__)

Placed = tuple[str, dict[str, Any]]
"""A row, and before it its place in words."""

JOB_FILE = "tokenize.json"


class Corpus:
    """A data set of images on its way to tokens, in a folder.

    Args:
        folder: gets `data/SPLIT-00000-of-00004.parquet`, a file for each unit, and `tokenize.json`, what was asked for.
        units: of the data set.
        tokenize: makes the tokens.
        job: what was asked for, as JSON holds it; a folder with another job is refused.
        keep_columns: columns that stay, by default all but those of pictures, sounds and the like.
        batch_size: images that are encoded at once.
        max_bad_examples: images that may fail to decode; they are counted, named and left out.
    """

    def __init__(
        self,
        folder: Path,
        units: ImageUnits,
        tokenize: TokenizeImages,
        job: dict[str, Any],
        keep_columns: Sequence[str] | None = None,
        batch_size: int = 64,
        max_bad_examples: int = 100,
    ) -> None:
        if batch_size < 1 or max_bad_examples < 0:
            raise ValueError(f"cannot tokenize with {batch_size=}, {max_bad_examples=}")
        self.folder, self.units, self.tokenize, self.job = folder, units, tokenize, job
        self.batch_size, self.max_bad_examples = batch_size, max_bad_examples
        self.kept = {name: _kept(split, keep_columns) for name, split in units.splits.items()}
        self.description = tokenize.description
        self.schemas = {
            name: self.description.added_to(token_features(self.description, kept).arrow_schema)
            for name, kept in self.kept.items()
        }

    def path(self, unit: ImageUnit) -> Path:
        """The file of a unit."""
        return self.folder / "data" / f"{unit.name}.parquet"

    def claim(self) -> None:
        """Takes the folder for this job, and removes what a killed process left half written.

        Raises: ValueError if another job, or something else, is there.
        """
        claimed = self.folder / JOB_FILE
        if claimed.is_file():
            self._refuse_other(json.loads(claimed.read_text(encoding="utf-8")))
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} is not empty, and no tokenization was begun there: name another folder")
        text = json.dumps(self.job, indent=2) + "\n"
        replace_file(claimed, lambda path: path.write_text(text, encoding="utf-8"))
        for half in self.folder.glob("data/.*.tmp"):
            half.unlink(missing_ok=True)

    def _refuse_other(self, found: dict[str, Any]) -> None:
        differing = [name for name in {**found, **self.job} if found.get(name) != self.job.get(name)]
        if differing:
            what = "; ".join(f"{n} is {found.get(n)!r} there and {self.job.get(n)!r} here" for n in differing)
            raise ValueError(f"{self.folder} belongs to another tokenization: {what}. Name another folder")

    def finished(self) -> list[ImageUnit]:
        """Units whose files are there."""
        return [unit for unit in self.units.units if self.path(unit).is_file()]

    def missing(self) -> list[ImageUnit]:
        """Units that are yet to be done."""
        return [unit for unit in self.units.units if not self.path(unit).is_file()]

    def bad_examples(self) -> dict[str, str]:
        """Images of finished units that could not be decoded, place -> reason."""
        return {place: why for unit in self.finished() for place, why in bad_examples_of(self.path(unit)).items()}

    def num_images(self) -> int:
        """Images of finished units, usable or not."""
        return self.num_rows() + len(self.bad_examples())

    def num_rows(self) -> int:
        """Rows of finished units."""
        return sum(pq.read_metadata(self.path(unit)).num_rows for unit in self.finished())

    def run(self, units: Sequence[ImageUnit], num_workers: int = 0, report: Callable[[int], object] = int) -> None:
        """Tokenizes units. Decoding, model and writing overlap where there are workers.

        Args:
            units: those to do.
            num_workers: loader processes that decode, each a unit at a time; 0 decodes in this process.
            report: is called with the number of images done since the last call.

        Raises: ValueError after too many bad examples; finished files stay.
        """
        batches = _UnitBatches(self.units, units, self.tokenize.process, self.kept, self.batch_size)
        workers = min(num_workers, len(units))
        with _Writing(self, units) as writing:
            for loaded in DataLoader(batches, batch_size=None, num_workers=workers, generator=torch.Generator()):
                writing.add(loaded, self.tokenize.encode(loaded.pixels))
                report(loaded.num_images)


class _Loaded(NamedTuple):
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


class _UnitBatches(torch.utils.data.IterableDataset):
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

    def __iter__(self) -> Iterator[_Loaded]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in range(first, len(self.wanted), step):
            yield from self._read(number)

    def _read(self, number: int) -> Iterator[_Loaded]:
        unit = self.wanted[number]
        rows = self.units.rows(unit)
        batch = list(islice(rows, self.batch_size))
        while True:
            following = list(islice(rows, self.batch_size))
            pixels, good, bad = self._prepare(batch)
            columns = {name: [row[name] for row in good] for name in self.kept[unit.split]}
            yield _Loaded(number, pixels, columns, bad, not following)
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
            return self.process([image for _, image in usable]), [row for (_, row), _ in usable], bad | unusable

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


class _Writing:
    """The files of units under way, written by a thread of their own while the model goes on."""

    def __init__(self, corpus: Corpus, units: Sequence[ImageUnit]) -> None:
        self.corpus, self.units = corpus, units
        self.files: dict[int, TokenFile] = {}
        self.bad: dict[int, dict[str, str]] = {}
        self.num_bad = len(corpus.bad_examples())
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future[None] | None = None

    def __enter__(self) -> "_Writing":
        return self

    def add(self, loaded: _Loaded, tokens: list[np.ndarray]) -> None:
        """Rows of a unit, in their order."""
        self.bad.setdefault(loaded.unit, {}).update(loaded.bad)
        self._check_bad(loaded.bad)
        self._wait()
        self.pending = self.thread.submit(self._write, loaded, tokens)

    def _write(self, loaded: _Loaded, tokens: list[np.ndarray]) -> None:
        unit = self.units[loaded.unit]
        if loaded.unit not in self.files:
            self.files[loaded.unit] = TokenFile(self.corpus.path(unit), self.corpus.schemas[unit.split])
        if tokens:
            self.files[loaded.unit].write(token_table(tokens, loaded.columns, self.corpus.schemas[unit.split]))
        if loaded.is_last:
            self.files.pop(loaded.unit).finish(self.bad.pop(loaded.unit))

    def _check_bad(self, bad: dict[str, str]) -> None:
        for place, reason in bad.items():
            logger.warning("skipped a bad example, %s: %s", place, reason)
        self.num_bad, most = self.num_bad + len(bad), self.corpus.max_bad_examples
        if bad and self.num_bad > most:
            place, reason = list(bad.items())[-1]
            raise ValueError(
                f"more than max_bad_examples={most} images could not be used, the last one at {place}: {reason}. "
                "Repair or remove them, or raise max_bad_examples; what is finished stays"
            )

    def _wait(self) -> None:
        if self.pending is not None:
            self.pending.result()

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                self._wait()
        finally:
            self.thread.shutdown()
            for file in self.files.values():
                file.abandon()


def _kept(dataset: Any, names: Sequence[str] | None) -> Features:
    """The columns that stay.

    Raises: ValueError if one that is asked for is not there.
    """
    features = dataset.features or Features.from_arrow_schema(pa.Table.from_pylist([next(iter(dataset))]).schema)
    if names is None:
        names = [name for name, kind in features.items() if not hasattr(kind, "decode_example")]
    if missing := [name for name in names if name not in features or name == "image"]:
        there = ", ".join(name for name in features if name != "image")
        raise ValueError(f"cannot keep the column {', '.join(missing)}: beside the images there are {there or 'none'}")
    return Features({name: features[name] for name in names})
