"""The facade: ids of any mix of images, in order, and back; the habits of a text tokenizer; errors that help."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image
from transformers import AutoImageProcessor

from hf_vq import SQVAEConfig, SQVAEModel, VQVAEConfig, VQVAEModel
from hf_vq.models.image_processing_vq import VQImageProcessor
from hf_vq.token_grids import on_grid, to_encoding
from hf_vq.tokenizer import ImageTokenizer
from hub_server import HubServer

CODES = 16
KEEP_SIZE = {"do_resize": False, "do_center_crop": False}


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    AutoImageProcessor.register(VQVAEConfig, image_processor_classes={"pil": VQImageProcessor}, exist_ok=True)


def make_tokenizer(quantizer: str = "ema", **settings: Any) -> ImageTokenizer:
    torch.manual_seed(0)
    stochastic = quantizer in ("gaussian", "vmf")
    config_class, model_class = (SQVAEConfig, SQVAEModel) if stochastic else (VQVAEConfig, VQVAEModel)
    config = config_class(
        quantizer=quantizer,
        image_size=16,
        codebook_size=CODES,
        hidden_channels=[8, 16],
        residual_channels=8,
        num_residual_blocks=1,
        **settings,
    )
    return ImageTokenizer(model_class(config).eval(), VQImageProcessor.for_config(config))


@pytest.fixture
def tok() -> ImageTokenizer:
    return make_tokenizer()


def pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    arrays = [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    return [Image.fromarray(array) for array in arrays]


def test_images_become_lists_of_ids(tok: ImageTokenizer):
    images = pictures((16, 16), (20, 30), (16, 16))
    batch = tok(images)
    assert batch.image_grid_hw == [[4, 4]] * 3
    pixel_values = tok.processor(images, return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = tok.model.encode(pixel_values).image_tokens
    assert batch.input_ids == expected.flatten(1).tolist()
    assert all(isinstance(token, int) for token in batch.input_ids[0])
    assert tok.encode(images[1]) == batch.input_ids[1]


def test_refined_ids_are_the_model_s(tok: ImageTokenizer):
    images = pictures((16, 16), (16, 16), (16, 16))
    expected = tok.model.encode(tok.processor(images, return_tensors="pt").pixel_values, refine=1).image_tokens
    assert tok(images, refine=1).input_ids == expected.flatten(1).tolist() != tok(images).input_ids
    assert tok.encode(images[0], refine=1) == expected[0].flatten().tolist()
    with pytest.raises(ValueError, match="refine must be a whole number of rounds, 0 or more, got -1"):
        tok(images, refine=-1)


def test_tensors_on_request(tok: ImageTokenizer):
    batch = tok(pictures((16, 16), (16, 16)), return_tensors="pt")
    assert batch["input_ids"].shape == (2, 16) and batch["input_ids"].dtype == torch.int64
    assert batch.image_grid_hw.tolist() == [[4, 4], [4, 4]]
    assert isinstance(tok(pictures((16, 16)), return_tensors="np").input_ids, np.ndarray)
    with pytest.raises(ValueError, match="tensorflow"):
        tok([], return_tensors="tensorflow")


def test_decode_is_the_model_s(tok: ImageTokenizer):
    images = pictures((16, 16), (16, 16))
    batch = tok(images, return_tensors="pt")
    with torch.no_grad():
        expected = tok.processor.postprocess(tok.model.decode(batch.input_ids.view(2, 4, 4)).pixel_values)
    ids = batch.input_ids.tolist()
    alternatives = [tok.decode(ids), tok.batch_decode(ids), tok.decode(batch.input_ids), tok.decode(np.array(ids))]
    alternatives += [tok.batch_decode(batch.input_ids), tok.decode(list(batch.input_ids)), tok.decode(tuple(ids))]
    alternatives += [tok.decode(ids, (4, 4)), tok.batch_decode(ids, batch.image_grid_hw)]
    alternatives += [[tok.decode(row) for row in ids], [tok.decode(row) for row in batch.input_ids]]
    for decoded in alternatives:
        assert [np.array_equal(image, other) for image, other in zip(decoded, expected, strict=True)] == [True, True]
    assert isinstance(tok.decode(ids[0]), Image.Image)
    assert tok.batch_decode([]) == []


SIZES = [(16, 16), (16, 24), (9, 40), (16, 16), (24, 16), (16, 25), (16, 16)]


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_sizes_mix_and_batch_size_changes_nothing(tok: ImageTokenizer, batch_size: int):
    images = pictures(*SIZES)
    batch = tok(images, batch_size=batch_size, **KEEP_SIZE)
    assert batch.image_grid_hw == [[height // 4, width // 4] for height, width in SIZES]
    assert batch.input_ids == [tok.encode(image, **KEEP_SIZE) for image in images]
    decoded = tok.batch_decode(batch.input_ids, batch.image_grid_hw, batch_size=batch_size)
    assert [image.size for image in decoded] == [(width // 4 * 4, height // 4 * 4) for height, width in SIZES]
    for image, ids, grid in zip(decoded, batch.input_ids, batch.image_grid_hw, strict=True):
        assert np.abs(np.asarray(image, int) - np.asarray(tok.decode(ids, grid), int)).max() <= 1


def test_many_sizes_do_not_pile_up(tok: ImageTokenizer, monkeypatch: pytest.MonkeyPatch):
    sizes = [(8, 4 * width) for width in range(2, 22)]
    seen: list[int] = []

    def watched() -> Iterator[Image.Image]:
        for image in pictures(*sizes):
            seen.append(len(ran))
            yield image

    ran: list[int] = []
    encode = tok.model.encode
    monkeypatch.setattr(tok.model, "encode", lambda *given, **named: ran.append(1) or encode(*given, **named))
    assert tok(watched(), batch_size=2, **KEEP_SIZE).image_grid_hw == [[2, width] for width in range(2, 22)]
    assert seen[-1] > 5


@pytest.mark.parametrize("kind", ["one", "array", "batch", "generator", "path", "tuple"])
def test_images_come_in_many_ways(tok: ImageTokenizer, kind: str, tmp_path: Path):
    (image,) = pictures((16, 16))
    image.save(tmp_path / "a.png")
    array = np.asarray(image)
    kinds = {
        "one": image,
        "array": array,
        "batch": array[None],
        "generator": (picture for picture in [image]),
        "path": tmp_path / "a.png",
        "tuple": (str(tmp_path / "a.png"),),
    }
    assert tok(kinds[kind]).input_ids == [tok.encode(image)]


def test_it_has_the_habits_of_a_text_tokenizer(tok: ImageTokenizer):
    assert tok.vocab_size == len(tok) == CODES
    assert repr(tok) == "ImageTokenizer(VQVAEModel, vocab_size=16, grid=4x4)"


def test_tokens_are_canonical(tok: ImageTokenizer):
    image = pictures((16, 16))[0]
    ids, seen = tok.encode(image), []
    tok.model.encoder.register_forward_hook(lambda *arguments: seen.append(arguments[2][0].dtype))
    tok.model.train()
    with torch.autocast("cpu", torch.bfloat16):
        assert tok.encode(image) == ids
    assert seen == [torch.float32]
    assert tok.model.training and tok.model.encoder.training
    assert tok.decode(tok(image, return_tensors="pt").input_ids)[0].size == (16, 16)


def test_saving_and_loading(tok: ImageTokenizer, tmp_path: Path):
    images = pictures((16, 16), (30, 20))
    tok.save_pretrained(tmp_path)
    loaded = ImageTokenizer.from_pretrained(tmp_path)
    assert loaded(images).input_ids == tok(images).input_ids
    assert next(loaded.model.parameters()).dtype == torch.float32 and not loaded.model.training
    narrow = ImageTokenizer.from_pretrained(str(tmp_path), device="cpu", dtype=torch.bfloat16)
    assert next(narrow.model.encoder.parameters()).dtype == torch.bfloat16
    ids = narrow(images).input_ids
    assert np.shape(ids) == (2, 16) and len(narrow.batch_decode(ids)) == 2


def test_the_default_is_float32_whatever_was_saved(tok: ImageTokenizer, tmp_path: Path):
    tok.model.to(torch.bfloat16)
    tok.save_pretrained(tmp_path)
    assert ImageTokenizer.from_pretrained(tmp_path).model.encoder.state_dict()
    assert {p.dtype for p in ImageTokenizer.from_pretrained(tmp_path).model.parameters()} == {torch.float32}


def test_push_to_hub_is_one_commit(tok: ImageTokenizer, hub: HubServer, hub_api: HfApi):
    commit = tok.push_to_hub("org/name", commit_message="First try", private=True)
    repository = hub.repositories["org/name"]
    assert commit.oid == repository.head().oid and len(repository.history()) == 2  # the empty one, and this
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= repository.head().files.keys()
    assert hub_api.model_info("org/name").private
    tok.push_to_hub("org/name", revision="trial")
    assert len(repository.history()) == 2 and "config.json" in repository.head("trial").files


def test_the_bar_shows_only_when_it_takes_long(
    tok: ImageTokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    images = pictures(*[(16, 16)] * 8)
    assert sys.modules["hf_vq.tokenizer"].SECONDS_BEFORE_BAR == 2
    monkeypatch.setattr(sys.modules["hf_vq.tokenizer"], "SECONDS_BEFORE_BAR", 3600)
    tok.batch_decode(tok(images, batch_size=1).input_ids, batch_size=1)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.modules["hf_vq.tokenizer"], "SECONDS_BEFORE_BAR", 1e-9)
    tok(images, batch_size=1)
    assert "encode" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ids", "grid", "message"),
    [
        ([0] * 15 + [CODES], None, r"sequence 0 has ids from 0 to 16, outside \[0, 16\).*start token of a prior"),
        ([-1] + [0] * 15, None, "ids from -1 to 0"),
        ([0] * 15, None, "15 ids.*not square needs image_grid_hw"),
        ([0] * 16, (3, 5), "16 ids, not those of a grid of 3x5"),
        ([0] * 16, (-4, -4), "grid of -4x-4"),
        ([0] * 16, (4, 4, 1), r"image_grid_hw has shape \(3,\)"),
        ([[0] * 16] * 2, [(4, 4)] * 3, r"image_grid_hw has shape \(3, 2\).*\(2, 2\)"),
        ([[0] * 16, [0] * 7], None, "sequence 1 has 7 ids"),
        ([], None, "sequence 0 has 0 ids"),
        ([[]], None, "sequence 0 has 0 ids"),
        ([0.5] * 16, None, "sequence 0 holds torch.float32: ids are integers"),
        ([True] * 16, None, "sequence 0 holds torch.bool"),
        (["a"] * 16, None, "sequence 0 is no list of ids"),
        (torch.zeros(2, 4, 4, dtype=torch.int64), None, r"sequence 0 has shape \(4, 4\).*flatten\(1\)"),
    ],
    ids=[
        "start",
        "negative",
        "count",
        "grid",
        "negative-grid",
        "grid-rank",
        "grid-count",
        "second",
        "empty",
        "empty-row",
        "float",
        "bool",
        "text",
        "rank",
    ],
)
def test_bad_ids_are_named(tok: ImageTokenizer, ids: Any, grid: Any, message: str):
    with pytest.raises(ValueError, match=message):
        tok.decode(ids, grid)


QUANTIZERS: dict[str, dict[str, Any]] = {
    "gradient": {"quantizer": "gradient", "normalize_codes": True},
    "ema": {"quantizer": "ema"},
    "soft_em": {"quantizer": "soft_em"},
    "linear": {"quantizer": "gradient", "codebook_transform": "linear"},
    "fsq": {"quantizer": "fsq", "levels": [4, 4], "codebook_dim": 2},
    "gaussian_I": {"quantizer": "gaussian"},
    "gaussian_IV": {"quantizer": "gaussian", "covariance": "diagonal"},
    "vmf": {"quantizer": "vmf"},
}


def flat(image_tokens: torch.Tensor) -> list[int]:
    """The ids of (h, w) or (h, w, M) tokens, written as the loops that define their order."""
    return [int(code) for row in image_tokens for position in row for code in position.reshape(-1)]


@pytest.mark.parametrize("num_codebooks", [1, 2, 3])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_ids_are_the_tokens_of_the_model_and_decode_as_they_do(name: str, num_codebooks: int):
    tok = make_tokenizer(**QUANTIZERS[name], num_codebooks=num_codebooks)
    for (image,) in map(pictures, [(16, 16), (8, 20), (28, 12)]):
        grid = (image.height // 4, image.width // 4)
        with torch.no_grad():
            pixel_values = tok.processor(image, return_tensors="pt", **KEEP_SIZE).pixel_values
            tokens = tok.model.encode(pixel_values).image_tokens
            drawn = torch.randint(CODES, tokens.shape, generator=torch.Generator().manual_seed(0))
            expected = tok.processor.postprocess(tok.model.decode(drawn).pixel_values)[0]
        assert tokens.shape == (1, *grid) + ((num_codebooks,) if num_codebooks > 1 else ())
        assert tok(image, **KEEP_SIZE) == {"input_ids": [flat(tokens[0])], "image_grid_hw": [list(grid)]}
        ids = flat(drawn[0])
        assert len(ids) == math.prod(grid) * num_codebooks
        for decoded in (tok.decode(ids, grid), *tok.batch_decode(np.array([ids]), [grid])):
            assert np.array_equal(decoded, expected)
        if grid == (4, 4):
            assert np.array_equal(tok.decode(torch.tensor(ids)), expected)
            assert np.array_equal(tok.processor.postprocess(decode_flat(tok, ids))[0], expected)


@torch.no_grad()
def decode_flat(tok: ImageTokenizer, ids: list[int]) -> torch.Tensor:
    """The model's own flat form, (B, h * w * M)."""
    return tok.model.decode(torch.tensor([ids])).pixel_values


