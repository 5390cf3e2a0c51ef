"""Bits per dim of CIFAR-10 over the number of codebooks: what a short training bounds the likelihood of images by.

    python training/benchmarks/bits_per_dim.py --dataset_name uoft-cs/cifar10

For M = 1, 2, 4 and 10 codebooks of 512 codes on 8 x 8: an SQ-VAE whose decoder gives discretised logistic mixtures,
trained on its own bound; a Transformer prior over its tokens; then the bound on the whole test split,
-log2 P(image | tokens) - log2 P(tokens), with the prior's null class. For comparison the same with the decoder's
mixture replaced by a Gaussian of one variance a channel, at M = 1 and 10.

Writes a picture, table.md and a JSON file for each training to output/bits_per_dim; a second start goes on with what is
missing. `--num_processes` trainings at a time, each on one thread.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from short_priors import tokenized, tokens_of, train_prior

from hf_vq import SQVAEConfig, SQVAEModel, TransformerPrior, TransformerPriorConfig
from hf_vq.figures import BLUE, INK, ORANGE, SOFT, new_figure, save_figure
from hf_vq.prior_evaluation import evaluate_prior
from kept_jobs import Count, Job, Numbers, run_jobs
from panels import say
from short_runs import load_pixels, planned_steps, train_short

CODEBOOKS = (1, 2, 4, 10)
CODES, SIDE = 512, 8
TOKENIZER: dict[str, Any] = {
    "image_size": 32,
    "codebook_size": CODES,
    "codebook_dim": 4,
    "hidden_channels": [64, 128],
    "residual_channels": 128,
    "num_residual_blocks": 2,
    "initial_variance": 0.3,
    "temperature_end": 0.4,
}
PRIOR: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 4, "dropout": 0.0}
TOKENIZER_PLAN: dict[str, Any] = {"epochs": 1, "batch_size": 64, "learning_rate": 4e-3}
PRIOR_PLAN: dict[str, Any] = {"epochs": 2, "batch_size": 64, "learning_rate": 2e-3}
PUBLISHED = {
    "VAE (van den Oord et al. 2017)": 4.51,
    "VQ-VAE (the same)": 4.67,
    "VQ-VAE, soft EM (Roy et al. 2018)": 4.80,
    "VIMCO (van den Oord et al. 2017)": 5.14,
}


def train(
    count: Count, data: Mapping[str, Any], tokenizer: Mapping[str, Any], prior: Mapping[str, Any], seed: int
) -> Numbers:
    """One tokenizer, its prior, and the bound on the test split."""
    pixels = load_pixels(data["dataset_name"], "train")[: data["limit"]]
    torch.manual_seed(seed)
    steps = planned_steps(len(pixels), tokenizer["plan"]["epochs"], tokenizer["plan"]["batch_size"])
    model = SQVAEModel(SQVAEConfig(temperature_decay_steps=steps, **tokenizer["model"]))
    speed = train_short(model, pixels, **tokenizer["plan"], seed=seed, mixed_precision="bf16", count=count)
    sizes = {name: getattr(model.config, name) for name in ("codebook_size", "num_codebooks", "grid_size")}
    made_for: dict[str, Any] = {**sizes, "tokenizer_fingerprint": model.fingerprint()}
    network = TransformerPrior(TransformerPriorConfig(**made_for, **prior["model"]))
    train_prior(network, tokens_of(model, pixels), **prior["plan"], seed=seed, count=count)
    test = load_pixels(data["dataset_name"], "test")[: data["limit"]]
    return {
        **evaluate_prior(network, tokenized(model, test), decoder=model).metrics,
        "parameters": {name: net.num_parameters() for name, net in (("tokenizer", model), ("prior", network))},
        "images_per_second_of_tokenizer": speed,
    }


def trainings(dataset_name: str, limit: int) -> dict[str, Job]:
    """The mixture at every M, the Gaussian at both ends."""
    wanted = [("logistic_mixture", codebooks) for codebooks in CODEBOOKS]
    wanted += [("gaussian", codebooks) for codebooks in (CODEBOOKS[0], CODEBOOKS[-1])]
    jobs = {}
    for observation, codebooks in wanted:
        fields = {**TOKENIZER, "observation": observation, "num_codebooks": codebooks}
        settings = {
            "data": {"dataset_name": dataset_name, "limit": limit},
            "tokenizer": {"model": fields, "plan": TOKENIZER_PLAN},
            "prior": {"model": PRIOR, "plan": PRIOR_PLAN},
            "seed": 0,
        }
        images = limit * (TOKENIZER_PLAN["epochs"] + PRIOR_PLAN["epochs"])
        jobs[f"{observation}-{codebooks}"] = Job(train, settings, images)
    return jobs


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each training, as Markdown."""
    head = "| decoder | codebooks | bits per dim | of it tokens | bits per token | entropy of a token |"
    lines = [head, "|---|--:|--:|--:|--:|--:|"]
    for name, numbers in results.items():
        observation, codebooks = name.rsplit("-", 1)
        tokens = int(codebooks) * SIDE * SIDE * numbers["bits_per_token"] / (3 * 32 * 32)
        lines.append(
            f"| {observation.replace('_', ' ')} | {codebooks} | {numbers['bits_per_dim']:.3f} | {tokens:.3f} "
            f"| {numbers['bits_per_token']:.2f} | {numbers['token_entropy']:.2f} |"
        )
    return "\n".join([*lines, ""])


def draw(path: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """The bound over M, with what others published as lines."""
    figure, (axis,) = new_figure(1, (7.2, 4.4))
    for observation, colour in (("logistic_mixture", BLUE), ("gaussian", ORANGE)):
        names = [name for name in results if name.startswith(f"{observation}-")]
        points = [(int(name.rsplit("-", 1)[1]), results[name]["bits_per_dim"]) for name in names]
        label = f"SQ-VAE, {observation.replace('_', ' ')}"
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
