"""Data sets of image tokens: Parquet files with a column of tokens, whose schema tells which tokenizer made them."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from hf_vq.decoding import open_file

__all__ = ["TOKEN_COLUMN", "ToImageTokens", "TokenDescription", "describes_tokens", "read_description"]

TOKEN_COLUMN = "image_tokens"
METADATA_KEY = b"hf_vq"


@dataclass(frozen=True)
class TokenDescription:
    """What the schema of a token data set tells of its tokens, as JSON under the key `hf_vq`.

    Attributes:
        codebook_size: number of codes K of each codebook.
        num_codebooks: number of codebooks M.
        grid_size: (h, w), None where it varies and each row has its own grid_h and grid_w.
        tokenizer_fingerprint: `fingerprint()` of the tokenizer's model.
        tokenizer_name_or_path: where it was loaded from.
        tokenizer_revision: its commit, branch or tag on the Hub.
        processor_hash: sha256 of the image processor's settings.
        precision: of the encoder, "float32" for canonical tokens.
    """

    codebook_size: int
    num_codebooks: int
    grid_size: tuple[int, int] | None
    tokenizer_fingerprint: str
    tokenizer_name_or_path: str | None = None
    tokenizer_revision: str | None = None
    processor_hash: str | None = None
    precision: str = "float32"

    def added_to(self, schema: pa.Schema) -> pa.Schema:
        """The schema with this description beside what it held."""
        return schema.with_metadata({**(schema.metadata or {}), METADATA_KEY: json.dumps(asdict(self)).encode()})

    @classmethod
    def of(cls, schema: pa.Schema) -> "TokenDescription | None":
        """What a schema holds, None if it describes no tokens."""
        text = (schema.metadata or {}).get(METADATA_KEY)
        if text is None or TOKEN_COLUMN not in schema.names:
            return None
        fields = json.loads(text)
        return cls(**fields | {"grid_size": fields["grid_size"] and tuple(fields["grid_size"])})


def describes_tokens(file: str | os.PathLike[str]) -> bool:
    """Whether a Parquet file, local or a URL, holds image tokens."""
    return TokenDescription.of(_schema(file)) is not None


def read_description(files: Iterable[str]) -> TokenDescription:
    """The description that Parquet files share.

    Raises: ValueError if one has none, or another than the first.
    """
    shared: TokenDescription | None = None
    for file in files:
        found = TokenDescription.of(_schema(file))
        if found is None:
            raise ValueError(f"{file} holds no column {TOKEN_COLUMN} with the description of its tokenizer")
        if shared is not None and found != shared:
            raise ValueError(f"{file} has tokens of another kind than the files before it: {found}, not {shared}")
        shared = found
    if shared is None:
        raise ValueError("no files of image tokens are given")
    return shared


@dataclass
class ToImageTokens:
    """The transform for priors: rows of one grid to {"image_tokens": (B, h, w[, M])} and, if known, class_labels.

    Args:
        description: of the data set.
        label_column: where the labels are, None for none.
    """

    description: TokenDescription
    label_column: str | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        codebooks = (self.description.num_codebooks,) if self.description.num_codebooks > 1 else ()
        tokens = torch.from_numpy(np.array([row[TOKEN_COLUMN] for row in rows], dtype=np.int64))
        batch = {"image_tokens": tokens.view(-1, *(self.description.grid_size or ()), *codebooks)}
        if self.label_column is not None:
            batch["class_labels"] = torch.tensor([row[self.label_column] for row in rows])
        return batch


def _schema(file: str | os.PathLike[str]) -> pa.Schema:
    with open_file(os.fspath(file)) as stream:
        return pq.read_schema(stream)
