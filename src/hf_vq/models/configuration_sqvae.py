"""Config of SQ-VAE (Takida et al. 2022, arXiv 2205.07547)."""

from typing import Literal

from huggingface_hub.dataclasses import strict

from .configuration_autoencoder import AutoencoderConfig, require_at_least_zero, require_positive


@strict
class SQVAEConfig(AutoencoderConfig):
    r"""Config of an `SQVAEModel`; the shared fields are those of `AutoencoderConfig`.

    Args:
        quantizer: distribution of the dequantization, `gaussian`.
        covariance: `global`, one variance sigma_phi^2 for all latents (type I of the paper's Table 1).
        variance_form: `product` makes sigma_phi^2 = exp(s), the paper's; `sum` makes it 1 + exp(s), the authors'
            vision code, so that it cannot fall below 1.
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

    quantizer: Literal["gaussian"] = "gaussian"
    covariance: Literal["global"] = "global"
    variance_form: Literal["product", "sum"] = "product"
    initial_variance: float | int = 1.0
    variance_lr_scale: float | int = 20.0
    dequantization_noise: bool = False
    variance_update: Literal["batch", "lagged", "learned"] = "batch"
    temperature_start: float | int = 1.0
    temperature_end: float | int = 0.4
    temperature_decay_steps: int = 10_000

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
