"""Bits per dim of CIFAR-10 over the number of codebooks: what a short training bounds the likelihood of images by.

    python training/benchmarks/bits_per_dim.py --dataset_name uoft-cs/cifar10

For M = 1, 2, 4 and 10 codebooks of 512 codes on 8 x 8: a VQ-VAE (moving averages, k-means start, revival), trained on
squared errors; for the same tokens a second decoder, of discretised logistic mixtures; a Transformer prior over the
tokens. Then two bounds on the whole test split, -log2 P(image | tokens) - log2 P(tokens) with the prior's null class:
with a Gaussian of one variance a channel, fitted to training images, around the first decoder's image, and with the
second decoder's mixtures.

Writes a picture, table.md and a JSON file for each M to output/bits_per_dim; a second start goes on with what is
missing. `--num_processes` trainings at a time, each on one thread.
"""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_vq import TransformerPrior, TransformerPriorConfig, VQVAEConfig, VQVAEModel
from hf_vq.figures import BLUE, INK, ORANGE, SOFT, new_figure, save_figure
from hf_vq.observation_fit import fit_observation_variance
from hf_vq.other_decoder import with_other_decoder
from hf_vq.prior_evaluation import evaluate_prior
from kept_jobs import Count, Job, Numbers, run_jobs
from panels import say
from short_priors import tokenized, tokens_of, train_prior
from short_runs import authors_net, data_variance, evaluate_short, load_pixels, train_short

CODEBOOKS = (1, 2, 4, 10)
SIDE, DIMS = 8, 3 * 32 * 32
IMAGES_FOR_VARIANCE = 10_000
TOKENIZER: dict[str, Any] = {
    **authors_net(32, 3, output_activation="none", latent_projection=True, codebook_dim=8),
    "quantizer": "ema",
    "codebook_init": "kmeans",
    "revive_below": 0.1,
}
PRIOR: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 4, "dropout": 0.0}
TOKENIZER_PLAN: dict[str, Any] = {"epochs": 4, "batch_size": 64, "learning_rate": 1e-3}
DECODER_PLAN: dict[str, Any] = {"epochs": 2, "batch_size": 64, "learning_rate": 1e-3}
PRIOR_PLAN: dict[str, Any] = {"epochs": 2, "batch_size": 64, "learning_rate": 2e-3}
PUBLISHED = {
    "VAE (van den Oord et al. 2017)": 4.51,
    "VQ-VAE (van den Oord et al. 2017)": 4.67,
    "VQ-VAE, soft EM (Roy et al. 2018)": 4.80,
    "VIMCO (van den Oord et al. 2017)": 5.14,
}


def train(
    count: Count,
    data: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
    decoder_plan: Mapping[str, Any],
    prior: Mapping[str, Any],
    seed: int,
) -> Numbers:
    """A tokenizer, a second decoder, a prior, and the bounds on the test split."""
    pixels, test = (load_pixels(data["dataset_name"], split)[: data["limit"]] for split in ("train", "test"))
    shared: dict[str, Any] = {"seed": seed, "count": count}
    torch.manual_seed(seed)
    first = VQVAEModel(VQVAEConfig(**tokenizer["model"], data_variance=data_variance(pixels)))
    train_short(first, pixels, **tokenizer["plan"], **shared, mixed_precision="bf16")
    fit_observation_variance(first, tokenized(first, pixels), IMAGES_FOR_VARIANCE)
    second = with_other_decoder(first, observation="logistic_mixture")
    train_short(second, pixels, **decoder_plan, **shared, mixed_precision="bf16")
    sizes = {name: getattr(first.config, name) for name in ("codebook_size", "num_codebooks", "grid_size")}
    made_for: dict[str, Any] = {**sizes, "tokenizer_fingerprint": first.fingerprint()}
    network = TransformerPrior(TransformerPriorConfig(**made_for, **prior["model"]))
    train_prior(network, tokens_of(first, pixels), **prior["plan"], **shared)
    measured = evaluate_prior(network, tokenized(first, test), decoder=first).metrics
    tokens = float(measured["bits_per_token"] or 0) * network.config.num_tokens / DIMS
    networks = {"tokenizer": first, "mixture": second, "prior": network}
    return {
        "bits_per_dim_gaussian": measured.pop("bits_per_dim"),
        **measured,
        "bits_per_dim_of_tokens": tokens,
        "bits_per_dim_mixture": tokens + bits_of_images(second, test),
        "psnr": evaluate_short(first, test).metrics["psnr"],
        "parameters": {name: net.num_parameters() for name, net in networks.items()},
    }


