"""Care for codebooks that would collapse: a k-means start, and revival of codes that nothing comes near."""

import torch
from torch import Tensor, nn

from .code_search import add_codes, nearest_code
from .quantizers import world_gather, world_sum

KEPT_ROWS_PER_CODE = 16
KMEANS_ITERATIONS = 10
USAGE_DECAY = 0.99


class CodebookCare(nn.Module):
    """Puts codes where latents are: all of them at the start (k-means), dead ones in any later step.

    The start is one step, or where the last micro-batch has fewer latents than there are codes, as many as it needs. A
    code is dead when its usage, a moving average of how often it is chosen, is under `revive_below` times the mean of
    its codebook; it then takes the place of a latent of the last micro-batch. All of it happens in `step`, on the
    latents of all processes, drawn by a generator that is seeded with the number of the step: every process does the
    same, and a resumed run does what the uninterrupted one did. An optimizer's moments of a moved code stay.

    Args:
        codebook_size, codebook_dim, num_codebooks: K, D, M of the codebooks.
        kmeans: whether there is a start. Until then codes are where they were initialised.
        revive_below: share of uniform usage; 0 revives nothing.

    Buffers:
        usage (M * K,): the moving average, which begins as if all codes had been used alike.
        steps (), placed (): the steps taken, and how many codes of each codebook the start has placed.
        pending_counts (M * K,), kept_rows (M, 16 * K, D), kept_count (): of the forwards since the last step; not
            saved.
    """

    usage: Tensor
    steps: Tensor
    placed: Tensor
    pending_counts: Tensor
    kept_rows: Tensor
    kept_count: Tensor

    local_buffers = ("pending_counts", "kept_rows", "kept_count")

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        num_codebooks: int = 1,
        kmeans: bool = False,
        revive_below: float = 0,
    ) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.kmeans = kmeans
        self.revive_below = revive_below
        codes, kept = num_codebooks * codebook_size, KEPT_ROWS_PER_CODE * codebook_size
        # Counters are floats: what casts a module that is kept in float32 does not ask for integers.
        self.register_buffer("usage", torch.zeros(codes, dtype=torch.float32))
        self.register_buffer("steps", torch.zeros((), dtype=torch.float32))
        self.register_buffer("placed", torch.zeros((), dtype=torch.float32))
        self.register_buffer("pending_counts", torch.zeros(codes, dtype=torch.float32), persistent=False)
        rows = torch.zeros(num_codebooks, kept, codebook_dim, dtype=torch.float32)
        self.register_buffer("kept_rows", rows, persistent=False)
        self.register_buffer("kept_count", torch.zeros((), dtype=torch.float32), persistent=False)

    def watch(self, rows: Tensor, codes: Tensor) -> None:
        """Counts codes (M, N), or (M, N, S) drawn ones, and keeps evenly strided rows (M, N, D): none is moved yet."""
        add_codes(self.pending_counts, None, rows, codes)
        found = rows.shape[1]
        kept = min(found, self.kept_rows.shape[1])
        strided = torch.arange(kept, device=rows.device) * found // kept
        self.kept_rows[:, :kept] = rows[:, strided].to(self.kept_rows.dtype)
        self.kept_count.fill_(kept)

    @torch.no_grad()
    def step(self, codebook: Tensor) -> Tensor:
        """Moves codes of the codebook (M * K, D) in place; returns the indices of those it moved."""
        counts = world_sum(self.pending_counts)
        if not counts.any():  # no forward, no latents to start from
            return torch.empty(0, dtype=torch.int64, device=codebook.device)
        usage = self.usage.view(-1, self.codebook_size)
        if not usage.any():
            usage += counts.view_as(usage).mean(dim=1, keepdim=True)
        self.usage.lerp_(counts, 1 - USAGE_DECAY)
        is_start = self.kmeans and bool(self.placed < self.codebook_size)
        if is_start:
            needy = (torch.arange(self.codebook_size, device=usage.device) >= self.placed).expand_as(usage)
        else:
            needy = usage < self.revive_below * usage.mean(dim=1, keepdim=True)
        moved = self._place(codebook, needy, is_start) if needy.any() else codebook.new_empty(0).long()
        if is_start:
            self.placed += len(moved) // len(usage)
        usage.flatten()[moved] = usage.mean(dim=1).repeat_interleave(self.codebook_size)[moved]
        self.pending_counts.zero_()
        self.kept_count.zero_()
        self.steps += 1
        return moved

    def _place(self, codebook: Tensor, needy: Tensor, is_start: bool) -> Tensor:
        """Gives needy codes (M, K) places among the latents, as far as these go."""
        generator = torch.Generator().manual_seed(int(self.steps))
        moved = []
        for index, (rows, wanting) in enumerate(zip(self._joint_rows().to(codebook.dtype), needy, strict=True)):
            codes = wanting.nonzero().squeeze(1)[: rows.shape[0]] + index * self.codebook_size
            order = torch.randperm(len(rows), generator=generator, device="cpu")
            places = rows[order[: len(codes)].to(rows.device)]
            codebook[codes] = lloyd(rows, places) if is_start else places
            moved.append(codes)
        return torch.cat(moved)

    def _joint_rows(self) -> Tensor:
        """The kept rows (M, R, D) of all processes."""
        counts, rows = world_gather(self.kept_count), world_gather(self.kept_rows)
        return torch.cat([own[:, : int(count)] for own, count in zip(rows, counts, strict=True)], dim=1)


def lloyd(rows: Tensor, centres: Tensor) -> Tensor:
    """Centres (K, D) after Lloyd's iterations on rows (R, D); a centre without rows stays."""
    for _ in range(KMEANS_ITERATIONS):
        counts, sums = centres.new_zeros(len(centres)), torch.zeros_like(centres)
        add_codes(counts, sums, rows[None], nearest_code(rows[None], centres[None]))
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), centres)
    return centres


__all__ = ["CodebookCare"]
