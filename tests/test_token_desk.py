"""What one does with tokens: looking, changing, mixing, looking up neighbours, drawing."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import hf_vq
from hf_vq.token_desk import PATTERNS, TokenDesk

TINY: dict[str, Any] = {"codebook_size": 16, "hidden_channels": [8], "residual_channels": 8, "num_residual_blocks": 1}


def make_desk(with_prior: bool = False, **fields: Any) -> TokenDesk:
    """A tokenizer of 8x8 pictures, 4x4 tokens of 16 codes, and perhaps a prior of two classes."""
    torch.manual_seed(0)
    config = hf_vq.SQVAEConfig(image_size=8, **TINY, **fields)
    tokenizer = hf_vq.ImageTokenizer(hf_vq.SQVAEModel(config).eval(), hf_vq.VQImageProcessor.for_config(config))
    if not with_prior:
        return TokenDesk(tokenizer)
    made_for: dict[str, Any] = {"tokenizer_fingerprint": tokenizer.model.fingerprint(), "num_classes": 2}
    sizes: dict[str, Any] = {"codebook_size": 16, "grid_size": 4, "hidden_size": 16, "num_hidden_layers": 1}
    prior = hf_vq.TransformerPrior(hf_vq.TransformerPriorConfig(**sizes, **made_for)).eval()
    parts: dict[str, Any] = {"decoder": tokenizer.model, "image_processor": tokenizer.processor}
    return TokenDesk(tokenizer, hf_vq.ImageGenerationPipeline(prior, **parts))


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8))


@pytest.mark.parametrize("codebooks", [1, 2])
def test_what_is_seen_is_what_the_tokenizer_says(codebooks: int):
    desk = make_desk(num_codebooks=codebooks)
    seen = desk.see(picture())
    ids = desk.tokenizer.encode(picture())
    assert np.array(seen.tokens).flatten().tolist() == ids
    assert seen.bits == 16 * codebooks * 4
    kept = desk.tokenizer.decode(ids)
    assert seen.reconstruction.size == (384, 384)
    assert seen.reconstruction.resize((8, 8), Image.Resampling.NEAREST).tobytes() == kept.convert("RGB").tobytes()
    error = (np.asarray(kept, dtype=float) - np.asarray(picture(), dtype=float)) / 255
    assert seen.psnr == pytest.approx(-10 * np.log10((error**2).mean()), abs=1e-3)
    assert desk.decode(seen.tokens).tobytes() == seen.reconstruction.tobytes()


@pytest.mark.parametrize("codebooks", [1, 2])
def test_a_code_is_changed_at_its_place_and_nowhere_else(codebooks: int):
    desk = make_desk(num_codebooks=codebooks)
    tokens = desk.see(picture()).tokens
    old = np.array(tokens)
    code = (int(old[2, 1, -1] if codebooks > 1 else old[2, 1]) + 1) % 16
    new = np.array(desk.change(tokens, 2, 1, code, codebooks - 1))
    place = (2, 1, codebooks - 1) if codebooks > 1 else (2, 1)
    assert new[place] == code and (new != old).sum() == 1 and np.array_equal(np.array(tokens), old)


def test_neighbours_are_the_nearest_codes():
    desk = make_desk()
    tokens = desk.see(picture()).tokens
    near = desk.neighbours(tokens, 0, 3)
    vectors = desk.tokenizer.model.quantizer.vectors()[0].detach()
    distances = (vectors - vectors[tokens[0][3]]).norm(dim=1)
    assert [code["code"] for code in near] == distances.argsort()[:8].tolist() and near[0]["code"] == tokens[0][3]
    assert near[1]["distance"] == pytest.approx(float(distances[near[1]["code"]]), abs=1e-4)
    assert all(len(code["colour"]) == 7 for code in near)


def test_a_code_is_the_first_of_its_neighbours_even_when_others_are_alike():
    desk = make_desk()
    with torch.no_grad():
        desk.tokenizer.model.quantizer.codebook.weight.zero_()
    near = desk.neighbours([[5, 1], [2, 3]], 0, 0)
    assert near[0]["code"] == 5 and len({code["code"] for code in near}) == 8


def test_two_pictures_are_mixed_by_place():
    desk = make_desk()
    first = np.array(desk.see(picture(1)).tokens)
    second = (first + 1) % 16

    def taken(pattern: str, share: float) -> np.ndarray:
        mixed = np.array(desk.mix(first.tolist(), second.tolist(), pattern, share))
        assert ((mixed == first) | (mixed == second)).all()
        return mixed == second

    assert (taken("left and right", 0.25) == (np.arange(4) >= 3)[None].repeat(4, 0)).all()
    assert (taken("top and bottom", 0.5) == (np.arange(4) >= 2)[:, None].repeat(4, 1)).all()
    assert (taken("checkerboard", 0.0) == np.indices((4, 4)).sum(0) % 2).all()
    some, more = taken("at random", 0.3), taken("at random", 0.8)
    assert 0 < some.sum() < more.sum() < 16 and (more | ~some).all()
    for pattern in PATTERNS[:2]:
        assert taken(pattern, 0.0).sum() == 0 and taken(pattern, 1.0).all()


def test_a_grid_shows_each_token_in_its_colour_and_finds_it_again():
    desk = make_desk()
    tokens = desk.see(picture()).tokens
    grid = np.asarray(desk.draw_grid(tokens, selected=(1, 2)))
    cell = 192
    for row in range(4):
        for column in range(4):
            assert grid[row * cell + 10, column * cell + 10].tolist() == desk.colours[0][tokens[row][column]].tolist()
            assert desk.place_of(tokens, column * cell + 5, row * cell + 180) == (row, column)
    assert grid[cell + 1, 2 * cell + 1].tolist() == [0, 0, 0]
    assert desk.place_of(tokens, 768, 768) == (3, 3)


def test_a_prior_draws_what_its_pipeline_draws():
    desk = make_desk(with_prior=True)
    state = torch.random.get_rng_state()
    images = desk.sample(1, guidance_scale=2.0, temperature=0.9, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(5)
    expected = desk.prior(class_labels=[1] * 8, temperature=0.9, guidance_scale=2.0)
    assert [image.resize((8, 8), Image.Resampling.NEAREST).tobytes() for image in images] == [
        image.convert("RGB").tobytes() for image in expected
    ]
    assert len(desk.class_names) == 2 and make_desk().class_names == []


def test_what_cannot_be_is_named():
    desk = make_desk()
    tokens = desk.see(picture()).tokens
    with pytest.raises(ValueError, match="code 16 is none of 0 to 15"):
        desk.change(tokens, 0, 0, 16)
    with pytest.raises(ValueError, match="row 4, column 0, codebook 0 is no place of a 4 x 4 grid"):
        desk.change(tokens, 4, 0, 1)
    with pytest.raises(ValueError, match="codes lie in 0 to 15, and one is 16"):
        desk.decode([[16] * 4] * 4)
    for odd in ([1, 2, 3], [[1.5] * 4] * 4, [], [["a"]]):
        with pytest.raises(ValueError, match="tokens are rows of whole numbers, and these are"):
            desk.decode(odd)
    with pytest.raises(ValueError, match="the tokens are not a grid"):
        desk.decode([[1, 2], [3]])
    with pytest.raises(ValueError, match="a grid of 100 x 100 is too large for this page"):
        desk.decode([[0] * 100] * 100)
    with pytest.raises(ValueError, match="codebook 1 is no place"):
        desk.draw_grid(tokens, codebook=1)
    with pytest.raises(ValueError, match="cannot be mixed"):
        desk.mix(tokens, tokens[:2], PATTERNS[0], 0.5)
    with pytest.raises(ValueError, match="pattern 'stripes' is none of"):
        desk.mix(tokens, tokens, "stripes", 0.5)
    with pytest.raises(ValueError, match=r"share must lie in \[0, 1\], and is 7"):
        desk.mix(tokens, tokens, PATTERNS[0], 7)
    with pytest.raises(ValueError, match="there is no prior to sample from"):
        desk.sample(0)
    config = hf_vq.SQVAEConfig(image_size=256, **TINY)
    large = hf_vq.ImageTokenizer(hf_vq.SQVAEModel(config).eval(), hf_vq.VQImageProcessor.for_config(config))
    with pytest.raises(ValueError, match="a grid of 128 x 128 tokens is too large for this page"):
        TokenDesk(large)
