"""Opening images from anywhere: a Hub name, a folder of pictures, or Parquet files; in memory, on disk, or as a stream.

Whatever the source, a row keeps the user's columns, and its picture is an undecoded cell, `{"bytes", "path"}`, in
the column "image"; of a data set of image tokens, rows come as they are.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
from datasets import (
    Dataset,
    DatasetBuilder,
    Features,
    Image,
    IterableDataset,
    Value,
)
from datasets.packaged_modules.parquet.parquet import Parquet

from hf_vq.builders import DataFiles, commit_of, find_builder, lists_local_pictures, version_of
from hf_vq.held_out import count_rows, files_of, hold_out_files, hold_out_rows, num_examples, record
from hf_vq.token_data import TokenDescription, describes_tokens, read_description

ImageDataset: TypeAlias = Dataset | IterableDataset


class ImageSplits(NamedTuple):
    """The rows to train on, to evaluate on while training, and to test on once, at the end; of which commit, if any."""

    train: ImageDataset
    validation: ImageDataset | None
    test: ImageDataset | None
    revision: str | None = None


class ImageSource(NamedTuple):
    """All splits of a data set, and which version of it they are.

    Attributes:
        splits: streams by name, or of local pictures tables of their paths.
        revision: the commit, of a data set on the Hub.
        version: names of all files, each with what tells that it changed: its commit, its ETag or its time.
    """

    splits: dict[str, ImageDataset]
    revision: str | None
    version: list[tuple[str, ...]]


def load_images(
    dataset_name: str,
    *,
    dataset_config_name: str | None = None,
    data_files: DataFiles | None = None,
    revision: str | None = None,
    streaming: bool = False,
    image_column: str | None = None,
    train_split: str = "train",
    validation_split: str | None = None,
    test_split: str | None = None,
    validation_size: int | None = None,
    keep_in_memory: bool = False,
    cache_dir: str | None = None,
    take_tokens: bool = False,
) -> ImageSplits:
    """Open a data set of images, or of their tokens.

    Splits named "validation" and "test" are used where they exist. Without a validation split, rows are held out from
    the training split, the same ones in every run: of data with a length, those that a permutation seeded 0 puts first;
    of a stream of Parquet files, the last files in name order (of a single file, its last row groups).

    Args:
        dataset_name: a name on the Hub, a local folder of pictures or of Parquet files, or "parquet" with `data_files`.
        dataset_config_name: the configuration, where the data set has several.
        data_files: paths, URLs or patterns: one list, or one for each split.
        revision: a branch, tag or commit on the Hub.
        streaming: read while training goes on, instead of preparing a copy on disk first.
        image_column: the column of the pictures; by default the only one that holds pictures.
        train_split: the split to train on.
        validation_split, test_split: the splits to evaluate on while training, and to test on.
        validation_size: rows to hold out, 0 for none; by default a tenth, at most 5,000. A stream holds out whole
            files, so they may be more.
        keep_in_memory: copy the prepared data to memory.
        cache_dir: where prepared data go; by default the cache of `datasets`.
        take_tokens: of a data set of image tokens (see `describe_tokens`) the rows, without decoding any picture.

    Raises:
        FileNotFoundError: no such folder, file or data set.
        ValueError: an unknown split or column, options that exclude each other, or nothing that can be held out.
    """
    if validation_split is not None and validation_size is not None:
        raise ValueError(f"drop validation_split={validation_split!r} or validation_size={validation_size}")
    if streaming and keep_in_memory:
        raise ValueError("drop streaming or keep_in_memory: a stream is not kept")
    builder = find_builder(dataset_name, dataset_config_name, data_files, revision, cache_dir)
    commit = commit_of(builder)
    # A table of local pictures holds nothing but their paths; unlike a stream of them it can be permuted.
    as_table = not streaming or lists_local_pictures(builder)
    opened = _open_tables(builder, keep_in_memory) if as_table else _open_streams(builder)
    free = ["test"] if validation_size is not None else ["validation", "test"]
    splits = _choose_splits(opened, train_split, validation_split, test_split, free)
    if splits[1] is None and validation_size != 0:
        splits[:2] = (hold_out_rows if as_table else hold_out_files)(builder, splits[0], validation_size)
    if take_tokens:
        splits = [split and _without_pictures(split) for split in splits]
    else:
        splits = [split and _undecoded(split, image_column, _in_tables(builder, as_table)) for split in splits]
        splits = _as_streams(*splits) if streaming and as_table else splits
    return ImageSplits(*splits)._replace(revision=commit)


def open_splits(
    dataset_name: str,
    *,
    dataset_config_name: str | None = None,
    data_files: DataFiles | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    splits: Sequence[str] | None = None,
    token: str | None = None,
) -> ImageSource:
    """The splits of a data set of images, whole.

    Args:
        splits: names, by default all.
        token: of the Hub; None is the one that was logged in with.
        dataset_name, dataset_config_name, data_files, revision, image_column: as in `load_images`.

    Raises:
        FileNotFoundError: no such folder, file or data set.
        ValueError: an unknown split or column.
    """
    builder = find_builder(dataset_name, dataset_config_name, data_files, revision, None, token)
    as_table = lists_local_pictures(builder)
    opened: dict[str, Any] = _open_tables(builder, False) if as_table else _open_streams(builder)
    names, in_tables = splits or list(map(str, opened)), _in_tables(builder, as_table)
    undecoded = {name: _undecoded(_choose(opened, name), image_column, in_tables) for name in names}
    return ImageSource(undecoded, commit_of(builder), version_of(builder))


def describe_tokens(
    dataset_name: str,
    *,
    dataset_config_name: str | None = None,
    data_files: DataFiles | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
) -> TokenDescription | None:
    """What tokens a data set of Parquet files holds, None if their schema tells of none.

    For the arguments see `load_images`.

    Raises:
        FileNotFoundError: no such folder, file or data set.
        ValueError: files that hold tokens of different tokenizers.
    """
    builder = find_builder(dataset_name, dataset_config_name, data_files, revision, cache_dir)
    if not isinstance(builder, Parquet):
        return None
    files = [str(file) for file in chain.from_iterable(builder.config.data_files.values())]
    return read_description(files) if describes_tokens(files[0]) else None


def shard_names(dataset: IterableDataset) -> list[str] | None:
    """What to call the shards of a stream in messages; None where nobody recorded it."""
    names = list(dataset.info.download_checksums or {})
    return names if len(names) == dataset.num_shards else None


def _in_tables(builder: DatasetBuilder, as_table: bool) -> bool:
    """Whether a stream comes in tables of Arrow."""
    return isinstance(builder, Parquet) and not as_table


def _open_tables(builder: DatasetBuilder, in_memory: bool) -> dict[str, Dataset]:
    builder.download_and_prepare()
    return builder.as_dataset(in_memory=in_memory)


def _open_streams(builder: DatasetBuilder) -> dict[str, IterableDataset]:
    opened = builder.as_streaming_dataset()
    if isinstance(builder, Parquet):
        for name, stream in opened.items():
            files = files_of(builder, name)
            record(stream, files, num_examples(stream) or count_rows(files))
    return opened


def _choose_splits(
    opened: Mapping[str, Any], train: str, validation: str | None, test: str | None, free_names: Sequence[str]
) -> list[Any]:
    """The splits of these names; without a name that called validation or test, if it is free for that."""
    free = {name: opened[name] for name in free_names if name in opened and name not in (train, validation, test)}
    return [
        _choose(opened, train),
        _choose(opened, validation) if validation else free.get("validation"),
        _choose(opened, test) if test else free.get("test"),
    ]


def _choose(opened: Mapping[str, ImageDataset], name: str) -> ImageDataset:
    if name not in opened:
        raise ValueError(f"there is no split {name!r}: the data set has {', '.join(map(str, opened))}")
    return opened[name]


def _without_pictures(dataset: ImageDataset) -> ImageDataset:
    """The columns that take no decoding."""
    return dataset.select_columns([n for n, f in dataset.features.items() if not hasattr(f, "decode_example")])


def _undecoded(dataset: ImageDataset, column: str | None, in_tables: bool) -> ImageDataset:
    """The rows with their pictures in "image", as bytes or paths: they are decoded where batches are made."""
    if isinstance(dataset, IterableDataset) and dataset.features:
        dataset = dataset.decode(False)
    features = dataset.features or Features(dict.fromkeys(next(iter(dataset)), Value("binary")))
    column = _image_column(features, column)
    if column != "image":
        dataset = _rename_in_tables(dataset, column) if in_tables else dataset.rename_column(column, "image")
    return dataset.cast_column("image", Image(decode=False))


def _rename_in_tables(stream: IterableDataset, column: str) -> IterableDataset:
    # rename_column of a stream takes its tables apart, which makes reading rows ten times slower.
    features = Features({"image" if name == column else name: kind for name, kind in stream.features.items()})
    tables = stream.with_format("arrow")
    renamed = tables.map(_with_names, batched=True, fn_kwargs={"names": list(features)}, features=features)
    return renamed.with_format(None)


def _with_names(table: pa.Table, names: list[str]) -> pa.Table:
    return table.rename_columns(names)


def _image_column(features: Features, asked: str | None) -> str:
    pictures = [name for name, feature in features.items() if isinstance(feature, Image)]
    found = [asked] if asked else pictures if len(pictures) == 1 else [n for n in ("image", "img") if n in features]
    if not found or found[0] not in features:
        what = f"there is no column {asked!r}" if asked else "cannot tell which column holds the pictures"
        raise ValueError(f"{what}: set image_column to one of {', '.join(features)}")
    if found[0] != "image" and "image" in features:
        raise ValueError(f'rename or drop the column "image": image_column={found[0]!r} takes its name')
    if not _can_hold_pictures(features[found[0]]):
        raise ValueError(f"column {found[0]!r} holds {features[found[0]]}, not pictures (encoded bytes or paths)")
    return found[0]


def _can_hold_pictures(feature: Any) -> bool:
    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    return isinstance(feature, Image) or feature in [Value(name) for name in ("binary", "large_binary", "string")]


def _as_streams(train: Dataset, *others: Dataset | None) -> list[IterableDataset | None]:
    # Folders list one class after the other, and a stream is shuffled in blocks: mix the training rows beforehand.
    mixed = train.select(np.random.default_rng(0).permutation(len(train)))
    streams = (table and table.to_iterable_dataset(num_shards=min(64, len(table))) for table in (mixed, *others))
    return [stream and record(stream, (), len(table)) for stream, table in zip(streams, (train, *others), strict=True)]
