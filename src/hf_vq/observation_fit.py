"""The decoder's variance, fitted to what it is used for: deterministic tokens, the weights that are saved."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hf_vq.canonical import canonical

__all__ = ["fit_observation_variance"]


@torch.no_grad()
def fit_observation_variance(model: Any, batches: Iterable[dict[str, Tensor]], images: int) -> None:
    """Sets `observation_variance` of a Gaussian observation to the mean squared error of each channel.

    Args:
        model: a tokenizer.
        batches: yields pixel_values (B, C, H, W) of training images, at least one, perhaps without end.
        images: the first so many count.
    """
    if model.config.observation != "gaussian":
        return
    errors, seen = torch.zeros(model.config.num_channels, dtype=torch.float64, device=model.device), 0
    with canonical(model):
        for batch in batches:
            pixel_values = batch["pixel_values"][: images - seen].to(model.device, torch.float32)
            decoded = model.decode(model.encode(pixel_values).image_tokens).pixel_values
            errors += (decoded.double() - pixel_values.double()).square().mean(dim=(2, 3)).sum(dim=0)
            seen += len(pixel_values)
            if seen >= images:
                break
    model.observation_variance.copy_(errors / seen)
