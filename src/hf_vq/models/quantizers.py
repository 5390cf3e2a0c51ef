"""Vector quantizers: latents in, codebook vectors and their indices out. One short class per idea.

Letters: B images, *grid the latent grid, N = B * prod(grid) positions, K codes of dimension D.
All mathematics works on rows (N, D), in float32 or wider, whatever the precision around it.

Papers: VQ-VAE, arXiv 1711.00937; SQ-VAE, arXiv 2205.07547.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Remote code of another repository may bring this file again: two copies must not register the same operators.
NAMESPACE = re.sub(r"\W", "_", __name__)


class QuantizerOutput(NamedTuple):
    """What a quantizer makes of latents (B, D, *grid)."""

    quantized: Tensor
    """(B, D, *grid), what the decoder gets: codebook vectors in evaluation; in training with a way for gradients."""
    image_tokens: Tensor
    """(B, *grid) int64 in [0, K): the deterministic codes."""
    loss: Tensor
    """(): the quantizer's part of the objective, in the family's own units."""
    perplexity: Tensor
    """(): exp(entropy) of this batch's histogram of image_tokens, in [1, K]."""


class RowOutput(NamedTuple):
    """The same on rows: quantized (N, D), image_tokens (N,), and a loss (N,) per position."""

    quantized: Tensor
    image_tokens: Tensor
    loss: Tensor


def to_rows(latents: Tensor) -> Tensor:
    """Latents (B, D, *grid) as rows (N, D), float32 or wider."""
    rows = latents.movedim(1, -1).reshape(-1, latents.shape[1])
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def to_grid(rows: Tensor, latents: Tensor) -> Tensor:
    """Rows (N, D) back in the shape (B, D, *grid) of the latents they came from."""
    batch, _, *grid = latents.shape
    return rows.view(batch, *grid, rows.shape[1]).movedim(-1, 1)


