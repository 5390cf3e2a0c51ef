"""Files of a token data set: Parquet, written under a hidden name and renamed when they are whole."""

import json
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Sequence, Value

from hf_vq.token_data import TOKEN_COLUMN, TokenDescription

__all__ = ["TokenFile", "bad_examples_of", "token_features", "token_table"]

ROW_GROUP = 10_000
"""Rows that are written at once: what a reader decodes at once, and a writer holds."""
BAD_EXAMPLES = b"hf_vq_bad_examples"
GRID_COLUMNS = ("grid_h", "grid_w")


def token_features(description: TokenDescription, kept: Features) -> Features:
    """The columns of a token data set: those that are kept, and the tokens as the smallest unsigned integers.

    Raises: ValueError if a kept column has a name that the tokens need.
    """
    own = {TOKEN_COLUMN: Sequence(Value(smallest_unsigned(description.codebook_size)))}
    if description.grid_size is None:
        own |= dict.fromkeys(GRID_COLUMNS, Value("uint16"))
    if clash := sorted(own.keys() & kept.keys()):
        raise ValueError(f"the data set has a column {', '.join(clash)} already: leave it out of the kept columns")
    return Features({**kept, **own})


def smallest_unsigned(codebook_size: int) -> str:
    """The smallest unsigned integer type that holds every token."""
    return str(np.min_scalar_type(codebook_size - 1))


def token_table(tokens: list[np.ndarray], columns: dict[str, list[Any]], schema: pa.Schema) -> pa.Table:
    """Rows of a token data set.

    Args:
        tokens: of each image, (h, w) or (h, w, M).
        columns: the kept ones.
        schema: of all columns.
    """
    flat = np.concatenate([token.reshape(-1) for token in tokens])
    ends = np.cumsum([0, *(token.size for token in tokens)]).astype(np.int32)
    arrays = {TOKEN_COLUMN: pa.ListArray.from_arrays(ends, pa.array(flat, schema.field(TOKEN_COLUMN).type.value_type))}
    for axis, name in enumerate(GRID_COLUMNS):
        arrays[name] = pa.array([token.shape[axis] for token in tokens], pa.uint16())
    arrays |= {name: pa.array(cells, schema.field(name).type) for name, cells in columns.items()}
    return pa.Table.from_arrays([arrays[name] for name in schema.names], schema=schema)


class TokenFile:
    """A file under way.

    Args:
        path: where it appears when it is finished.
        schema: of its rows, with the description of the tokens.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.num_rows = path, 0
        path.parent.mkdir(parents=True, exist_ok=True)
        # Two machines of a cluster may be at the same unit, under the same process number.
        self.hidden = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        self._writer = pq.ParquetWriter(self.hidden, schema)
        self._waiting: list[pa.Table] = []

    def write(self, table: pa.Table) -> None:
        """Adds rows."""
        self.num_rows += len(table)
        self._waiting.append(table)
        rows = pa.concat_tables(self._waiting)
        while len(rows) >= ROW_GROUP:
            self._writer.write_table(rows.slice(0, ROW_GROUP))
            rows = rows.slice(ROW_GROUP)
        self._waiting = [rows]

    def finish(self, bad_examples: dict[str, str]) -> None:
        """Makes the file appear, with the images that could not be decoded, place -> reason, in its metadata."""
        rows = pa.concat_tables(self._waiting) if self._waiting else None
        if rows:
            self._writer.write_table(rows)
        self._writer.add_key_value_metadata({BAD_EXAMPLES: json.dumps(bad_examples)})
        self._writer.close()
        self.hidden.replace(self.path)

    def abandon(self) -> None:
        """Leaves nothing."""
        self._writer.close()
        self.hidden.unlink(missing_ok=True)


def bad_examples_of(path: Path) -> dict[str, str]:
    """The images that could not be decoded, place -> reason, when this file was written."""
    metadata = pq.read_metadata(path).metadata or {}
    return json.loads(metadata.get(BAD_EXAMPLES, b"{}"))