@torch.no_grad()
def bits_of_images(model: VQVAEModel, pixels: Tensor) -> float:
    """-log2 P(image | tokens) over C * H * W, the mean over images."""
    nats = [model.log_prob(batch["pixel_values"], batch["image_tokens"]) for batch in tokenized(model, pixels)]
    return float(-torch.cat(nats).double().mean()) / math.log(2) / DIMS


def trainings(dataset_name: str, limit: int) -> dict[str, Job]:
    """One for each M."""
    images = limit * sum(plan["epochs"] for plan in (TOKENIZER_PLAN, DECODER_PLAN, PRIOR_PLAN))
    return {
        f"codebooks-{codebooks}": Job(
            train,
            {
                "data": {"dataset_name": dataset_name, "limit": limit},
                "tokenizer": {"model": {**TOKENIZER, "num_codebooks": codebooks}, "plan": TOKENIZER_PLAN},
                "decoder_plan": DECODER_PLAN,
                "prior": {"model": PRIOR, "plan": PRIOR_PLAN},
                "seed": 0,
            },
            images,
        )
        for codebooks in CODEBOOKS
    }


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each M, as Markdown."""
    head = "| codebooks | mixture | Gaussian | of both, tokens | bits per token | entropy of a token | psnr |"
    lines = [head, "|--:|--:|--:|--:|--:|--:|--:|"]
    for codebooks, numbers in zip(CODEBOOKS, results.values(), strict=True):
        bounds = [numbers[f"bits_per_dim_{kind}"] for kind in ("mixture", "gaussian", "of_tokens")]
        cells = [f"{bits:.3f}" for bits in bounds]
        cells += [f"{numbers[name]:.2f}" for name in ("bits_per_token", "token_entropy", "psnr")]
        lines.append(f"| {codebooks} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def draw(path: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """The bounds over M, with what others published as lines."""
    figure, (axis,) = new_figure(1, (7.2, 4.4))
    for kind, colour, label in (("mixture", BLUE, "logistic mixture"), ("gaussian", ORANGE, "Gaussian")):
        points = [(m, n[f"bits_per_dim_{kind}"]) for m, n in zip(CODEBOOKS, results.values(), strict=True)]
        axis.plot(*zip(*points, strict=True), "o-", color=colour, linewidth=2, label=label)
        for codebooks, bits in points:
            axis.annotate(f"{bits:.2f}", (codebooks, bits), (0, 7), textcoords="offset points", ha="center", color=INK)
    for name, bits in PUBLISHED.items():
        axis.axhline(bits, color=SOFT, linewidth=0.9, linestyle=":")
        beside: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "fontsize": 8, "color": SOFT}
        axis.annotate(f"{name} {bits:.2f}", (CODEBOOKS[-1], bits), (0, 2), **beside)
    axis.set_xticks(CODEBOOKS)
    say(axis, "CIFAR-10, whole test split, 8 x 8 tokens of 512 codes", "codebooks", "bits per dim (upper bound)")
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10")
    parser.add_argument("--limit", type=int, default=50_000, help="images that each training sees in an epoch")
    parser.add_argument("--output_dir", type=Path, default=Path("output/bits_per_dim"))
    parser.add_argument("--num_processes", type=int, default=1, help="trainings at a time, each on one thread; 0: here")
    options = parser.parse_args()
    results = run_jobs(options.output_dir, trainings(options.dataset_name, options.limit), options.num_processes)
    text = table(results)
    draw(options.output_dir / "bits_per_dim.png", results)
    (options.output_dir / "table.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nthe picture is in {options.output_dir}")


if __name__ == "__main__":
    main()
