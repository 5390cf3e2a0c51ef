"""SQ-VAE (Takida et al. 2022, arXiv 2205.07547)."""

from typing import Any

import torch
from torch import Tensor, nn

from .annealing import AnnealedTemperature, DequantizationVariance, InverseConcentration
from .configuration_sqvae import SQVAEConfig
from .modeling_autoencoder import AutoencoderModel
from .quantizers import Quantizer, world_mean
from .stochastic_quantizers import DiagonalGaussianQuantizer, GaussianQuantizer, VonMisesFisherQuantizer


class SQVAEModel(AutoencoderModel):
    """Stochastically quantized tokenizer: one loss, in nats per image, trains encoder, decoder, codebook and variances.

    loss = reconstruction_loss + regulariser - entropy (Eq. 8, constants dropped). With S the squared error per image,
    C * H * W elements and sigma^2 = `observation_variance`, reconstruction_loss is, by `variance_update`,
        batch:   C*H*W / 2 * log S, with S averaged over the joint batch of all processes, exact in value and gradient;
        lagged:  C*H*W / 2 * (S / S0 + log S0 - 1), with S0 = C*H*W * sigma^2 of the last optimizer step;
        learned: S / (2 sigma^2) + C*H*W / 2 * log sigma^2, with a trained sigma^2.
    In evaluation `batch` is computed as `lagged`: no collective runs, and an image's loss does not depend on its batch.

    Example:
        >>> model = SQVAEModel.from_pretrained("org/sqvae-cifar10")
        >>> encoded = model.encode(pixel_values)
        >>> decoded = model.decode(encoded.image_tokens)
    """

    config: SQVAEConfig

    def __init__(self, config: SQVAEConfig) -> None:
        super().__init__(config)
        if config.variance_update == "learned":
            self.log_observation_variance = nn.Parameter(torch.zeros(()))
            self._keep_in_fp32_modules_strict = [*self._keep_in_fp32_modules_strict, "log_observation_variance"]
        self.post_init()

    def make_quantizer(self) -> Quantizer:
        """The quantizer that `config.quantizer` and `config.covariance` name, with its variance and temperature."""
        config = self.config
        shape = (config.codebook_size, config.codebook_dim, config.num_codebooks)
        variance = (config.variance_form, config.initial_variance, config.variance_lr_scale)
        temperature = AnnealedTemperature(
            config.temperature_start, config.temperature_end, config.temperature_decay_steps
        )
        if config.quantizer == "vmf":
            return VonMisesFisherQuantizer(*shape, variance=InverseConcentration(*variance), temperature=temperature)
        shared: dict[str, Any] = {
            "dequantization_noise": config.dequantization_noise,
            "variance": DequantizationVariance(*variance),
            "temperature": temperature,
        }
        if config.covariance == "diagonal":
            return DiagonalGaussianQuantizer(*shape, **shared)
        return GaussianQuantizer(*shape, covariance=config.covariance, **shared)

    def reconstruction_loss(self, error: Tensor, elements: int) -> Tensor:
        """-log p(image | tokens) in nats per image, less its constants."""
        update = self.config.variance_update
        if update == "learned":
            log_variance = self.log_observation_variance
            return elements / 2 * (error / log_variance.exp() + log_variance)
        if update == "batch" and self.training:
            joint = world_mean(error.detach())
            # The value is log S; the gradient, averaged over processes, is that of the joint S.
            return elements / 2 * ((joint * elements).log() + (error - error.detach()) / joint)
        variance = self.observation_variance.mean()
        return elements / 2 * (error / variance + (elements * variance).log() - 1)

    def likelihood_loss(self, nats: Tensor, elements: int) -> Tensor:
        """-log P(image | tokens) in nats per image."""
        return nats

    @torch.no_grad()
    def step(self) -> None:
        super().step()
        if self.config.variance_update == "learned":
            self.observation_variance.copy_(self.log_observation_variance.exp())


SQVAEModel.register_for_auto_class("AutoModel")

__all__ = ["SQVAEModel"]
