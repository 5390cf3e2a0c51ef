"""A data set of images on its way to tokens: what is done, what is missing, and the doing."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Features, Image
from filelock import FileLock, Timeout
from torch.utils.data import DataLoader

from hf_vq.corpus.loading import UnitBatches
from hf_vq.corpus.token_file import bad_examples_of, token_features
from hf_vq.corpus.transform import TokenizeImages
from hf_vq.corpus.units import ImageUnit, ImageUnits
from hf_vq.corpus.writing import UnitFiles
from hf_vq.files import replace_file

__all__ = ["JOB_FILE", "Corpus", "read_job"]

JOB_FILE = "tokenize.json"
CHANGED = {
    "tokenizer_commit": "the tokenizer's commit is another",
    "tokenizer_fingerprint": "the tokenizer has changed",
    "processor_hash": "the image processor has changed",
    "dataset_commit": "the data set's commit is another",
    "images_hash": "the images have changed",
}
"""Parts of a job that say nothing to people, in words."""


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
        self._num_bad: int | None = None
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

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Holds the folder for this job, and removes what a killed process left half written.

        Raises: ValueError if another job, another process at work, or something else is there.
        """
        begun = (self.folder / JOB_FILE).is_file()
        if begun:
            self.refuse_other()
        elif self.folder.exists() and any(not path.name.startswith(".") for path in self.folder.iterdir()):
            raise ValueError(f"{self.folder} is not empty, and no tokenization was begun there: name another folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            # The system lets go of the lock when the process ends, however it does.
            with FileLock(self.folder / ".lock", timeout=0):
                if not begun:
                    text = json.dumps(self.job, indent=2) + "\n"
                    replace_file(self.folder / JOB_FILE, lambda path: path.write_text(text, encoding="utf-8"))
                for half in [*self.folder.glob(".*.tmp"), *self.folder.glob("data/.*.tmp")]:
                    half.unlink(missing_ok=True)
                yield
        except Timeout as error:
            raise ValueError(f"another process is tokenizing to {self.folder}: wait for it, or stop it") from error

    def refuse_other(self) -> None:
        """Raises a ValueError that names the differences if the folder is that of another job."""
        found = read_job(self.folder)
        differing = [name for name in {**found, **self.job} if found.get(name) != self.job.get(name)]
        if differing:
            reasons = [CHANGED.get(n, f"{n} is {found.get(n)!r} there and {self.job.get(n)!r} here") for n in differing]
            what = "; ".join(dict.fromkeys(reasons))
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

    def run(
        self, units: Sequence[ImageUnit], num_workers: int = 0, report: Callable[[int], object] | None = None
    ) -> None:
        """Tokenizes units. Decoding, model and writing overlap where there are workers.

        Args:
            units: those to do.
            num_workers: loader processes that decode, each a unit at a time; 0 decodes in this process.
            report: is called with the number of images done since the last call.

        Raises: ValueError after too many bad examples; finished files stay.
        """
        batches = UnitBatches(self.units, units, self.tokenize.process, self.kept, self.batch_size)
        workers = min(num_workers, len(units))
        paths, schemas = [self.path(unit) for unit in units], [self.schemas[unit.split] for unit in units]
        num_bad = len(self.bad_examples()) if self._num_bad is None else self._num_bad
        with UnitFiles(paths, schemas, num_bad, self.max_bad_examples) as files:
            for loaded in DataLoader(batches, batch_size=None, num_workers=workers, generator=torch.Generator()):
                files.add(loaded, self.tokenize.encode(loaded.pixels))
                if report is not None:
                    report(loaded.num_images)
        self._num_bad = files.num_bad


def read_job(folder: Path) -> dict[str, Any]:
    """What the tokenization that was begun in a folder was asked for, and opened; {} if none was."""
    file = folder / JOB_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _holds_media(kind: Any) -> bool:
    """Whether a column holds pictures, sounds or the like, also inside of lists and records."""
    if isinstance(kind, dict):
        return any(map(_holds_media, kind.values()))
    return _holds_media(kind.feature) if hasattr(kind, "feature") else hasattr(kind, "decode_example")


def _kept(dataset: Any, names: Sequence[str] | None) -> Features:
    """The columns that stay.

    Raises: ValueError if one that is asked for is not there.
    """
    features = dataset.features or Features.from_arrow_schema(pa.Table.from_pylist([next(iter(dataset))]).schema)
    if names is None:
        names = [name for name, kind in features.items() if not _holds_media(kind)]
    if missing := [name for name in names if name not in features or name == "image"]:
        there = ", ".join(name for name in features if name != "image")
        raise ValueError(f"cannot keep the column {', '.join(missing)}: beside the images there are {there or 'none'}")
    # Pictures were read undecoded; who loads them from the tokens' data set gets them as from its source.
    return Features({name: Image() if isinstance(features[name], Image) else features[name] for name in names})
