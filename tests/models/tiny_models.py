"""One tiny model of every family and quantizer, and images for it."""

import torch
from torch import Tensor

from hf_vq import SQVAEConfig, SQVAEModel, VQVAEConfig, VQVAEModel
from hf_vq.models.modeling_autoencoder import AutoencoderModel

BODY = {
    "image_size": 8,
    "codebook_size": 12,
    "codebook_dim": 3,
    "hidden_channels": (4, 8),
    "num_residual_blocks": 1,
    "residual_channels": 4,
}
FAMILIES = {
    "gradient": (VQVAEModel, VQVAEConfig, {"quantizer": "gradient"}),
    "ema": (VQVAEModel, VQVAEConfig, {"quantizer": "ema"}),
    "gaussian": (SQVAEModel, SQVAEConfig, {"quantizer": "gaussian"}),
    "gaussian-noisy-learned": (
        SQVAEModel,
        SQVAEConfig,
        {"variance_form": "sum", "dequantization_noise": True, "variance_update": "learned"},
    ),
}


def make_model(family: str, seed: int = 0, **settings: object) -> AutoencoderModel:
    """A model in evaluation mode whose codes are as large as its latents, so that many of them occur."""
    model_class, config_class, own = FAMILIES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**BODY, **own, **settings})).eval()
    with torch.no_grad():
        model.quantizer.codebook.weight.normal_().mul_(0.5)
    return model


def make_images(
    count: int, height: int = 8, width: int = 8, seed: int = 1, dtype: torch.dtype = torch.float32
) -> Tensor:
    """8-bit images (count, 3, height, width) as pixel_values in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator).to(dtype) / 127.5 - 1
