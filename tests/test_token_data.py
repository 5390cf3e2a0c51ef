"""Token data sets: what their schema tells, and how their rows come."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset

from hf_vq.streams import EvaluationBatches, TrainBatches, describe_tokens, load_images, num_examples
from hf_vq.token_batches import ToImageTokens
from hf_vq.token_data import TokenDescription, describes_tokens, read_description
from token_files import CLASSES, write_token_data, write_token_file

DESCRIPTION = TokenDescription(11, 1, (2, 3), "f" * 64, "org/tok", "abc", "0" * 64)
in_every_way = pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])


def test_the_schema_keeps_the_description_beside_what_it_held(tmp_path: Path):
    write_token_file(tmp_path / "a.parquet", DESCRIPTION)
    schema = pq.read_schema(tmp_path / "a.parquet")
    assert TokenDescription.of(schema) == DESCRIPTION
    assert b"huggingface" in schema.metadata
    assert describes_tokens(tmp_path / "a.parquet")
    varying = replace(DESCRIPTION, grid_size=None)
    assert TokenDescription.of(varying.added_to(schema)) == varying


def test_other_people_read_it_with_plain_load_dataset(tmp_path: Path):
    write_token_data(tmp_path / "data", DESCRIPTION)
    dataset = load_dataset(str(tmp_path / "data"), cache_dir=str(tmp_path))
    assert dataset["train"].features["label"].names == CLASSES
    assert len(dataset["test"][0]["image_tokens"]) == 6


@in_every_way
def test_rows_hold_tokens_and_what_takes_no_decoding(tmp_path: Path, streaming: bool):
    write_token_data(tmp_path / "data", DESCRIPTION)
    splits = load_images(str(tmp_path / "data"), streaming=streaming, take_tokens=True, cache_dir=str(tmp_path))
    assert describe_tokens(str(tmp_path / "data"), cache_dir=str(tmp_path)) == DESCRIPTION
    # A stream holds out whole files.
    assert (num_examples(splits.train), num_examples(splits.validation)) == ((36, 12) if streaming else (44, 4))
    assert num_examples(splits.test) == 12
    assert list(splits.train.features) == ["image_tokens", "label", "caption"]


@in_every_way
@pytest.mark.parametrize("codebooks", [1, 2])
def test_batches_are_the_rows(tmp_path: Path, streaming: bool, codebooks: int):
    description = replace(DESCRIPTION, num_codebooks=codebooks)
    write_token_data(tmp_path / "data", description)
    splits = load_images(str(tmp_path / "data"), streaming=streaming, take_tokens=True, cache_dir=str(tmp_path))
    batches = list(EvaluationBatches(splits.test, ToImageTokens(description, "label"), 5))
    assert [len(batch["class_labels"]) for batch in batches] == [5, 5, 2]
    tokens = torch.cat([batch["image_tokens"] for batch in batches])
    assert tokens.shape == (12, 2, 3) + ((2,) if codebooks > 1 else ()) and tokens.dtype == torch.int64
    written = pq.read_table(tmp_path / "data" / "test-00000.parquet")
    assert np.array_equal(tokens.flatten(1), written["image_tokens"].to_pylist())
    assert torch.cat([batch["class_labels"] for batch in batches]).tolist() == written["label"].to_pylist()


@in_every_way
def test_training_continues_where_it_stood(tmp_path: Path, streaming: bool):
    write_token_data(tmp_path / "data", DESCRIPTION)
    train = load_images(
        str(tmp_path / "data"), streaming=streaming, take_tokens=True, validation_size=0, cache_dir=str(tmp_path)
    ).train

    def opened() -> TrainBatches:
        return TrainBatches(train, ToImageTokens(DESCRIPTION), 5, seed=3)

    whole = [batch["image_tokens"] for _, batch in zip(range(25), opened(), strict=False)]
    begun = opened()
    first = [batch["image_tokens"] for _, batch in zip(range(11), begun, strict=False)]
    resumed = opened()
    resumed.load_state_dict(begun.state_dict())
    rest = [batch["image_tokens"] for _, batch in zip(range(14), resumed, strict=False)]
    assert torch.equal(torch.cat(whole), torch.cat(first + rest))


def test_a_token_data_set_has_no_pictures(tmp_path: Path):
    write_token_data(tmp_path / "data", DESCRIPTION)
    with pytest.raises(ValueError, match="which column holds the pictures.*image_tokens, label, caption"):
        load_images(str(tmp_path / "data"), cache_dir=str(tmp_path))


def test_files_of_different_tokenizers_do_not_mix(tmp_path: Path):
    write_token_data(tmp_path / "data", DESCRIPTION)
    stranger = tmp_path / "data" / "train-00009.parquet"
    write_token_file(stranger, replace(DESCRIPTION, tokenizer_fingerprint="0" * 64))
    with pytest.raises(ValueError, match="train-00009.*tokens of another kind"):
        describe_tokens(str(tmp_path / "data"), cache_dir=str(tmp_path))


@pytest.mark.parametrize("row", [[1] * 12, [1] * 3, [], None])
def test_a_row_of_another_length_is_no_image(row: list[int] | None):
    rows = [{"image_tokens": [1] * 6}, {"image_tokens": row}]
    with pytest.raises(ValueError, match=r"a row of image_tokens has \d+ tokens, and grid \(2, 3\) .* has 6"):
        ToImageTokens(DESCRIPTION)(rows)


def test_a_row_without_a_label_has_no_class():
    rows = [{"image_tokens": [1] * 6, "label": 2}, {"image_tokens": [1] * 6, "label": None}]
    assert ToImageTokens(DESCRIPTION, "label")(rows)["class_labels"].tolist() == [2, -1]


def test_a_file_without_description_is_named(tmp_path: Path):
    write_token_file(tmp_path / "a.parquet", DESCRIPTION)
    plain = tmp_path / "b.parquet"
    pq.write_table(pq.read_table(tmp_path / "a.parquet").replace_schema_metadata({}), plain)
    assert not describes_tokens(plain)
    with pytest.raises(ValueError, match="b.parquet holds no column image_tokens"):
        read_description([str(tmp_path / "a.parquet"), str(plain)])
    with pytest.raises(ValueError, match="no files"):
        read_description([])
