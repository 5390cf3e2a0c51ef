"""Bulk tokenization: every row once, as its own, and the same bytes whatever happened on the way."""

import gc
import json
import logging
import multiprocessing
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value, load_dataset

import hf_vq
from corpora import CLASSES, FEATURES, make_tokenizer, picture, save_tokenizer, write_data_set, write_images
from hf_vq.cli import main
from hf_vq.corpus.job import TokenizationJob
from hf_vq.corpus.token_file import TokenFile
from hf_vq.corpus.transform import TokenizeImages
from hf_vq.streams import describe_tokens

ROWS = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_data_set(tmp_path_factory.mktemp("images")))


def tokenize(folder: Path, model: str, dataset_name: str, *flags: str) -> int:
    """`hf-vq tokenize`, decoding in this process."""
    given = ["--dataset_name", dataset_name, "--output", str(folder), "--dataloader_num_workers", "0"]
    return main(["tokenize", model, *given, *flags])


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by its name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rows(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    return list(load_dataset(str(folder), split=split))


def ids_of(model: str, numbers: range) -> list[list[int]]:
    return hf_vq.ImageTokenizer.from_pretrained(model)([picture(number) for number in numbers])["input_ids"]


def test_tokens_and_the_columns_beside_them(tmp_path: Path, model: str, images: str):
    assert tokenize(tmp_path / "out", model, images) == 0
    train, test = rows(tmp_path / "out"), rows(tmp_path / "out", "test")
    assert [row["caption"] for row in train] == [f"picture {n}" for n in range(48)]
    assert [row["label"] for row in test] == [n % 3 for n in range(48, 60)]
    assert [row["image_tokens"] for row in train + test] == ids_of(model, range(ROWS))
    assert set(train[0]) == {"image_tokens", "label", "caption"}
    loaded = load_dataset(str(tmp_path / "out"))
    assert loaded["train"].features["label"].names == CLASSES
    assert loaded["train"].features["image_tokens"].feature.dtype == "uint16"
    assert {name: len(split) for name, split in loaded.items()} == {"train": 48, "test": 12}


def test_the_schema_says_which_tokenizer(tmp_path: Path, model: str, images: str):
    tokenize(tmp_path / "out", model, images)
    found = describe_tokens(str(tmp_path / "out"))
    made = TokenizeImages(make_tokenizer()).description
    assert found is not None and found.tokenizer_fingerprint == made.tokenizer_fingerprint
    assert found.processor_hash == made.processor_hash and len(made.processor_hash or "") == 64
    assert (found.codebook_size, found.num_codebooks, found.grid_size) == (300, 1, (2, 2))
    assert found.tokenizer_name_or_path == model and found.precision == "float32"
    found.check_made_by(make_tokenizer().model)


def test_refined_tokens_on_request_and_the_schema_says_so(tmp_path: Path, model: str, images: str):
    assert tokenize(tmp_path / "out", model, images, "--refine", "2") == 0
    found = describe_tokens(str(tmp_path / "out"))
    assert found is not None and found.refine == 2
    tok = hf_vq.ImageTokenizer.from_pretrained(model)
    refined = tok([picture(number) for number in range(48)], refine=2)["input_ids"]
    assert [row["image_tokens"] for row in rows(tmp_path / "out")] == refined != ids_of(model, range(48))
    assert "| refined | 2 rounds |" in (tmp_path / "out" / "README.md").read_text()


def test_a_bad_image_is_counted_named_and_left_out(
    tmp_path: Path, model: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
):
    images = str(write_data_set(tmp_path / "images", bad=[3, 30]))
    with caplog.at_level(logging.WARNING):
        assert tokenize(tmp_path / "out", model, images) == 0
    assert [row["caption"] for row in rows(tmp_path / "out")] == [f"picture {n}" for n in range(48) if n not in (3, 30)]
    assert "58 images are tokenized" in (said := capsys.readouterr().out) and "2 were left out" in said
    assert any("row 3 of" in message for message in caplog.messages)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| images left out as unusable | 2 |" in card and "row 6 of" in card and "train-00002" in card


@pytest.mark.parametrize("batch_size", ["1", "64"])
def test_an_image_that_the_processor_refuses_is_a_bad_one(tmp_path: Path, model: str, batch_size: str):
    sizes = [(8, 8), (2, 9), (12, 8)]
    for number, (height, width) in enumerate(sizes):
        (tmp_path / "images").mkdir(exist_ok=True)
        picture(number, height, width).save(tmp_path / "images" / f"{number}.png")
    flags = ["--keep_size", "--batch_size", batch_size]
    assert tokenize(tmp_path / "out", model, str(tmp_path / "images"), *flags) == 0
    found = rows(tmp_path / "out")
    assert [(row["grid_h"], row["grid_w"]) for row in found] == [(2, 2), (3, 2)]
    assert [len(row["image_tokens"]) for row in found] == [4, 6]
    assert describe_tokens(str(tmp_path / "out")).grid_size is None  # type: ignore[union-attr]  # there is one


def test_too_many_bad_images_stop_it(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]):
    images = str(write_data_set(tmp_path / "images", bad=[3, 30, 31]))
    assert tokenize(tmp_path / "out", model, images, "--max_bad_examples", "2") == 2
    assert "more than max_bad_examples=2" in capsys.readouterr().err
    # What is finished stays, and counts.
    there = {path.name for path in (tmp_path / "out" / "data").iterdir()}
    assert "train-00000-of-00004.parquet" in there and "train-00002-of-00004.parquet" not in there
    assert tokenize(tmp_path / "out", model, images, "--max_bad_examples", "3") == 0
    assert len(rows(tmp_path / "out")) == 45


