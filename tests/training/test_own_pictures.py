"""A folder of JPEGs, trained on by one command; some of them truncated, and the pictures afterwards not square."""

from pathlib import Path

import pytest
from recipes import flags, run, smooth_picture, train, truncate, write_jpegs

from hf_vq import ImageTokenizer


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of JPEGs of several shapes, all of them larger than 64 x 64."""
    folder = tmp_path_factory.mktemp("pictures") / "jpegs"
    write_jpegs(folder, [(72, 96), (100, 66), (64, 64), (80, 130)] * 6)
    return folder


PHOTOS = {"image_size": 64, "hidden_channels": [8, 8]}


def test_a_folder_of_jpegs_and_pictures_that_are_not_square(pictures: Path, tmp_path: Path):
    train(tmp_path / "run", PHOTOS, dataset_name=pictures, validation_size=4, max_train_steps=4)
    tokenizer = ImageTokenizer.from_pretrained(tmp_path / "run")
    assert len(tokenizer.encode(pictures / "000.jpg")) == 16 * 16

    shapes = [(48, 80), (50, 83), (120, 64)]  # the second is cut to a multiple of 4
    own_size = {"do_resize": False, "do_center_crop": False}
    batch = tokenizer([smooth_picture(n, *shape) for n, shape in enumerate(shapes)], **own_size)
    assert batch.image_grid_hw == [[12, 20], [12, 20], [30, 16]]
    assert [len(ids) for ids in batch.input_ids] == [240, 240, 480]
    decoded = tokenizer.decode(batch.input_ids, image_grid_hw=batch.image_grid_hw)
    assert [(image.height, image.width) for image in decoded] == [(48, 80), (48, 80), (120, 64)]

    tokenizer.processor.do_resize = tokenizer.processor.do_center_crop = False
    tokenizer.save_pretrained(tmp_path / "own_size")
    again = ImageTokenizer.from_pretrained(tmp_path / "own_size")
    assert again(smooth_picture(0, 48, 80)).input_ids == batch.input_ids[:1]


@pytest.mark.parametrize("workers", [0, 2], ids=["no_workers", "two_workers"])
def test_truncated_jpegs_are_counted_and_skipped(pictures: Path, tmp_path: Path, workers: int):
    folder = tmp_path / "jpegs"
    folder.mkdir()
    for path in pictures.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for name in ("001.jpg", "012.jpg", "020.jpg"):
        truncate(folder / name)
    # Five epochs: a picture that comes again is counted once.
    settings = {"dataset_name": folder, "validation_size": 0, "max_train_steps": 15, "dataloader_num_workers": workers}
    output = train(tmp_path / "run", PHOTOS, max_bad_examples=3, **settings)
    assert output.count("skipped a bad example") == 3
    assert all(f"{folder / name}" in output for name in ("001.jpg", "012.jpg", "020.jpg"))
    message = run(flags(tmp_path / "strict", PHOTOS, max_bad_examples=2, **settings)).output
    assert "more than max_bad_examples=2" in message and "raise max_bad_examples" in message
    if not workers:
        assert "Traceback" not in message
    assert not (tmp_path / "strict" / "model.safetensors").exists()
