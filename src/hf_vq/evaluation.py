"""A model and a stream of images -> numbers, the same in the training loop and offline; and the files they go to."""

import copy
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_vq.canonical import canonical, unwrapped
from hf_vq.features import FeatureNetwork
from hf_vq.files import replace_file
from hf_vq.metrics import CodeCounts, FrechetDistance, ImageMeans, ReconstructionMetrics, over_ranks, perplexity, usage
from hf_vq.version import __version__

__all__ = [
    "PROTOCOL",
    "STATISTICS",
    "Evaluation",
    "about_weights",
    "evaluate",
    "to_uint8",
    "weights_hash",
    "write_evaluation",
]

PROTOCOL = (
    "float32, deterministic tokens; mse, psnr, ssim on [0, 1] after rounding to 8 bits, psnr and ssim per image, then "
    "the mean; ssim: Gaussian window 11, sigma 1.5; perplexity and usage of the token histogram over the whole set"
)
LOSSES = ("loss", "reconstruction_loss", "embedding_loss")
STATISTICS = ("posterior_entropy", "argmax_probability", "dequantization_variance")
"""What a quantizer's `statistics` may tell; those without a posterior over codes tell nothing."""


class Evaluation(NamedTuple):
    """What `evaluate` measured.

    Attributes:
        metrics: loss, reconstruction_loss, embedding_loss (means over images), mse, psnr (dB), psnr_of_mse (dB), ssim
            (None under 11 pixels), perplexity, usage, num_images, images_per_second (of all processes together, from
            reading to metrics), and with `fd_model` frechet_distance (None with fewer than two images). Where the
            quantizer has a posterior over codes, also means over images of posterior_entropy (nats per token),
            argmax_probability (of the likeliest code: the share of sampled tokens that equal the deterministic ones)
            and dequantization_variance.
        code_counts: how often each code occurred, (M, K) int64.
    """

    metrics: dict[str, float | None]
    code_counts: Tensor