def keep_float32(move: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`move` (what `Module.to` applies to each tensor), except that it never narrows a tensor below float32."""

    def careful(tensor: Tensor) -> Tensor:
        moved = move(tensor)
        narrowed = moved.is_floating_point() and torch.finfo(moved.dtype).bits < 32
        return tensor.to(moved.device, torch.float32) if narrowed else moved

    return careful


def in_process_group() -> bool:
    """Whether a process group exists now; it may be made after the model."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def world_sum(tensor: Tensor) -> Tensor:
    """Sum of `tensor` over the processes of the group, if any; `tensor` itself is left alone."""
    if not in_process_group():
        return tensor
    total = tensor.clone()
    torch.distributed.all_reduce(total)
    return total


def world_mean(tensor: Tensor) -> Tensor:
    """Mean of `tensor` over the processes of the group, if any."""
    return world_sum(tensor) / torch.distributed.get_world_size() if in_process_group() else tensor


def code_perplexity(image_tokens: Tensor, codebook_size: int) -> Tensor:
    """exp(entropy) of the histogram of image_tokens (N,), a scalar in [1, K]."""
    # bincount, whose shape depends on the data, would break a compiled graph.
    ones = torch.ones_like(image_tokens, dtype=torch.float32)
    frequency = ones.new_zeros(codebook_size).index_add(0, image_tokens, ones) / image_tokens.numel()
    return torch.special.entr(frequency).sum().exp()


def gumbel_noise(like: Tensor) -> Tensor:
    """Standard Gumbel noise in the shape of `like`."""
    return -torch.empty_like(like).exponential_().log()


def gaussian_noise(like: Tensor) -> Tensor:
    """Standard normal noise in the shape of `like`."""
    return torch.randn_like(like)


def draw_codes(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One index (N,) for each row of probabilities (N, K)."""
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


@torch.library.custom_op(f"{NAMESPACE}::nearest_code", mutates_args=())
def nearest_code(rows: Tensor, vectors: Tensor) -> Tensor:
    """Index (N,) of the vector (K, D) nearest to each row (N, D).

    Minimises ||e||^2 / 2 - z.e, which orders the vectors as the distance does, in chunks of rows whose scores fit the
    cache: memory grows with neither N x K nor N x D.
    """
    with torch.autocast(rows.device.type, enabled=False):
        offsets = vectors.square().sum(1) / 2
        chunk = max(1, (2**18 if rows.device.type == "cpu" else 2**26) // len(vectors))
        nearest = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
        for start in range(0, len(rows), chunk):
            scores = torch.addmm(offsets, rows[start : start + chunk], vectors.T, alpha=-1)
            # On CPU argmin costs several times what min does.
            nearest[start : start + chunk] = scores.min(dim=1).indices
        return nearest


@nearest_code.register_fake
def _(rows: Tensor, vectors: Tensor) -> Tensor:
    return rows.new_empty(len(rows), dtype=torch.int64)


@torch.library.custom_op(f"{NAMESPACE}::count_codes", mutates_args=("counts", "sums"))
def count_codes(counts: Tensor, sums: Tensor, rows: Tensor, image_tokens: Tensor) -> None:
    """Adds rows (N, D) with codes image_tokens (N,) to counts (K,) and sums (K, D), in place.

    Not when gradient checkpointing repeats the forward from inside the backward pass: each row counts once.
    """
    if torch._C._current_graph_task_id() == -1:
        # Unlike bincount, this needs no look at the data, for which a GPU would have to wait.
        counts.index_add_(0, image_tokens, torch.ones_like(image_tokens, dtype=counts.dtype))
        sums.index_add_(0, image_tokens, rows.to(sums.dtype))


class Quantizer(nn.Module):
    """The contract: a codebook, a deterministic search, and what training makes of the two.

    A subclass writes `quantize_rows`, and `reduce_loss` if its loss is not a mean. The codebook never falls below
    float32: `.half()` and `.to(torch.bfloat16)` leave it, `.double()` widens it.
    """

    def __init__(self, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        self.codebook = nn.Embedding(codebook_size, codebook_dim)

    def forward(self, latents: Tensor, log_variance: Tensor | None = None) -> QuantizerOutput:
        """Quantizes latents (B, D, *grid). `log_variance` is for quantizers whose variance the encoder predicts."""
        with torch.autocast(latents.device.type, enabled=False):
            quantized, image_tokens, loss = self.quantize_rows(to_rows(latents))
            return QuantizerOutput(
                quantized=to_grid(quantized, latents),
                image_tokens=image_tokens.view(latents.shape[0], *latents.shape[2:]),
                loss=self.reduce_loss(loss.view(latents.shape[0], -1)),
                perplexity=code_perplexity(image_tokens, self.codebook.num_embeddings),
            )

    def search(self, latents: Tensor) -> Tensor:
        """The deterministic image_tokens (B, *grid) of latents (B, D, *grid)."""
        return self.search_rows(to_rows(latents)).view(latents.shape[0], *latents.shape[2:])

    def sample(self, latents: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """image_tokens (B, *grid) drawn from the posterior; where that is a point mass, the deterministic ones."""
        return self.search(latents)

    def lookup(self, image_tokens: Tensor) -> Tensor:
        """Codebook vectors (B, D, *grid) at image_tokens (B, *grid)."""
        return F.embedding(image_tokens, self.vectors()).movedim(-1, 1)

    def vectors(self) -> Tensor:
        """The vectors (K, D) that search and decoding use."""
        return self.codebook.weight

    def search_rows(self, rows: Tensor) -> Tensor:
        """Deterministic code (N,) of each row (N, D)."""
        return nearest_code(rows.detach(), self.vectors().detach().to(rows.dtype))

    def quantize_rows(self, rows: Tensor) -> RowOutput:
        """Quantizes rows (N, D); in training this is where gradients and statistics arise."""
        raise NotImplementedError

    def reduce_loss(self, loss: Tensor) -> Tensor:
        """One number from the loss (B, positions)."""
        return loss.mean()

    def step(self) -> None:
        """What moves once after each optimizer step, alike on every process. Nothing, by default."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return super()._apply(keep_float32(fn), recurse)


class VectorQuantizer(Quantizer):
    """Nearest code, straight-through gradients, a codebook that learns by a loss of its own (VQ-VAE, Eq. 3).

    Choose it as the paper's baseline; codes that no latent comes near receive no gradient and stay unused.

    Args:
        commitment_weight: beta, on ||z_e - sg[e]||^2 and on that term alone.
    """

    def __init__(self, codebook_size: int, codebook_dim: int, commitment_weight: float) -> None:
        super().__init__(codebook_size, codebook_dim)
        self.commitment_weight = commitment_weight

    def quantize_rows(self, rows: Tensor) -> RowOutput:
        image_tokens = self.search_rows(rows)
        vectors = F.embedding(image_tokens, self.vectors())
        loss = self.codebook_loss(rows, vectors) + self.commitment_weight * squared_distance(rows, vectors.detach())
        if self.training:
            vectors = rows + (vectors - rows).detach()
        return RowOutput(vectors, image_tokens, loss / rows.shape[1])

    def codebook_loss(self, rows: Tensor, vectors: Tensor) -> Tensor:
        """||sg[z_e] - e||^2 of each row, which pulls the codes to the latents."""
        return squared_distance(rows.detach(), vectors)


class EMAVectorQuantizer(VectorQuantizer):
    """Nearest code, straight-through gradients, a codebook of moving averages (VQ-VAE, Appendix A.1).

    Choose it over the gradient codebook for a faster and steadier start: each code is the running mean of its latents.
    The forward only adds to the pending sums; `step` reduces them over processes and moves the codebook once, so
    that gradient accumulation and several processes give what one process gives on the joint batch. (With
    BatchNorm in the body the latents themselves depend on the local batch.)

    Args:
        decay: gamma of the moving averages.

    Buffers:
        cluster_size (K,): N, the moving average of the latents per code; zeros at first.
        pending_counts (K,), pending_sums (K, D): of the forwards since the last `step`; not saved.
    """

    cluster_size: Tensor
    pending_counts: Tensor
    pending_sums: Tensor

    def __init__(self, codebook_size: int, codebook_dim: int, commitment_weight: float, decay: float) -> None:
        super().__init__(codebook_size, codebook_dim, commitment_weight)
        self.decay = decay
        self.codebook.weight.requires_grad_(False)
        self.register_buffer("cluster_size", torch.zeros(codebook_size, dtype=torch.float32))
        self.register_buffer("pending_counts", torch.zeros(codebook_size, dtype=torch.float32), persistent=False)
        sums = torch.zeros(codebook_size, codebook_dim, dtype=torch.float32)
        self.register_buffer("pending_sums", sums, persistent=False)
        # A broadcast from rank 0 would overwrite what the other ranks have counted.
        self._ddp_params_and_buffers_to_ignore = ["pending_counts", "pending_sums"]

    def quantize_rows(self, rows: Tensor) -> RowOutput:
        output = super().quantize_rows(rows)
        if self.training:
            count_codes(self.pending_counts, self.pending_sums, rows.detach(), output.image_tokens)
        return output

    def codebook_loss(self, rows: Tensor, vectors: Tensor) -> Tensor:
        """Zero: the codebook moves in `step`."""
        return rows.new_zeros(())

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


class DequantizationVariance(nn.Module):
    """sigma_phi^2, one learned scalar for all latents (SQ-VAE, type I).

    Args:
        form: `product` for exp(s), `sum` for 1 + exp(s).
        initial: exp(s) at the start.
        lr_scale: s = log(initial) + lr_scale * parameter.
    """

    def __init__(self, form: str, initial: float, lr_scale: float) -> None:
        super().__init__()
        self.floor = 1.0 if form == "sum" else 0.0
        self.initial = initial
        self.lr_scale = lr_scale
        self.log_ratio = nn.Parameter(torch.zeros(()))

    def forward(self) -> Tensor:
        """The variance, ()."""
        return self.floor + self.initial * (self.lr_scale * self.log_ratio).exp()


class AnnealedTemperature(nn.Module):
    """Temperature that decays exponentially from `start` to `end` over `decay_steps`, then stays.

    Buffers:
        steps (): optimizer steps taken; float, since dtype casts of a kept-in-float32 module reach integers too.
    """

    steps: Tensor

    def __init__(self, start: float, end: float, decay_steps: int) -> None:
        super().__init__()
        self.start = start
        self.log_ratio = math.log(end / start)
        self.decay_steps = decay_steps
        self.register_buffer("steps", torch.zeros((), dtype=torch.float32))

    def forward(self) -> Tensor:
        """The temperature of the coming step, ()."""
        return self.start * (self.log_ratio * (self.steps / self.decay_steps).clamp(max=1)).exp()

    def step(self) -> None:
        """Advances by one optimizer step."""
        self.steps += 1


class GaussianQuantizer(Quantizer):
    """Stochastic quantization with a Gaussian dequantization of one shared variance (SQ-VAE, Section 3, type I).

    P(z_q = b_k | Z) = softmax_k(-||b_k - z||^2 / (2 sigma_phi^2)) (Eq. 7). Training relaxes the draw to a
    Gumbel-softmax, so that encoder, codebook and variance learn by one loss: no straight-through, no commitment, no
    restart. As the decoder's sigma^2 falls, so does sigma_phi^2, and the quantization becomes deterministic by itself.
    The loss is regulariser - entropy in nats per image, summed over positions: an average would change the method.

    Args:
        variance: gives sigma_phi^2.
        temperature: gives the temperature of the relaxation.
        dequantization_noise: whether training draws Z ~ N(latents, sigma_phi^2 I) instead of taking its mean. Logits
            and regulariser then use the noisy Z, the latter less its constant D / 2 per position.
    """

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        variance: DequantizationVariance,
        temperature: AnnealedTemperature,
        dequantization_noise: bool = False,
    ) -> None:
        super().__init__(codebook_size, codebook_dim)
        self.variance = variance
        self.temperature = temperature
        self.dequantization_noise = dequantization_noise

    def quantize_rows(self, rows: Tensor) -> RowOutput:
        if not self.training:
            image_tokens = self.search_rows(rows)
            vectors = F.embedding(image_tokens, self.vectors())
            return RowOutput(vectors, image_tokens, self.divergence(rows, vectors, self.log_posterior(rows)))
        noisy, constant = self.dequantize(rows)
        log_posterior = self.log_posterior(noisy)
        mixture = ((log_posterior + gumbel_noise(log_posterior)) / self.temperature()).softmax(dim=1)
        vectors = mixture @ self.vectors()
        loss = self.divergence(noisy, vectors, log_posterior) - constant
        return RowOutput(vectors, self.search_rows(rows), loss)

    def dequantize(self, rows: Tensor) -> tuple[Tensor, float]:
        """Z for latents (N, D), and what its noise adds to the regulariser of a position on average."""
        if not self.dequantization_noise:
            return rows, 0.0
        return rows + self.variance().sqrt() * gaussian_noise(rows), rows.shape[1] / 2

    def log_posterior(self, rows: Tensor) -> Tensor:
        """log P(z_q = b_k | Z) (N, K) for rows (N, D) (Eq. 7); ||z||^2 is the same for every code and left out."""
        vectors = self.vectors()
        scores = torch.addmm(-vectors.square().sum(1) / 2, rows, vectors.T)
        return (scores / self.variance()).log_softmax(dim=1)

    def divergence(self, rows: Tensor, vectors: Tensor, log_posterior: Tensor) -> Tensor:
        """Regulariser ||z - z_q||^2 / (2 sigma_phi^2) minus the entropy of the posterior, (N,) (Eq. 8)."""
        entropy = -(log_posterior.exp() * log_posterior).sum(dim=1)
        return squared_distance(rows, vectors) / (2 * self.variance()) - entropy

    def reduce_loss(self, loss: Tensor) -> Tensor:
        return loss.sum(dim=1).mean()

    def sample(self, latents: Tensor, generator: torch.Generator | None = None) -> Tensor:
        with torch.autocast(latents.device.type, enabled=False):
            codes = draw_codes(self.log_posterior(to_rows(latents)).exp(), generator)
        return codes.view(latents.shape[0], *latents.shape[2:])

    def step(self) -> None:
        self.temperature.step()


def squared_distance(rows: Tensor, vectors: Tensor) -> Tensor:
    """||z - e||^2 (N,) of rows and vectors (N, D)."""
    return (rows - vectors).square().sum(dim=1)


__all__ = [
    "AnnealedTemperature",
    "DequantizationVariance",
    "EMAVectorQuantizer",
    "GaussianQuantizer",
    "Quantizer",
    "QuantizerOutput",
    "VectorQuantizer",
]
