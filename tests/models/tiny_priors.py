"""Priors small enough to look at every token, of every family."""

import torch

from hf_vq import PixelCNNPrior, PixelCNNPriorConfig, TransformerPrior, TransformerPriorConfig
from hf_vq.models.modeling_prior import PriorPreTrainedModel

CODES, CLASSES, GRID = 11, 4, (3, 4)

# Weights this large make every token matter; with the usual ones all logits are nearly alike.
TINY = {"hidden_size": 16, "num_hidden_layers": 3, "initializer_range": 0.3}

FAMILIES = {
    "pixelcnn": (PixelCNNPrior, PixelCNNPriorConfig, {}),
    "pixelcnn-wide": (PixelCNNPrior, PixelCNNPriorConfig, {"kernel_size": 5, "num_hidden_layers": 2}),
    "transformer": (TransformerPrior, TransformerPriorConfig, {}),
}


def make_prior(family: str, num_codebooks: int = 1, seed: int = 0, **settings: object) -> PriorPreTrainedModel:
    """A new prior in evaluation and float64, where sums of another order do not move a draw."""
    model_class, config_class, own = FAMILIES[family]
    torch.manual_seed(seed)
    sizes = {"codebook_size": CODES, "num_codebooks": num_codebooks, "grid_size": GRID, "num_classes": CLASSES}
    return model_class(config_class(**{**sizes, **TINY, **own, **settings})).double().eval()


def make_tokens(prior: PriorPreTrainedModel, count: int = 2, seed: int = 0) -> torch.Tensor:
    """image_tokens of `count` images."""
    generator = torch.Generator().manual_seed(seed)
    codebooks = (prior.config.num_codebooks,) if prior.config.num_codebooks > 1 else ()
    return torch.randint(prior.config.codebook_size, (count, *GRID, *codebooks), generator=generator)
