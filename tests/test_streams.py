"""Opening images from every kind of source, and dealing them out: complete, shuffled, exactly resumable."""

import io
import json
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Features, Image, IterableDataset, Value

import hf_vq.readers
from hf_vq.streams import (
    BadImageError,
    EvaluationBatches,
    TrainBatches,
    decode_image,
    load_images,
    num_examples,
)

NUM_FILES = 5
ROWS_PER_FILE = 23
NUM_ROWS = NUM_FILES * ROWS_PER_FILE
BAD = {11, 60, 61, 62, 114}


def picture(number: int) -> PIL.Image.Image:
    """A picture of noise whose pixel at the right of the first row shows its number."""
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
    pixels[0, -1] = number // 256, number % 256, 7
    return PIL.Image.fromarray(pixels)


def encoded(number: int, image_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, image_format)
    return buffer.getvalue()


def cell(number: int, bad: Iterable[int] = ()) -> dict[str, Any]:
    png = encoded(number)
    return {"bytes": png[: len(png) // 2] if number in bad else png, "path": None}


def read_numbers(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The transform of these tests: pictures back to their numbers."""
    pixels = [row["image"].getpixel((15, 0)) for row in rows]
    return {"numbers": torch.tensor([256 * red + green for red, green, _ in pixels])}


def write_parquet(
    path: Path, numbers: Iterable[int], bad: Iterable[int] = (), column: str = "img", rows_per_group: int = 7
) -> Path:
    numbers = list(numbers)
    features = Features({column: Image(), "number": Value("int64")})
    rows = {column: [cell(number, bad) for number in numbers], "number": numbers}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(rows, schema=features.arrow_schema), path, row_group_size=rows_per_group)
    return path


def write_files(folder: Path, bad: Iterable[int] = ()) -> Path:
    for file in range(NUM_FILES):
        numbers = range(file * ROWS_PER_FILE, (file + 1) * ROWS_PER_FILE)
        write_parquet(folder / f"train-{file:05}-of-{NUM_FILES:05}.parquet", numbers, bad)
    return folder


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_files(tmp_path_factory.mktemp("parquet"))
    write_parquet(folder / "test-00000-of-00001.parquet", range(1000, 1010))
    return folder


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("damaged"), BAD)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(30):
        path = folder / ("cats" if number < 15 else "dogs") / f"{number:03}.png"
        path.parent.mkdir(exist_ok=True)
        picture(number).save(path)
    return folder


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_vq.readers, "SHUFFLE_BLOCK", 8)


def train_rows(folder: Path, streaming: bool) -> Dataset | IterableDataset:
    return load_images(str(folder), streaming=streaming, validation_size=0).train


def numbers_of(dataset: Iterable[dict[str, Any]]) -> list[int]:
    return [read_numbers([{"image": decode_image(row["image"])}])["numbers"].item() for row in dataset]


def flat(batches: Iterable[dict[str, torch.Tensor]]) -> list[int]:
    return [number for batch in batches for number in batch["numbers"].tolist()]


def chained(parts: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(parts))


def lists(batches: Iterable[dict[str, torch.Tensor]], count: int) -> list[list[int]]:
    return [batch["numbers"].tolist() for batch in islice(batches, count)]


streamed = pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
workers = pytest.mark.parametrize("num_workers", [0, 2], ids=["no workers", "2 workers"])


# Opening


@streamed
def test_a_folder_of_parquet_opens(parquet: Path, streaming: bool):
    splits = load_images(str(parquet), streaming=streaming, validation_size=0)
    assert isinstance(splits.train, IterableDataset if streaming else Dataset)
    assert splits.validation is None
    assert set(splits.train.features) == {"image", "number"}
    assert splits.train.features["image"] == Image(decode=False)
    assert numbers_of(splits.train) == [row["number"] for row in splits.train] == list(range(NUM_ROWS))
    assert numbers_of(splits.test) == list(range(1000, 1010))


@streamed
def test_parquet_files_open(parquet: Path, streaming: bool):
    files = {"train": str(parquet / "train-*.parquet"), "later": [str(parquet / "test-00000-of-00001.parquet")]}
    splits = load_images("parquet", data_files=files, streaming=streaming, validation_split="later")
    assert numbers_of(splits.train) == list(range(NUM_ROWS))
    assert numbers_of(splits.validation) == list(range(1000, 1010))
    assert splits.test is None


def test_a_split_has_one_use(parquet: Path):
    assert load_images(str(parquet), validation_split="test").test is None
    assert load_images(str(parquet), train_split="test", validation_size=0).test is None
    assert num_examples(load_images(str(parquet), validation_split="test", test_split="test").test) == 10


@streamed
def test_a_folder_of_pictures_opens(pictures: Path, streaming: bool):
    splits = load_images(str(pictures), streaming=streaming, validation_size=0)
    assert isinstance(splits.train, IterableDataset if streaming else Dataset)
    assert sorted(numbers_of(splits.train)) == list(range(30))
    assert {row["label"] for row in splits.train} == {0, 1}
    assert next(iter(splits.train))["image"]["bytes"] is None


def test_a_stream_of_pictures_mixes_the_classes(pictures: Path):
    train = load_images(str(pictures), streaming=True, validation_size=0).train
    assert len({row["label"] for row in islice(train, 8)}) == 2


def test_splits_by_folder_are_found(tmp_path: Path):
    for number, split in enumerate(["train", "train", "validation", "test"]):
        path = tmp_path / split / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        picture(number).save(path)
    assert [numbers_of(split) for split in load_images(str(tmp_path))[:3]] == [[0, 1], [2], [3]]


def test_data_lie_on_disk_or_in_memory(parquet: Path, tmp_path: Path):
    on_disk = load_images(str(parquet), cache_dir=str(tmp_path)).train
    in_memory = load_images(str(parquet), cache_dir=str(tmp_path), keep_in_memory=True).train
    assert all(Path(file["filename"]).is_relative_to(tmp_path) for file in on_disk.cache_files)
    assert on_disk.cache_files and not in_memory.cache_files
    assert numbers_of(on_disk) == numbers_of(in_memory)


@streamed
@pytest.mark.parametrize("kind", ["binary", "struct"])
def test_encoded_bytes_need_no_image_feature(tmp_path: Path, kind: str, streaming: bool):
    values = [cell(number) if kind == "struct" else encoded(number) for number in range(6)]
    text = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    column = pa.array(values, text if kind == "struct" else pa.binary())
    pq.write_table(pa.table({"photo": column, "caption": ["words"] * 6}), tmp_path / "train.parquet")
    train = load_images(str(tmp_path), image_column="photo", validation_size=0, streaming=streaming).train
    assert numbers_of(train) == list(range(6))
    assert [row["caption"] for row in train] == ["words"] * 6


def test_a_stream_of_any_origin_is_dealt_out():
    stream = IterableDataset.from_generator(lambda: ({"image": cell(number)} for number in range(20)))
    assert num_examples(stream) is None
    assert sorted(flat(islice(TrainBatches(stream, read_numbers, 4, seed=0), 5))) == list(range(20))
    assert flat(EvaluationBatches(stream, read_numbers, 8)) == list(range(20))


@streamed
def test_num_examples(parquet: Path, streaming: bool):
    splits = load_images(str(parquet), streaming=streaming, validation_size=20)
    assert [num_examples(split) for split in splits[:3]] == ([92, 23, 10] if streaming else [95, 20, 10])
    assert [sum(1 for _ in split) for split in splits[:3]] == [num_examples(split) for split in splits[:3]]


# Holding out


def test_rows_held_out_of_a_table_are_always_the_same(parquet: Path):
    splits = load_images(str(parquet))
    order = np.random.default_rng(0).permutation(NUM_ROWS)
    assert numbers_of(splits.validation) == sorted(order[: NUM_ROWS // 10])
    assert sorted(numbers_of(splits.train) + numbers_of(splits.validation)) == list(range(NUM_ROWS))


@pytest.mark.parametrize(("size", "files"), [(None, 1), (23, 1), (24, 2), (69, 3)])
def test_a_stream_holds_out_its_last_files(parquet: Path, size: int | None, files: int):
    splits = load_images(str(parquet), streaming=True, validation_size=size)
    kept = NUM_ROWS - files * ROWS_PER_FILE
    assert numbers_of(splits.train) == list(range(kept))
    assert numbers_of(splits.validation) == list(range(kept, NUM_ROWS))
    assert splits.train.num_shards == NUM_FILES - files
    assert len(splits.test.features) == 2


def test_the_order_of_files_is_that_of_their_names(parquet: Path):
    files = sorted(map(str, parquet.glob("train-*")), reverse=True)
    splits = load_images("parquet", data_files=files, streaming=True)
    assert numbers_of(splits.validation) == list(range(NUM_ROWS - ROWS_PER_FILE, NUM_ROWS))


@pytest.mark.parametrize(("size", "held_out"), [(None, 7), (8, 14)])
def test_a_stream_of_one_file_holds_out_its_last_row_groups(tmp_path: Path, size: int | None, held_out: int):
    file = write_parquet(tmp_path / "all.parquet", range(70))
    splits = load_images("parquet", data_files=str(file), streaming=True, validation_size=size)
    assert numbers_of(splits.train) == list(range(70 - held_out))
    assert numbers_of(splits.validation) == list(range(70 - held_out, 70))
    assert [num_examples(split) for split in splits[:2]] == [70 - held_out, held_out]
    batches = TrainBatches(splits.train, read_numbers, 70 - held_out, seed=0)
    assert sorted(flat(islice(batches, 1))) == list(range(70 - held_out))


def test_a_streamed_folder_of_pictures_holds_out_what_the_table_does(pictures: Path):
    table, stream = (load_images(str(pictures), streaming=streaming) for streaming in (False, True))
    assert numbers_of(stream.validation) == numbers_of(table.validation)
    assert sorted(numbers_of(stream.train)) == sorted(numbers_of(table.train))


@streamed
@pytest.mark.parametrize("size", [-1, NUM_ROWS])
def test_too_much_cannot_be_held_out(parquet: Path, size: int, streaming: bool):
    with pytest.raises(ValueError, match=f"validation_size={size} of {NUM_ROWS} rows: choose from 0 to 114"):
        load_images(str(parquet), streaming=streaming, validation_size=size)


@pytest.mark.parametrize("files", [1, 2], ids=["one row group", "two files"])
def test_a_stream_that_cannot_be_divided_says_what_to_do(tmp_path: Path, files: int):
    for file in range(files):
        write_parquet(tmp_path / f"{file}.parquet", range(30 if file == 0 else 1), rows_per_group=100)
    with pytest.raises(ValueError, match=r"by whole pieces.*name a validation_split, set validation_size=0, or do not"):
        load_images(str(tmp_path), streaming=True, validation_size=5)


# Errors of opening


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_split": "trian"}, "there is no split 'trian': the data set has train, test"),
        ({"validation_split": "dev"}, "there is no split 'dev'"),
        ({"test_split": "final"}, "there is no split 'final'"),
        ({"image_column": "image"}, "there is no column 'image': set image_column to one of img, number"),
        ({"image_column": "number"}, "column 'number' holds .*, not pictures"),
        ({"validation_split": "test", "validation_size": 5}, "drop validation_split='test' or validation_size=5"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@streamed
def test_unknown_names_are_refused(parquet: Path, streaming: bool, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        load_images(str(parquet), streaming=streaming, **options)


def test_a_stream_is_not_kept_in_memory(parquet: Path):
    with pytest.raises(ValueError, match="drop streaming or keep_in_memory"):
        load_images(str(parquet), streaming=True, keep_in_memory=True)


def test_data_without_pictures_are_refused(tmp_path: Path):
    pq.write_table(pa.table({"words": ["a", "b"], "count": [1, 2]}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="cannot tell which column holds the pictures: .* one of words, count"):
        load_images(str(tmp_path))


def test_two_columns_cannot_both_be_the_image(tmp_path: Path):
    table = pa.table({"image": ["a.png"], "photo": [encoded(0)]})
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="image_column='photo' takes its name"):
        load_images(str(tmp_path), image_column="photo", validation_size=0)


def test_a_missing_folder_names_its_neighbours(tmp_path: Path):
    (tmp_path / "holidays").mkdir()
    with pytest.raises(FileNotFoundError, match=rf"no folder {tmp_path}/holiday \({tmp_path} holds .* holidays\)"):
        load_images(str(tmp_path / "holiday"))


def test_an_empty_folder_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="doesn't contain any data files"):
        load_images(str(tmp_path))


def test_a_file_is_no_folder(parquet: Path):
    with pytest.raises(FileNotFoundError, match='read it as "parquet" with data_files'):
        load_images(str(parquet / "test-00000-of-00001.parquet"))


def test_a_name_that_is_nowhere_is_refused():
    with pytest.raises(FileNotFoundError, match=r"cannot open the data set 'nobody/nothing'.*Nor is it a local folder"):
        load_images("nobody/nothing")


def test_parquet_needs_files(tmp_path: Path):
    with pytest.raises(ValueError, match='"parquet" is a format'):
        load_images("parquet")
    with pytest.raises(FileNotFoundError, match="none.parquet"):
        load_images("parquet", data_files=str(tmp_path / "none.parquet"))


# Decoding


def test_every_kind_of_cell_is_decoded(tmp_path: Path):
    path = tmp_path / "5.png"
    path.write_bytes(encoded(5))
    cells = [
        picture(5),
        encoded(5),
        {"bytes": encoded(5), "path": None},
        {"bytes": None, "path": str(path)},
        {"bytes": None, "path": path.as_uri()},
    ]
    assert numbers_of({"image": each} for each in cells) == [5] * 5


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (encoded(5)[:400], "truncated"),
        (encoded(5)[:40], "no picture that Pillow can read"),
        (encoded(5, "JPEG")[:-50], "truncated"),
        (b"no picture", "no picture that Pillow can read"),
        (None, "the cell is empty"),
        ({"bytes": None, "path": None}, "the cell is empty"),
        ({"bytes": None, "path": "/no/such/file.png"}, "No such file"),
        (17, "int"),
    ],
    ids=["png", "head of png", "jpeg", "text", "none", "null", "missing file", "number"],
)
def test_a_bad_cell_is_one_kind_of_error(bad: object, reason: str):
    with pytest.raises(BadImageError, match=reason):
        decode_image(bad)


# Training batches


@streamed
@workers
def test_every_epoch_has_every_example_once_in_a_new_order(parquet: Path, streaming: bool, num_workers: int):
    if streaming and num_workers:
        pytest.skip("workers end their epochs apart: see the test by epochs")
    batches = TrainBatches(train_rows(parquet, streaming), read_numbers, 23, seed=3, num_workers=num_workers)
    numbers = flat(islice(batches, 10))
    first, second = numbers[:NUM_ROWS], numbers[NUM_ROWS:]
    assert sorted(first) == sorted(second) == list(range(NUM_ROWS))
    assert first != second
    assert first != sorted(first)


@streamed
def test_batches_are_full_and_run_across_the_end_of_an_epoch(parquet: Path, streaming: bool):
    batches = TrainBatches(train_rows(parquet, streaming), read_numbers, 50, seed=0)
    joined = lists(batches, 5)
    assert [len(batch) for batch in joined] == [50] * 5
    assert sorted(chained(joined)[:NUM_ROWS]) == list(range(NUM_ROWS))


@streamed
def test_the_order_follows_the_seed(parquet: Path, streaming: bool):
    rows = train_rows(parquet, streaming)
    once, again, other = (lists(TrainBatches(rows, read_numbers, 10, seed=seed), 3) for seed in (0, 0, 1))
    assert once == again != other


def test_a_stream_is_shuffled_across_the_shards_of_a_block(parquet: Path):
    hf_vq.readers.SHUFFLE_BLOCK = 2 * ROWS_PER_FILE
    numbers = lists(TrainBatches(train_rows(parquet, True), read_numbers, 46, seed=0), 1)[0]
    assert len({number // ROWS_PER_FILE for number in numbers[:20]}) == 2


def test_more_shards_than_are_opened_one_by_one_are_read_in_groups(parquet: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hf_vq.readers, "_MAX_SHARDS", 2)
    numbers = flat(islice(TrainBatches(train_rows(parquet, True), read_numbers, 23, seed=0), 5))
    assert sorted(numbers) == list(range(NUM_ROWS))


def test_accumulation_and_ranks_cut_one_sequence(parquet: Path):
    rows = train_rows(parquet, False)
    joint = flat(islice(TrainBatches(rows, read_numbers, 12, seed=0), 12))
    accumulated = flat(islice(TrainBatches(rows, read_numbers, 3, seed=0), 48))
    ranks = [TrainBatches(rows, read_numbers, 6, seed=0, rank=rank, world_size=2) for rank in range(2)]
    together = [sorted(left + right) for left, right in zip(*(lists(rank, 12) for rank in ranks), strict=True)]
    assert accumulated == joint
    assert together == [sorted(joint[start : start + 12]) for start in range(0, 144, 12)]


def test_workers_do_not_change_the_batches_of_a_table(parquet: Path):
    rows = train_rows(parquet, False)
    alone, helped = (TrainBatches(rows, read_numbers, 10, seed=0, num_workers=count) for count in (0, 2))
    assert lists(alone, 15) == lists(helped, 15)


def by_epoch(batches: TrainBatches, epochs: int) -> dict[int, list[int]]:
    """The numbers of each of the first epochs of a stream, batch size 1, until every reader is beyond them."""
    found = defaultdict(list)
    for batch in batches:
        state = batches.state_dict()
        if all(cursor and cursor["epoch"] >= epochs for cursor in state["cursors"]):
            return {epoch: found[epoch] for epoch in range(epochs)}
        reader = (state["next_reader"] - 1) % len(state["cursors"])
        found[state["cursors"][reader]["epoch"]] += batch["numbers"].tolist()
    raise AssertionError("training batches never end")


@pytest.mark.parametrize(
    ("world_size", "num_workers"), [(1, 2), (2, 0), (2, 2), (3, 0), (7, 0)], ids=lambda value: str(value)
)
def test_the_processes_share_the_shards_of_a_stream(parquet: Path, world_size: int, num_workers: int):
    rows = train_rows(parquet, True)
    ranks = [
        by_epoch(
            TrainBatches(rows, read_numbers, 1, seed=0, rank=rank, world_size=world_size, num_workers=num_workers), 2
        )
        for rank in range(world_size)
    ]
    for epoch in range(2):
        assert sorted(chained(rank[epoch] for rank in ranks)) == list(range(NUM_ROWS))
        sizes = [len(rank[epoch]) for rank in ranks]
        assert max(sizes) - min(sizes) <= NUM_FILES % world_size
    assert ranks[0][0] != ranks[0][1]


def test_the_processes_share_a_table(parquet: Path):
    rows = train_rows(parquet, False)
    ranks = [TrainBatches(rows, read_numbers, 23, seed=0, rank=rank, world_size=5) for rank in range(5)]
    assert sorted(chained(flat(islice(rank, 1)) for rank in ranks)) == list(range(NUM_ROWS))


def test_empty_shards_are_no_obstacle():
    def generate(shards: list[list[int]]) -> Iterator[dict[str, Any]]:
        return ({"image": cell(number)} for shard in shards for number in shard)

    rows = IterableDataset.from_generator(generate, gen_kwargs={"shards": [list(range(6)), []]})
    ranks = [by_epoch(TrainBatches(rows, read_numbers, 1, seed=0, rank=rank, world_size=2), 4) for rank in range(2)]
    for epoch in range(4):
        assert sorted(chained(rank[epoch] for rank in ranks)) == list(range(6))


def test_more_processes_than_rows_are_an_error(tmp_path: Path):
    write_parquet(tmp_path / "train.parquet", range(2))
    with pytest.raises(ValueError, match="process 2 of 3 gets no rows: use fewer processes"):
        lists(TrainBatches(train_rows(tmp_path, True), read_numbers, 1, seed=0, rank=2, world_size=3), 1)


def test_a_stream_uses_no_more_workers_than_it_has_shards(parquet: Path):
    rows = train_rows(parquet, True)
    assert TrainBatches(rows, read_numbers, 4, seed=0, num_workers=9).num_readers == NUM_FILES
    assert TrainBatches(rows, read_numbers, 4, seed=0, num_workers=9, world_size=2).num_readers == 2
    assert TrainBatches(rows, read_numbers, 4, seed=0, num_workers=9, world_size=7).num_readers == 1


# Continuing


def with_states(batches: TrainBatches, count: int) -> Iterator[tuple[str, list[int]]]:
    """Pairs of the state before a batch, as JSON, and the batch."""
    iterator = iter(batches)
    for _ in range(count):
        state = json.dumps(batches.state_dict())
        yield state, next(iterator)["numbers"].tolist()


@streamed
@workers
@pytest.mark.parametrize("source", ["parquet", "damaged"])
def test_a_continued_run_equals_the_uninterrupted_one(
    request: pytest.FixtureRequest, source: str, streaming: bool, num_workers: int
):
    rows = train_rows(request.getfixturevalue(source), streaming)

    def build() -> TrainBatches:
        return TrainBatches(rows, read_numbers, 9, seed=5, num_workers=num_workers)

    # 30 batches of 9 are more than two epochs.
    states, expected = zip(*with_states(build(), 30), strict=True)
    offsets = (0, 1, 7, 12, 13, 26) if num_workers else range(27)
    for offset in offsets:
        batches = build()
        batches.load_state_dict(json.loads(states[offset]))
        assert lists(batches, 4) == list(expected[offset : offset + 4])
        assert (offset + 4 == 30) or json.loads(states[offset + 4]) == batches.state_dict()


@streamed
def test_a_second_rank_continues_too(parquet: Path, streaming: bool):
    rows = train_rows(parquet, streaming)

    def make() -> TrainBatches:
        return TrainBatches(rows, read_numbers, 4, seed=5, rank=1, world_size=2)

    states, expected = zip(*with_states(make(), 40), strict=True)
    for offset in range(0, 37, 5):
        batches = make()
        batches.load_state_dict(json.loads(states[offset]))
        assert lists(batches, 3) == list(expected[offset : offset + 3])


def test_iterating_again_continues(parquet: Path):
    rows = train_rows(parquet, True)
    batches = TrainBatches(rows, read_numbers, 9, seed=0)
    assert lists(batches, 3) + lists(batches, 3) == lists(TrainBatches(rows, read_numbers, 9, seed=0), 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"batch_size": 8}, "batch_size was 4, is 8"),
        ({"num_workers": 2}, "loader_workers was 1, is 2"),
        ({"world_size": 2, "rank": 1}, "rank was 0, is 1; world_size was 1, is 2"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_state_of_another_layout_is_refused(parquet: Path, change: dict[str, int], message: str):
    options = {"batch_size": 4, "seed": 0}
    state = TrainBatches(train_rows(parquet, False), read_numbers, **options).state_dict()
    changed = TrainBatches(train_rows(parquet, False), read_numbers, **(options | change))
    with pytest.raises(ValueError, match=message):
        changed.load_state_dict(state)


def test_the_loader_leaves_the_global_generator_alone(parquet: Path):
    before = torch.get_rng_state()
    next(iter(TrainBatches(train_rows(parquet, False), read_numbers, 4, seed=0)))
    assert torch.equal(before, torch.get_rng_state())


# Bad examples


@streamed
@workers
def test_bad_examples_are_counted_logged_and_skipped(
    damaged: Path, streaming: bool, num_workers: int, caplog: pytest.LogCaptureFixture
):
    batches = TrainBatches(train_rows(damaged, streaming), read_numbers, 10, seed=0, num_workers=num_workers)
    with caplog.at_level(logging.WARNING, "hf_vq.streams"):
        seen = lists(batches, 40)
    assert all(len(batch) == 10 for batch in seen)
    assert set(chained(seen)) == set(range(NUM_ROWS)) - BAD
    assert batches.bad_examples == len(BAD) == len(caplog.records)
    place = r"row 11 of \S+/train-00000-of-00005\.parquet" if streaming else "row 11"
    assert any(re.search(place + ": ", record.getMessage()) for record in caplog.records)


def test_no_good_example_is_lost_beside_bad_ones(damaged: Path):
    batches = TrainBatches(train_rows(damaged, False), read_numbers, 10, seed=0)
    assert sorted(flat(islice(batches, 11))) == sorted(set(range(NUM_ROWS)) - BAD)


def test_the_count_of_bad_examples_survives(damaged: Path):
    rows = train_rows(damaged, True)
    first, second = (TrainBatches(rows, read_numbers, 10, seed=0) for _ in range(2))
    lists(first, 20)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.bad_examples == len(BAD)
    lists(second, 20)
    assert second.bad_examples == len(BAD)


@streamed
@workers
def test_too_many_bad_examples_are_an_error(damaged: Path, streaming: bool, num_workers: int):
    options = {"seed": 0, "num_workers": num_workers, "max_bad_examples": 4}
    batches = TrainBatches(train_rows(damaged, streaming), read_numbers, 10, **options)
    with pytest.raises(ValueError, match=r"more than max_bad_examples=4 .*row \d+.*or raise max_bad_examples"):
        lists(batches, 40)


@streamed
def test_data_with_nothing_but_bad_examples_are_an_error(tmp_path: Path, streaming: bool):
    write_parquet(tmp_path / "train.parquet", range(5), bad=range(5))
    with pytest.raises(ValueError, match="more than max_bad_examples=100"):
        lists(TrainBatches(train_rows(tmp_path, streaming), read_numbers, 2, seed=0), 1)


def test_a_bad_file_is_named(pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "good.png").write_bytes(encoded(1))
    (tmp_path / "torn.png").write_bytes(encoded(2)[:30])
    batches = EvaluationBatches(train_rows(tmp_path, False), read_numbers, 2)
    assert flat(batches) == [1]
    assert f"({tmp_path / 'torn.png'})" in caplog.text


@streamed
def test_evaluation_counts_bad_examples_anew(damaged: Path, streaming: bool):
    batches = EvaluationBatches(train_rows(damaged, streaming), read_numbers, 10)
    for _ in range(2):
        assert flat(batches) == sorted(set(range(NUM_ROWS)) - BAD)
        assert batches.bad_examples == len(BAD)


def test_errors_of_the_transform_arrive(parquet: Path):
    def fail(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        raise KeyError("caption")

    with pytest.raises(KeyError, match="caption"):
        next(iter(TrainBatches(train_rows(parquet, True), fail, 4, seed=0)))


# Evaluation batches


@streamed
@workers
def test_evaluation_is_complete_and_repeatable(parquet: Path, streaming: bool, num_workers: int):
    batches = EvaluationBatches(train_rows(parquet, streaming), read_numbers, 10, num_workers=num_workers)
    first, second = ([batch["numbers"].tolist() for batch in batches] for _ in range(2))
    assert first == second
    assert sorted(chained(first)) == list(range(NUM_ROWS))
    if not (streaming and num_workers):
        assert chained(first) == list(range(NUM_ROWS))
        assert [len(batch) for batch in first] == [10] * 11 + [5]


@streamed
@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_the_processes_share_an_evaluation(parquet: Path, streaming: bool, world_size: int):
    rows = train_rows(parquet, streaming)
    counts = Counter()
    for rank in range(world_size):
        counts.update(flat(EvaluationBatches(rows, read_numbers, 10, rank=rank, world_size=world_size)))
    assert counts == Counter(range(NUM_ROWS))


def test_evaluation_tells_its_number_of_images(parquet: Path):
    table, stream = (train_rows(parquet, streaming) for streaming in (False, True))
    ranks = [EvaluationBatches(table, read_numbers, 10, rank=rank, world_size=2) for rank in range(2)]
    assert [batches.num_images for batches in ranks] == [58, 57] == [len(flat(batches)) for batches in ranks]
    assert EvaluationBatches(stream, read_numbers, 10).num_images == NUM_ROWS
    assert EvaluationBatches(stream, read_numbers, 10, world_size=2).num_images is None


def test_a_process_may_have_nothing_to_evaluate(parquet: Path):
    rows = train_rows(parquet, False).select(range(2))
    assert list(EvaluationBatches(rows, read_numbers, 10, rank=2, world_size=3)) == []


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 0}, {"rank": 2, "world_size": 2}, {"num_workers": -1}],
    ids=lambda value: next(iter(value)),
)
def test_impossible_layouts_are_refused(parquet: Path, options: dict[str, int]):
    with pytest.raises(ValueError, match="cannot batch with"):
        EvaluationBatches(train_rows(parquet, False), read_numbers, **({"batch_size": 4} | options))


def test_no_rows_are_refused(parquet: Path):
    with pytest.raises(ValueError, match="no rows"):
        TrainBatches(train_rows(parquet, False).select([]), read_numbers, 4, seed=0)


# Real data


def test_cifar10_streams(shared_data: Path):
    def sizes(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {"sizes": torch.tensor([row["image"].size for row in rows])}

    splits = load_images(str(shared_data / "cifar10"), streaming=True)
    assert [num_examples(split) for split in splits[:3]] == [37_500, 12_500, 10_000]
    assert next(iter(TrainBatches(splits.train, sizes, 64, seed=0)))["sizes"].tolist() == [[32, 32]] * 64
