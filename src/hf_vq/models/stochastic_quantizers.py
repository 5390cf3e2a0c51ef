"""Quantizers that draw their codes and anneal themselves: SQ-VAE (Takida et al. 2022, arXiv 2205.07547).

    GaussianQuantizer            one variance for all latents, for each image, for each position    types I, II, III
    DiagonalGaussianQuantizer    one for each component of each position                             type IV
    VonMisesFisherQuantizer      directions instead of positions                                     Section 4

Encoder, codebook and variances learn by one loss: no straight-through, no commitment, no restart. As the decoder's
sigma^2 falls, so does the quantizer's sigma_phi^2, and the posterior becomes deterministic by itself (Proposition 1).
Letters as in quantizers.py: M codebooks, N positions, K codes of dimension D.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .annealing import AnnealedTemperature, DequantizationVariance
from .code_search import chunks, inverse_cdf, likeliest_code
from .quantizer_noise import gaussian_noise, gumbel_noise, uniform_noise
from .quantizers import Quantizer, RowOutput, pick, squared_distance, to_rows, without_autocast
from .relaxed_codes import relaxed_codes


class StochasticQuantizer(Quantizer):
    """A posterior over codes, relaxed in training, and its argmax in evaluation.

    Training relaxes the draw from P(z_q = b_k | Z) to a Gumbel-softmax. The loss is regulariser - entropy in nats per
    image, summed over positions and codebooks: an average would change the method. A subclass writes `factors` and
    `regulariser`.

    Args:
        variance: gives sigma_phi^2 (von Mises-Fisher: 1 / kappa).
        temperature: gives the temperature of the relaxation.
    """

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        num_codebooks: int = 1,
        *,
        variance: DequantizationVariance,
        temperature: AnnealedTemperature,
        normalize_codes: bool = False,
    ) -> None:
        super().__init__(codebook_size, codebook_dim, num_codebooks, normalize_codes)
        self.variance = variance
        self.temperature = temperature

    def factors(self, rows: Tensor, vectors: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """(M, N, E) and (M, K, E) whose product is log P(z_q = b_k | Z) up to a constant of each row.

        Args:
            rows: (M, N, D).
            vectors: (M, K, D).
        """
        raise NotImplementedError

    def over_posterior(self, rows: Tensor, variance: Tensor, look: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """What `look` makes of log P(z_q = b_k | Z), (M, n, K), of a chunk of rows after the other, put together again.

        Args:
            rows: (M, N, D).
            look: gets the logarithms and which rows they belong to, and returns (M, n, ...).
        """
        left, right = self.factors(rows, self.vectors().to(rows.dtype), variance)
        whole = torch.compiler.is_compiling()
        parts = [slice(None)] if whole else chunks(rows.shape[1], self.codebook_size, rows.device)
        return torch.cat([look((left[:, part] @ right.mT).log_softmax(dim=-1), part) for part in parts], dim=1)

    def regulariser(self, rows: Tensor, quantized: Tensor, variance: Tensor) -> Tensor:
        """What Z costs given z_q, (M, N), for rows and quantized (M, N, D)."""
        raise NotImplementedError

    def row_variance(self, log_variance: Tensor | None) -> Tensor:
        """The variance as it meets rows: () or (M or 1, N, D or 1)."""
        return self.variance()

    def dequantize(self, rows: Tensor, variance: Tensor) -> tuple[Tensor, float]:
        """Z for latents (M, N, D), and what its noise adds to the regulariser of a position on average."""
        return rows, 0.0

    def quantize_rows(self, rows: Tensor, variance: Tensor) -> RowOutput:  # type: ignore[override]  # never None here
        if not self.training:
            codes = self.search_rows(rows, variance)
            quantized = pick(self.vectors(), codes)
            entropies = self.over_posterior(rows, variance, lambda log_posterior, _: entropy(log_posterior))
            return RowOutput(quantized, codes, self.regulariser(rows, quantized, variance) - entropies)
        noisy, constant = self.dequantize(rows, variance)
        vectors = self.vectors().to(rows.dtype)
        noise = gumbel_noise(rows.new_empty(()).expand(*rows.shape[:2], self.codebook_size))
        drawn = relaxed_codes(*self.factors(noisy, vectors, variance), vectors, noise, self.temperature())
        codes = drawn.codes if noisy is rows else self.search_rows(rows, variance)
        loss = self.regulariser(noisy, drawn.quantized, variance) - constant - drawn.entropy
        return RowOutput(drawn.quantized, codes, loss)

    def reduce_loss(self, loss: Tensor, batch: int) -> Tensor:
        return loss.sum() / batch

    def sample(
        self, latents: Tensor, log_variance: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """image_tokens drawn from the posterior P(z_q | latents)."""
        with without_autocast(latents):
            rows = self.rows(latents)
            noise = uniform_noise(rows, 1, generator)
            drawn = self.over_posterior(
                rows,
                self.row_variance(log_variance),
                lambda log_posterior, part: inverse_cdf(log_posterior, noise[:, part]),
            )
        return self.to_tokens(drawn.squeeze(-1), latents)

    def statistics(self, latents: Tensor, log_variance: Tensor | None = None) -> dict[str, Tensor]:
        """posterior_entropy (nats per token), argmax_probability (the expected share of draws that equal the
        deterministic token) and dequantization_variance, means over the batch."""
        with without_autocast(latents):
            variance = self.row_variance(log_variance)
            entropies, highest = self.over_posterior(self.rows(latents), variance, entropy_and_highest).unbind(-1)
            return {
                "posterior_entropy": entropies.mean(),
                "argmax_probability": highest.mean(),
                "dequantization_variance": variance.mean(),
            }

    def scalars(self) -> dict[str, Tensor]:
        """dequantization_variance, unless it depends on the image, and temperature."""
        return {"dequantization_variance": self.variance(), "temperature": self.temperature()}

    def step(self) -> None:
        self.temperature.step()


class GaussianQuantizer(StochasticQuantizer):
    """Gaussian dequantization of one variance for all, for each image, or for each position (types I, II, III).

    P(z_q = b_k | Z) = softmax_k(-||b_k - z||^2 / (2 sigma_phi^2)) (Eq. 7), regulariser ||z - z_q||^2 / (2 sigma_phi^2)
    (Eq. 8 and Table 1). The deterministic code is the nearest.

    Args:
        covariance: `global`, `per_sample` or `per_latent`; the latter two take the mean of the encoder's log_variance.
        dequantization_noise: whether training draws Z ~ N(latents, sigma_phi^2 I) instead of taking its mean. Logits
            and regulariser then use the noisy Z, the latter less its constant D / 2 per code.
    """

    covariances: tuple[str, ...] = ("global", "per_sample", "per_latent")

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        num_codebooks: int = 1,
        *,
        covariance: str = "global",
        dequantization_noise: bool = False,
        **shared: Any,
    ) -> None:
        super().__init__(codebook_size, codebook_dim, num_codebooks, **shared)
        if covariance not in self.covariances:
            raise ValueError(f"covariance must be one of {', '.join(self.covariances)}, got {covariance}")
        self.covariance = covariance
        self.dequantization_noise = dequantization_noise

    def scalars(self) -> dict[str, Tensor]:
        scalars = super().scalars()
        # Of a variance for each image or position there are only the `statistics` of images.
        return scalars if self.covariance == "global" else {"temperature": scalars["temperature"]}

    def row_variance(self, log_variance: Tensor | None) -> Tensor:
        if self.covariance == "global":
            return self.variance()
        if log_variance is None:
            raise ValueError(f"the covariance {self.covariance} needs the log_variance that the encoder gives")
        pooled = self.pool(log_variance.to(torch.promote_types(log_variance.dtype, torch.float32)))
        return self.variance(pooled)

    def pool(self, log_variance: Tensor) -> Tensor:
        """The encoder's log_variance (B, M * D, *grid) for each position, (1, N, 1)."""
        axes = 1 if self.covariance == "per_latent" else tuple(range(1, log_variance.ndim))
        pooled = log_variance.mean(dim=axes, keepdim=True)
        return pooled.expand(-1, 1, *log_variance.shape[2:]).reshape(1, -1, 1)

    def factors(self, rows: Tensor, vectors: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        # (z.e - ||e||^2 / 2) / variance; ||z||^2 is the same for every code, and left out.
        precision = variance.reciprocal().expand(*rows.shape[:-1], 1)
        half_norms = vectors.square().sum(dim=-1, keepdim=True) / 2
        return torch.cat([rows * precision, -precision], dim=-1), torch.cat([vectors, half_norms], dim=-1)

    def regulariser(self, rows: Tensor, quantized: Tensor, variance: Tensor) -> Tensor:
        return ((rows - quantized).square() / (2 * variance)).sum(dim=-1)

    def dequantize(self, rows: Tensor, variance: Tensor) -> tuple[Tensor, float]:
        if not self.dequantization_noise:
            return rows, 0.0
        return rows + variance.sqrt() * gaussian_noise(rows), rows.shape[-1] / 2


class DiagonalGaussianQuantizer(GaussianQuantizer):
    """Gaussian dequantization with a variance for each component of each position (type IV).

    Logits -sum_d w_d (b_d - z_d)^2 / 2 with w = 1 / sigma_phi^2 are the two products (w z).b and w.b^2 side by side,
    never an (N, D, K) tensor. The deterministic code is their argmax, not the nearest one.
    """

    covariances = ("diagonal",)

    def __init__(self, codebook_size: int, codebook_dim: int, num_codebooks: int = 1, **shared: Any) -> None:
        super().__init__(codebook_size, codebook_dim, num_codebooks, covariance="diagonal", **shared)

    def token_options(self) -> dict[str, object]:
        """The deterministic code depends on the variance, and that on how it is put together."""
        return {name: getattr(self.variance, name) for name in ("form", "initial", "lr_scale")}

    def pool(self, log_variance: Tensor) -> Tensor:
        return to_rows(log_variance, self.num_codebooks)

    def factors(self, rows: Tensor, vectors: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        precision = variance.reciprocal().expand_as(rows)
        return torch.cat([rows * precision, -precision / 2], dim=-1), torch.cat([vectors, vectors.square()], dim=-1)

    def row_distances(self, rows: Tensor, vectors: Tensor, variance: Tensor) -> Tensor:  # type: ignore[override]  # never None here
        return squared_distance(rows / variance.sqrt(), vectors / variance.sqrt())

    def search_rows(self, rows: Tensor, variance: Tensor) -> Tensor:  # type: ignore[override]  # never None here
        vectors = self.vectors().detach().to(rows.dtype)
        return likeliest_code(rows.detach(), vectors, variance.detach().expand_as(rows))


class VonMisesFisherQuantizer(StochasticQuantizer):
    """Latents and codes on the unit sphere, and a von Mises-Fisher dequantization of concentration kappa (Section 4).

    P(z_q = b_k | Z) = softmax_k(kappa b_k . z), regulariser kappa (1 - z_q . z): linear in z_q, which is a mixture in
    training. 1 / kappa stands in the variance's place.

    Args:
        variance: an `InverseConcentration`.
    """

    def __init__(self, codebook_size: int, codebook_dim: int, num_codebooks: int = 1, **shared: Any) -> None:
        super().__init__(codebook_size, codebook_dim, num_codebooks, normalize_codes=True, **shared)

    def factors(self, rows: Tensor, vectors: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        return rows / variance, vectors

    def regulariser(self, rows: Tensor, quantized: Tensor, variance: Tensor) -> Tensor:
        return (1 - (rows * quantized).sum(dim=-1)) / variance


def entropy(log_posterior: Tensor) -> Tensor:
    """-sum_k p_k log p_k (M, N) of log p (M, N, K)."""
    return -(log_posterior.exp() * log_posterior).sum(dim=-1)


def entropy_and_highest(log_posterior: Tensor, part: slice) -> Tensor:
    """The entropy and the probability of the likeliest code, (M, N, 2), of log p (M, N, K)."""
    return torch.stack([entropy(log_posterior), log_posterior.amax(dim=-1).exp()], dim=-1)


__all__ = [
    "DiagonalGaussianQuantizer",
    "GaussianQuantizer",
    "StochasticQuantizer",
    "VonMisesFisherQuantizer",
]