@pytest.mark.parametrize(
    "flags",
    [[], ["--dataloader_num_workers", "2"], ["--batch_size", "5"], ["--batch_size", "100"]],
    ids=["again", "workers", "small", "large"],
)
def test_the_same_rows_however_they_are_loaded(tmp_path: Path, model: str, images: str, flags: list[str]):
    tokenize(tmp_path / "one", model, images)
    tokenize(tmp_path / "two", model, images, *flags)
    first, second = contents(tmp_path / "one" / "data"), contents(tmp_path / "two" / "data")
    assert first == second and len(first) == 5


def test_what_is_finished_is_not_done_again(tmp_path: Path, model: str, images: str):
    tokenize(tmp_path, model, images)
    whole, files = contents(tmp_path), sorted((tmp_path / "data").iterdir())
    times = {path: path.stat().st_mtime_ns for path in files}
    files[1].unlink()
    (tmp_path / "data" / ".half.parquet.1.tmp").write_bytes(b"half")
    assert tokenize(tmp_path, model, images) == 0
    assert contents(tmp_path) == whole
    redone = [path for path in files if path.stat().st_mtime_ns != times[path]]
    assert redone == [files[1]]


def tokenize_slowly(ready: Any, *arguments: str) -> None:
    """`tokenize`, which takes its time over each batch, in a process of its own."""
    encode = TokenizeImages.encode

    def slowly(self: TokenizeImages, batches: Any) -> Any:
        ready.set()
        time.sleep(0.06)
        return encode(self, batches)

    TokenizeImages.encode = slowly  # type: ignore[method-assign]  # in this process
    torch.set_num_threads(1)
    sys.exit(tokenize(Path(arguments[0]), *arguments[1:]))


def test_killed_at_ten_moments_it_equals_the_undisturbed(tmp_path: Path, model: str, images: str):
    flags = [model, images, "--batch_size", "2", "--rows_per_file", "5"]
    tokenize(tmp_path / "calm", *flags)
    server = multiprocessing.get_context("forkserver")
    draw, killed = random.Random(0), 0
    while killed < 10:
        ready = server.Event()
        process = server.Process(target=tokenize_slowly, args=(ready, str(tmp_path / "killed"), *flags))
        process.start()
        assert ready.wait(60)
        time.sleep(draw.uniform(0.0, 0.4))  # a file takes at least 0.18: ten times are not enough for all
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        done = len(list((tmp_path / "killed").glob("data/[!.]*.parquet")))
        assert done < 15
    assert done > 0
    assert tokenize(tmp_path / "killed", *flags) == 0
    calm, disturbed = (contents(tmp_path / name / "data") for name in ("calm", "killed"))
    assert calm == disturbed and len(calm) == 15


