"""What every tokenizer's config shares: the data it sees, the codebook, and the convolutional body."""

import math
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .logistic_mixture import num_parameters

OF_BODY = {
    "convolutional": ("residual_channels", "norm", "latent_projection"),
    "unet": ("attention_levels", "middle_attention", "bottleneck_channels", "norm_groups"),
}
"""Options that only one body has."""


class Default(int):
    """A default that can be told from the same number given by hand."""


@strict
class AutoencoderConfig(PreTrainedConfig):
    r"""Base of `VQVAEConfig` and `SQVAEConfig`.

    Args:
        num_channels: channels C of the images.
        image_size: height and width of the images that the processor makes; other multiples of
            `downsampling_factor` work too.
        codebook_size: number of codes K of each codebook.
        codebook_dim: dimension D of a code.
        num_codebooks: number of codebooks M; each quantizes D of the M * D latent channels, so that a position has M
            tokens.
        observation: distribution of an image given its tokens: `gaussian`, around the reconstruction and with one
            variance for each channel; or `logistic_mixture`, whose channels depend on each other (PixelCNN++).
        num_mixtures: components of the logistic mixture.
        body: `convolutional` works at the latent grid; `unet` is VQGAN's, with residual blocks at every resolution, for
            machines with an accelerator.
        hidden_channels: width after each stride-2 convolution, and in a `unet` at each resolution, the full one
            included; their number fixes the downsampling factor.
        num_residual_blocks: residual blocks in the encoder, and again in the decoder, all at the latent grid; in a
            `unet` at each resolution, one more in the decoder.
        residual_channels: width between the two convolutions of a residual block; not in a `unet`.
        norm: `group` normalises before each activation of a residual block, `batch` after each convolution
            (the SQ-VAE authors), `none` not at all (the Sonnet net).
        activation: the nonlinearity.
        latent_projection: whether a 1x1 convolution leads to the latents and a 3x3 one away from them. Without it the
            latents leave the last residual block itself, and the decoder mirrors the encoder's 3x3 convolution.
        attention_levels: of a `unet`, the places in hidden_channels whose blocks are followed by attention.
        middle_attention: of a `unet`, whether there is attention at the latent grid.
        bottleneck_channels: of a `unet`, channels beside the 1x1 convolutions to and from the latents; None for
            those of the latents.
        norm_groups: of a `unet`, groups of each norm.
        output_activation: `sigmoid` bounds the reconstruction by 2 * sigmoid - 1; `none` leaves it linear.
        initializer_range: standard deviation of the convolutions' weights at the start; None scales it by fan-in.
    """

    num_channels: int = 3
    image_size: int = 32
    codebook_size: int = Default(512)
    codebook_dim: int = Default(4)
    num_codebooks: int = 1
    observation: Literal["gaussian", "logistic_mixture"] = "gaussian"
    num_mixtures: int = 10
    body: Literal["convolutional", "unet"] = "convolutional"
    hidden_channels: list[int] | tuple[int, ...] = (64, 128)
    num_residual_blocks: int = 2
    residual_channels: int = 64
    norm: Literal["group", "batch", "none"] = "group"
    activation: Literal["silu", "relu"] = "silu"
    latent_projection: bool = True
    attention_levels: list[int] | tuple[int, ...] = ()
    middle_attention: bool = True
    bottleneck_channels: int | None = None
    norm_groups: int = 32
    output_activation: Literal["none", "sigmoid"] = "none"
    initializer_range: float | int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # Only while a config is made does it matter who chose the numbers.
        self.codebook_size, self.codebook_dim = int(self.codebook_size), int(self.codebook_dim)
        super().__post_init__(**kwargs)

    @property
    def downsampling_factor(self) -> int:
        """Pixels of an image that one token stands for, along each axis."""
        return 2 ** (len(self.hidden_channels) - (self.body == "unet"))

    @property
    def latent_channels(self) -> int:
        """Channels of the latents, M * D."""
        return self.num_codebooks * self.codebook_dim

    @property
    def decoder_channels(self) -> int:
        """Numbers that the decoder gives for each pixel."""
        if self.observation == "logistic_mixture":
            return num_parameters(self.num_channels, self.num_mixtures)
        return self.num_channels

    @property
    def has_variance_head(self) -> bool:
        """Whether the encoder predicts a variance beside the latents."""
        return False

    @property
    def grid_size(self) -> tuple[int, int]:
        """Token grid (h, w) of an image of `image_size`."""
        side = self.image_size // self.downsampling_factor
        return side, side

    def validate_sizes(self) -> None:
        """Every size is a positive whole number, and a codebook has something to choose from."""
        sizes = (
            "num_channels",
            "image_size",
            "codebook_dim",
            "num_codebooks",
            "num_residual_blocks",
            "residual_channels",
            "num_mixtures",
            "norm_groups",
        )
        for name in sizes:
            require_positive(self, name)
        if self.initializer_range is not None:
            require_positive(self, "initializer_range")
        if self.codebook_size < 2:
            raise ValueError(f"codebook_size must be at least 2, got {self.codebook_size}")

    def validate_body(self) -> None:
        """The widths fit the image, the normalisation and the latents."""
        widths = list(self.hidden_channels)
        if not widths or min(widths) < 1:
            raise ValueError(f"hidden_channels must name one positive width per stride-2 stage, got {widths}")
        self._validate_options_of_body()
        if self.image_size % self.downsampling_factor:
            raise ValueError(
                f"image_size {self.image_size} is not divisible by the downsampling factor "
                f"{self.downsampling_factor} of hidden_channels {widths}"
            )
        if self.observation != "gaussian" and self.output_activation != "none":
            raise ValueError(f"output_activation {self.output_activation} bounds pixels, and not those of a mixture")
        if not self.latent_projection and widths[-1] != self.latent_channels:
            raise ValueError(
                f"without latent_projection the last of hidden_channels ({widths[-1]}) is the width of the latents, "
                f"num_codebooks * codebook_dim = {self.latent_channels}"
            )

    def _validate_options_of_body(self) -> None:
        """Options of the other body are left alone, and those of a `unet` fit its widths."""
        for name in OF_BODY["convolutional" if self.body == "unet" else "unet"]:
            value, default = getattr(self, name), getattr(AutoencoderConfig, name)
            if value != default and list_of(value) != list_of(default):
                raise ValueError(f"{name} {value!r} is no option of the body {self.body!r}: leave it out")
        if self.body == "unet":
            widths = list(self.hidden_channels)
            if any(width % self.norm_groups for width in widths):
                raise ValueError(f"norm_groups {self.norm_groups} does not divide all of hidden_channels {widths}")
            if not all(0 <= level < len(widths) for level in self.attention_levels):
                raise ValueError(
                    f"attention_levels {list(self.attention_levels)} are places in hidden_channels {widths}: choose "
                    f"from 0 to {len(widths) - 1}"
                )
            if self.bottleneck_channels is not None:
                require_positive(self, "bottleneck_channels")


def list_of(value: Any) -> Any:
    """A tuple as the list that JSON makes of it."""
    return list(value) if isinstance(value, tuple) else value


def require_positive(config: PreTrainedConfig, name: str) -> None:
    """Raises a ValueError that names the field unless its value is above zero and finite."""
    if not 0 < getattr(config, name) < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {getattr(config, name)}")


def require_at_least_zero(config: PreTrainedConfig, name: str) -> None:
    """Raises a ValueError that names the field unless its value is zero or above, and finite."""
    if not 0 <= getattr(config, name) < math.inf:
        raise ValueError(f"{name} must be zero or above, and finite, got {getattr(config, name)}")


def require_directions(config: AutoencoderConfig, what: str) -> None:
    """Raises a ValueError if all codes of length 1 are -1 and 1."""
    if config.codebook_dim == 1:
        raise ValueError(
            f"the codes of {what} are directions, and codebook_dim 1 has two of them: choose codebook_dim 2 or more"
        )


__all__ = ["AutoencoderConfig", "Default", "require_at_least_zero", "require_directions", "require_positive"]
