"""Config of SQ-VAE (Takida et al. 2022, arXiv 2205.07547)."""

from typing import Literal

from huggingface_hub.dataclasses import strict

from .configuration_autoencoder import AutoencoderConfig, require_at_least_zero, require_directions, require_positive


@strict
class SQVAEConfig(AutoencoderConfig):
    r"""Config of an `SQVAEModel`; the shared fields are those of `AutoencoderConfig`.

    Args:
        quantizer: distribution of the dequantization: `gaussian`, or `vmf`, the von Mises-Fisher distribution of
            directions (Section 4 of the paper), for which the variance is 1 / kappa.
        covariance: of the Gaussian, by the types of the paper's Table 1: `global` (I), one variance sigma_phi^2 for all
            latents; `per_sample` (II), one for each image; `per_latent` (III), one for each position; `diagonal` (IV),
            one for each component of each position. All but the first come from a second head of the encoder.
        variance_form: `product` makes sigma_phi^2 = exp(head + s), the paper's; `sum` makes it exp(head) + exp(s), the
            authors' vision code. With `global`, head = 0, so that the sum cannot fall below 1. (`vmf`: kappa =
            exp(-s), or 1 + exp(-s).)
        initial_variance: exp(s) at the start.
        variance_lr_scale: s = log(initial_variance) + variance_lr_scale * parameter, so that under Adam s learns that
            many times faster than the rest; 0 holds the variance fixed.
        dequantization_noise: whether training draws the dequantized Z of Eq. 8; the authors' code uses its mean.
        variance_update: the decoder's sigma^2: `batch` is the closed form on the batch at hand (the authors'), `lagged`
            that of the last optimizer step (exact under gradient accumulation), `learned` the scalar of Eq. 8.
        temperature_start: temperature of the Gumbel-softmax relaxation at the first step.
        temperature_end: temperature from step `temperature_decay_steps` on.
        temperature_decay_steps: optimizer steps over which the temperature decays exponentially.

    Example:
        >>> from hf_vq import SQVAEConfig, SQVAEModel
        >>> model = SQVAEModel(SQVAEConfig(codebook_size=256))
    """

    model_type = "hf_sqvae"

    quantizer: Literal["gaussian", "vmf"] = "gaussian"
    covariance: Literal["global", "per_sample", "per_latent", "diagonal"] = "global"
    variance_form: Literal["product", "sum"] = "product"
    initial_variance: float | int = 1.0
    variance_lr_scale: float | int = 20.0
    dequantization_noise: bool = False
    variance_update: Literal["batch", "lagged", "learned"] = "batch"
    temperature_start: float | int = 1.0
    temperature_end: float | int = 0.4
    temperature_decay_steps: int = 10_000

    @property
    def has_variance_head(self) -> bool:
        """Whether the encoder predicts a variance beside the latents."""
        return self.covariance != "global"

    def validate_quantizer(self) -> None:
        """What belongs to the Gaussian is not asked of another."""
        if self.quantizer == "vmf" and (self.covariance != "global" or self.dequantization_noise):
            raise ValueError(
                f"quantizer vmf has covariance global and no dequantization_noise, got {self.covariance} and "
                f"{self.dequantization_noise}"
            )
        if self.quantizer == "vmf":
            require_directions(self, "quantizer vmf")

    def validate_annealing(self) -> None:
        """Variances and temperatures are positive, and the temperature does not rise."""
        for name in ("initial_variance", "temperature_start", "temperature_end", "temperature_decay_steps"):
            require_positive(self, name)
        require_at_least_zero(self, "variance_lr_scale")
        if self.temperature_end > self.temperature_start:
            raise ValueError(
                f"temperature_end ({self.temperature_end}) must not exceed temperature_start ({self.temperature_start})"
            )


SQVAEConfig.register_for_auto_class()

__all__ = ["SQVAEConfig"]
