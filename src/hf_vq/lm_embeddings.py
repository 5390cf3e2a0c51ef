"""Embeddings and scores of image tokens in a language model that knows none yet."""

from typing import Any

import torch
from torch import Tensor

from hf_vq.image_layout import ImageLayout
from hf_vq.models.fourier_features import fourier_features

__all__ = ["extend_embeddings"]


@torch.no_grad()
def extend_embeddings(model: Any, vocab_size: int, layout: ImageLayout, vectors: Tensor | None = None) -> None:
    """Gives a language model embeddings, and scores, of `vocab_size` ids; the rows of text stay to the bit.

    Args:
        model: a causal LM. One with more rows keeps them, and the images take those after the text's.
        vocab_size: ids of text and images together.
        layout: which of them belong to images.
        vectors: (M, K, D), the codes: image tokens begin alike where these are close, as the mean of the rows of text
            and random features of the codes with their deviation. None: as markers begin, at random with that mean and
            deviation. Where scores have a bias, theirs is the mean of the text's.
    """
    if model.get_input_embeddings().weight.shape[0] < vocab_size:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    embeddings, scores = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [embeddings] if scores is None or scores.weight is embeddings.weight else [embeddings, scores]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for table in tables:
            _start(table.weight, layout, vectors)
            if (bias := getattr(table, "bias", None)) is not None:
                bias[[*layout.marker_ids, *layout.code_ids]] = bias[: min(layout.marker_ids)].mean()


def _start(weight: Tensor, layout: ImageLayout, vectors: Tensor | None) -> None:
    known, width = weight[: min(layout.marker_ids)], weight.shape[1]
    mean, deviation = known.mean(0), known.std()
    # Rows that were there to spare hold anything, so that markers begin anew as well.
    weight[layout.marker_ids] = mean + deviation * torch.randn(len(layout.marker_ids), width).to(weight)
    for codebook in range(layout.num_codebooks):
        ids = layout.ids_of(codebook)
        features = (
            torch.randn(len(ids), width)
            if vectors is None
            else fourier_features(vectors[codebook].float().cpu(), width)
        )
        weight[ids.start : ids.stop] = mean + deviation * features.to(weight)