def test_several_codebooks_save_and_load(tmp_path: Path):
    tok = make_tokenizer(num_codebooks=3)
    assert repr(tok) == "ImageTokenizer(VQVAEModel, vocab_size=16, grid=4x4, num_codebooks=3)"
    images = pictures((16, 16), (30, 20))
    ids = tok(images).input_ids
    assert np.shape(ids) == (2, 48) and len({tuple(row[book::3]) for row in ids for book in range(3)}) == 6
    tok.save_pretrained(tmp_path)
    loaded = ImageTokenizer.from_pretrained(tmp_path)
    assert loaded(images).input_ids == ids
    assert loaded(images, return_tensors="pt").input_ids.tolist() == ids
    for image, other in zip(loaded.batch_decode(ids), tok.decode(ids), strict=True):
        assert np.array_equal(image, other)


@pytest.mark.parametrize(
    ("count", "grid", "message"),
    [
        (47, None, "47 ids: a model of 3 codebooks has 3 for each position"),
        (16, None, "16 ids: a model of 3 codebooks has 3"),
        (36, None, "36 ids, not those of a grid of 3x3 with 3 codebooks: a grid that is not square"),
        (48, (4, 5), "48 ids, not those of a grid of 4x5 with 3 codebooks: pass its own image_grid_hw"),
    ],
    ids=["no-multiple", "one-codebook", "not-square", "other-grid"],
)
def test_counts_that_do_not_fit_the_codebooks_are_named(count: int, grid: Any, message: str):
    tok = make_tokenizer(num_codebooks=3)
    with pytest.raises(ValueError, match=f"sequence 0 has {message}"):
        tok.decode([0] * count, grid)


