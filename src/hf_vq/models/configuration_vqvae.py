"""Config of VQ-VAE (van den Oord et al. 2017, arXiv 1711.00937)."""

from typing import Literal

from huggingface_hub.dataclasses import strict

from .configuration_autoencoder import AutoencoderConfig, require_at_least_zero, require_positive


@strict
class VQVAEConfig(AutoencoderConfig):
    r"""Config of a `VQVAEModel`; the shared fields are those of `AutoencoderConfig`.

    Args:
        quantizer: how the codebook learns: `gradient` by a loss of its own (Eq. 3 of the paper), `ema` by moving
            averages of the latents assigned to each code (Appendix A.1).
        commitment_weight: beta, the weight of the commitment term ||z_e - sg[e]||^2, and of that term alone.
        ema_decay: gamma of the moving averages.
        data_variance: variance of pixel_values over the training set; the squared error is divided by it.
        codebook_init: `random`; no other start yet.
        revive_below: share of uniform usage under which a code is revived; 0, never, is all there is yet.
        gradient_estimator: `straight_through`; no other yet.
        normalize_codes: False; codes on the sphere are not supported yet.

    Example:
        >>> from hf_vq import VQVAEConfig, VQVAEModel
        >>> model = VQVAEModel(VQVAEConfig(quantizer="ema", codebook_size=256))
    """

    model_type = "hf_vqvae"

    quantizer: Literal["gradient", "ema"] = "ema"
    commitment_weight: float | int = 0.25
    ema_decay: float | int = 0.99
    data_variance: float | int = 1.0
    codebook_init: Literal["random"] = "random"
    revive_below: float | int = 0
    gradient_estimator: Literal["straight_through"] = "straight_through"
    normalize_codes: bool = False

    def validate_objective(self) -> None:
        """The weights of the objective lie in their ranges."""
        require_positive(self, "data_variance")
        require_at_least_zero(self, "commitment_weight")
        for name in ("revive_below", "normalize_codes"):
            if getattr(self, name):
                raise ValueError(f"{name} must be {type(self).__dict__[name]}, got {getattr(self, name)}: not yet")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")


VQVAEConfig.register_for_auto_class()

__all__ = ["VQVAEConfig"]
