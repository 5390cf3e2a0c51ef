"""Config of VQ-VAE (van den Oord et al. 2017, arXiv 1711.00937)."""

import math
from typing import Any, Literal

from huggingface_hub.dataclasses import strict

from .configuration_autoencoder import (
    AutoencoderConfig,
    Default,
    require_at_least_zero,
    require_directions,
    require_positive,
)

# Codes of an FSQ grid: of more, the sum of their numbers' places would not be exact, nor the grid small.
LARGEST_GRID = 2**24


@strict
class VQVAEConfig(AutoencoderConfig):
    r"""Config of a `VQVAEModel`; the shared fields are those of `AutoencoderConfig`.

    Args:
        quantizer: how the codebook learns: `gradient` by a loss of its own (Eq. 3 of the paper), `ema` by moving
            averages of the latents assigned to each code (Appendix A.1), `soft_em` by moving averages of codes that
            are drawn (Roy et al. 2018), `fsq` not at all: latents are rounded (Mentzer et al. 2023).
        levels: for `fsq`, the number of values of each latent component, such as [8, 5, 5, 5]. codebook_size is their
            product, codebook_dim their number.
        commitment_weight: beta, the weight of the commitment term ||z_e - sg[e]||^2, and of that term alone.
        ema_decay: gamma of the moving averages.
        num_samples: for `soft_em`, the number m of codes drawn for each position.
        codebook_init: `random`, or `kmeans`: the first step puts the codes at k-means centres of its latents.
        revive_below: share of uniform usage under which a code is put in the place of a latent; 0 is never.
        gradient_estimator: how gradients pass the quantizer: `straight_through`, or `rotation` (arXiv 2410.06424).
        normalize_codes: whether latents and codes are projected to the unit sphere before they meet.
        codebook_transform: for `gradient`, `linear` freezes a Gaussian codebook and learns one linear map of all its
            codes (SimVQ, arXiv 2411.02038).
        data_variance: variance of pixel_values over the training set; the squared error is divided by it.

    Example:
        >>> from hf_vq import VQVAEConfig, VQVAEModel
        >>> model = VQVAEModel(VQVAEConfig(quantizer="ema", codebook_size=256))
    """

    model_type = "hf_vqvae"

    quantizer: Literal["gradient", "ema", "soft_em", "fsq"] = "ema"
    levels: list[int] | tuple[int, ...] | None = None
    commitment_weight: float | int = 0.25
    ema_decay: float | int = 0.99
    num_samples: int = 5
    codebook_init: Literal["random", "kmeans"] = "random"
    revive_below: float | int = 0
    gradient_estimator: Literal["straight_through", "rotation"] = "straight_through"
    normalize_codes: bool = False
    codebook_transform: Literal["none", "linear"] = "none"
    data_variance: float | int = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.quantizer == "fsq":
            self._follow_levels()
        super().__post_init__(**kwargs)

    def _follow_levels(self) -> None:
        """codebook_size and codebook_dim as levels imply them; values given by hand must agree."""
        if not self.levels:
            raise ValueError("quantizer fsq needs levels, for instance [8, 5, 5, 5] for 1000 codes")
        for name, implied in (("codebook_size", math.prod(self.levels)), ("codebook_dim", len(self.levels))):
            given = getattr(self, name)
            if not isinstance(given, Default) and given != implied:
                raise ValueError(
                    f"levels {list(self.levels)} make {name} {implied}, and it is {given}: set it to {implied}, or "
                    "leave it out of a new config"
                )
            setattr(self, name, implied)

    def validate_objective(self) -> None:
        """The weights of the objective lie in their ranges."""
        require_positive(self, "data_variance")
        require_positive(self, "num_samples")
        require_at_least_zero(self, "commitment_weight")
        for name in ("ema_decay", "revive_below"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")

    def validate_quantizer(self) -> None:
        """The options belong to the quantizer, and the sizes to the levels."""
        if self.quantizer == "fsq":
            self._follow_levels()
        if self.levels is not None:
            self._require("levels", "quantizer", ("fsq",))
            if not all(3 <= level <= 1000 for level in self.levels):
                raise ValueError(f"levels must each be at least 3, better 5, and at most 1000, got {list(self.levels)}")
            if math.prod(self.levels) > LARGEST_GRID:
                raise ValueError(
                    f"levels {list(self.levels)} make {math.prod(self.levels):,} codes, and their grid is kept whole: "
                    f"choose at most {LARGEST_GRID:,}"
                )
        learned = ("gradient", "ema", "soft_em")
        for name in ("codebook_init", "revive_below", "gradient_estimator", "normalize_codes"):
            self._require(name, "quantizer", learned)
        self._require("codebook_transform", "quantizer", ("gradient",))
        self._require("commitment_weight", "quantizer", learned)
        self._require("ema_decay", "quantizer", ("ema", "soft_em"))
        self._require("num_samples", "quantizer", ("soft_em",))
        for name in ("codebook_init", "revive_below"):
            self._require(name, "codebook_transform", ("none",))
        if self.normalize_codes:
            require_directions(self, "normalize_codes")

    def _require(self, name: str, other: str, allowed: tuple[str, ...]) -> None:
        """Raises a ValueError if `name` differs from its default although `other` is none of `allowed`."""
        if getattr(self, name) != getattr(type(self), name) and getattr(self, other) not in allowed:
            raise ValueError(
                f"{name} {getattr(self, name)!r} goes with {other} {' or '.join(allowed)}, and {other} is "
                f"{getattr(self, other)}"
            )


VQVAEConfig.register_for_auto_class()

__all__ = ["VQVAEConfig"]
