"""What a model says to tensors that do not fit it."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny_models import make_images, make_model
from torch import Tensor

import hf_vq

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


def test_pixel_values_must_be_floats_and_some():
    model = hf_vq.SQVAEModel(hf_vq.SQVAEConfig(hidden_channels=[8], residual_channels=8)).eval()
    integers = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    tokens = model.encode(integers.float()).image_tokens
    for call in (model.encode, model, lambda pixel_values: model.log_prob(pixel_values, tokens)):
        with pytest.raises(ValueError, match="must be floats in .* got torch.uint8"):
            call(integers)
        with pytest.raises(ValueError, match="at least one image"):
            call(torch.zeros(0, 3, 32, 32))


def test_a_loss_of_sampled_tokens_is_refused():
    model = hf_vq.SQVAEModel(hf_vq.SQVAEConfig(hidden_channels=[8], residual_channels=8)).eval()
    with pytest.raises(ValueError, match="return_loss or sample"):
        model.encode(torch.zeros(1, 3, 32, 32), return_loss=True, sample=True)


@pytest.mark.parametrize("family", ["gradient", "gaussian", "fsq"])
def test_latents_of_a_wrong_width(family: str):
    quantizer = make_model(family).quantizer
    channels = quantizer.num_codebooks * quantizer.codebook.embedding_dim
    with pytest.raises(ValueError, match=rf"latents must have shape \(B, {channels}, \*grid\), got \(2, 7, 4, 4\)"):
        quantizer(torch.zeros(2, 7, 4, 4))


def test_a_config_that_was_changed_is_checked_again():
    config = hf_vq.VQVAEConfig()
    config.num_codebooks = 0
    with pytest.raises(StrictDataclassError, match="num_codebooks must be positive.*got 0"):
        hf_vq.VQVAEModel(config)
