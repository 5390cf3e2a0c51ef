"""Which rows of a training split are held out, the same ones in every run."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset, DatasetBuilder, IterableDataset, SplitDict, SplitInfo, concatenate_datasets
from datasets.packaged_modules.parquet.parquet import Parquet

from hf_vq.decoding import open_file

__all__ = ["count_rows", "files_of", "hold_out_files", "hold_out_rows", "num_examples", "record", "row_groups"]

DEFAULT_VALIDATION_SIZE = 5_000
_HELD_OUT = "held_out"
_WAYS_OUT = "name a validation_split, set validation_size=0, or do not stream"


def num_examples(dataset: Dataset | IterableDataset) -> int | None:
    """The number of rows; of a stream only where its files or its description on the Hub tell it, else None."""
    if isinstance(dataset, Dataset):
        return len(dataset)
    split = (dataset.info.splits or {}).get(str(dataset.split))
    return split.num_examples if split else None


def record(stream: IterableDataset, shards: Iterable[str], rows: int) -> IterableDataset:
    """Write down the shards and the rows of a stream where renaming and casting its columns keep them."""
    name = str(stream.split)
    stream.info.splits = SplitDict({name: SplitInfo(name, num_examples=rows)})
    stream.info.download_checksums = {shard: {} for shard in shards}
    return stream


def hold_out_rows(builder: DatasetBuilder, train: Dataset, asked: int | None) -> tuple[Dataset, Dataset]:
    """The rest, and the rows that a permutation seeded 0 puts first: `asked` of them, by default a tenth."""
    size = _validation_size(asked, len(train))
    order = np.random.default_rng(0).permutation(len(train))
    return train.select(np.sort(order[size:])), train.select(np.sort(order[:size]))


def hold_out_files(
    builder: DatasetBuilder, train: IterableDataset, asked: int | None
) -> tuple[IterableDataset, IterableDataset]:
    """The rest of a stream, and its last files, or of a single file its last row groups, of at least `asked` rows."""
    name, total = str(train.split), num_examples(train)
    if not isinstance(builder, Parquet) or total is None:
        raise ValueError(f"rows can be held out from a stream of Parquet files only: {_WAYS_OUT}")
    size = _validation_size(asked, total)
    files = sorted(files_of(builder, name))
    if len(files) == 1:
        return _hold_out_row_groups(train, files[0], size)
    held_out = _last_pieces([count_rows([file]) for file in files], size)
    builder.config.data_files = {name: files[:-held_out], _HELD_OUT: files[-held_out:]}
    rest, validation = (builder.as_streaming_dataset()[split] for split in (name, _HELD_OUT))
    rows = count_rows(files[-held_out:])
    return record(rest, files[:-held_out], total - rows), record(validation, files[-held_out:], rows)


def _hold_out_row_groups(train: IterableDataset, file: str, size: int) -> tuple[IterableDataset, IterableDataset]:
    rows = row_groups(file)
    held_out = _last_pieces(rows, size)
    groups = train.reshard()
    shards = [groups.shard(len(rows), index) for index in range(len(rows))]
    names = [f"{file}, row group {index}" for index in range(len(rows))]
    parts = slice(None, -held_out), slice(-held_out, None)
    rest, validation = (record(concatenate_datasets(shards[part]), names[part], sum(rows[part])) for part in parts)
    return rest, validation


def _validation_size(asked: int | None, total: int) -> int:
    size = max(1, min(DEFAULT_VALIDATION_SIZE, total // 10)) if asked is None else asked
    if not 0 < size < total:
        raise ValueError(f"cannot hold out validation_size={size} of {total} rows: choose from 0 to {total - 1}")
    return size


def _last_pieces(rows: list[int], size: int) -> int:
    """How many of the last pieces (files or row groups) together hold `size` rows; the first one always stays."""
    for count in range(1, len(rows)):
        if sum(rows[-count:]) >= size:
            return count
    raise ValueError(f"cannot hold out {size} rows by whole pieces, which have {rows[:10]} rows: {_WAYS_OUT}")


def files_of(builder: DatasetBuilder, split: str) -> list[str]:
    """The files of a split."""
    return [str(file) for name, files in builder.config.data_files.items() if str(name) == split for file in files]


def count_rows(files: list[str]) -> int:
    """The rows of Parquet files, from their footers."""
    with ThreadPoolExecutor(16) as pool:
        return sum(map(sum, pool.map(row_groups, files)))


@lru_cache(maxsize=65_536)
def row_groups(file: str) -> list[int]:
    """The rows of each row group of a Parquet file, from its footer."""
    with open_file(file) as stream:
        footer = pq.read_metadata(stream)
    return [footer.row_group(index).num_rows for index in range(footer.num_row_groups)]
