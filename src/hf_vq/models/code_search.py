"""Search, sampling and counting over codebooks, in chunks of rows: no N x K matrix is ever whole.

Letters: M codebooks of K codes of dimension D; N rows for each. The operators are opaque to torch.compile, which
neither breaks its graphs on them nor keeps what they make; while torch.export looks on, a search is a plain expression.
"""

import re
from collections.abc import Iterator

import torch
from torch import Tensor

# Remote code of another repository may bring this file again: two copies must not register the same operators.
NAMESPACE = re.sub(r"\W", "_", __name__)

# Scores at once: on a CPU what stays in cache, on a GPU what keeps it busy.
CPU_CHUNK, GPU_CHUNK = 2**20, 2**26


def nearest_code(rows: Tensor, vectors: Tensor) -> Tensor:
    """Code (M, N) of the vector (M, K, D) nearest to each row (M, N, D), the first of equals.

    Minimises ||e||^2 / 2 - z.e, which orders the vectors as the distance does.
    """
    return lowest_score(rows, vectors, vectors.square().sum(dim=-1) / 2)


def likeliest_code(rows: Tensor, vectors: Tensor, variance: Tensor) -> Tensor:
    """Code (M, N) whose vector (M, K, D) minimises sum_d (z_d - e_d)^2 / variance_d; rows and variance (M, N, D).

    Minimises the sum of e_d^2 / (2 variance_d) - e_d z_d / variance_d: one product of vectors twice as long.
    """
    rows, vectors = torch.cat([rows, -rows.new_tensor(0.5).expand_as(rows)], -1), torch.cat([vectors, vectors**2], -1)
    return lowest_score(rows / torch.cat([variance, variance], -1), vectors, vectors.new_zeros(vectors.shape[:2]))


def lowest_score(rows: Tensor, vectors: Tensor, offsets: Tensor) -> Tensor:
    """Code (M, N) that minimises offset - row.vector over the codes, the first of equals; offsets (M, K)."""
    if torch.compiler.is_exporting():
        return torch.baddbmm(offsets.unsqueeze(1), rows, vectors.mT, alpha=-1).argmin(dim=-1)
    return lowest_score_in_chunks(rows, vectors, offsets)


@torch.library.custom_op(f"{NAMESPACE}::lowest_score", mutates_args=())
def lowest_score_in_chunks(rows: Tensor, vectors: Tensor, offsets: Tensor) -> Tensor:
    """`lowest_score`, a chunk of rows at a time: memory grows with neither N x K nor N x D."""
    best = torch.empty(rows.shape[:2], dtype=torch.int64, device=rows.device)
    num_codes = vectors.shape[1]
    block = block_length(num_codes)
    vectors, offsets = fill_blocks(vectors, block), fill_blocks(offsets, block)
    with torch.autocast(rows.device.type, enabled=False):
        # Memory that is new for every chunk would cost as much again in page faults.
        length = min(rows.shape[1], chunk_length(vectors.shape[1], rows.device))
        buffer = rows.new_empty(length, vectors.shape[1])
        for codebook, (own_rows, own_vectors, own_offsets) in enumerate(zip(rows, vectors, offsets, strict=True)):
            for chunk in chunks(len(own_rows), len(own_vectors), rows.device):
                part = own_rows[chunk]
                scores = torch.addmm(own_offsets, part, own_vectors.T, alpha=-1, out=buffer[: len(part)])
                best[codebook, chunk] = first_lowest(scores, block)
    return best.clamp_(max=num_codes - 1)


@lowest_score_in_chunks.register_fake
def _(rows: Tensor, vectors: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[:2], dtype=torch.int64)


