"""Data sets of image tokens: Parquet files with a column of tokens, whose schema tells which tokenizer made them."""

import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hf_vq.decoding import open_file
from hf_vq.models.prior_tokenizer import differences

__all__ = ["TOKEN_COLUMN", "TokenDescription", "describes_tokens", "read_description"]

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
        refine: rounds of refinement, 0 for canonical tokens.
    """

    codebook_size: int
    num_codebooks: int
    grid_size: tuple[int, int] | None
    tokenizer_fingerprint: str
    tokenizer_name_or_path: str | None = None
    tokenizer_revision: str | None = None
    processor_hash: str | None = None
    precision: str = "float32"
    refine: int = 0

    @property
    def token_shape(self) -> tuple[int, ...]:
        """Of the image_tokens of one image where the grid does not vary: (h, w), or (h, w, M)."""
        grid = self.grid_size or ()
        return (*grid, self.num_codebooks) if self.num_codebooks > 1 else grid

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

    def check_made_by(self, model: Any) -> None:
        """Raises a ValueError that names both tokenizers unless `model` is the one that made all of these tokens."""
        if self.grid_size is None:
            raise ValueError("the token data set has grids of several sizes, a prior has one: tokenize at one size")
        if differing := differences(self, model):
            raise ValueError(
                f"the token data set was made by the tokenizer {self.tokenizer_name_or_path}, and "
                f"{model.config.name_or_path or 'this one'} is another: {', '.join(differing)}"
            )


def describes_tokens(file: str | os.PathLike[str]) -> bool:
    """Whether a Parquet file, local or a URL, holds image tokens."""
    return TokenDescription.of(_schema(file)) is not None


def read_description(files: Iterable[str]) -> TokenDescription:
    """The description that Parquet files share.

    Raises: ValueError if one has none, or another than the first.
    """
    shared: TokenDescription | None = None
    files = list(files)
    with ThreadPoolExecutor(16) as pool:
        schemas = list(pool.map(_schema, files))
    for file, schema in zip(files, schemas, strict=True):
        found = TokenDescription.of(schema)
        if found is None:
            raise ValueError(f"{file} holds no column {TOKEN_COLUMN} with the description of its tokenizer")
        if shared is not None and found != shared:
            raise ValueError(f"{file} has tokens of another kind than the files before it: {found}, not {shared}")
        shared = found
    if shared is None:
        raise ValueError("no files of image tokens are given")
    return shared


def _schema(file: str | os.PathLike[str]) -> pa.Schema:
    with open_file(os.fspath(file)) as stream:
        return pq.read_schema(stream)