def test_several_codebooks_share_a_position():
    ids = torch.arange(12)
    tokens = on_grid(ids, (2, 3), codes=12, codebooks=2, index=0)
    assert tokens.shape == (2, 3, 2) and tokens[0, 1].tolist() == [2, 3]
    assert to_encoding([tokens], None) == {"input_ids": [ids.tolist()], "image_grid_hw": [[2, 3]]}


@pytest.mark.parametrize("images", [[], iter(())], ids=["list", "iterator"])
def test_no_images(tok: ImageTokenizer, images: Any):
    with pytest.raises(ValueError, match="images is empty"):
        tok(images)


def test_bad_images_are_named(tok: ImageTokenizer):
    images = pictures((16, 16), (16, 24))
    with pytest.raises(ValueError, match=r"one grid.*\(4, 4\), \(4, 6\)"):
        tok(images, return_tensors="pt", **KEEP_SIZE)
    with pytest.raises(ValueError, match="encode takes one image, got 2"):
        tok.encode(images)
    with pytest.raises(TypeError, match="images is a int"):
        tok(3)
    with pytest.raises(ValueError, match="batch_size=0"):
        tok(images, batch_size=0)
    with pytest.raises(TypeError, match="image 1 is a str|image 1 is a object") as caught:
        tok([*images, *images, images[0], object()], batch_size=4)
    assert "counted from number 4" in caught.value.__notes__[0]


def test_a_model_without_codes_is_refused(tok: ImageTokenizer):
    with pytest.raises(ValueError, match="Linear is no image tokenizer"):
        ImageTokenizer(torch.nn.Linear(2, 2), tok.processor)


def test_ids_are_plain_json(tok: ImageTokenizer):
    assert json.loads(json.dumps(dict(tok(pictures((16, 16)))))).keys() == {"input_ids", "image_grid_hw"}