def first_lowest(scores: Tensor, block: int) -> Tensor:
    """Index (n,) of the lowest score in each row (n, K), the first of equals.

    On a CPU `amin` vectorises and `min` with indices does not: the first takes the lowest of each block, the second
    then finds the first best block, and the first best in it.
    """
    if block == 1:
        return scores.min(dim=1).indices
    blocks = scores.view(-1, block)
    best = blocks.amin(dim=1).view(len(scores), -1).min(dim=1).indices
    first = torch.arange(len(scores), device=scores.device) * (scores.shape[1] // block)
    return best * block + blocks.index_select(0, first + best).min(dim=1).indices


def fill_blocks(codes: Tensor, block: int) -> Tensor:
    """Codes (M, K, ...) with the last one repeated until the blocks are full: whichever is found, it is that one."""
    missing = -codes.shape[1] % block
    return torch.cat([codes, codes[:, -1:].expand(-1, missing, *codes.shape[2:])], dim=1) if missing else codes


def block_length(num_codes: int) -> int:
    """Scores in a block for K codes: few codes are searched one by one."""
    if num_codes < 256:
        return 1
    return 64 if num_codes <= 4096 else 128


def chunk_length(num_codes: int, device: torch.device) -> int:
    """Rows of a chunk: as many as have scores against all codes within the budget of the device."""
    return max(1, (CPU_CHUNK if device.type == "cpu" else GPU_CHUNK) // num_codes)


def chunks(num_rows: int, num_codes: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows whose scores against all codes fit the budget of the device."""
    size = chunk_length(num_codes, device)
    for start in range(0, num_rows, size):
        yield slice(start, start + size)


def inverse_cdf(log_weights: Tensor, uniforms: Tensor) -> Tensor:
    """Codes (..., N, S) drawn with probabilities softmax(log_weights) (..., N, K) by uniforms (..., N, S) in [0, 1)."""
    cumulative = log_weights.softmax(dim=-1).cumsum(dim=-1)
    codes = torch.searchsorted(cumulative, uniforms * cumulative[..., -1:], right=True)
    return codes.clamp(max=log_weights.shape[-1] - 1)


@torch.library.custom_op(f"{NAMESPACE}::sample_codes", mutates_args=())
def sample_codes(rows: Tensor, vectors: Tensor, scale: float, uniforms: Tensor) -> Tensor:
    """Codes (M, N, S) drawn with probabilities softmax_k(-scale * ||z - e_k||^2), a chunk of rows at a time.

    Args:
        rows: (M, N, D).
        vectors: (M, K, D).
        uniforms: (M, N, S) in [0, 1), the randomness of the draw.
    """
    drawn = torch.empty(uniforms.shape, dtype=torch.int64, device=rows.device)
    with torch.autocast(rows.device.type, enabled=False):
        for codebook, own_vectors in enumerate(vectors):
            offsets = -scale * own_vectors.square().sum(dim=1)
            for chunk in chunks(rows.shape[1], len(own_vectors), rows.device):
                log_weights = torch.addmm(offsets, rows[codebook, chunk], own_vectors.T, alpha=2 * scale)
                drawn[codebook, chunk] = inverse_cdf(log_weights, uniforms[codebook, chunk])
    return drawn


@sample_codes.register_fake
def _(rows: Tensor, vectors: Tensor, scale: float, uniforms: Tensor) -> Tensor:
    return uniforms.new_empty(uniforms.shape, dtype=torch.int64)


@torch.library.custom_op(f"{NAMESPACE}::add_codes", mutates_args=("counts", "sums"))
def add_codes(counts: Tensor, sums: Tensor | None, rows: Tensor, codes: Tensor) -> None:
    """Adds rows (M, N, D) to counts (M * K,) and sums (M * K, D) of their codes (M, N), or of S codes each, by 1 / S.

    Not when gradient checkpointing repeats the forward from inside the backward pass: each row counts once.
    """
    if torch._C._current_graph_task_id() != -1:
        return
    codes = codes.unsqueeze(-1) if codes.ndim == 2 else codes
    num_codebooks, _, samples = codes.shape
    first = torch.arange(num_codebooks, device=codes.device).view(-1, 1, 1) * (len(counts) // num_codebooks)
    rows = rows.flatten(0, 1).to(counts.dtype)
    ones = torch.ones_like(rows[:, 0])
    for drawn in (codes + first).flatten(0, 1).unbind(dim=1):
        # Unlike bincount, this needs no look at the data, for which a GPU would have to wait.
        counts.index_add_(0, drawn, ones, alpha=1 / samples)
        if sums is not None:
            sums.index_add_(0, drawn, rows, alpha=1 / samples)


__all__ = [
    "NAMESPACE",
    "add_codes",
    "block_length",
    "chunks",
    "first_lowest",
    "inverse_cdf",
    "likeliest_code",
    "nearest_code",
    "sample_codes",
]
