"""What a model says to tensors that do not fit it."""

import pytest
import torch
from tiny_models import make_images, make_model
from torch import Tensor

TOKENS = torch.zeros(2, 2, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 9, 8), r"divisible by 4, got 9 x 8"),
        ((2, 3, 8, 6), r"divisible by 4, got 8 x 6"),
        ((2, 3, 0, 8), r"divisible by 4, got 0 x 8"),
        ((2, 1, 8, 8), r"\(B, 3, H, W\), got \(2, 1, 8, 8\)"),
        ((3, 8, 8), r"\(B, 3, H, W\), got \(3, 8, 8\)"),
    ],
)
@pytest.mark.parametrize("method", ["encode", "forward"])
def test_pixel_values_of_a_wrong_shape(method: str, shape: tuple[int, ...], message: str):
    with pytest.raises(ValueError, match=message):
        getattr(make_model("ema"), method)(torch.zeros(shape))


@pytest.mark.parametrize("family", ["ema", "gaussian"])
@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (TOKENS - 1, r"\[0, 12\), got values from -1 to -1"),
        (TOKENS + torch.arange(2) * 12, r"\[0, 12\), got values from 0 to 12"),
        (TOKENS.float(), r"integers, got torch.float32"),
        (TOKENS.bool(), r"integers, got torch.bool"),
        (TOKENS.flatten(), r"\(B, h, w\), or \(B, 4\) for the model's own grid of 2 x 2, got \(8,\)"),
        (TOKENS.flatten(1)[:, :3], r"got \(2, 3\)"),
        (TOKENS[..., None], r"got \(2, 2, 2, 1\)"),
    ],
    ids="negative too-large float bool one-axis wrong-length four-axes".split(),
)
def test_tokens_that_no_image_has(tokens: Tensor, message: str, family: str):
    model = make_model(family)
    with pytest.raises(ValueError, match=message):
        model.decode(tokens)
    with pytest.raises(ValueError, match=message):
        model.log_prob(make_images(2), tokens)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (1, 3, 8, 8), (2, 3, 8, 4)])
def test_log_prob_of_images_that_do_not_belong_to_the_tokens(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=rf"{shape[0]}, {shape[1]}, {shape[2]}, {shape[3]}"):
        make_model("ema").log_prob(torch.zeros(shape), TOKENS)


def test_decode_takes_one_of_two():
    model = make_model("ema")
    quantized = model.encode(make_images(2)).quantized_last_hidden_state
    for arguments in ({}, {"image_tokens": TOKENS, "quantized_last_hidden_state": quantized}):
        with pytest.raises(ValueError, match="image_tokens or quantized_last_hidden_state"):
            model.decode(**arguments)
