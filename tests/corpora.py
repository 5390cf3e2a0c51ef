"""Data sets of images and tokenizers small enough for bulk tokenization in a test."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import ClassLabel, Features, Image, Value
from PIL import Image as PILImage

import hf_vq

CLASSES = ["cat", "dog", "fish"]
FEATURES = Features({"image": Image(), "label": ClassLabel(names=CLASSES), "caption": Value("string")})


def picture(number: int, height: int = 8, width: int = 8) -> PILImage.Image:
    """Noise, another for every number."""
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    return PILImage.fromarray(pixels)


def png(number: int, height: int = 8, width: int = 8) -> bytes:
    """The same, encoded."""
    buffer = io.BytesIO()
    picture(number, height, width).save(buffer, "png")
    return buffer.getvalue()


def write_images(path: Path, numbers: Iterable[int], bad: Iterable[int] = (), rows_per_group: int = 5) -> None:
    """A Parquet file of pictures, `bad` ones cut off, with labels and captions."""
    numbers, bad = list(numbers), set(bad)
    cells = [png(number)[: 40 if number in bad else None] for number in numbers]
    rows = {
        "image": [{"bytes": cell, "path": None} for cell in cells],
        "label": [number % len(CLASSES) for number in numbers],
        "caption": [f"picture {number}" for number in numbers],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(rows, schema=FEATURES.arrow_schema), path, row_group_size=rows_per_group)


def write_data_set(folder: Path, files: int = 4, rows: int = 12, bad: Iterable[int] = ()) -> Path:
    """`files` files to train on, and one to test on; the pictures are numbered throughout."""
    for number in range(files + 1):
        name = f"train-{number:05}-of-{files:05}" if number < files else "test-00000-of-00001"
        write_images(folder / f"{name}.parquet", range(number * rows, (number + 1) * rows), bad)
    return folder


def make_tokenizer(**settings: Any) -> hf_vq.ImageTokenizer:
    """For 8 x 8 pictures, 2 x 2 tokens of 300 codes."""
    torch.manual_seed(0)
    net: dict[str, Any] = {"hidden_channels": [8, 8], "residual_channels": 8, "num_residual_blocks": 1}
    config = hf_vq.SQVAEConfig(**{"image_size": 8, "codebook_size": 300, "codebook_dim": 2, **net, **settings})
    return hf_vq.ImageTokenizer(hf_vq.SQVAEModel(config).eval(), hf_vq.VQImageProcessor.for_config(config))


def save_tokenizer(folder: Path, **settings: Any) -> Path:
    """The same, in a folder."""
    make_tokenizer(**settings).save_pretrained(folder)
    return folder
