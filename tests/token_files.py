"""Token data sets small enough to read."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, Sequence, Value

from hf_vq.token_data import TokenDescription

CLASSES = ["cat", "dog", "fish"]


def write_token_data(folder: Path, description: TokenDescription, files: int = 4, rows: int = 12) -> None:
    """`files` files of random tokens with labels to train on, and one to test on."""
    folder.mkdir(parents=True)
    for number in range(files + 1):
        name = f"train-{number:05}.parquet" if number < files else "test-00000.parquet"
        write_token_file(folder / name, description, rows, seed=number)


def write_token_file(path: Path, description: TokenDescription, rows: int = 12, seed: int = 0) -> None:
    """One Parquet file: image_tokens, label, and a caption of each."""
    rng = np.random.default_rng(seed)
    height, width = description.grid_size or (2, 2)
    tokens = rng.integers(description.codebook_size, size=(rows, height * width * description.num_codebooks))
    labels = rng.integers(len(CLASSES), size=rows)
    columns: dict[str, Any] = {
        "image_tokens": tokens.tolist(),
        "label": labels.tolist(),
        "caption": [f"{CLASSES[label]} {row}" for row, label in enumerate(labels)],
    }
    features = Features(
        {"image_tokens": Sequence(Value("uint16")), "label": ClassLabel(names=CLASSES), "caption": Value("string")}
    )
    schema = description.added_to(features.arrow_schema)
    pq.write_table(pa.table(columns).cast(schema), path)
