"""The contract of every quantizer: latents in, codebook vectors and their indices out.

    vector_quantizers.py         nearest code: learned by a loss, by moving averages, by soft EM (VQ-VAE and after)
    stochastic_quantizers.py     a posterior over codes that anneals itself (SQ-VAE)
    finite_scalar_quantizer.py   rounding; nothing to learn (FSQ)

Letters: B images, *grid the latent grid, N = B * prod(grid) positions, M codebooks of K codes each, dimension D.
All mathematics works on rows (M, N, D) and vectors (M, K, D), in float32 or wider, whatever autocast is around it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .code_search import nearest_code


class QuantizerOutput(NamedTuple):
    """What a quantizer makes of latents (B, M * D, *grid)."""

    quantized: Tensor
    """(B, M * D, *grid), what the decoder gets: codebook vectors; in training with a way for gradients."""
    image_tokens: Tensor
    """(B, *grid), or (B, *grid, M) for M > 1, int64 in [0, K): the deterministic codes."""
    loss: Tensor
    """(): the quantizer's part of the objective, in the family's own units."""
    perplexity: Tensor
    """(): exp(entropy) of this batch's histogram of image_tokens, in [1, K]; the mean over codebooks."""


class RowOutput(NamedTuple):
    """The same on rows: quantized (M, N, D), codes (M, N), and a loss (M, N) per code."""

    quantized: Tensor
    codes: Tensor
    loss: Tensor


