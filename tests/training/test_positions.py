"""The experiment on positions: what rotary ones do, and that every kind trains."""

from pathlib import Path

import positions
import pytest
import torch
from safetensors.torch import save_file

MODEL = {"hidden_size": 16, "num_hidden_layers": 2, "codebook_size": 11, "grid_size": [2, 3]}
PLAN = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-2}


@pytest.mark.parametrize("by_axes", [False, True])
def test_products_of_rotated_vectors_depend_on_how_far_apart_they_are(by_axes: bool):
    angles = positions.rotations((4, 5), 8, by_axes)
    query, key = torch.randn(2, 8)
    places = (
        positions.rotated(query.expand(1, 1, 21, 8), angles) @ positions.rotated(key.expand(1, 1, 21, 8), angles).mT
    )
    products = places[0, 0]
    # Two places to the right in the same row, and two rows down.
    torch.testing.assert_close(products[1, 3], products[12, 14])
    torch.testing.assert_close(products[2, 12], products[7, 17])
    assert not torch.isclose(products[1, 3], products[1, 4])
    if by_axes:
        # The same step between columns, whatever the rows: from the end of one row to the start of the next is none.
        assert not torch.isclose(products[5, 6], products[1, 2])
    else:
        torch.testing.assert_close(products[5, 6], products[1, 2])


@pytest.mark.parametrize("way", positions.WAYS)
def test_every_kind_learns_where_a_token_stands(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(positions, "HELD_OUT", 32)
    tokens = tmp_path / "tokens.safetensors"
    save_file({"image_tokens": torch.arange(6).view(1, 2, 3).expand(800, 2, 3).contiguous()}, tokens)
    numbers = positions.train(lambda images: None, str(tokens), way, MODEL, PLAN, seed=0)
    assert numbers["num_images"] == 32 and numbers["bits_per_token"] < 1
