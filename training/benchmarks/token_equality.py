"""Are an image's tokens the same in any batch, on any number of threads?

    python training/benchmarks/token_equality.py model_cards/sqvae-cifar10 --dataset_name uoft-cs/cifar10

Encodes the whole test split in float32, in batches of 256 and one by one, on one thread and on two. Prints how many
tokens differ from those of one thread in batches of 256, and the largest margin of those: how much nearer the latent is
to one of the two codes, as a share of the squared distance. Fails where more than 1 in 10,000 (or one of fewer) differ,
or by a margin of 1e-4 or more.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModel

from hf_vq.canonical import canonical
from hf_vq.reference_tokens import Verification, compare_tokens
from short_runs import load_pixels, to_pixel_values

WAYS = ((1, 256), (2, 256), (1, 1), (2, 1))
TOKENS_FOR_ONE, LARGEST_MARGIN = 10_000, 1e-4


class Encoded(NamedTuple):
    """latents, log_variance (None for most quantizers) and image_tokens of many images."""

    latents: Tensor
    log_variance: Tensor | None
    image_tokens: Tensor


def encode(model: Any, pixels: Tensor, threads: int, batch_size: int) -> Encoded:
    """What a model makes of uint8 pixels (N, C, H, W)."""
    torch.set_num_threads(threads)
    parts = []
    with canonical(model), tqdm(total=len(pixels), desc=f"threads {threads}, batch {batch_size}", unit="img") as bar:
        for part in pixels.split(batch_size):
            latents, log_variance = model.encoder(to_pixel_values(part))
            parts.append(Encoded(latents, log_variance, model.quantizer.search(latents, log_variance)))
            bar.update(len(part))
    latents, log_variance, tokens = (None if p[0] is None else torch.cat(p) for p in zip(*parts, strict=True))
    assert latents is not None and tokens is not None
    return Encoded(latents, log_variance, tokens)


def compare(model: Any, pixels: Tensor) -> dict[tuple[int, int], Verification]:
    """(threads, batch size) -> how its tokens compare with those of the first way."""
    first = encode(model, pixels, *WAYS[0])
    others = {way: encode(model, pixels, *way).image_tokens for way in WAYS[1:]}
    return {way: compare_tokens(model, *first, tokens) for way, tokens in others.items()}


def most_differing(verification: Verification) -> int:
    """Near-ties that are to be expected."""
    return max(1, verification.num_tokens // TOKENS_FOR_ONE)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("model", help="a tokenizer")
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10", help="(default: %(default)s)")
    parser.add_argument("--limit", type=int, help="only the first images of the test split")
    options = parser.parse_args(arguments)
    model = AutoModel.from_pretrained(options.model)
    found = compare(model, load_pixels(options.dataset_name, "test", options.limit))
    print("| threads | batch | tokens | others | largest margin |\n|--:|--:|--:|--:|--:|")
    for (threads, batch_size), v in found.items():
        print(f"| {threads} | {batch_size} | {v.num_tokens:,} | {v.num_differing} | {v.largest_margin:.1e} |")
    if any(v.num_differing > most_differing(v) or v.largest_margin >= LARGEST_MARGIN for v in found.values()):
        sys.exit("the tokens of an image depend on its batch or on the threads")


if __name__ == "__main__":
    main()
