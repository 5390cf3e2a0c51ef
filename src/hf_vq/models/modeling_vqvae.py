"""VQ-VAE (van den Oord et al. 2017, arXiv 1711.00937)."""

from typing import Any

from torch import Tensor

from .codebook_care import CodebookCare
from .configuration_vqvae import VQVAEConfig
from .finite_scalar_quantizer import FiniteScalarQuantizer
from .modeling_autoencoder import AutoencoderModel
from .quantizers import Quantizer
from .vector_quantizers import (
    EMAVectorQuantizer,
    LinearCodebookQuantizer,
    SoftEMVectorQuantizer,
    VectorQuantizer,
)


class VQVAEModel(AutoencoderModel):
    """Nearest-code tokenizer with straight-through gradients.

    loss = mean squared error / data_variance + codebook term + commitment_weight * commitment term, all means over
    elements. The codebook term is absent where the codebook moves by averages, both are where latents are rounded.

    Example:
        >>> model = VQVAEModel.from_pretrained("org/vqvae-cifar10")
        >>> encoded = model.encode(pixel_values)
        >>> decoded = model.decode(encoded.image_tokens)
    """

    config: VQVAEConfig

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__(config)
        self.post_init()

    def make_quantizer(self) -> Quantizer:
        """The quantizer that `config.quantizer` names."""
        config = self.config
        if config.quantizer == "fsq":
            return FiniteScalarQuantizer(config.levels or (), config.num_codebooks)
        shape = (config.codebook_size, config.codebook_dim, config.num_codebooks)
        cared_for = config.codebook_init == "kmeans" or config.revive_below > 0
        shared: dict[str, Any] = {
            "commitment_weight": config.commitment_weight,
            "gradient_estimator": config.gradient_estimator,
            "normalize_codes": config.normalize_codes,
            "care": CodebookCare(*shape, config.codebook_init == "kmeans", config.revive_below) if cared_for else None,
        }
        if config.quantizer == "ema":
            return EMAVectorQuantizer(*shape, **shared, decay=config.ema_decay)
        if config.quantizer == "soft_em":
            return SoftEMVectorQuantizer(*shape, **shared, decay=config.ema_decay, num_samples=config.num_samples)
        return (LinearCodebookQuantizer if config.codebook_transform == "linear" else VectorQuantizer)(*shape, **shared)

    def reconstruction_loss(self, error: Tensor, elements: int) -> Tensor:
        """Squared error as a share of the data's variance."""
        return error / self.config.data_variance

    def likelihood_loss(self, nats: Tensor, elements: int) -> Tensor:
        """Nats per element, of the size of a squared error over the data's variance."""
        return nats / elements


VQVAEModel.register_for_auto_class("AutoModel")

__all__ = ["VQVAEModel"]
