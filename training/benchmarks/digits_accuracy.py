"""Do reconstructed and sampled digits read as what they are?

    python training/benchmarks/digits_accuracy.py output/sqvae-digits --prior output/prior-digits

A classifier fitted on the real training digits reads the test digits, their reconstructions, and with a prior as many
samples of each class as --samples says; prints the share that it calls by their label.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from PIL.Image import Image
from transformers import pipeline

from digits import features, fit_reader, load_digits_images
from hf_vq import ImageTokenizer
from hf_vq.streams import decode_image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a tokenizer trained on the digits")
    parser.add_argument("--prior", help="a prior over its tokens")
    parser.add_argument("--samples", type=int, default=50, help="of each class (default: %(default)s)")
    options = parser.parse_args()
    tokenizer = ImageTokenizer.from_pretrained(options.model)

    reader = fit_reader()
    test: Any = load_digits_images().test
    images, labels = [decode_image(cell) for cell in test["image"]], test["label"]
    reconstructions = tokenizer.batch_decode(tokenizer(images).input_ids)
    real, kept = (reader.score(features(seen), labels) for seen in (images, reconstructions))
    print(
        f"accuracy on {len(images)} test digits {real:.4f}, on their reconstructions {kept:.4f}: kept {kept / real:.4f}"
    )
    if options.prior is not None:
        asked = [digit for digit in range(10) for _ in range(options.samples)]
        read = reader.predict(features(samples(options.prior, asked)))
        right = read == np.array(asked)
        of_each = ", ".join(f"{digit}: {share:.2f}" for digit, share in enumerate(right.reshape(10, -1).mean(axis=1)))
        print(f"{len(asked)} samples by class: {right.mean():.4f} are read as what was asked for ({of_each})")


def samples(prior: str, class_labels: list[int]) -> list[Image]:
    """An image of each class asked for, drawn as the prior draws by itself."""
    pipe = pipeline("unconditional-image-generation", model=prior)  # type: ignore[call-overload]  # a registered task
    torch.manual_seed(0)
    images: list[Image] = pipe(class_labels=class_labels)
    return images


if __name__ == "__main__":
    main()
