"""The metrics as `evaluate.Metric`s, for those who collect numbers with Hugging Face evaluate (`pip install evaluate`).

>>> from hf_vq.evaluate_metrics import Psnr, Ssim
>>> evaluate.combine([Psnr(), Ssim()]).compute(predictions=reconstructions, references=originals)
"""

from collections.abc import Callable, Sequence

import datasets
import evaluate  # type: ignore[import-not-found, import-untyped, unused-ignore]  # optional, and untyped
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hf_vq import metrics

__all__ = ["CodePerplexity", "CodeUsage", "Mse", "Psnr", "Ssim"]


class _ImageMetric(evaluate.Metric):
    """The mean of a function of 8-bit images, of any sizes: PIL images, or uint8 arrays (H, W) or (H, W, 3)."""

    key: str
    function: Callable[[Tensor, Tensor], Tensor | None]

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()})
        return _info(self.key, "predictions: reconstructions; references: originals; both 8-bit images.", features)

    def _compute(
        self, predictions: Sequence[Image.Image], references: Sequence[Image.Image]
    ) -> dict[str, float | None]:
        function = type(self).function
        values = [function(_batch(x), _batch(y)) for x, y in zip(references, predictions, strict=True)]
        known = [value for value in values if value is not None]
        return {self.key: torch.cat(known).mean().item() if len(known) == len(values) else None}


class Mse(_ImageMetric):
    """`metrics.mse`: on [0, 1]."""

    key = "mse"
    function = staticmethod(metrics.mse)


class Psnr(_ImageMetric):
    """`metrics.psnr`: the mean over images, in dB."""

    key = "psnr"
    function = staticmethod(metrics.psnr)


class Ssim(_ImageMetric):
    """`metrics.ssim`; None if an image is smaller than 11 pixels."""

    key = "ssim"
    function = staticmethod(metrics.ssim)


class _CodeMetric(evaluate.Metric):
    """A function of the histogram of image tokens. Predictions are flat lists of tokens, one list an image."""

    key: str
    function: Callable[[Tensor], float]

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Sequence(datasets.Value("int64"))})
        inputs = "predictions: image tokens, flat, codebook fastest; codebook_size; num_codebooks, 1 by default."
        return _info(self.key, inputs, features)

    def _compute(
        self, predictions: Sequence[Sequence[int]], codebook_size: int, num_codebooks: int = 1
    ) -> dict[str, float]:
        if uneven := sorted({len(row) for row in predictions if len(row) % num_codebooks}):
            raise ValueError(f"predictions have {uneven[:8]} tokens, no multiples of num_codebooks={num_codebooks}")
        tokens = torch.from_numpy(np.concatenate([np.asarray(row, dtype=np.int64) for row in predictions]))
        return {self.key: type(self).function(metrics.count_codes(tokens, codebook_size, num_codebooks))}


class CodePerplexity(_CodeMetric):
    """`metrics.perplexity` of all tokens together; compute(predictions=..., codebook_size=K, num_codebooks=M)."""

    key = "perplexity"
    function = staticmethod(metrics.perplexity)


class CodeUsage(_CodeMetric):
    """`metrics.usage` of all tokens together; compute(predictions=..., codebook_size=K, num_codebooks=M)."""

    key = "usage"
    function = staticmethod(metrics.usage)


def _info(key: str, inputs: str, features: datasets.Features) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=f"{key}, as hf_vq.metrics defines it", citation="", inputs_description=inputs, features=features
    )


def _batch(image: Image.Image) -> Tensor:
    pixels = np.array(image)
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)[None]