def test_another_job_is_refused(tmp_path: Path, model: str, images: str, capsys: pytest.CaptureFixture[str]):
    tokenize(tmp_path / "out", model, images)
    before = contents(tmp_path / "out")
    assert tokenize(tmp_path / "out", model, images, "--keep_columns", "label") == 2
    assert "belongs to another tokenization: keep_columns is None there and ['label'] here" in capsys.readouterr().err
    other = str(save_tokenizer(tmp_path / "other", codebook_size=200))
    assert tokenize(tmp_path / "out", other, images) == 2
    assert "the tokenizer has changed" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    assert tokenize(tmp_path / "full", model, images) == 2
    assert "is not empty" in capsys.readouterr().err


def test_images_that_change_under_way_are_refused(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]):
    images = write_data_set(tmp_path / "images")
    tokenize(tmp_path / "out", model, str(images))
    write_images(images / "train-00003-of-00004.parquet", range(60, 72))  # others, but as many
    assert tokenize(tmp_path / "out", model, str(images)) == 2
    assert "the images have changed" in capsys.readouterr().err


def test_pictures_that_change_under_way_are_refused(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "images").mkdir()
    for number in range(7):
        picture(number).save(tmp_path / "images" / f"{number}.png")
    tokenize(tmp_path / "out", model, str(tmp_path / "images"), "--rows_per_file", "3")
    (tmp_path / "images" / "0.png").unlink()
    picture(9).save(tmp_path / "images" / "9.png")
    assert tokenize(tmp_path / "out", model, str(tmp_path / "images"), "--rows_per_file", "3") == 2
    assert "the images have changed" in capsys.readouterr().err


def test_two_processes_do_not_share_a_folder(
    tmp_path: Path, model: str, images: str, capsys: pytest.CaptureFixture[str]
):
    with TokenizationJob(model, images).open(tmp_path).claimed():
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / ".train.parquet.1.tmp").write_bytes(b"under way")
        assert tokenize(tmp_path, model, images) == 2
        assert "another process is tokenizing" in capsys.readouterr().err
        assert (tmp_path / "data" / ".train.parquet.1.tmp").exists()
    assert tokenize(tmp_path, model, images) == 0


