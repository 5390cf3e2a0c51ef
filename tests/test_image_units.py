"""A data set of images in units: every row in one of them, in order, and always the same ones."""

from pathlib import Path

import pytest

from corpora import picture, write_data_set, write_images
from hf_vq.corpus.units import ImageUnits
from hf_vq.datasets_io import open_splits


def captions(units: ImageUnits, split: str = "train") -> list[list[str]]:
    return [[row["caption"] for _, row in units.rows(unit)] for unit in units.units if unit.split == split]


def expected(*ends: int, first: int = 0) -> list[list[str]]:
    starts = [first, *ends[:-1]]
    return [[f"picture {n}" for n in range(start, end)] for start, end in zip(starts, ends, strict=True)]


def test_a_file_is_a_unit(tmp_path: Path):
    units = ImageUnits(open_splits(str(write_data_set(tmp_path))), rows_per_file=12)
    assert [unit.name for unit in units.units if unit.split == "train"] == [f"train-{n:05}-of-00004" for n in range(4)]
    assert captions(units) == expected(12, 24, 36, 48)
    assert captions(units, "test") == expected(60, first=48)
    assert units.num_rows == 60 and [unit.num_rows for unit in units.units] == [12] * 5


def test_a_long_file_is_cut_at_its_row_groups(tmp_path: Path):
    write_images(tmp_path / "train-00000-of-00002.parquet", range(23), rows_per_group=5)
    write_images(tmp_path / "train-00001-of-00002.parquet", range(23, 27), rows_per_group=5)
    units = ImageUnits(open_splits(str(tmp_path)), rows_per_file=11)
    # Five and five fit, a third group of five does not; the rest of the first file does not join the second.
    assert captions(units) == expected(10, 20, 23, 27)
    assert [unit.name for unit in units.units] == [f"train-{n:05}-of-00004" for n in range(4)]
    place, _ = next(units.rows(units.units[2]))
    assert place.startswith("row 0 of ") and place.endswith("train-00000-of-00002.parquet, row group 4")


def test_a_row_group_is_never_cut(tmp_path: Path):
    write_images(tmp_path / "train-00000-of-00001.parquet", range(20), rows_per_group=8)
    assert captions(ImageUnits(open_splits(str(tmp_path)), rows_per_file=3)) == expected(8, 16, 20)


def test_local_pictures_are_cut_by_rows(tmp_path: Path):
    for number in range(7):
        picture(number).save(tmp_path / f"{number}.png")
    units = ImageUnits(open_splits(str(tmp_path)), rows_per_file=3)
    names = [[Path(row["image"]["path"]).stem for _, row in units.rows(unit)] for unit in units.units]
    assert names == [["0", "1", "2"], ["3", "4", "5"], ["6"]]
    assert [place for place, _ in units.rows(units.units[1])] == ["row 3", "row 4", "row 5"]


def test_only_the_splits_that_are_asked_for(tmp_path: Path):
    units = ImageUnits(open_splits(str(write_data_set(tmp_path)), splits=["test"]), rows_per_file=12)
    assert [unit.name for unit in units.units] == ["test-00000-of-00001"]
    with pytest.raises(ValueError, match="no split 'nowhere': the data set has"):
        open_splits(str(tmp_path), splits=["nowhere"])


def test_the_hash_is_that_of_the_files(tmp_path: Path):
    one, two = write_data_set(tmp_path / "one"), write_data_set(tmp_path / "two", files=3)
    hashes = [ImageUnits(open_splits(str(folder)), rows).hash() for folder, rows in ((one, 12), (one, 12), (one, 5))]
    assert hashes[0] == hashes[1] != hashes[2]
    assert ImageUnits(open_splits(str(two)), 12).hash() != hashes[0]


@pytest.mark.parametrize("rows", [0, -1])
def test_a_file_has_a_row(tmp_path: Path, rows: int):
    with pytest.raises(ValueError, match=f"rows_per_file must be at least 1, got {rows}"):
        ImageUnits(open_splits(str(write_data_set(tmp_path))), rows)


def test_pictures_open_from_their_cells(tmp_path: Path):
    units = ImageUnits(open_splits(str(write_data_set(tmp_path))), rows_per_file=12)
    _, row = next(units.rows(units.units[0]))
    assert set(row) == {"image", "label", "caption"} and row["image"]["bytes"].startswith(b"\x89PNG")
