"""What a prior accepts, and what it says to the rest."""

from typing import Any

import torch
from torch import Tensor

from .configuration_prior import NO_CLASS, PriorConfig


def as_class_labels(class_labels: Any, device: torch.device) -> Tensor:
    """A tensor (B,) of labels, from one, from a list or from an int."""
    return torch.as_tensor(class_labels, device=device).reshape(-1)


def check_sequences(input_ids: Tensor, config: PriorConfig, seen: int) -> None:
    """Raises a ValueError unless input_ids (B, L) continue sequences of `seen` tokens, and no further than an image."""
    if input_ids.ndim != 2 or not input_ids.shape[1] or input_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"input_ids must be integers (B, L), got {input_ids.dtype} of shape {tuple(input_ids.shape)}")
    longest = 1 + config.num_tokens
    if seen + input_ids.shape[1] > longest:
        raise ValueError(
            f"sequences of {seen + input_ids.shape[1]} tokens are longer than a start token and an image of "
            f"{described_grid(config)}, {longest}"
        )
    # In the steps of a generation the codes are the prior's own, and looking at values waits for a GPU.
    if seen and input_ids.device.type != "cpu":
        return
    tokens = input_ids if seen else input_ids[:, 1:]
    start = config.bos_token_id
    if not seen and (input_ids[:, 0] != start).any():
        raise ValueError(f"sequences begin with the start token, {start}, got {input_ids[:, 0].unique().tolist()[:8]}")
    check_codes(tokens, config)


def check_tokens(image_tokens: Tensor, config: PriorConfig) -> None:
    """Raises a ValueError unless image_tokens, on the grid or flat, are those of whole images."""
    if tuple(image_tokens.shape[1:]) not in (config.token_shape, (config.num_tokens,)):
        raise ValueError(
            f"image_tokens must have the prior's grid of {described_grid(config)}, or {config.num_tokens} tokens in a "
            f"row, got shape {tuple(image_tokens.shape)}"
        )
    if image_tokens.is_floating_point():
        raise ValueError(f"image_tokens must be integers, got {image_tokens.dtype}")
    check_codes(image_tokens, config)


def check_codes(codes: Tensor, config: PriorConfig) -> None:
    """Raises a ValueError unless all codes lie in [0, K)."""
    if not codes.numel():
        return
    least, most = codes.aminmax()
    if least < 0 or most >= config.codebook_size:
        hint = ", where the start token stands first and nowhere else" if most == config.bos_token_id else ""
        raise ValueError(f"image tokens must lie in [0, {config.codebook_size}){hint}, got {least} to {most}")


def check_class_labels(class_labels: Tensor | None, config: PriorConfig, batch_size: int) -> None:
    """Raises a ValueError unless class_labels are (B,) in [-1, num_classes)."""
    if class_labels is None:
        return
    if tuple(class_labels.shape) != (batch_size,) or class_labels.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"class_labels must be integers ({batch_size},), got {class_labels.dtype} of shape "
            f"{tuple(class_labels.shape)}"
        )
    if not batch_size:
        return
    least, most = class_labels.aminmax()
    if least < NO_CLASS or most >= config.num_classes:
        raise ValueError(
            f"class_labels must lie in [0, {config.num_classes}), or be -1 for no class, got {least} to {most}"
        )


def described_grid(config: PriorConfig) -> str:
    """The grid in words."""
    codebooks = f", {config.num_codebooks} codebooks" if config.num_codebooks > 1 else ""
    return f"{config.grid[0]} x {config.grid[1]}{codebooks}"


__all__ = ["as_class_labels", "check_class_labels", "check_sequences", "check_tokens"]
