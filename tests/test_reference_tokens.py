"""Reference tokens: what is saved is told apart from what another model, machine or kernel would give."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_vq
from corpora import make_tokenizer
from hf_vq.reference_tokens import REFERENCE_FILE, compare, hash_of_reference, save_reference_tokens

IMAGES = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tok(tmp_path: Path) -> hf_vq.ImageTokenizer:
    """A tokenizer in a folder, with its reference tokens."""
    saved = make_tokenizer()
    saved.save_pretrained(tmp_path)
    save_reference_tokens(tmp_path, saved.model, saved.processor, IMAGES)
    return hf_vq.ImageTokenizer.from_pretrained(tmp_path)


def test_a_loaded_tokenizer_verifies_itself(tok: hf_vq.ImageTokenizer):
    found = tok.verify()
    assert found == (16, 0, 0.0) and found.share_differing == 0
    assert str(found) == "all 16 tokens are the published ones"


def test_the_file_holds_the_tokens_of_the_images(tok: hf_vq.ImageTokenizer, tmp_path: Path):
    kept = load_file(tmp_path / REFERENCE_FILE)
    assert torch.equal(kept["images"], IMAGES)
    ids = tok(list(IMAGES.movedim(1, -1).numpy()), return_tensors="pt").input_ids
    assert torch.equal(kept["image_tokens"].flatten(1), ids)


@torch.no_grad()
def test_tokens_that_differ_are_counted_with_their_margin(tok: hf_vq.ImageTokenizer):
    pixel_values = tok.processor(list(IMAGES.movedim(1, -1).numpy()), return_tensors="pt").pixel_values
    encoded = tok.model.encode(pixel_values)
    squared = (tok.model.quantizer.vectors()[0] - encoded.last_hidden_state[0, :, 0, 0]).square().sum(-1)
    near, far = squared.argsort()[:2].tolist()
    # The two nearest codes of one latent change places, and with them the tokens that were either.
    weight = tok.model.quantizer.codebook.weight
    weight[[near, far]] = weight[[far, near]]
    moved = int(torch.isin(encoded.image_tokens, torch.tensor([near, far])).sum())
    found = tok.verify()
    assert found.num_differing == moved > 0
    assert found.largest_margin >= float(1 - squared[near] / squared[far]) - 1e-6
    assert f"{moved} of 16 tokens" in str(found) and "%" in str(found)


@pytest.mark.parametrize("quantizer", ["fsq", "ema"])
def test_a_near_tie_has_a_small_margin(tmp_path: Path, quantizer: str):
    fields = {"levels": [5, 5]} if quantizer == "fsq" else {"codebook_size": 32, "codebook_dim": 2}
    config = hf_vq.VQVAEConfig(
        image_size=8, quantizer=quantizer, hidden_channels=[8, 8], residual_channels=8, num_residual_blocks=1, **fields
    )
    torch.manual_seed(1)
    model, processor = hf_vq.VQVAEModel(config).eval(), hf_vq.VQImageProcessor.for_config(config)
    latents = torch.randn(4, 2, 2, 2)
    tokens = model.quantizer.search(latents)
    squared = torch.stack([model.quantizer.squared_distances(latents, torch.full_like(tokens, k)) for k in range(25)])
    assert torch.equal(squared.argmin(0)[tokens < 25], tokens[tokens < 25])
    save_reference_tokens(tmp_path, model, processor, IMAGES)
    assert compare(tmp_path / REFERENCE_FILE, model, processor).num_differing == 0


def test_the_margin_of_a_variance_for_each_component(tmp_path: Path):
    """The search of type IV weighs the components: its tokens have the smallest distance, and no other's does."""
    tok = make_tokenizer(quantizer="gaussian", covariance="diagonal")
    model = tok.model
    latents, log_variance = torch.randn(2, 4, 2, 2, 2)
    tokens = model.quantizer.search(latents, log_variance)
    every = [model.quantizer.squared_distances(latents, torch.full_like(tokens, k), log_variance) for k in range(300)]
    assert torch.equal(torch.stack(every).argmin(0), tokens)
    save_reference_tokens(tmp_path, model, tok.processor, IMAGES)
    assert compare(tmp_path / REFERENCE_FILE, model, tok.processor) == (16, 0, 0.0)


def test_several_codebooks(tmp_path: Path):
    tok = make_tokenizer(num_codebooks=2)
    save_reference_tokens(tmp_path, tok.model, tok.processor, IMAGES)
    assert compare(tmp_path / REFERENCE_FILE, tok.model, tok.processor) == (32, 0, 0.0)


def test_a_damaged_file_is_told(tok: hf_vq.ImageTokenizer, tmp_path: Path):
    file, digest = tmp_path / REFERENCE_FILE, hash_of_reference(tmp_path)
    assert digest is not None and len(digest) == 64
    kept = load_file(file)
    kept["image_tokens"][0, 0, 0] += 1
    save_file(kept, file, metadata={"sha256_of_tokens": digest})
    with pytest.raises(ValueError, match=f"{REFERENCE_FILE} is damaged"):
        tok.verify()


def test_without_reference_tokens_there_is_nothing_to_verify(tmp_path: Path):
    with pytest.raises(ValueError, match="load the tokenizer by from_pretrained"):
        make_tokenizer().verify()
    make_tokenizer().save_pretrained(tmp_path)
    assert hash_of_reference(tmp_path) is None
    with pytest.raises(ValueError, match=f"was published without a {REFERENCE_FILE}"):
        hf_vq.ImageTokenizer.from_pretrained(tmp_path).verify()
