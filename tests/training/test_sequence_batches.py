"""What a prior trains on: each image is encoded once, and the tokens stay those of `encode`."""

from typing import Any

import pytest
import torch

import sequence_batches
from hf_vq import VQVAEConfig, VQVAEModel
from sequence_batches import ENCODED_AT_ONCE, SequenceBatches

CODES = 16


class Passes:
    """The same images twice, in another order and other batches the second time."""

    def __init__(self, pixel_values: torch.Tensor) -> None:
        self.pixel_values = pixel_values

    def __iter__(self) -> Any:
        for batch in (*self.pixel_values.split(4), *self.pixel_values.flip(0).split(3)):
            yield {"pixel_values": batch}


@pytest.fixture
def tokenizer() -> VQVAEModel:
    torch.manual_seed(0)
    return VQVAEModel(VQVAEConfig(image_size=8, codebook_size=CODES, codebook_dim=4, hidden_channels=[8, 8])).eval()


@pytest.fixture
def encoded(tokenizer: VQVAEModel, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What each call of `encode` got."""
    given: list[torch.Tensor] = []
    encode = tokenizer.encode

    def counting(pixel_values: torch.Tensor) -> Any:
        given.append(pixel_values)
        return encode(pixel_values)

    monkeypatch.setattr(tokenizer, "encode", counting)
    return given


def count(encoded: list[torch.Tensor]) -> int:
    """The images of all calls, a repeated one of a call once."""
    return sum(len(pixel_values.unique(dim=0)) for pixel_values in encoded)


def drawn(pixel_values: torch.Tensor, tokenizer: VQVAEModel) -> torch.Tensor:
    return torch.cat([batch["input_ids"] for batch in SequenceBatches(Passes(pixel_values), tokenizer, CODES)])


def test_each_image_is_encoded_once(tokenizer: VQVAEModel, encoded: list[torch.Tensor]):
    pixel_values = torch.rand(10, 3, 8, 8)
    pixel_values[1] = pixel_values[0]
    pixel_values[2] = pixel_values[0].flip(-1)
    tokens = tokenizer.encode(pixel_values).image_tokens.flatten(1)
    encoded.clear()
    sequences = drawn(pixel_values, tokenizer)
    assert count(encoded) == 9  # the second is the first again, and a mirrored image is another
    assert sequences[:, 0].eq(CODES).all() and sequences.dtype == torch.int64
    assert torch.equal(sequences[:10, 1:], tokens)
    assert torch.equal(sequences[10:, 1:], tokens.flip(0))


def test_what_is_known_already_changes_no_batch(tokenizer: VQVAEModel, encoded: list[torch.Tensor]):
    drawn(torch.rand(40, 3, 8, 8), tokenizer)
    assert {len(pixel_values) for pixel_values in encoded} == {ENCODED_AT_ONCE}


def test_what_does_not_fit_is_encoded_again(
    tokenizer: VQVAEModel, encoded: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sequence_batches, "REMEMBERED_BYTES", 1)
    pixel_values = torch.rand(10, 3, 8, 8)
    sequences = drawn(pixel_values, tokenizer)
    assert count(encoded) == 16  # the first batch of four is remembered
    assert torch.equal(sequences[:10], sequences[10:].flip(0))