def test_what_is_stopped_says_how_to_go_on(
    tmp_path: Path, model: str, images: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def stop(self: TokenizeImages, batches: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(TokenizeImages, "encode", stop)
        assert tokenize(tmp_path, model, images) == 130
    assert "run the same command again to go on" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.parquet*"))
    assert tokenize(tmp_path, model, images) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--keep_columns", "label", "captoin"], "cannot keep the column captoin: beside the images there are label"),
        (["--keep_columns", "image"], "cannot keep the column image"),
        (["--splits", "validation"], "there is no split 'validation'"),
        (["--batch_size", "0"], "batch_size=0"),
        (["--rows_per_file", "0"], "rows_per_file must be at least 1"),
        (["--image_column", "caption2"], "there is no column 'caption2'"),
        (["--num_actors", "2"], "are for --engine ray"),
        (["--private"], "--private is for a repository"),
        (["--device", "quantum"], "'quantum' cannot be used here"),
    ],
)
def test_bad_settings(
    tmp_path: Path, model: str, images: str, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert tokenize(tmp_path / "out", model, images, *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_column_that_the_tokens_need(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]):
    cells = {"image": [picture(0)], "image_tokens": [[1, 2]]}
    (tmp_path / "images").mkdir()
    Dataset.from_dict(cells).to_parquet(tmp_path / "images" / "train.parquet")
    assert tokenize(tmp_path / "out", model, str(tmp_path / "images")) == 2
    assert "has a column image_tokens already" in capsys.readouterr().err
    assert tokenize(tmp_path / "out", model, str(tmp_path / "images"), "--keep_columns") == 0
    assert rows(tmp_path / "out") == [{"image_tokens": ids_of(model, range(1))[0]}]


def test_the_same_object_in_map(model: str):
    pictures = [picture(n) for n in range(10)]
    dataset = Dataset.from_dict({"image": pictures, "caption": [f"picture {n}" for n in range(10)]})
    tokenizer = hf_vq.ImageTokenizer.from_pretrained(model)
    mapped = dataset.map(TokenizeImages(tokenizer), batched=True, batch_size=4, remove_columns="image")
    assert mapped["image_tokens"][:] == ids_of(model, range(10))
    assert mapped.column_names == ["caption", "image_tokens"]


def test_several_codebooks_lie_codebook_fastest(tmp_path: Path, images: str):
    model = str(save_tokenizer(tmp_path / "tok", num_codebooks=3))
    tokenize(tmp_path / "out", model, images, "--splits", "test")
    found = rows(tmp_path / "out", "test")
    assert [row["image_tokens"] for row in found] == ids_of(model, range(48, 60))
    assert {len(row["image_tokens"]) for row in found} == {12}


def test_a_code_fits_its_type(tmp_path: Path, images: str):
    for codebook_size, kind in ((256, "uint8"), (257, "uint16")):
        model = str(save_tokenizer(tmp_path / f"tok{codebook_size}", codebook_size=codebook_size))
        tokenize(tmp_path / kind, model, images, "--splits", "test")
        found = load_dataset(str(tmp_path / kind), split="test")
        assert found.features["image_tokens"].feature.dtype == kind
        assert found["image_tokens"][:] == ids_of(model, range(48, 60))


def test_row_groups_are_of_one_size(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hf_vq.corpus.token_file.ROW_GROUP", 5)
    images = write_data_set(tmp_path / "images", files=1)
    tokenize(tmp_path / "out", model, str(images), "--batch_size", "7")
    footer = pq.read_metadata(tmp_path / "out" / "data" / "train-00000-of-00001.parquet")
    assert [footer.row_group(group).num_rows for group in range(footer.num_row_groups)] == [5, 5, 2]


def test_the_job_is_plain(tmp_path: Path, model: str, images: str):
    tokenize(tmp_path / "out", model, images, "--splits", "test", "--keep_columns", "label")
    job = json.loads((tmp_path / "out" / "tokenize.json").read_text())
    assert job["dataset_name"] == images and job["splits"] == ["test"] and job["keep_columns"] == ["label"]
    assert TokenizationJob(model, images).settings["splits"] is None


def test_memory_does_not_grow_with_the_data(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch):
    """What waits for the writer, the loader and the model is bounded by batches, whatever the number of rows."""
    monkeypatch.setattr("hf_vq.corpus.token_file.ROW_GROUP", 100)
    images, held = tmp_path / "images", list[tuple[int, int]]()
    write_images(images / "train-00000-of-00001.parquet", range(1000), rows_per_group=50)
    write = TokenFile.write

    def watched(self: TokenFile, table: pa.Table) -> None:
        write(self, table)
        pixels = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.shape[1:] == (3, 8, 8)]
        held.append((sum(map(len, pixels)), sum(map(len, self._waiting))))

    monkeypatch.setattr(TokenFile, "write", watched)
    tokenize(tmp_path / "out", model, str(images), "--batch_size", "20")
    most_pixels, most_rows = (max(numbers) for numbers in zip(*held, strict=True))
    assert len(held) == 50 and most_pixels <= 6 * 20 and most_rows < 100


def test_pictures_beside_the_tokens(tmp_path: Path, model: str):
    """Those inside of other columns are left out like the others; one that is asked for comes back as a picture."""
    cells = {"image": [picture(0)], "pages": [[picture(1)]], "icon": [picture(2)], "name": ["a"]}
    kinds = {"image": Image(), "pages": List(Image()), "icon": Image(), "name": Value("string")}
    (tmp_path / "images").mkdir()
    Dataset.from_dict(cells, features=Features(kinds)).to_parquet(tmp_path / "images" / "train.parquet")
    flags = ["--image_column", "image"]
    tokenize(tmp_path / "bare", model, str(tmp_path / "images"), *flags)
    assert rows(tmp_path / "bare")[0].keys() == {"name", "image_tokens"}
    tokenize(tmp_path / "kept", model, str(tmp_path / "images"), *flags, "--keep_columns", "icon")
    assert np.array_equal(np.asarray(rows(tmp_path / "kept")[0]["icon"]), np.asarray(picture(2)))


def test_features_survive(tmp_path: Path, model: str, images: str):
    tokenize(tmp_path / "out", model, images)
    found = load_dataset(str(tmp_path / "out"), split="train", streaming=True)
    assert found.features["caption"] == FEATURES["caption"] and found.features["label"] == FEATURES["label"]
    assert np.asarray(next(iter(found))["image_tokens"]).shape == (4,)
