"""What a tokenizer accepts, and what it says to the rest."""

import math

import torch
from torch import Tensor, nn

from .configuration_autoencoder import AutoencoderConfig


def check_pixel_values(pixel_values: Tensor, config: AutoencoderConfig) -> None:
    """Raises a ValueError unless pixel_values are floats (B, C, H, W), H and W divisible by the downsampling factor."""
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"pixel_values must be floats in [-1, 1], got {pixel_values.dtype}: the model's image processor makes them"
        )
    if not pixel_values.shape[0]:
        raise ValueError(f"pixel_values must hold at least one image, got shape {tuple(pixel_values.shape)}")
    channels, factor = config.num_channels, config.downsampling_factor
    if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
        raise ValueError(f"pixel_values must have shape (B, {channels}, H, W), got {tuple(pixel_values.shape)}")
    height, width = pixel_values.shape[2:]
    if height % factor or width % factor or not height or not width:
        raise ValueError(
            f"height and width of pixel_values must be divisible by {factor}, got {height} x {width}; "
            "the model's image processor resizes or crops to such a size"
        )


def check_refinement(rounds: int, model: nn.Module, plain: bool) -> None:
    """Raises a ValueError unless so many rounds of refinement can be done now.

    Args:
        plain: whether nothing else is asked of the tokens.
    """
    if not isinstance(rounds, int) or rounds < 0:
        raise ValueError(f"refine must be a whole number of rounds, 0 or more, got {rounds}")
    if model.training or not plain:
        raise ValueError(
            f"refine={rounds} changes the deterministic tokens of a model in evaluation mode: call model.eval(), and "
            "set neither return_loss nor sample"
        )
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            f"refine={rounds} needs gradients, and weights that were made inside torch.inference_mode() give none: "
            "load and move the model outside of it"
        )


def tokens_on_grid(image_tokens: Tensor, config: AutoencoderConfig) -> Tensor:
    """image_tokens, any integers, as int64 (B, h, w), or (B, h, w, M) with M > 1 codebooks.

    Args:
        image_tokens: of that shape, or flat (B, h * w * M), codebook fastest, for the config's own grid.

    Raises:
        ValueError: for a wrong type or shape, or codes outside [0, K).
    """
    (height, width), codebooks = config.grid_size, config.num_codebooks
    own_shape = (height, width, codebooks)[: 3 if codebooks > 1 else 2]
    if image_tokens.is_floating_point() or image_tokens.dtype == torch.bool:
        raise ValueError(f"image_tokens must be integers, got {image_tokens.dtype}")
    image_tokens = image_tokens.long()
    if image_tokens.ndim == 2 and image_tokens.shape[1] == math.prod(own_shape):
        image_tokens = image_tokens.view(-1, *own_shape)
    if image_tokens.ndim != 1 + len(own_shape) or image_tokens.shape[3:] != own_shape[2:]:
        letters = f"(B, h, w, {codebooks})" if codebooks > 1 else "(B, h, w)"
        raise ValueError(
            f"image_tokens must have shape {letters}, or (B, {math.prod(own_shape)}) for the model's own grid of "
            f"{' x '.join(map(str, own_shape))}, got {tuple(image_tokens.shape)}"
        )
    # Looking at values would break a compiled graph.
    if not torch.compiler.is_compiling() and image_tokens.numel():
        check_codes(image_tokens, config.codebook_size)
    return image_tokens


def check_codes(image_tokens: Tensor, codebook_size: int) -> None:
    """Raises a ValueError unless all codes lie in [0, K)."""
    least, most = image_tokens.aminmax()
    if least < 0 or most >= codebook_size:
        raise ValueError(f"image_tokens must lie in [0, {codebook_size}), got values from {least} to {most}")


__all__ = ["check_pixel_values", "check_refinement", "tokens_on_grid"]
