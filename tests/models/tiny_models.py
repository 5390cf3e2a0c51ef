"""One tiny model of every family, quantizer and option, and images for it."""

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
VECTOR_QUANTIZERS: dict[str, dict[str, object]] = {
    "gradient": {"quantizer": "gradient"},
    "rotation": {"quantizer": "gradient", "gradient_estimator": "rotation"},
    "normalised": {"quantizer": "gradient", "normalize_codes": True},
    "linear": {"quantizer": "gradient", "codebook_transform": "linear"},
    "ema": {"quantizer": "ema"},
    "ema-kmeans-revival": {"quantizer": "ema", "codebook_init": "kmeans", "revive_below": 0.1},
    "ema-3-codebooks": {"quantizer": "ema", "num_codebooks": 3, "codebook_dim": 1},
    "soft_em": {"quantizer": "soft_em", "num_samples": 3},
    "fsq": {"quantizer": "fsq", "levels": [4, 3], "codebook_dim": 2},
}
STOCHASTIC_QUANTIZERS: dict[str, dict[str, object]] = {
    "gaussian": {"quantizer": "gaussian"},
    "gaussian-noisy-learned": {
        "variance_form": "sum",
        "dequantization_noise": True,
        "variance_update": "learned",
    },
    "gaussian-per_sample": {"covariance": "per_sample"},
    "gaussian-per_latent": {"covariance": "per_latent", "variance_form": "sum"},
    "gaussian-diagonal": {"covariance": "diagonal", "dequantization_noise": True},
    "gaussian-2-codebooks": {"num_codebooks": 2, "codebook_dim": 2},
    "vmf": {"quantizer": "vmf", "initial_variance": 0.1},
}
FAMILIES = {
    **{name: (VQVAEModel, VQVAEConfig, own) for name, own in VECTOR_QUANTIZERS.items()},
    **{name: (SQVAEModel, SQVAEConfig, own) for name, own in STOCHASTIC_QUANTIZERS.items()},
}


def make_model(family: str, seed: int = 0, **settings: object) -> AutoencoderModel:
    """A model in evaluation mode whose codes are about as large as its latents, so that many of them occur."""
    model_class, config_class, own = FAMILIES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**BODY, **own, **settings})).eval()
    with torch.no_grad():
        if model.config.quantizer == "fsq":
            # Its codes are a grid, and stay.
            model.encoder.to_latents[-1].weight.mul_(8)
        else:
            model.quantizer.codebook.weight.normal_().mul_(0.5)
    return model


def make_images(
    count: int, height: int = 8, width: int = 8, seed: int = 1, dtype: torch.dtype = torch.float32
) -> Tensor:
    """8-bit images (count, 3, height, width) as pixel_values in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator).to(dtype) / 127.5 - 1
