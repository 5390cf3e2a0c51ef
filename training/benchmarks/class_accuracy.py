"""Do images, their reconstructions and a prior's samples read as what they are? A classifier of real images says.

    python training/benchmarks/class_accuracy.py model_cards/sqvae-cifar10 --prior model_cards/sqvae-cifar10-prior

Trains a small residual net on the real training images (once: its weights are kept in --output_dir), and prints the
share that it calls by their label: of the test images, of their reconstructions, and of --samples images that the prior
drew for each class, for each --guidance_scale (1 is without guidance). What follows ± is one standard error.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

from hf_vq import ImageTokenizer
from hf_vq.evaluation import to_uint8, weights_hash
from hf_vq.files import replace_file
from hf_vq.models.prior_tokenizer import check_tokenizer
from hf_vq.streams import load_images
from hf_vq.token_batches import find_classes
from random_views import taken_at
from run_log import git_commit
from short_runs import load_pixels, to_pixel_values

WIDTHS = (32, 64, 128, 256)
EPOCHS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY, SMOOTHING = 6, 128, 4e-3, 0.05, 0.1
PADDING = 4
AT_ONCE = 250


class Residual(nn.Module):
    """x plus two convolutions of x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(convolution(width, width), convolution(width, width))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.layers(hidden)