def to_rows(latents: Tensor, num_codebooks: int = 1) -> Tensor:
    """Latents (B, M * D, *grid) as rows (M, N, D), float32 or wider."""
    rows = latents.movedim(1, -1).reshape(-1, num_codebooks, latents.shape[1] // num_codebooks).transpose(0, 1)
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def to_grid(rows: Tensor, latents: Tensor) -> Tensor:
    """Rows (M, N, D) back in the shape (B, M * D, *grid) of the latents they came from."""
    batch, channels, *grid = latents.shape
    return rows.transpose(0, 1).reshape(batch, *grid, channels).movedim(-1, 1)


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


def world_gather(tensor: Tensor) -> list[Tensor]:
    """`tensor` of each process of the group, all of one shape; alone, just this one."""
    if not in_process_group():
        return [tensor]
    gathered = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(gathered, tensor)
    return gathered


def world_mean(tensor: Tensor) -> Tensor:
    """Mean of `tensor` over the processes of the group, if any."""
    return world_sum(tensor) / torch.distributed.get_world_size() if in_process_group() else tensor


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """No autocast on the device of `tensor`; an exported program has none, and would hold this as an operator."""
    return nullcontext() if torch.compiler.is_exporting() else torch.autocast(tensor.device.type, enabled=False)


def code_perplexity(codes: Tensor, codebook_size: int) -> Tensor:
    """exp(entropy) of the histogram of codes (M, N) of each codebook, and the mean of those: a scalar in [1, K]."""
    # bincount, whose shape depends on the data, would break a compiled graph.
    ones = torch.ones_like(codes, dtype=torch.float32)
    histogram = ones.new_zeros(len(codes), codebook_size).scatter_add(1, codes, ones)
    return torch.special.entr(histogram / codes.shape[1]).sum(dim=1).exp().mean()


class Quantizer(nn.Module):
    """The contract: codebooks, a deterministic search, and what training makes of the two.

    A subclass writes `quantize_rows`, and `reduce_loss` if its loss is not a mean. The codebook never falls below
    float32: `.half()` and `.to(torch.bfloat16)` leave it, `.double()` widens it.

    Args:
        codebook_size: K, codes of one codebook.
        codebook_dim: D.
        num_codebooks: M; codebook m quantizes channels m * D to (m + 1) * D of the latents.
        normalize_codes: whether latents and codes are projected to the unit sphere before they meet.
    """

    def __init__(
        self, codebook_size: int, codebook_dim: int, num_codebooks: int = 1, normalize_codes: bool = False
    ) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.num_codebooks = num_codebooks
        self.normalize_codes = normalize_codes
        self.codebook = nn.Embedding(num_codebooks * codebook_size, codebook_dim)

    def forward(self, latents: Tensor, log_variance: Tensor | None = None) -> QuantizerOutput:
        """Quantizes latents (B, M * D, *grid).

        Args:
            log_variance: like latents; what the encoder says of its own variance, for quantizers that ask for it.
        """
        with without_autocast(latents):
            quantized, codes, loss = self.quantize_rows(self.rows(latents), self.row_variance(log_variance))
            return QuantizerOutput(
                quantized=to_grid(quantized, latents),
                image_tokens=self.to_tokens(codes, latents),
                loss=self.reduce_loss(loss, latents.shape[0]),
                perplexity=code_perplexity(codes, self.codebook_size),
            )

    def search(self, latents: Tensor, log_variance: Tensor | None = None) -> Tensor:
        """The deterministic image_tokens of latents (B, M * D, *grid)."""
        with without_autocast(latents):
            return self.to_tokens(self.search_rows(self.rows(latents), self.row_variance(log_variance)), latents)

    def sample(
        self, latents: Tensor, log_variance: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """image_tokens drawn from the posterior; where that is a point mass, the deterministic ones."""
        return self.search(latents, log_variance)

    def lookup(self, image_tokens: Tensor) -> Tensor:
        """Codebook vectors (B, M * D, *grid) at image_tokens, (B, *grid) or with M > 1 (B, *grid, M)."""
        codes = image_tokens if self.num_codebooks > 1 else image_tokens.unsqueeze(-1)
        with without_autocast(self.codebook.weight):
            return pick(self.vectors(), codes.movedim(-1, 0)).movedim(0, -2).flatten(-2).movedim(-1, 1)

    def squared_distances(self, latents: Tensor, image_tokens: Tensor, log_variance: Tensor | None = None) -> Tensor:
        """What the search minimises: ||z - e||^2 from the vectors at image_tokens, in the shape of these."""
        with without_autocast(latents):
            rows, vectors = self.comparable(self.rows(latents)), to_rows(self.lookup(image_tokens), self.num_codebooks)
            distances = self.row_distances(rows, vectors, self.row_variance(log_variance))
            return distances.T.reshape(image_tokens.shape)

    def vectors(self) -> Tensor:
        """The vectors (M, K, D) that search and decoding use."""
        codes = self.place_codes()
        return F.normalize(codes, dim=-1) if self.normalize_codes else codes

    def place_codes(self) -> Tensor:
        """The codes (M, K, D) before any projection to the sphere: the codebook itself, by default."""
        return self.codebook.weight.view(self.num_codebooks, self.codebook_size, -1)

    def step(self) -> None:
        """What moves once after each optimizer step, alike on every process. Nothing, by default."""

    def scalars(self) -> dict[str, Tensor]:
        """What moves beside the weights and belongs in a log, by name; each ()."""
        return {}

    def statistics(self, latents: Tensor, log_variance: Tensor | None = None) -> dict[str, Tensor]:
        """What there is to know of the posterior over codes, by name; each (), a mean over the batch."""
        return {}

    def token_options(self) -> dict[str, object]:
        """What decides on tokens and is no parameter, where it differs from the usual; see `token_fingerprint`."""
        return {"normalize_codes": True} if self.normalize_codes else {}

    def initial_state(self) -> dict[str, Tensor]:
        """Values at the start of training, by name of parameter or buffer; what is not named starts at zero."""
        return {"codebook.weight": torch.randn_like(self.codebook.weight)}

    def rows(self, latents: Tensor) -> Tensor:
        """Latents (B, M * D, *grid) as the rows (M, N, D) that meet the vectors."""
        channels = self.num_codebooks * self.codebook.embedding_dim
        if latents.shape[1] != channels:
            raise ValueError(f"latents must have shape (B, {channels}, *grid), got {tuple(latents.shape)}")
        rows = to_rows(latents, self.num_codebooks)
        return F.normalize(rows, dim=-1) if self.normalize_codes else rows

    def comparable(self, rows: Tensor) -> Tensor:
        """Rows (M, N, D) where the search looks for the nearest vector."""
        return rows

    def row_distances(self, rows: Tensor, vectors: Tensor, variance: Tensor | None) -> Tensor:
        """Squared distances (M, N) of comparable rows from vectors, both (M, N, D)."""
        return squared_distance(rows, vectors)

    def row_variance(self, log_variance: Tensor | None) -> Tensor | None:
        """What `quantize_rows` and `search_rows` get of log_variance; nothing, by default."""
        return None

    def to_tokens(self, codes: Tensor, latents: Tensor) -> Tensor:
        """Codes (M, N) as image_tokens on the grid of the latents."""
        image_tokens = codes.T.reshape(latents.shape[0], *latents.shape[2:], self.num_codebooks)
        return image_tokens if self.num_codebooks > 1 else image_tokens.squeeze(-1)

    def search_rows(self, rows: Tensor, variance: Tensor | None = None) -> Tensor:
        """Deterministic code (M, N) of each row (M, N, D)."""
        return nearest_code(rows.detach(), self.vectors().detach().to(rows.dtype))

    def quantize_rows(self, rows: Tensor, variance: Tensor | None = None) -> RowOutput:
        """Quantizes rows (M, N, D); in training this is where gradients and statistics arise."""
        raise NotImplementedError

    def reduce_loss(self, loss: Tensor, batch: int) -> Tensor:
        """One number from the loss (M, N) of a batch of images."""
        return loss.mean()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return super()._apply(keep_float32(fn), recurse)


def pick(vectors: Tensor, codes: Tensor) -> Tensor:
    """The vectors (M, ..., D) out of (M, K, D) at codes (M, ...)."""
    first = torch.arange(len(vectors), device=codes.device).view(-1, *[1] * (codes.ndim - 1)) * vectors.shape[1]
    return F.embedding(codes + first, vectors.reshape(-1, vectors.shape[2]))


def squared_distance(rows: Tensor, vectors: Tensor) -> Tensor:
    """||z - e||^2 (M, N) of rows and vectors (M, N, D)."""
    return (rows - vectors).square().sum(dim=-1)


__all__ = [
    "Quantizer",
    "QuantizerOutput",
    "RowOutput",
    "code_perplexity",
    "in_process_group",
    "keep_float32",
    "pick",
    "squared_distance",
    "to_grid",
    "to_rows",
    "without_autocast",
    "world_gather",
    "world_mean",
    "world_sum",
]
