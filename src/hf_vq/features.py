"""Features of images under any Hugging Face vision model, for distances between sets of images."""

import logging
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoImageProcessor, AutoModel

__all__ = ["FeatureNetwork"]

logger = logging.getLogger(__name__)


class FeatureNetwork:
    """uint8 images (B, C, H, W) -> features (B, D): `pooler_output`, or the mean of `last_hidden_state` over positions.

    Args:
        model: an `AutoModel` that takes pixel_values (of CLIP and its kin, the vision tower is used).
        processor: its image processor. Without one, images are resized to `config.image_size` and scaled to [-1, 1].
        use_pooler: whether the model's pooler has been trained.
    """

    def __init__(self, model: nn.Module, processor: Any = None, use_pooler: bool = True) -> None:
        self.model: Any = getattr(model, "vision_model", model).eval()
        self.processor = processor
        self.use_pooler = use_pooler

    @classmethod
    def load(cls, model: str | os.PathLike[str] | nn.Module, device: torch.device | str = "cpu") -> "FeatureNetwork":
        """From a name, a folder or a loaded model; the last stays where it is and brings the processor saved beside it.

        Raises: OSError if there is no such model.
        """
        if isinstance(model, nn.Module):
            return cls(model, _load_processor(getattr(model, "name_or_path", "")))
        loaded, info = AutoModel.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
        # Checkpoints often lack a pooler; transformers then draws one, and its features would differ in every run.
        use_pooler = not any("pooler" in name for name in info["missing_keys"])
        return cls(loaded.to(device), _load_processor(model), use_pooler)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features, (B, D) float32, of uint8 images, (B, C, H, W); grey ones count as RGB where the model wants it."""
        parameter = next(self.model.parameters())
        channels = getattr(self.model.config, "num_channels", 3)
        if images.shape[1] == 1 and channels == 3:
            images = images.expand(-1, 3, -1, -1)
        pixel_values = self._prepare(images).to(parameter)
        output = self.model(pixel_values=pixel_values)
        pooled = getattr(output, "pooler_output", None) if self.use_pooler else None
        return _pool(output.last_hidden_state) if pooled is None else pooled.flatten(1).float()

    def _prepare(self, images: Tensor) -> Tensor:
        if self.processor is not None:
            arrays = list(images.permute(0, 2, 3, 1).cpu().numpy())
            return self.processor(images=arrays, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
        size = getattr(self.model.config, "image_size", None) or images.shape[-2:]
        size = (size, size) if isinstance(size, int) else tuple(size)
        pixel_values = images.float() / 127.5 - 1
        if tuple(pixel_values.shape[-2:]) == size:
            return pixel_values
        return functional.interpolate(pixel_values, size=size, mode="bilinear", antialias=True)


def _pool(last_hidden_state: Tensor) -> Tensor:
    """(B, T, D) of a transformer, or (B, D, h, w) of a convolutional net -> (B, D)."""
    positions = (1,) if last_hidden_state.ndim == 3 else (2, 3)
    return last_hidden_state.float().mean(dim=positions)


def _load_processor(name_or_path: str | os.PathLike[str]) -> Any:
    if not name_or_path:
        return None
    try:
        return AutoImageProcessor.from_pretrained(name_or_path)
    except (OSError, ValueError):
        logger.warning("%s has no image processor: images are resized and scaled to [-1, 1] for it", name_or_path)
        return None