def evaluate(
    model: nn.Module,
    processor: Any,
    batches: Iterable[dict[str, Tensor]],
    *,
    fd_model: str | os.PathLike[str] | nn.Module | None = None,
    refine: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Measures an image tokenizer on a data set.

    Runs in evaluation mode, in float32 and without autocast, whatever surrounds it, and leaves the model as it was.
    Under torch.distributed every process calls it with its own batches, as many as it has; all get the same result.

    Args:
        model: a `VQVAEModel` or `SQVAEModel`, also wrapped for distributed training or compiled.
        processor: the model's image processor: its scaling turns pixel values back into 8-bit images.
        batches: yields dicts with pixel_values (B, C, H, W), all images once. B, and H and W, may differ between them.
            From `num_images`, the number of this process, or else from `len`, the bar knows how long it takes.
        fd_model: name, folder or loaded `AutoModel` whose features give the Fréchet distance between originals and
            reconstructions. (Not FID, which is the distance under one certain network.)
        refine: rounds of `model.encode(..., refine=)`; then there are neither losses nor what a quantizer knows of its
            posterior, which are about the encoder's own tokens.
        progress: show a bar with images per second and the time left.

    Raises: ValueError if there are no images, or a reconstruction is not finite.
    """
    network = _float32(unwrapped(model))
    device = next(network.parameters()).device
    totals = _Totals(network.config, processor, device, fd_model)
    start = time.perf_counter()
    with canonical(network), _listening_to_quantizer(network) as statistics:
        for batch in _with_progress(batches, progress):
            pixel_values = batch["pixel_values"].to(device, torch.float32, non_blocking=True)
            # The class's own forward: Accelerate puts one on the instance that turns autocast on.
            output = _refined(network, pixel_values, refine) if refine else type(network).forward(network, pixel_values)
            totals.update(pixel_values, output, statistics)
    return totals.compute(start)


def _refined(network: Any, pixel_values: Tensor, rounds: int) -> SimpleNamespace:
    """What `forward` would give of refined tokens; of their losses nobody knows."""
    image_tokens = network.encode(pixel_values, refine=rounds).image_tokens
    decoded = network.decode(image_tokens).pixel_values
    return SimpleNamespace(image_tokens=image_tokens, decoded_pixel_values=decoded)


@contextmanager
def _listening_to_quantizer(network: Any) -> Iterator[dict[str, Tensor]]:
    """A dict that holds, after each forward, the quantizer's `statistics` of the same latents: nothing runs twice."""
    statistics: dict[str, Tensor] = {}
    quantizer: Any = getattr(network, "quantizer", None)
    if not hasattr(quantizer, "statistics"):
        yield statistics
        return

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        statistics.update(module.statistics(*args, **kwargs))

    handle = quantizer.register_forward_hook(look, with_kwargs=True)
    try:
        yield statistics
    finally:
        handle.remove()


class _Totals:
    """Every accumulator of one evaluation."""

    def __init__(self, config: Any, processor: Any, device: torch.device, fd_model: Any) -> None:
        # MPS has no float64.
        self.device = torch.device("cpu") if device.type == "mps" else device
        self.processor = processor
        self.means = ImageMeans(*LOSSES, *STATISTICS, device=self.device)
        self.known = torch.zeros(len(self.means.names), dtype=torch.int64, device=self.device)
        self.reconstruction = ReconstructionMetrics(self.device)
        self.codes = CodeCounts(config.codebook_size, config.num_codebooks, self.device)
        self.features = None if fd_model is None else FeatureNetwork.load(fd_model, device)
        self.distance = FrechetDistance(self.device)

    def update(self, pixel_values: Tensor, output: Any, statistics: Mapping[str, Tensor]) -> None:
        """Adds a batch, what the model made of it, and its quantizer's statistics."""
        if not bool(output.decoded_pixel_values.isfinite().all()):
            raise ValueError("The reconstructions have NaN or infinite values: the model has diverged")
        originals = to_uint8(pixel_values, self.processor).to(self.device)
        reconstructions = to_uint8(output.decoded_pixel_values, self.processor).to(self.device)
        self.reconstruction.update(originals, reconstructions)
        self.codes.update(output.image_tokens)
        told = {name: getattr(output, name) for name in LOSSES if hasattr(output, name)} | {**statistics}
        absent = torch.zeros(())
        self.means.update(len(originals), **{name: told.get(name, absent) for name in self.means.names})
        self.known |= torch.tensor([name in told for name in self.means.names], device=self.device)
        if self.features is not None:
            self.distance.update(self.features(originals), self.features(reconstructions))

    def compute(self, start: float) -> Evaluation:
        """The numbers over all processes."""
        # A process without images learns from the others what is known.
        known = over_ranks(self.known, "max").tolist()
        means = {
            name: mean for (name, mean), is_known in zip(self.means.compute().items(), known, strict=True) if is_known
        }
        code_counts = self.codes.compute()
        metrics: dict[str, float | None] = {name: means.pop(name) for name in LOSSES if name in means}
        metrics |= self.reconstruction.compute()
        metrics |= {"perplexity": perplexity(code_counts), "usage": usage(code_counts), **means}
        num_images = int(over_ranks(self.means.num_images))
        if self.features is not None:
            metrics["frechet_distance"] = self.distance.compute()
        seconds = over_ranks(torch.tensor(time.perf_counter() - start, dtype=torch.float64), "max").item()
        return Evaluation(metrics | {"num_images": num_images, "images_per_second": num_images / seconds}, code_counts)


def to_uint8(pixel_values: Tensor, processor: Any) -> Tensor:
    """`pixel_values` as images: the processor's `postprocess` on a whole batch, where the batch is.

    Args:
        pixel_values: (B, C, H, W) float, finite.
        processor: has the attributes of Hugging Face's image processors that rescale and normalise.

    Returns: uint8 of the same shape, rounded and clipped.
    """
    factor = processor.rescale_factor if processor.do_rescale else 1.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
    offset, scale = (
        torch.tensor(value, dtype=torch.float32, device=pixel_values.device).view(-1, 1, 1)
        for value in (np.divide(mean, factor), np.divide(factor, std))
    )
    return (pixel_values.detach().float() / scale + offset).round().clamp(0, 255).to(torch.uint8)


def write_evaluation(path: str | os.PathLike[str], evaluation: Evaluation, **protocol: Any) -> None:
    """Writes the metrics, what they were measured on and the versions of the software as one flat JSON object.

    Args:
        path: the file, `evaluation.json` of a run or model directory; replaced as a whole.
        evaluation: its metrics become top-level keys; None and values that are not finite become null.
        protocol: dataset_name, split and whatever else belongs to the measurement. `protocol` describes how the
            numbers were taken, and is filled in if absent.

    Raises: ValueError if a key of `protocol` is that of a metric.
    """
    described = {"protocol": PROTOCOL, **protocol, "versions": _versions()}
    if clash := sorted(described.keys() & evaluation.metrics.keys()):
        raise ValueError(f"{', '.join(clash)}: a metric has this name, so describe the measurement by another")
    finite = {name: v if v is None or math.isfinite(v) else None for name, v in evaluation.metrics.items()}
    text = json.dumps(finite | described, indent=2, allow_nan=False) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def weights_hash(model: nn.Module) -> str:
    """sha256 of all weights by name, in float32: what numbers were measured on."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu()
        values = values.float() if values.is_floating_point() else values
        digest.update(f"{name} {tuple(values.shape)}\n".encode() + values.contiguous().numpy().tobytes())
    return digest.hexdigest()


def about_weights(model: Any) -> dict[str, Any]:
    """What evaluation.json says of the weights that were measured: their number and their hash."""
    return {"parameters": model.num_parameters(), "weights_sha256": weights_hash(model)}


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version(), "hf-vq": __version__}
    for package in ("torch", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def _float32(model: nn.Module) -> nn.Module:
    narrow = any(p.is_floating_point() and p.dtype != torch.float32 for p in model.parameters())
    return copy.deepcopy(model).float() if narrow else model


def _with_progress(batches: Iterable[dict[str, Tensor]], progress: bool) -> Iterator[dict[str, Tensor]]:
    with tqdm(desc="evaluate", unit="img", disable=not progress, total=getattr(batches, "num_images", None)) as bar:
        for batch in batches:
            size = len(batch["pixel_values"])
            if bar.total is None:
                bar.total = _images_by_length(batches, size)
            yield batch
            bar.update(size)
        bar.total = bar.n  # the last batch may be short
        bar.refresh()


def _images_by_length(batches: Iterable[dict[str, Tensor]], size: int) -> int | None:
    try:
        return len(batches) * size  # type: ignore[arg-type]  # not every iterable has one: that is asked here
    except TypeError:  # a stream need not know
        return None
