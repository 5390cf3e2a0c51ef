"""VQ-VAE (van den Oord et al. 2017, arXiv 1711.00937)."""

from torch import Tensor, nn
from transformers import initialization as init

from .configuration_vqvae import VQVAEConfig
from .modeling_autoencoder import AutoencoderModel
from .quantizers import EMAVectorQuantizer, Quantizer, VectorQuantizer


class VQVAEModel(AutoencoderModel):
    """Nearest-code tokenizer with straight-through gradients.

    loss = mean squared error / data_variance + codebook term + commitment_weight * commitment term, all means over
    elements; the codebook term is absent where the codebook moves by averages.

    Example:
        >>> model = VQVAEModel.from_pretrained("org/vqvae-cifar10")
        >>> encoded = model.encode(pixel_values)
        >>> decoded = model.decode(encoded.image_tokens)
    """

    config: VQVAEConfig

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__(config)
        self.post_init()

    def _init_codebook(self, module: nn.Embedding) -> None:
        """Codes U(-1/K, 1/K): among codes nearer to zero than the latents, the direction of a latent decides."""
        init.uniform_(module.weight, -1 / module.num_embeddings, 1 / module.num_embeddings)

    def make_quantizer(self) -> Quantizer:
        """The quantizer that `config.quantizer` names."""
        config = self.config
        shared = (config.codebook_size, config.codebook_dim, config.commitment_weight)
        if config.quantizer == "gradient":
            return VectorQuantizer(*shared)
        return EMAVectorQuantizer(*shared, decay=config.ema_decay)

    def reconstruction_loss(self, error: Tensor, elements: int) -> Tensor:
        """Squared error as a share of the data's variance."""
        return error / self.config.data_variance


VQVAEModel.register_for_auto_class("AutoModel")

__all__ = ["VQVAEModel"]
