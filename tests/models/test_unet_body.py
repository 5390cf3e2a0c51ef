"""The U-Net body against a naive twin, and the options that belong to it."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_vq import SQVAEConfig, SQVAEModel, VQVAEConfig, VQVAEModel

SETTINGS: dict[str, Any] = {
    "body": "unet",
    "image_size": 16,
    "codebook_size": 12,
    "hidden_channels": [8, 16, 16],
    "num_residual_blocks": 2,
    "attention_levels": [1],
    "bottleneck_channels": 6,
    "norm_groups": 4,
}


def make(seed: int = 0, **settings: Any) -> SQVAEModel:
    """A tiny model whose norms and biases are not those of the start."""
    torch.manual_seed(seed)
    model = SQVAEModel(SQVAEConfig(**SETTINGS | settings)).eval()
    with torch.no_grad():
        for parameter in (*model.encoder.parameters(), *model.decoder.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


class Twin:
    """VQGAN's encoder and decoder, as functions of the weights by name (Esser et al., arXiv 2012.09841, Table 7)."""

    def __init__(self, model: SQVAEModel, groups: int, widths: list[int], blocks: int, attended: list[int]) -> None:
        self.weights = dict(model.named_parameters())
        self.groups, self.widths, self.blocks, self.attended = groups, widths, blocks, attended

    def conv(self, x: Tensor, name: str, stride: int = 1, padding: int = 0) -> Tensor:
        return F.conv2d(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], stride, padding)

    def norm(self, x: Tensor, name: str) -> Tensor:
        grouped = x.view(len(x), self.groups, -1)
        mean, variance = grouped.mean(-1, keepdim=True), grouped.var(-1, keepdim=True, correction=0)
        scaled = ((grouped - mean) / (variance + 1e-6).sqrt()).view(x.shape)
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return scaled * weight[:, None, None] + bias[:, None, None]

    def swish(self, x: Tensor) -> Tensor:
        return x / (1 + (-x).exp())

    def block(self, x: Tensor, name: str) -> Tensor:
        inner = self.conv(self.swish(self.norm(x, f"{name}.layers.0")), f"{name}.layers.2", padding=1)
        inner = self.conv(self.swish(self.norm(inner, f"{name}.layers.3")), f"{name}.layers.5", padding=1)
        return (self.conv(x, f"{name}.shortcut") if f"{name}.shortcut.weight" in self.weights else x) + inner

    def attention(self, x: Tensor, name: str) -> Tensor:
        batch, channels, height, width = x.shape
        places = self.norm(x, f"{name}.norm").permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        query, key, value = (
            places @ self.weights[f"{name}.{part}.weight"].T + self.weights[f"{name}.{part}.bias"]
            for part in ("query", "key", "value")
        )
        scores = (query @ key.transpose(1, 2) / math.sqrt(channels)).softmax(-1)
        mixed = scores @ value @ self.weights[f"{name}.output.weight"].T + self.weights[f"{name}.output.bias"]
        return x + mixed.reshape(batch, height, width, channels).permute(0, 3, 1, 2)

    def stage(self, x: Tensor, name: str, level: int, blocks: int) -> Tensor:
        place = 0
        for _ in range(blocks):
            x, place = self.block(x, f"{name}.{place}"), place + 1
            if level in self.attended:
                x, place = self.attention(x, f"{name}.{place}"), place + 1
        return x

    def middle(self, x: Tensor, name: str) -> Tensor:
        return self.block(self.attention(self.block(x, f"{name}.0"), f"{name}.1"), f"{name}.2")

    def encode(self, x: Tensor) -> Tensor:
        x = self.conv(x, "encoder.stem", padding=1)
        for level in range(len(self.widths)):
            x = self.stage(x, f"encoder.stages.{level}", level, self.blocks)
            if level < len(self.widths) - 1:
                x = self.conv(F.pad(x, (0, 1, 0, 1)), f"encoder.downsample.{level}.convolution", stride=2)
        x = self.swish(self.norm(self.middle(x, "encoder.middle"), "encoder.to_latents.0"))
        return self.conv(self.conv(x, "encoder.to_latents.2", padding=1), "encoder.to_latents.3")

    def decode(self, z: Tensor) -> Tensor:
        x = self.conv(self.conv(z, "decoder.from_latents.0"), "decoder.from_latents.1", padding=1)
        x = self.middle(x, "decoder.middle")
        for place, level in enumerate(reversed(range(len(self.widths)))):
            x = self.stage(x, f"decoder.stages.{place}", level, self.blocks + 1)
            if level > 0:
                x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                x = self.conv(x, f"decoder.upsample.{place}.convolution", padding=1)
        return self.conv(self.swish(self.norm(x, "decoder.to_pixels.0")), "decoder.to_pixels.2", padding=1)