def convolution(narrow: int, wide: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution, batch norm, SiLU."""
    return nn.Sequential(nn.Conv2d(narrow, wide, 3, stride, 1, bias=False), nn.BatchNorm2d(wide), nn.SiLU())


def make_classifier(num_channels: int, num_classes: int) -> nn.Sequential:
    """pixel_values (B, C, H, W) to scores (B, num_classes)."""
    stem = convolution(num_channels, WIDTHS[0])
    stages = [nn.Sequential(convolution(narrow, wide, stride=2), Residual(wide)) for narrow, wide in pairwise(WIDTHS)]
    return nn.Sequential(stem, *stages, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], num_classes))


def train_classifier(classifier: nn.Module, pixels: Tensor, labels: Tensor, seed: int) -> None:
    """AdamW with one cycle; images are mirrored and shifted."""
    steps = EPOCHS * (len(pixels) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    classifier.train()
    with tqdm(total=steps * BATCH_SIZE, desc="train the classifier", unit="img") as bar:
        for step in range(steps):
            start = step % (len(pixels) // BATCH_SIZE)
            if start == 0:
                order = torch.randperm(len(pixels), generator=generator)
            chosen = order[start * BATCH_SIZE : (start + 1) * BATCH_SIZE]
            with torch.autocast("cpu", torch.bfloat16):
                scores = classifier(to_pixel_values(moved(pixels[chosen], generator)))
            nn.functional.cross_entropy(scores.float(), labels[chosen], label_smoothing=SMOOTHING).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.update(BATCH_SIZE)


def moved(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Images, half of them mirrored, each shifted by up to `PADDING` pixels."""
    count, _, height, width = pixels.shape
    mirrored = torch.rand(count, generator=generator) < 0.5
    padded = nn.functional.pad(pixels, (PADDING,) * 4)
    down, right = torch.randint(2 * PADDING + 1, (2, count, 1), generator=generator)
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    columns = torch.where(mirrored.unsqueeze(1), padded.shape[-1] - 1 - columns, columns)
    return taken_at(padded, rows, columns)


def load_classifier(folder: Path, dataset_name: str, seed: int, num_channels: int, num_classes: int) -> nn.Module:
    """The one that lies there, or a new one."""
    torch.manual_seed(seed)
    classifier = make_classifier(num_channels, num_classes)
    path = folder / f"classifier-{Path(dataset_name).name}-seed{seed}.safetensors"
    if path.exists():
        classifier.load_state_dict(load_file(path))
    else:
        labels, _ = load_labels(dataset_name, "train")
        train_classifier(classifier, load_pixels(dataset_name, "train"), labels, seed)
        replace_file(path, lambda temporary: save_file(classifier.state_dict(), temporary))
    return classifier.eval()


def load_labels(dataset_name: str, split: str) -> tuple[Tensor, list[str]]:
    """The labels of a split, in the order of `load_pixels`, and the names of the classes."""
    stream: Any = load_images(dataset_name, streaming=True, train_split=split, validation_size=0).train
    column, names = find_classes(stream, None)
    if column is None:
        raise ValueError(f"{dataset_name} has no single column of classes")
    return torch.tensor([row[column] for row in stream.select_columns([column])]), names


@torch.no_grad()
def read(classifier: nn.Module, pixels: Tensor) -> Tensor:
    """The classes (N,) that the classifier sees in uint8 (N, C, H, W)."""
    return torch.cat([classifier(to_pixel_values(part)).argmax(1) for part in pixels.split(AT_ONCE)])


@torch.no_grad()
def reconstructed(tokenizer: ImageTokenizer, pixels: Tensor) -> Tensor:
    """What the tokens keep of images, in uint8."""
    model: Any = tokenizer.model
    parts = [model.decode(model.encode(to_pixel_values(part)).image_tokens) for part in pixels.split(AT_ONCE)]
    return torch.cat([to_uint8(part.pixel_values, tokenizer.processor) for part in parts])


@torch.no_grad()
def sampled(tokenizer: ImageTokenizer, prior: Any, labels: Tensor, guidance_scale: float, seed: int) -> Tensor:
    """An image of each class asked for, in uint8."""
    torch.manual_seed(seed)
    model: Any = tokenizer.model
    guidance = {} if math.isclose(guidance_scale, 1) else {"guidance_scale": guidance_scale}
    parts = []
    for part in tqdm(labels.split(AT_ONCE), desc=f"sample, guidance {guidance_scale:g}", unit=f"x {AT_ONCE} images"):
        sequences = prior.generate(class_labels=part, **guidance)
        decoded = model.decode(prior.image_tokens(sequences)).pixel_values
        parts.append(to_uint8(decoded, tokenizer.processor))
    return torch.cat(parts)


class Share(NamedTuple):
    """Of `num_images` images, the share that is called by its label."""

    accuracy: float
    num_images: int

    @property
    def standard_error(self) -> float:
        """Of the accuracy, from the number of images alone."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.num_images)


def measure(options: argparse.Namespace, tokenizer: ImageTokenizer, prior: Any) -> dict[str, Share]:
    """What was read -> how much of it is called by its label."""
    pixels, (labels, names) = load_pixels(options.dataset_name, "test"), load_labels(options.dataset_name, "test")
    where = (options.output_dir, options.dataset_name, options.seed)
    classifier = load_classifier(*where, num_channels=pixels.shape[1], num_classes=len(names))

    def share(shown: Tensor, truth: Tensor) -> Share:
        return Share(float((read(classifier, shown) == truth).float().mean()), len(truth))

    seen = {"test images": share(pixels, labels)}
    seen["their reconstructions"] = share(reconstructed(tokenizer, pixels), labels)
    asked = torch.arange(len(names)).repeat_interleave(options.samples)
    for scale in options.guidance_scale if prior is not None else ():
        drawn = sampled(tokenizer, prior, asked, scale, options.seed)
        seen[f"samples, guidance {scale:g}"] = share(drawn, asked)
    return seen


def about(options: argparse.Namespace, tokenizer: ImageTokenizer, prior: Any) -> dict[str, Any]:
    """What was measured, and by whom."""
    of_prior = {} if prior is None else {"prior": options.prior, "prior_sha256": weights_hash(prior)}
    of_tokenizer = {"model": options.model, "weights_sha256": weights_hash(tokenizer.model)}
    read_by = {"dataset_name": options.dataset_name, "samples_of_a_class": options.samples, "seed": options.seed}
    return {**of_tokenizer, **of_prior, **read_by, "git_commit": git_commit(Path(__file__).parent)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("model", help="a tokenizer")
    parser.add_argument("--prior", help="a prior over its tokens")
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10", help="labelled images (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=100, help="of each class (default: %(default)s)")
    parser.add_argument("--guidance_scale", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0])
    parser.add_argument("--output_dir", type=Path, default=Path("output/class_accuracy"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    tokenizer, prior = ImageTokenizer.from_pretrained(options.model), None
    if options.prior is not None:
        prior = AutoModelForCausalLM.from_pretrained(options.prior)
        check_tokenizer(prior.config, tokenizer.model)
    shares = measure(options, tokenizer, prior)
    told = {what: {**share._asdict(), "standard_error": share.standard_error} for what, share in shares.items()}
    text = json.dumps(about(options, tokenizer, prior) | {"read": told}, indent=2)
    replace_file(options.output_dir / "accuracy.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))
    print("| | images | read as their label |\n|---|--:|--:|")
    for what, share in shares.items():
        print(f"| {what} | {share.num_images:,} | {share.accuracy:.1%} ± {share.standard_error:.1%} |")


if __name__ == "__main__":
    main()
