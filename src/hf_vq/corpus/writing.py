"""The files of units, written while the next rows are on their way."""

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa

from hf_vq.corpus.loading import LoadedRows
from hf_vq.corpus.token_file import TokenFile, token_table

__all__ = ["UnitFiles"]

logger = logging.getLogger(__name__)


class UnitFiles:
    """The files of units under way, written by a thread of their own while the model goes on.

    Args:
        paths: the file of each unit.
        schemas: of each file.
        num_bad: bad examples that were met before.
        max_bad_examples: how many there may be in all.
    """

    def __init__(
        self, paths: Sequence[Path], schemas: Sequence[pa.Schema], num_bad: int, max_bad_examples: int
    ) -> None:
        self.paths, self.schemas = paths, schemas
        self.num_bad, self.max_bad_examples = num_bad, max_bad_examples
        self.files: dict[int, TokenFile] = {}
        self.bad: dict[int, dict[str, str]] = {}
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future[None] | None = None

    def __enter__(self) -> "UnitFiles":
        return self

    def add(self, loaded: LoadedRows, tokens: list[np.ndarray]) -> None:
        """Rows of a unit, in their order."""
        self.bad.setdefault(loaded.unit, {}).update(loaded.bad)
        self._check_bad(loaded.bad)
        self._wait()
        self.pending = self.thread.submit(self._write, loaded, tokens)

    def _write(self, loaded: LoadedRows, tokens: list[np.ndarray]) -> None:
        schema = self.schemas[loaded.unit]
        if loaded.unit not in self.files:
            self.files[loaded.unit] = TokenFile(self.paths[loaded.unit], schema)
        if tokens:
            self.files[loaded.unit].write(token_table(tokens, loaded.columns, schema))
        if loaded.is_last:
            self.files.pop(loaded.unit).finish(self.bad.pop(loaded.unit))

    def _check_bad(self, bad: dict[str, str]) -> None:
        for place, reason in bad.items():
            logger.warning("skipped a bad example, %s: %s", place, reason)
        self.num_bad += len(bad)
        if bad and self.num_bad > self.max_bad_examples:
            place, reason = list(bad.items())[-1]
            raise ValueError(
                f"more than max_bad_examples={self.max_bad_examples} images could not be used, the last one at "
                f"{place}: {reason}. Repair or remove them, or raise max_bad_examples; what is finished stays"
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
