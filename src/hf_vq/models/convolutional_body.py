"""The convolutional body: an encoder from images to latents and a decoder back.

By config alone it is the default net (residual, group norm, SiLU, no batch statistics), the SQ-VAE authors' CIFAR net
(arXiv 2205.07547) or the van den Oord / Sonnet net (arXiv 1711.00937).
"""

import math
from itertools import pairwise

from torch import Tensor, nn

from .body_parts import BodyBlock, make_activation
from .configuration_autoencoder import AutoencoderConfig


def make_norm(config: AutoencoderConfig, channels: int) -> list[nn.Module]:
    """The config's normalisation of `channels`, or nothing."""
    if config.norm == "group":
        # A group has two channels or more: statistics of a single one would wipe out its mean.
        most = max(1, min(32, channels // 2))
        return [nn.GroupNorm(math.gcd(most, channels), channels)]
    return [nn.BatchNorm2d(channels)] if config.norm == "batch" else []


def activated(config: AutoencoderConfig, convolution: nn.Conv2d | nn.ConvTranspose2d) -> list[nn.Module]:
    """Convolution, normalisation, activation."""
    return [convolution, *make_norm(config, convolution.out_channels), make_activation(config)]


def preactivation(config: AutoencoderConfig, channels: int) -> list[nn.Module]:
    """What stands before a convolution of the residual trunk."""
    return [*(make_norm(config, channels) if config.norm == "group" else []), make_activation(config)]


class ResidualBlock(BodyBlock):
    """x plus a 3x3 and a 1x1 convolution of x (VQ-VAE, Section 4.1)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        width, inner = config.hidden_channels[-1], config.residual_channels
        self.layers = nn.Sequential(
            *self.unit(config, nn.Conv2d(width, inner, 3, padding=1)),
            *self.unit(config, nn.Conv2d(inner, width, 1)),
        )

    @staticmethod
    def unit(config: AutoencoderConfig, convolution: nn.Conv2d) -> list[nn.Module]:
        """Activation and convolution; group norm goes before the activation, batch norm after the convolution."""
        after = make_norm(config, convolution.out_channels) if config.norm == "batch" else []
        return [*preactivation(config, convolution.in_channels), convolution, *after]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, width, h, w) to the same."""
        return hidden_states + self.layers(hidden_states)


def residual_blocks(config: AutoencoderConfig) -> nn.Sequential:
    """The residual trunk at the latent grid."""
    return nn.Sequential(*(ResidualBlock(config) for _ in range(config.num_residual_blocks)))


class Encoder(nn.Module):
    """pixel_values (B, C, H, W) to latents (B, M * D, h, w): stride-2 convolutions, a 3x3 one, residual blocks.

    A variance head, where the config has one, is a second copy of whatever the latents leave by: of the 1x1 convolution
    with `latent_projection`, of the last residual block without (the SQ-VAE authors).
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.num_channels, *config.hidden_channels]
        stages = [nn.Conv2d(narrow, wide, 4, stride=2, padding=1) for narrow, wide in pairwise(widths)]
        stem = nn.Conv2d(widths[-1], widths[-1], 3, padding=1)
        self.downsample = nn.Sequential(*(layer for conv in (*stages, stem) for layer in activated(config, conv)))
        self.blocks = residual_blocks(config)
        self.to_latents = nn.Sequential(*self.make_head(config)) if config.latent_projection else nn.Sequential()
        self.to_log_variance: nn.Sequential | None = None
        if config.has_variance_head:
            head = self.make_head(config) if config.latent_projection else [ResidualBlock(config)]
            self.to_log_variance = nn.Sequential(*head)
        self.shares_last_block = config.latent_projection

    @staticmethod
    def make_head(config: AutoencoderConfig) -> list[nn.Module]:
        """Activation and 1x1 convolution to the latents' channels."""
        width = config.hidden_channels[-1]
        return [*preactivation(config, width), nn.Conv2d(width, config.latent_channels, 1)]

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Latents of pixel_values, and log_variance of the same shape where there is a head for it."""
        *earlier, last = self.blocks
        hidden_states = self.downsample(pixel_values)
        for block in earlier:
            hidden_states = block(hidden_states)
        latest = last(hidden_states)
        if self.to_log_variance is None:
            return self.to_latents(latest), None
        return self.to_latents(latest), self.to_log_variance(latest if self.shares_last_block else hidden_states)


class Decoder(nn.Module):
    """quantized (B, M * D, h, w) to pixels: residual blocks, transposed convolutions.

    To the reconstruction (B, C, H, W), or to `decoder_channels` parameters of each pixel's distribution.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [*reversed(config.hidden_channels), config.decoder_channels]
        stages = [nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1) for wide, narrow in pairwise(widths)]
        self.from_latents = nn.Sequential()
        if config.latent_projection:
            self.from_latents.append(nn.Conv2d(config.latent_channels, widths[0], 3, padding=1))
            after_blocks = preactivation(config, widths[0])
        else:
            after_blocks = activated(config, nn.ConvTranspose2d(widths[0], widths[0], 3, padding=1))
        self.blocks = residual_blocks(config)
        hidden = [layer for stage in stages[:-1] for layer in activated(config, stage)]
        self.upsample = nn.Sequential(*after_blocks, *hidden, stages[-1])
        self.bounded = config.output_activation == "sigmoid"

    def forward(self, quantized: Tensor) -> Tensor:
        """Pixels, or their parameters, from quantized latents."""
        pixel_values = self.upsample(self.blocks(self.from_latents(quantized)))
        return 2 * pixel_values.sigmoid() - 1 if self.bounded else pixel_values


__all__ = ["Decoder", "Encoder", "ResidualBlock"]
