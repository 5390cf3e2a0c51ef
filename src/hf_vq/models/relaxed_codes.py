"""The relaxed draw of stochastic quantizers, forward and backward in chunks of rows that stay in cache.

Letters as in code_search.py. Two operators, opaque to torch.compile: of what is N x K they keep the mixture and the
scores, and everything between lives for one chunk.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .code_search import NAMESPACE, block_length, chunks, first_lowest


class RelaxedCodes(NamedTuple):
    """What `relaxed_codes` gives: the mean vector of the mixture, the entropy of the posterior, its likeliest code."""

    quantized: Tensor
    entropy: Tensor
    codes: Tensor


def relaxed_codes(left: Tensor, right: Tensor, vectors: Tensor, noise: Tensor, temperature: Tensor) -> RelaxedCodes:
    """Gumbel-softmax over codes whose log P(k | row), up to a constant of each row, is `left @ right^T`.

    Args:
        left: (M, N, E), and
        right: (M, K, E), the factors of the scores.
        vectors: (M, K, D), what is mixed.
        noise: (M, N, K), standard Gumbel.
        temperature: ().

    Returns:
        softmax((scores + noise) / temperature) @ vectors (M, N, D); H = -sum_k p_k log p_k (M, N) of
        p = softmax(scores); and argmax_k scores (M, N). Gradients reach left, right and vectors.
    """
    return RelaxedCodes(*relaxed_codes_in_chunks(left, right, vectors, noise, temperature)[:3])


@torch.library.custom_op(f"{NAMESPACE}::relaxed_codes", mutates_args=())
def relaxed_codes_in_chunks(
    left: Tensor, right: Tensor, vectors: Tensor, noise: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """quantized, entropy, codes; and for the backward pass the mixture, the scores less the highest, log p of that."""
    quantized, entropy, codes, mixture, shifted, log_top = relaxed_codes_like(left, right, vectors, noise, temperature)
    block = block_length(right.shape[1])
    block = block if right.shape[1] % block == 0 else 1
    with torch.autocast(left.device.type, enabled=False):
        for codebook, (own_left, own_right, own_vectors) in enumerate(zip(-left, right, vectors, strict=True)):
            for chunk in chunks(len(own_left), len(own_right), left.device):
                part, score = (codebook, chunk), shifted[codebook, chunk]
                # Minus the scores, for which there is a fast search; then how far each is below the highest.
                torch.mm(own_left[chunk], own_right.T, out=score)
                best = first_lowest(score, block)
                codes[part] = best
                torch.sub(score.gather(1, best.unsqueeze(1)), score, out=score)
                relaxed = (noise[part] + score).div_(temperature)
                quantized[part] = torch.softmax(relaxed, dim=1, out=mixture[part]) @ own_vectors
                # log p_k = score_k + log p_top, without a logarithm of each; p_top >= 1 / K.
                posterior = score.softmax(dim=1)
                log_top[part] = posterior.gather(1, best.unsqueeze(1)).log()
                entropy[part] = -log_top[part].squeeze(1) - posterior.mul_(score).sum(dim=1)
    return quantized, entropy, codes, mixture, shifted, log_top


@relaxed_codes_in_chunks.register_fake
def relaxed_codes_like(
    left: Tensor, right: Tensor, vectors: Tensor, noise: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Empty tensors of the shapes that `relaxed_codes_in_chunks` fills."""
    rows, weights = left.shape[:2], (*left.shape[:2], right.shape[1])
    return (
        left.new_empty(*rows, vectors.shape[2]),
        left.new_empty(rows),
        left.new_empty(rows, dtype=torch.int64),
        left.new_empty(weights),
        left.new_empty(weights),
        left.new_empty(*rows, 1),
    )


@torch.library.custom_op(f"{NAMESPACE}::relaxed_codes_backward", mutates_args=())
def relaxed_codes_backward(
    of_quantized: Tensor,
    of_entropy: Tensor,
    left: Tensor,
    right: Tensor,
    vectors: Tensor,
    mixture: Tensor,
    shifted: Tensor,
    log_top_entropy: Tensor,
    temperature: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of left, right and vectors; log_top_entropy (M, N, 1) is log p of the best code plus the entropy."""
    of_left = torch.empty_like(left)
    # Sums over rows (K, E) gather faster as their transposes.
    of_right, of_vectors = (torch.zeros_like(factor.mT.contiguous()) for factor in (right, vectors))
    # A backward pass may be called under autocast.
    with torch.autocast(left.device.type, enabled=False):
        for codebook in range(len(left)):
            for chunk in chunks(left.shape[1], right.shape[1], left.device):
                part = (codebook, chunk)
                mixed, score = mixture[part], shifted[part]
                of_vectors[codebook].addmm_(of_quantized[part].T, mixed)
                of_mixture = of_quantized[part] @ vectors[codebook].T
                of_score = torch._softmax_backward_data(of_mixture, mixed, 1, mixed.dtype).div_(temperature)
                # dH / d score_k = -p_k (log p_k + H)
                posterior = torch.softmax(score, dim=1, out=of_mixture)
                of_score.addcmul_(
                    posterior.mul_(score + log_top_entropy[part]), of_entropy[part].unsqueeze(1), value=-1
                )
                torch.mm(of_score, right[codebook], out=of_left[part])
                of_right[codebook].addmm_(left[part].T, of_score)
    return of_left, of_right.mT.contiguous(), of_vectors.mT.contiguous()


@relaxed_codes_backward.register_fake
def _(of_quantized: Tensor, of_entropy: Tensor, left: Tensor, right: Tensor, vectors: Tensor, *saved: Tensor) -> Any:
    return torch.empty_like(left), torch.empty_like(right), torch.empty_like(vectors)


def save_relaxed_codes(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keeps what `differentiate_relaxed_codes` needs."""
    left, right, vectors, _, temperature = inputs
    _, entropy, codes, mixture, shifted, log_top = output
    # Else zeros would be made for the outputs that have no gradient, N x K of them.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(codes, mixture, shifted, log_top)
    ctx.save_for_backward(left, right, vectors, mixture, shifted, log_top, entropy, temperature)


def differentiate_relaxed_codes(ctx: Any, of_quantized: Tensor | None, of_entropy: Tensor | None, *_: None) -> Any:
    """Gradients of the arguments of `relaxed_codes_in_chunks`; a gradient that is None is zero."""
    left, right, vectors, mixture, shifted, log_top, entropy, temperature = ctx.saved_tensors
    of_quantized = left.new_zeros(*left.shape[:2], vectors.shape[2]) if of_quantized is None else of_quantized
    of_entropy = torch.zeros_like(entropy) if of_entropy is None else of_entropy
    gradients = relaxed_codes_backward(
        of_quantized, of_entropy, left, right, vectors, mixture, shifted, log_top + entropy.unsqueeze(2), temperature
    )
    return *gradients, None, None


relaxed_codes_in_chunks.register_autograd(differentiate_relaxed_codes, setup_context=save_relaxed_codes)

__all__ = ["RelaxedCodes", "relaxed_codes"]
