"""The rows of fixed_net.py: which model, and the config fields in which it differs from the authors' net."""

from typing import Any, NamedTuple

from hf_vq import SQVAEModel, VQVAEModel

CURES = {"codebook_init": "kmeans", "revive_below": 0.1}

# The authors' vision code: sigma_phi^2 = exp(head) + exp(s), exp(s) = 20 at first, s under the same Adam as the rest.
AUTHORS_VARIANCE = {"variance_form": "sum", "initial_variance": 20.0, "variance_lr_scale": 1.0, "temperature_end": 0.4}


class Row(NamedTuple):
    """A quantizer of the table.

    Attributes:
        label: what the table calls it.
        model_class: `VQVAEModel` or `SQVAEModel`.
        fields: config fields, on top of the authors' net.
    """

    label: str
    model_class: type[VQVAEModel] | type[SQVAEModel]
    fields: dict[str, Any]


def _vq(label: str, quantizer: str, **fields: Any) -> Row:
    return Row(label, VQVAEModel, {"quantizer": quantizer, **fields})


def _authors(label: str, covariance: str) -> Row:
    return Row(label, SQVAEModel, {"covariance": covariance, **AUTHORS_VARIANCE})


ROWS = {
    "gradient": _vq("gradient", "gradient"),
    "ema": _vq("EMA, no cures", "ema"),
    "ema-cured": _vq("EMA, k-means, revival", "ema", **CURES),
    "ema-cured-rotation": _vq("EMA, k-means, revival, rotation", "ema", **CURES, gradient_estimator="rotation"),
    "ema-normalized": _vq("EMA, k-means, normalised codes", "ema", codebook_init="kmeans", normalize_codes=True),
    "linear-codebook": _vq("linear codebook (SimVQ)", "gradient", codebook_transform="linear"),
    "soft-em": _vq("soft EM, m = 5", "soft_em", num_samples=5),
    # Three latent channels, not the 64 in which the net ends: 1x1 and 3x3 convolutions lead there and back.
    "fsq": _vq("FSQ [8, 8, 8]", "fsq", levels=[8, 8, 8], codebook_dim=3, latent_projection=True),
    "sqvae-product": Row("SQ-VAE I, product", SQVAEModel, {"variance_form": "product", "temperature_end": 0.4}),
    "sqvae-1": _authors("SQ-VAE I, authors' sum", "global"),
    "sqvae-2": _authors("SQ-VAE II, authors' sum", "per_sample"),
    "sqvae-3": _authors("SQ-VAE III, authors' sum", "per_latent"),
    "sqvae-4": _authors("SQ-VAE IV, authors' sum", "diagonal"),
    "vmf": Row("SQ-VAE, von Mises-Fisher", SQVAEModel, {"quantizer": "vmf", "temperature_end": 0.4}),
    # The same 64 channels, cut in four: four times the bits of the other rows.
    "ema-cured-4": _vq("EMA, k-means, revival, M = 4", "ema", **CURES, num_codebooks=4, codebook_dim=16),
}
