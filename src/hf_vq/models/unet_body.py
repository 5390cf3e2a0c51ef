"""The U-Net body of VQGAN (Esser et al., arXiv 2012.09841): residual blocks at every resolution, attention where asked.

By config alone it is the body of diffusers' `VQModel`, too. It works at full resolution and costs many times the
convolutional body: for machines with an accelerator.
"""

from torch import Tensor, nn

from .body_parts import BodyBlock, make_activation
from .configuration_autoencoder import AutoencoderConfig

EPSILON = 1e-6


def normalised(config: AutoencoderConfig, channels: int) -> nn.GroupNorm:
    """Group norm of `channels`."""
    return nn.GroupNorm(config.norm_groups, channels, EPSILON)


class UNetBlock(BodyBlock):
    """x, by a 1x1 convolution where the width changes, plus two 3x3 convolutions of x."""

    def __init__(self, config: AutoencoderConfig, narrow: int, wide: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            normalised(config, narrow),
            make_activation(config),
            nn.Conv2d(narrow, wide, 3, padding=1),
            normalised(config, wide),
            make_activation(config),
            nn.Conv2d(wide, wide, 3, padding=1),
        )
        self.shortcut = nn.Identity() if narrow == wide else nn.Conv2d(narrow, wide, 1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, narrow, h, w) to (B, wide, h, w)."""
        return self.shortcut(hidden_states) + self.layers(hidden_states)


class GridAttention(BodyBlock):
    """x plus attention of every position over all, with one head."""

    def __init__(self, config: AutoencoderConfig, channels: int) -> None:
        super().__init__()
        self.norm = normalised(config, channels)
        self.query, self.key, self.value, self.output = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, channels, h, w) to the same."""
        rows = self.norm(hidden_states).flatten(2).mT
        query, key, value = (project(rows)[:, None] for project in (self.query, self.key, self.value))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)[:, 0]
        return hidden_states + self.output(mixed).mT.reshape(hidden_states.shape)


class HalfResolution(nn.Module):
    """A 3x3 convolution of stride 2, padded at the right and at the bottom."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, channels, h, w) to (B, channels, h / 2, w / 2)."""
        return self.convolution(nn.functional.pad(hidden_states, (0, 1, 0, 1)))


class DoubleResolution(nn.Module):
    """Each position four times, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, channels, h, w) to (B, channels, 2 h, 2 w)."""
        return self.convolution(nn.functional.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))


def stage(config: AutoencoderConfig, level: int, narrow: int, num_blocks: int) -> nn.Sequential:
    """The blocks of a resolution, each followed by attention where `attention_levels` has it."""
    wide = config.hidden_channels[level]
    layers: list[nn.Module] = []
    for width in [narrow, *[wide] * (num_blocks - 1)]:
        layers.append(UNetBlock(config, width, wide))
        if level in config.attention_levels:
            layers.append(GridAttention(config, wide))
    return nn.Sequential(*layers)


def middle(config: AutoencoderConfig) -> nn.Sequential:
    """Two blocks at the latent grid, attention between them."""
    width = config.hidden_channels[-1]
    attention = [GridAttention(config, width)] if config.middle_attention else []
    return nn.Sequential(UNetBlock(config, width, width), *attention, UNetBlock(config, width, width))


def leave(config: AutoencoderConfig, channels: int, out: int) -> list[nn.Module]:
    """Norm, activation and a 3x3 convolution."""
    return [normalised(config, channels), make_activation(config), nn.Conv2d(channels, out, 3, padding=1)]


class UNetEncoder(nn.Module):
    """pixel_values (B, C, H, W) to latents (B, M * D, h, w), and to log_variance where the config has a head for it."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = list(config.hidden_channels)
        self.stem = nn.Conv2d(config.num_channels, widths[0], 3, padding=1)
        narrow = [widths[0], *widths[:-1]]
        self.stages = nn.ModuleList(
            stage(config, level, width, config.num_residual_blocks) for level, width in enumerate(narrow)
        )
        self.downsample = nn.ModuleList(HalfResolution(width) for width in widths[:-1])
        self.middle = middle(config)
        self.to_latents = self.make_head(config)
        self.to_log_variance = self.make_head(config) if config.has_variance_head else None

    @staticmethod
    def make_head(config: AutoencoderConfig) -> nn.Sequential:
        """To `bottleneck_channels`, and from there by a 1x1 convolution to the latents' channels."""
        between = config.bottleneck_channels or config.latent_channels
        return nn.Sequential(
            *leave(config, config.hidden_channels[-1], between), nn.Conv2d(between, config.latent_channels, 1)
        )

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Latents of pixel_values, and log_variance of the same shape where there is a head for it."""
        hidden_states = self.stem(pixel_values)
        for level, blocks in enumerate(self.stages):
            hidden_states = blocks(hidden_states)
            if level < len(self.downsample):
                hidden_states = self.downsample[level](hidden_states)
        hidden_states = self.middle(hidden_states)
        log_variance = None if self.to_log_variance is None else self.to_log_variance(hidden_states)
        return self.to_latents(hidden_states), log_variance


class UNetDecoder(nn.Module):
    """quantized (B, M * D, h, w) to pixels: the encoder's stages the other way round, each with one block more."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = list(config.hidden_channels)
        between = config.bottleneck_channels or config.latent_channels
        self.from_latents = nn.Sequential(
            nn.Conv2d(config.latent_channels, between, 1), nn.Conv2d(between, widths[-1], 3, padding=1)
        )
        self.middle = middle(config)
        levels = list(reversed(range(len(widths))))
        before = [widths[-1], *(widths[level] for level in levels[:-1])]
        self.stages = nn.ModuleList(
            stage(config, level, width, config.num_residual_blocks + 1)
            for level, width in zip(levels, before, strict=True)
        )
        self.upsample = nn.ModuleList(DoubleResolution(widths[level]) for level in levels[:-1])
        self.to_pixels = nn.Sequential(*leave(config, widths[0], config.decoder_channels))
        self.bounded = config.output_activation == "sigmoid"

    def forward(self, quantized: Tensor) -> Tensor:
        """Pixels, or their parameters, from quantized latents."""
        hidden_states = self.middle(self.from_latents(quantized))
        for level, blocks in enumerate(self.stages):
            hidden_states = blocks(hidden_states)
            if level < len(self.upsample):
                hidden_states = self.upsample[level](hidden_states)
        pixel_values = self.to_pixels(hidden_states)
        return 2 * pixel_values.sigmoid() - 1 if self.bounded else pixel_values


__all__ = ["GridAttention", "UNetBlock", "UNetDecoder", "UNetEncoder"]
