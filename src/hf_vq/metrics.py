"""Numbers that compare images with their reconstructions, and token histograms with a uniform one.

Pure functions first, then the accumulators that run them over a whole data set and over all processes. Images are
uint8, (B, C, H, W); every result is computed and summed in float64 or int64. Nothing here knows of a model.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "EXACT_MSE",
    "CodeCounts",
    "FrechetDistance",
    "ImageMeans",
    "ReconstructionMetrics",
    "count_codes",
    "frechet_distance",
    "mse",
    "over_ranks",
    "perplexity",
    "psnr",
    "psnr_of_mse",
    "ssim",
    "usage",
]

# The variance of rounding to 8 bits: an exact image has no finite PSNR, and one infinity would spoil the mean.
EXACT_MSE = 1 / (12 * 255**2)

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
_SSIM_CHUNK = 2**21  # elements in float64: a handful of maps of this size stay far under a gigabyte


def mse(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean squared error of each image, per element, on [0, 1].

    Args:
        originals, reconstructions: uint8, (B, C, H, W).

    Returns: (B,) float64.
    Raises: TypeError if either is not uint8, ValueError if the shapes differ or are not (B, C, H, W).
    """
    _check_images(originals, reconstructions)
    squares = (originals.int() - reconstructions.int()).square().sum(dim=(1, 2, 3), dtype=torch.int64)
    return squares.double() / (255**2 * originals.shape[1:].numel())


