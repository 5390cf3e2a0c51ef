"""Says in words when a codebook collapses: few codes take all tokens, and the others are lost."""

from typing import Any

from torch import Tensor

from hf_vq.metrics import perplexity

__all__ = ["WARN_PERPLEXITY_BELOW", "collapse_warning"]

# Weak codebooks that train on, such as the published 70 of 512, lie above; collapsed ones far below.
WARN_PERPLEXITY_BELOW = 0.1


def collapse_warning(code_counts: Tensor, config: Any, below: float = WARN_PERPLEXITY_BELOW) -> str | None:
    """A warning with numbers and ways out, if the perplexity of some codebook is under a share of its size; else None.

    Args:
        code_counts: (M, K), of an evaluation.
        config: the tokenizer's; the ways out are those that it does not take yet.
        below: share of K, in [0, 1]; 0 never warns.

    Raises: ValueError if a codebook counted nothing.
    """
    num_codebooks, codebook_size = code_counts.shape
    lowest, codebook = min((perplexity(counts[None]), index) for index, counts in enumerate(code_counts))
    if lowest >= below * codebook_size:
        return None
    where = f" of codebook {codebook}" if num_codebooks > 1 else ""
    in_use = int((code_counts[codebook] > 0).sum())
    return (
        f"the perplexity{where} is {lowest:.4g}, under {below:.3g} x {codebook_size} codes, of which {in_use} occur. "
        "If it does not rise soon, this is index collapse: the model has lost most of its codebook. "
        f"Ways out: {'; '.join(_ways_out(config))}."
    )


def _ways_out(config: Any) -> list[str]:
    if config.model_type == "hf_sqvae":
        return ["a larger initial_variance", "a slower temperature (temperature_decay_steps)", "a lower learning rate"]
    if config.quantizer == "fsq":
        return ["fewer levels", "a quantizer that learns its codes (quantizer: ema)"]
    ways = ["an SQ-VAE (model_type: hf_sqvae), which anneals its quantization by itself"]
    if config.codebook_transform == "none":
        if config.revive_below == 0:
            ways.insert(0, "move unused codes to latents (revive_below: 0.1)")
        if config.codebook_init == "random":
            ways.insert(0, "start the codes at latents (codebook_init: kmeans)")
    return ways
