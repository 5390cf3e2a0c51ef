"""Quantizers that take the nearest code: VQ-VAE and what came after. One short class per idea.

    VectorQuantizer            the codebook learns by a loss        van den Oord et al. 2017, arXiv 1711.00937, Eq. 3
    EMAVectorQuantizer         ... by moving averages               the same, Appendix A.1
    SoftEMVectorQuantizer      ... of codes that are drawn          Roy et al. 2018, arXiv 1805.11063
    LinearCodebookQuantizer    ... by one linear map of all codes   SimVQ, arXiv 2411.02038

Each passes gradients straight through or by the rotation trick (arXiv 2410.06424), and each but the last may be given
care: a k-means start and revival of dead codes. Letters as in quantizers.py: M codebooks, N positions, K codes of
dimension D.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .code_search import add_codes, sample_codes
from .codebook_care import CodebookCare
from .quantizer_noise import uniform_noise
from .quantizers import Quantizer, RowOutput, pick, squared_distance, world_sum

LARGEST_STRETCH = 10.0


def straight_through(rows: Tensor, vectors: Tensor) -> Tensor:
    """The vectors, with the gradient of the rows: both (..., D)."""
    return rows + (vectors - rows).detach()


def rotation(rows: Tensor, vectors: Tensor) -> Tensor:
    """The vectors, with the gradient of rows that are rotated and stretched onto them (arXiv 2410.06424, Section 4).

    q = |q| / |e| * R e, with R = I - 2 w w^T + 2 q^ e^^T and w = (e^ + q^) / |e^ + q^|, where R and |q| / |e| are
    constants. A row e at zero, or opposite to its vector q, has no such rotation: its gradient passes a reflection.
    The stretch of a gradient stops at `LARGEST_STRETCH`: a row near zero would have one without bound.
    """
    row, target = F.normalize(rows.detach(), dim=-1), F.normalize(vectors.detach(), dim=-1)
    between = F.normalize(row + target, dim=-1)
    along_between, along_row = ((rows * axis).sum(dim=-1, keepdim=True) for axis in (between, row))
    stretch = vectors.detach().norm(dim=-1, keepdim=True) / rows.detach().norm(dim=-1, keepdim=True)
    stretch = stretch.nan_to_num(1.0).clamp(max=LARGEST_STRETCH)
    turned = stretch * (rows - 2 * along_between * between + 2 * along_row * target)
    # Rounding, and rows that cannot be rotated, must not reach the decoder.
    return turned + (vectors - turned).detach()


GRADIENT_ESTIMATORS = {"straight_through": straight_through, "rotation": rotation}


class VectorQuantizer(Quantizer):
    """Nearest code, and a codebook that learns by a loss of its own (VQ-VAE, Eq. 3).

    Choose it as the paper's baseline; codes that no latent comes near receive no gradient and stay unused, unless care
    is taken of them.

    Args:
        commitment_weight: beta, on ||z_e - sg[e]||^2 and on that term alone.
        gradient_estimator: what the encoder learns from the decoder: `straight_through` or `rotation`.
        care: k-means start and revival.
    """

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        num_codebooks: int = 1,
        *,
        commitment_weight: float = 0.25,
        gradient_estimator: str = "straight_through",
        normalize_codes: bool = False,
        care: CodebookCare | None = None,
    ) -> None:
        super().__init__(codebook_size, codebook_dim, num_codebooks, normalize_codes)
        self.commitment_weight = commitment_weight
        self.pass_gradient = GRADIENT_ESTIMATORS[gradient_estimator]
        self.care = care
        if care is not None:
            self._ddp_params_and_buffers_to_ignore = [f"care.{name}" for name in care.local_buffers]

    def quantize_rows(self, rows: Tensor, variance: Tensor | None = None) -> RowOutput:
        codes = self.search_rows(rows)
        if not self.training:
            chosen = pick(self.vectors(), codes)
            return RowOutput(chosen, codes, self.row_loss(rows, chosen))
        chosen = self.choose(rows.detach(), codes)
        return RowOutput(self.pass_gradient(rows, chosen), codes, self.row_loss(rows, chosen))

    def choose(self, rows: Tensor, codes: Tensor) -> Tensor:
        """The vectors (M, N, D) that training puts in the place of rows with these nearest codes; keeps statistics."""
        self.watch(rows, codes)
        return pick(self.vectors(), codes)

    def row_loss(self, rows: Tensor, vectors: Tensor) -> Tensor:
        """Codebook and commitment term (M, N) of rows and vectors (M, N, D), means over elements."""
        commitment = squared_distance(rows, vectors.detach())
        return (self.codebook_loss(rows, vectors) + self.commitment_weight * commitment) / rows.shape[-1]

    def codebook_loss(self, rows: Tensor, vectors: Tensor) -> Tensor:
        """||sg[z_e] - e||^2 of each row, which pulls the codes to the latents."""
        return squared_distance(rows.detach(), vectors)

    def watch(self, rows: Tensor, codes: Tensor) -> None:
        """Keeps what `step` will need of rows (M, N, D) with codes (M, N), or (M, N, S) drawn ones."""
        if self.care is not None:
            self.care.watch(rows, codes)

    @torch.no_grad()
    def step(self) -> None:
        """Takes care of the codes, where that is asked for."""
        if self.care is not None:
            self.care.step(self.codebook.weight)

    def initial_state(self) -> dict[str, Tensor]:
        """Codes U(-1/K, 1/K): among codes nearer to zero than the latents, the direction of a latent decides."""
        if self.normalize_codes:
            # The shorter a code, the further a step of an optimizer turns it.
            return {"codebook.weight": F.normalize(torch.randn_like(self.codebook.weight), dim=-1)}
        bound = 1 / self.codebook_size
        return {"codebook.weight": torch.empty_like(self.codebook.weight).uniform_(-bound, bound)}


class EMAVectorQuantizer(VectorQuantizer):
    """Nearest code, and a codebook of moving averages (VQ-VAE, Appendix A.1).

    Choose it over the gradient codebook for a faster and steadier start: each code is the running mean of its latents.
    The forward only adds to the pending sums; `step` reduces them over processes and moves the codebook once, so
    that gradient accumulation and several processes give what one process gives on the joint batch. (With
    BatchNorm in the body the latents themselves depend on the local batch.)

    Args:
        decay: gamma of the moving averages.

    Buffers:
        cluster_size (M * K,): N, the moving average of the latents per code; zeros at first.
        pending_counts (M * K,), pending_sums (M * K, D): of the forwards since the last `step`; not saved.
    """

    cluster_size: Tensor
    pending_counts: Tensor
    pending_sums: Tensor

    def __init__(
        self, codebook_size: int, codebook_dim: int, num_codebooks: int = 1, *, decay: float = 0.99, **shared: Any
    ) -> None:
        super().__init__(codebook_size, codebook_dim, num_codebooks, **shared)
        self.decay = decay
        self.codebook.weight.requires_grad_(False)
        codes = num_codebooks * codebook_size
        self.register_buffer("cluster_size", torch.zeros(codes, dtype=torch.float32))
        self.register_buffer("pending_counts", torch.zeros(codes, dtype=torch.float32), persistent=False)
        self.register_buffer("pending_sums", torch.zeros(codes, codebook_dim, dtype=torch.float32), persistent=False)
        # A broadcast from rank 0 would overwrite what the other ranks have counted.
        of_care = getattr(self, "_ddp_params_and_buffers_to_ignore", [])
        self._ddp_params_and_buffers_to_ignore = ["pending_counts", "pending_sums", *of_care]

    def codebook_loss(self, rows: Tensor, vectors: Tensor) -> Tensor:
        """Zero: the codebook moves in `step`."""
        return rows.new_zeros(())

    def watch(self, rows: Tensor, codes: Tensor) -> None:
        super().watch(rows, codes)
        add_codes(self.pending_counts, self.pending_sums, rows, codes)

    @torch.no_grad()
    def step(self) -> None:
        """Moves the codebook and cluster_size by one average over all that is pending, on all processes alike.

        With N = cluster_size and the pending counts n and sums s, where n > 0:
        e <- (gamma N e + (1 - gamma) s) / (gamma N + (1 - gamma) n); then N <- gamma N + (1 - gamma) n.
        """
        counts, sums = world_sum(self.pending_counts)[:, None], world_sum(self.pending_sums)
        old, new = self.decay * self.cluster_size[:, None], 1 - self.decay
        moved = (old * self.codebook.weight + new * sums) / (old + new * counts)
        self.codebook.weight.copy_(torch.where(counts > 0, moved, self.codebook.weight))
        self.cluster_size.copy_((old + new * counts).squeeze(1))
        self.pending_counts.zero_()
        self.pending_sums.zero_()
        if self.care is not None:
            replaced = self.care.step(self.codebook.weight)
            # A new code weighs as much as an average one, or the next latent would carry it away.
            self.cluster_size[replaced] = self.cluster_size.mean()


class SoftEMVectorQuantizer(EMAVectorQuantizer):
    """Codes drawn from a posterior in training, and moving averages of fractional counts (Roy et al. 2018).

    E step: z^1 ... z^m from P(k) = softmax_k(-||e_k - z_e||^2), and the decoder gets the mean of their vectors.
    M step: each draw counts as 1 / m of a latent. Choose it where hard assignment collapses at large K.
    image_tokens, and all of evaluation, are deterministic.

    Args:
        num_samples: m.
    """

    def __init__(
        self, codebook_size: int, codebook_dim: int, num_codebooks: int = 1, *, num_samples: int = 5, **shared: Any
    ) -> None:
        super().__init__(codebook_size, codebook_dim, num_codebooks, **shared)
        self.num_samples = num_samples

    def choose(self, rows: Tensor, codes: Tensor) -> Tensor:
        vectors = self.vectors()
        drawn = sample_codes(rows, vectors.detach().to(rows.dtype), 1.0, uniform_noise(rows, self.num_samples))
        self.watch(rows, drawn)
        return pick(vectors, drawn).mean(dim=2)


class LinearCodebookQuantizer(VectorQuantizer):
    """Nearest code of a frozen Gaussian codebook under one learned linear map (SimVQ, arXiv 2411.02038, Section 4).

    Choose it for large codebooks: every gradient moves all codes, so that none is left behind.

    Parameters:
        transform (M, D, D): W of each codebook, the identity at first; the vectors are W c.
    """

    def __init__(self, codebook_size: int, codebook_dim: int, num_codebooks: int = 1, **shared: Any) -> None:
        super().__init__(codebook_size, codebook_dim, num_codebooks, **shared)
        self.codebook.weight.requires_grad_(False)
        self.transform = nn.Parameter(torch.eye(codebook_dim).repeat(num_codebooks, 1, 1))

    def place_codes(self) -> Tensor:
        return super().place_codes() @ self.transform.mT

    def initial_state(self) -> dict[str, Tensor]:
        """Codes N(0, 1 / D), under the identity."""
        codes = torch.randn_like(self.codebook.weight) / self.codebook.weight.shape[1] ** 0.5
        identity = torch.eye(self.transform.shape[-1], device=codes.device).expand_as(self.transform)
        return {"codebook.weight": codes, "transform": identity}


__all__ = [
    "EMAVectorQuantizer",
    "LinearCodebookQuantizer",
    "SoftEMVectorQuantizer",
    "VectorQuantizer",
    "rotation",
    "straight_through",
]