def psnr_of_mse(mean_squared_error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio, in dB, of errors on [0, 1]; elementwise. An error of 0 counts as `EXACT_MSE`."""
    error = mean_squared_error.double()
    return -10 * torch.where(error == 0, EXACT_MSE, error).log10()


def psnr(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, (B,) float64; arguments and errors as `mse`.

    An exact image counts as MSE 1/(12·255²), 58.92 dB. (One that differs in a few pixels only can score higher.)
    """
    return psnr_of_mse(mse(originals, reconstructions))


def ssim(originals: Tensor, reconstructions: Tensor) -> Tensor | None:
    """Structural similarity of each image (Wang et al. 2004), mean over positions and channels.

    Gaussian window of 11 pixels with sigma 1.5 on [0, 1], population covariance, whole windows only: scikit-image's
    `structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1)`.

    Args:
        originals, reconstructions: uint8, (B, C, H, W).

    Returns: (B,) float64, or None where an image has no whole window (a side under 11 pixels).
    Raises: as `mse`.
    """
    _check_images(originals, reconstructions)
    if min(originals.shape[-2:]) < SSIM_WINDOW:
        return None
    images = max(1, _SSIM_CHUNK // originals.shape[1:].numel())
    pairs = zip(originals.split(images), reconstructions.split(images), strict=True)
    return torch.cat([_ssim(x.double() / 255, y.double() / 255) for x, y in pairs])


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    rows, columns = (_gaussian_band(size, x.device) for size in x.shape[-2:])
    # As matrix products, the separable filter is many times faster than as convolutions, and runs in float64 anywhere.
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = rows @ torch.stack([x, y, x * x, y * y, x * y]) @ columns.mT
    product, squares = mean_x * mean_y, mean_x.square() + mean_y.square()
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * product + c1) / (squares + c1)
    structure = (2 * (mean_xy - product) + c2) / (mean_xx + mean_yy - squares + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _gaussian_band(size: int, device: torch.device) -> Tensor:
    """The banded matrix (size - 10, size) that filters one axis with the Gaussian window."""
    offsets = torch.arange(size, device=device) - torch.arange(size - SSIM_WINDOW + 1, device=device)[:, None]
    distances = offsets.double() - SSIM_WINDOW // 2
    weights = torch.exp(-0.5 * (distances / SSIM_SIGMA).square())
    weights = torch.where(distances.abs() <= SSIM_WINDOW // 2, weights, 0.0)
    return weights / weights.sum(dim=1, keepdim=True)


def count_codes(image_tokens: Tensor, codebook_size: int, num_codebooks: int = 1) -> Tensor:
    """How often each code occurs.

    Args:
        image_tokens: integers in [0, K), (B, h, w), with M > 1 codebooks (B, h, w, M); or flat, codebook fastest.
        codebook_size, num_codebooks: K and M.

    Returns: (M, K) int64.
    Raises: ValueError if a token is out of range, or the shape is not that of M codebooks.
    """
    shape, most = tuple(image_tokens.shape), 3 if num_codebooks == 1 else 2
    if shape[-1] != num_codebooks and (len(shape) > most or shape[-1] % num_codebooks):
        raise ValueError(f"image_tokens of shape {shape} do not fit {num_codebooks} codebooks: (B, h, w, M), or flat")
    rows = image_tokens.long().reshape(-1, num_codebooks)
    if rows.numel() and not 0 <= (extremes := rows.aminmax()).min <= extremes.max < codebook_size:
        raise ValueError(
            f"image_tokens must lie in [0, {codebook_size}), got {int(extremes.min)} to {int(extremes.max)}: "
            "do they belong to this codebook?"
        )
    first = codebook_size * torch.arange(num_codebooks, device=rows.device)
    counts = torch.bincount((rows + first).flatten(), minlength=num_codebooks * codebook_size)
    return counts.view(num_codebooks, codebook_size)


def perplexity(code_counts: Tensor) -> float:
    """exp of the entropy of each codebook's histogram, then the mean over codebooks: in [1, K].

    `code_counts` is (M, K). Raises: ValueError if a codebook counted nothing.
    """
    shares = _shares(code_counts)
    return torch.special.entr(shares).sum(dim=1).exp().mean().item()


def usage(code_counts: Tensor) -> float:
    """Share of the codes that occur, per codebook, then the mean: in (0, 1]. Argument and errors as `perplexity`."""
    return (_shares(code_counts) > 0).double().mean().item()


def frechet_distance(mean_1: Tensor, covariance_1: Tensor, mean_2: Tensor, covariance_2: Tensor) -> float:
    """Squared Fréchet (Wasserstein-2) distance of two Gaussians: |m1 - m2|² + tr(S1 + S2 - 2 (S1 S2)^½).

    Args:
        mean_1, mean_2: (D,). covariance_1, covariance_2: (D, D), symmetric positive semidefinite, also singular.
    """
    mean_1, covariance_1, mean_2, covariance_2 = (t.double() for t in (mean_1, covariance_1, mean_2, covariance_2))
    # S1 S2 and the symmetric S1^½ S2 S1^½ have the same eigenvalues; those of the latter are real, and cannot fail.
    values, vectors = torch.linalg.eigh(covariance_1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.mT
    cross = torch.linalg.eigvalsh(root @ covariance_2 @ root).clamp(min=0).sqrt().sum()
    distance = (mean_1 - mean_2).square().sum() + covariance_1.trace() + covariance_2.trace() - 2 * cross
    return distance.clamp(min=0).item()


class ImageMeans:
    """Means of named values over images. Only `compute` communicates: one process may see more batches than another."""

    def __init__(self, *names: str, device: torch.device | str = "cpu") -> None:
        self.names = names
        self.sums = torch.zeros(len(names), dtype=torch.float64, device=device)
        self.num_images = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, num_images: int, **values: Tensor) -> None:
        """Adds a batch. Each value is its mean over the batch's images, a scalar."""
        batch = torch.stack([values[name].detach().double().to(self.sums.device) for name in self.names])
        self.sums += num_images * batch
        self.num_images += num_images

    def compute(self) -> dict[str, float]:
        """The means over all images of all processes. Raises: ValueError if there were none."""
        num_images, sums = over_ranks(self.num_images), over_ranks(self.sums)
        if num_images == 0:
            raise ValueError("No images were seen, so there is nothing to average: is the data set or its split empty?")
        return dict(zip(self.names, (sums / num_images).tolist(), strict=True))


class ReconstructionMetrics:
    """mse, psnr, psnr_of_mse and ssim over a data set."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.means = ImageMeans("mse", "psnr", "ssim", device=device)

    def update(self, originals: Tensor, reconstructions: Tensor) -> None:
        """Adds a batch of uint8 images, (B, C, H, W) both."""
        error = mse(originals, reconstructions)
        similarity = ssim(originals, reconstructions)
        # NaN marks the images that have no SSIM: it survives every sum, also that over processes.
        similarity = error.new_full((), math.nan) if similarity is None else similarity.mean()
        self.means.update(len(error), mse=error.mean(), psnr=psnr_of_mse(error).mean(), ssim=similarity)

    def compute(self) -> dict[str, float | None]:
        """mse, psnr, psnr_of_mse, ssim (None if any image was under 11 pixels). Raises: as `ImageMeans.compute`."""
        means = self.means.compute()
        of_mean = psnr_of_mse(torch.tensor(means["mse"], dtype=torch.float64)).item()
        similarity = None if math.isnan(means["ssim"]) else means["ssim"]
        return {"mse": means["mse"], "psnr": means["psnr"], "psnr_of_mse": of_mean, "ssim": similarity}


class CodeCounts:
    """Histogram of the image tokens over a data set, per codebook."""

    def __init__(self, codebook_size: int, num_codebooks: int = 1, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(num_codebooks, codebook_size, dtype=torch.int64, device=device)

    def update(self, image_tokens: Tensor) -> None:
        """Adds a batch of image tokens; shapes and errors as `count_codes`."""
        num_codebooks, codebook_size = self.counts.shape
        self.counts += count_codes(image_tokens, codebook_size, num_codebooks).to(self.counts.device)

    def compute(self) -> Tensor:
        """The counts of all processes, (M, K) int64 on the CPU; `perplexity` and `usage` read them."""
        return over_ranks(self.counts).cpu()


class FrechetDistance:
    """Fréchet distance between two streams of features, each taken as a Gaussian.

    The covariance of fewer images than feature dimensions is singular and the distance biased upwards: compare only
    distances over the same number of images. (It is the FID only with that score's own network and preprocessing.)
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.originals = _Moments(device)
        self.reconstructions = _Moments(device)

    def update(self, originals: Tensor, reconstructions: Tensor) -> None:
        """Adds the features of a batch, (B, D) both."""
        self.originals.update(originals)
        self.reconstructions.update(reconstructions)

    def compute(self) -> float | None:
        """The distance over all processes; None with fewer than two images."""
        count, *originals = self.originals.compute()
        _, *reconstructions = self.reconstructions.compute()
        return frechet_distance(*originals, *reconstructions) if count > 1 else None


class _Moments:
    """Streaming mean and covariance of (B, D) features: Chan's update, because plain sums of squares cancel."""

    def __init__(self, device: torch.device | str) -> None:
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.mean = torch.zeros(0, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(0, 0, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        features = features.detach().to(self.mean)
        self._allocate(features.shape[1])
        mean = features.mean(dim=0)
        centred, shift = features - mean, mean - self.mean
        total = self.count + len(features)
        self.scatter += centred.mT @ centred + shift.outer(shift) * (self.count * len(features) / total)
        self.mean += shift * (len(features) / total)
        self.count = total

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Count, mean (D,) and unbiased covariance (D, D) over all processes."""
        self._allocate(int(over_ranks(torch.tensor(len(self.mean)), "max")))
        count = over_ranks(self.count)
        mean = over_ranks(self.mean * self.count) / count
        shift = self.mean - mean
        scatter = over_ranks(self.scatter + self.count * shift.outer(shift))
        return count, mean, scatter / (count - 1)

    def _allocate(self, dimension: int) -> None:
        """Only the first features tell D, and a process without images learns it from the others."""
        if len(self.mean) == 0:
            self.mean = self.mean.new_zeros(dimension)
            self.scatter = self.scatter.new_zeros(dimension, dimension)


def _shares(code_counts: Tensor) -> Tensor:
    totals = code_counts.double().sum(dim=1, keepdim=True)
    if not bool((totals > 0).all()):
        raise ValueError("code_counts holds no tokens in some codebook: count the tokens of at least one image first")
    return code_counts / totals


def _check_images(originals: Tensor, reconstructions: Tensor) -> None:
    for name, images in (("originals", originals), ("reconstructions", reconstructions)):
        if images.dtype != torch.uint8:
            raise TypeError(f"{name} must be uint8 images in 0..255, got {images.dtype}: round and clip them first")
    if originals.shape != reconstructions.shape or originals.ndim != 4:
        shapes = f"{tuple(originals.shape)} and {tuple(reconstructions.shape)}"
        raise ValueError(f"originals and reconstructions must have one shape (B, C, H, W), got {shapes}")


def over_ranks(tensor: Tensor, operation: str = "sum") -> Tensor:
    """The `sum` or `max` over all processes, as a copy: the argument stays local. Without a process group, the copy."""
    if not (dist.is_available() and dist.is_initialized()):
        return tensor.clone()
    # NCCL cannot send what lies on the CPU.
    device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else tensor.device
    result = tensor.to(device, copy=True)
    dist.all_reduce(result, op=getattr(dist.ReduceOp, operation.upper()))
    return result.to(tensor.device)
