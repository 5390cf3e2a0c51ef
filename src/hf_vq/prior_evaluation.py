"""A prior and a stream of tokenized images -> bits, the same in the training loop and offline."""

import math
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_vq.canonical import canonical, unwrapped
from hf_vq.evaluation import Evaluation
from hf_vq.metrics import CodeCounts, ImageMeans, over_ranks
from hf_vq.models.prior_tokenizer import check_tokenizer

__all__ = ["PROTOCOL", "evaluate_prior"]

PROTOCOL = (
    "float32; bits_per_token: -log2 P(token | earlier tokens), the mean over all tokens, under the null class, and "
    "bits_per_token_of_class under the image's own; bits_per_dim: (-log2 P(8-bit image | tokens) - log2 P(tokens under "
    "the null class)) / (C * H * W), an upper bound; token_entropy: of the histogram of all tokens, position_entropy: "
    "of that of each position, then the mean; both of the images evaluated, in bits"
)
BITS = 1 / math.log(2)


def evaluate_prior(
    prior: Any, batches: Iterable[dict[str, Tensor]], *, decoder: Any = None, progress: bool = False
) -> Evaluation:
    """Measures a prior on tokens, and with their images the tokenizer and the prior together.

    Runs in evaluation mode, in float32 and without autocast, and leaves the models as they were. Under
    torch.distributed every process calls it with its own batches, as many as it has; all get the same result.

    Args:
        prior: a `PixelCNNPrior` or `TransformerPrior`, also wrapped or compiled.
        batches: yields dicts with image_tokens (B, h, w[, M]), and if known class_labels (B,) and pixel_values
            (B, C, H, W), all images once. `num_images`, if it has that, tells the bar its length.
        decoder: the tokenizer's model; with it and pixel_values there are bits_per_dim.
        progress: show a bar with images per second and the time left.

    Returns: metrics bits_per_token, bits_per_token_of_class (None without classes), bits_per_dim (None without
        images), token_entropy, position_entropy, num_images, images_per_second; and the code counts, (M, K).

    Raises: ValueError if there are no images, or the tokenizer is not the prior's.
    """
    network = unwrapped(prior)
    if decoder is not None:
        check_tokenizer(network.config, decoder)
    totals = _Totals(network, decoder)
    began = time.perf_counter()
    size = getattr(batches, "num_images", None)
    models = (network,) if decoder is None else (network, decoder)
    with canonical(*models), tqdm(desc="evaluate", unit="img", total=size, disable=not progress) as bar:
        for batch in batches:
            totals.update(batch)
            bar.update(len(batch["image_tokens"]))
    return totals.compute(began)


class _Totals:
    """Every accumulator of one evaluation."""

    def __init__(self, prior: Any, decoder: Any) -> None:
        self.prior, self.decoder, config = prior, decoder, prior.config
        self.device = prior.device
        self.tokens = config.num_tokens
        self.bits = ImageMeans("null", "own", "image", device=self.device)
        self.known = torch.zeros(2, dtype=torch.int64, device=self.device)
        self.codes = CodeCounts(config.codebook_size, config.num_codebooks, self.device)
        self.codes_of_places = CodeCounts(config.codebook_size, config.num_tokens, self.device)

    def update(self, batch: dict[str, Tensor]) -> None:
        """Adds the bits of a batch of images."""
        batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        image_tokens, class_labels = batch["image_tokens"], batch.get("class_labels")
        null = -self.prior.log_prob(image_tokens) * BITS
        own = image = torch.zeros_like(null)
        if class_labels is not None and self.prior.config.num_classes:
            own, self.known[0] = -self.prior.log_prob(image_tokens, class_labels) * BITS, 1
        if self.decoder is not None and "pixel_values" in batch:
            pixel_values = batch["pixel_values"]
            image = (null - self.decoder.log_prob(pixel_values, image_tokens) * BITS) / pixel_values[0].numel()
            self.known[1] = 1
        self.bits.update(len(null), null=null.mean(), own=own.mean(), image=image.mean())
        self.codes.update(image_tokens)
        self.codes_of_places.update(image_tokens.flatten(1))

    def compute(self, began: float) -> Evaluation:
        """The numbers over all processes."""
        means, code_counts = self.bits.compute(), self.codes.compute()
        has_classes, has_images = over_ranks(self.known, "max").tolist()
        num_images = int(over_ranks(self.bits.num_images))
        seconds = over_ranks(torch.tensor(time.perf_counter() - began, dtype=torch.float64), "max").item()
        return Evaluation(
            {
                "bits_per_token": means["null"] / self.tokens,
                "bits_per_token_of_class": means["own"] / self.tokens if has_classes else None,
                "bits_per_dim": means["image"] if has_images else None,
                "token_entropy": entropy(code_counts),
                "position_entropy": entropy(self.codes_of_places.compute()),
                "num_images": num_images,
                "images_per_second": num_images / seconds,
            },
            code_counts,
        )


def entropy(code_counts: Tensor) -> float:
    """Entropy in bits of each histogram (N, K), then the mean."""
    shares = code_counts.double() / code_counts.sum(dim=1, keepdim=True)
    return float(torch.special.entr(shares).sum(dim=1).mean() * BITS)