def test_encoder_and_decoder_equal_the_naive_twin_in_value_and_gradient():
    model = make().double()
    twin = Twin(model, 4, [8, 16, 16], 2, [1])
    images = (torch.rand(2, 3, 16, 16, dtype=torch.float64) * 2 - 1).requires_grad_()
    latents, log_variance = model.encoder(images)
    assert latents.shape == (2, 4, 4, 4) and log_variance is None
    torch.testing.assert_close(latents, twin.encode(images))
    pixels = model.decoder(latents)
    torch.testing.assert_close(pixels, twin.decode(latents))
    names, parameters = zip(
        *((n, p) for n, p in model.named_parameters() if not n.startswith("quantizer")), strict=True
    )
    ours = torch.autograd.grad(pixels.square().sum(), [images, *parameters])
    theirs = torch.autograd.grad(twin.decode(twin.encode(images)).square().sum(), [images, *parameters])
    for name, own, other in zip(("images", *names), ours, theirs, strict=True):
        torch.testing.assert_close(own, other, msg=name)


@pytest.mark.parametrize("settings", [{}, {"covariance": "per_latent"}, {"observation": "logistic_mixture"}])
def test_a_model_with_this_body_trains_and_round_trips(settings: dict[str, Any]):
    model = make(**settings)
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    assert model.config.downsampling_factor == 4 and model.config.grid_size == (4, 4)
    output = model(images)
    assert output.image_tokens.shape == (2, 4, 6)
    torch.testing.assert_close(model.decode(output.image_tokens).pixel_values, output.decoded_pixel_values)
    model.train()
    model(images).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_groups_of_norms_are_part_of_the_fingerprint():
    assert make().fingerprint() != make(norm_groups=8).fingerprint()


def test_attention_in_the_middle_can_be_left_out():
    with_it, without = make(), make(middle_attention=False)
    assert len(with_it.encoder.middle) == 3 and len(without.encoder.middle) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "batch"}, "norm 'batch' is no option of the body 'unet'"),
        ({"residual_channels": 32}, "residual_channels 32 is no option of the body 'unet'"),
        ({"norm_groups": 5}, r"norm_groups 5 does not divide all of hidden_channels \[8, 16, 16\]"),
        ({"attention_levels": [3]}, r"attention_levels \[3\] are places in hidden_channels"),
        ({"bottleneck_channels": 0}, "bottleneck_channels must be positive"),
        ({"image_size": 18}, "image_size 18 is not divisible by the downsampling factor 4"),
    ],
)
def test_options_that_do_not_fit_are_named(settings: dict[str, Any], message: str):
    with pytest.raises(Exception, match=message):
        VQVAEConfig(**SETTINGS | settings).validate()


def test_the_convolutional_body_has_no_options_of_a_unet():
    with pytest.raises(Exception, match=r"attention_levels \[1\] is no option of the body 'convolutional'"):
        VQVAEConfig(attention_levels=[1])
    VQVAEModel(VQVAEConfig.from_dict(VQVAEConfig().to_dict()))
