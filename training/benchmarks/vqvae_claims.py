"""What is said of VQ-VAE (arXiv 1711.00937), and of its soft EM (arXiv 1805.11063), tried on Fashion-MNIST.

    python training/benchmarks/vqvae_claims.py --dataset_name zalando-datasets/fashion_mnist

1. Results do not depend on the commitment weight beta from 0.1 to 2. 2. Without it the encoder's output grows without
bound. 3. Without stop-gradients, ||z_e - e||^2 as it stands does not converge, because "the two chase each other's
tails". 4. Soft EM with m = 1, 5 or 10 draws keeps more codes alive than hard EMA.

A net of the paper's shape (two strided convolutions, two residual blocks, latents by a 1x1 convolution, linear output),
with group norm in the residual blocks, and for claim 2 also without any, as in the paper. K = 256, D = 64, 800 steps of
Adam on batches of 32, two seeds.

Writes a picture for each claim, verdict.md and a JSON file for each training to output/vqvae_claims; a second start
goes on with what is missing. `--num_processes` trainings at a time, each on one thread.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_vq import VQVAEConfig, VQVAEModel
from hf_vq.models.quantizers import code_perplexity, squared_distance, to_rows
from hf_vq.models.vector_quantizers import VectorQuantizer
from kept_jobs import Count, Job, Numbers, run_jobs
from short_runs import data_variance, evaluate_short, hold_out, load_pixels, planned_steps, to_pixel_values, train_short
from vqvae_claims_report import draw, verdict

NET: dict[str, Any] = {
    "image_size": 28,
    "num_channels": 1,
    "codebook_size": 256,
    "codebook_dim": 64,
    "hidden_channels": [32, 64],
    "num_residual_blocks": 2,
    "residual_channels": 64,
    "norm": "group",
    "activation": "relu",
}
IMAGES = 25_600
# Codes that learn by gradients move so far a step and component: at 1e-3 they would not reach the latents in time.
PLAN = {"epochs": 1, "batch_size": 32, "learning_rate": 4e-3}
SEEDS = (0, 1)
HELD_OUT, WATCHED, POINTS = 5000, 256, 40

COMMITMENT_WEIGHTS = (0.1, 0.25, 1.0, 2.0)
NUM_SAMPLES = (1, 5, 10)


class WithoutStopGradient(VectorQuantizer):
    """One term pulls latents and codes to each other: commitment_weight * ||z_e - e||^2, no stop-gradient in it."""

    def row_loss(self, rows: Tensor, vectors: Tensor) -> Tensor:
        return self.commitment_weight * squared_distance(rows, vectors) / rows.shape[-1]


class WithoutStopGradientModel(VQVAEModel):
    """A VQ-VAE whose latents and codes meet without stop-gradients."""

    def make_quantizer(self) -> VectorQuantizer:
        config = self.config
        return WithoutStopGradient(
            config.codebook_size, config.codebook_dim, commitment_weight=config.commitment_weight
        )


class Watch:
    """What `train_short` calls after each step: keeps norms, distances and perplexity on the same held-out images."""

    def __init__(self, pixels: Tensor, steps: int) -> None:
        self.pixel_values = to_pixel_values(pixels)
        self.points = {1, 2, 5, 10, 20} | {round(steps * part / POINTS) for part in range(1, POINTS + 1)}
        self.rows: list[dict[str, float]] = []

    def __call__(self, step: int, model: VQVAEModel, output: Any) -> None:
        if step in self.points:
            self.rows.append({"step": step, **latents_and_codes(model, self.pixel_values)})


@torch.no_grad()
def latents_and_codes(model: VQVAEModel, pixel_values: Tensor) -> dict[str, float]:
    """Mean norm of the encoder's outputs and of the codes they take, their mean squared distance, the perplexity."""
    model.eval()
    latents = model.encoder(pixel_values)[0]
    image_tokens = model.quantizer.search(latents)
    rows, chosen = to_rows(latents)[0], to_rows(model.quantizer.lookup(image_tokens))[0]
    model.train()
    return {
        "latent_norm": float(rows.norm(dim=1).mean()),
        "code_norm": float(chosen.norm(dim=1).mean()),
        "distance": float(squared_distance(rows, chosen).mean()),
        "perplexity": float(code_perplexity(image_tokens.flatten()[None], model.config.codebook_size)),
    }


def train(
    count: Count,
    data: Mapping[str, Any],
    model: Mapping[str, Any],
    plan: Mapping[str, Any],
    stop_gradient: bool = True,
) -> Numbers:
    """One training, what was seen of it, and its numbers on the test split."""
    pixels, held_out = hold_out(load_pixels(data["dataset_name"], "train"), HELD_OUT)
    config = VQVAEConfig(data_variance=data_variance(pixels), **model)
    torch.manual_seed(plan["seed"])
    trained = (VQVAEModel if stop_gradient else WithoutStopGradientModel)(config)
    pixels = pixels[: data["limit"]]
    watch = Watch(held_out[:WATCHED], planned_steps(len(pixels), plan["epochs"], plan["batch_size"]))
    train_short(trained, pixels, **plan, on_step=watch, count=count)
    return {"rows": watch.rows, **evaluate_short(trained, load_pixels(data["dataset_name"], "test")).metrics}


def variants() -> dict[str, dict[str, Any]]:
    """What is trained, by name: the arguments of `train` beside data and seed."""
    gradient: dict[str, Any] = {"quantizer": "gradient"}
    bare: dict[str, Any] = {"norm": "none"}
    weights = {f"beta-{beta:g}": {**gradient, "commitment_weight": beta} for beta in (0.0, *COMMITMENT_WEIGHTS)}
    without_norm = {f"bare-beta-{beta:g}": {**gradient, **bare, "commitment_weight": beta} for beta in (0.0, 0.25)}
    averages: dict[str, dict[str, Any]] = {
        "hard": {"quantizer": "ema"},
        "hard-beta-0": {"quantizer": "ema", "commitment_weight": 0.0},
    }
    tails = {f"no-stop-{w:g}": {**gradient, "commitment_weight": w, "stop_gradient": False} for w in (1.0, 1.25)}
    soft: dict[str, dict[str, Any]] = {
        f"soft-{draws}": {"quantizer": "soft_em", "num_samples": draws} for draws in NUM_SAMPLES
    }
    return weights | without_norm | averages | tails | soft


def trainings(dataset_name: str, limit: int) -> dict[str, Job]:
    """Every variant with every seed."""
    jobs = {}
    for seed in SEEDS:
        for name, fields in variants().items():
            own = dict(fields)
            stopped = {"stop_gradient": own.pop("stop_gradient")} if "stop_gradient" in own else {}
            data, plan = {"dataset_name": dataset_name, "limit": limit}, {**PLAN, "seed": seed}
            settings = {"data": data, "model": {**NET, **own}, "plan": plan, **stopped}
            jobs[f"{name}-seed-{seed}"] = Job(train, settings, limit)
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--dataset_name", default="zalando-datasets/fashion_mnist")
    parser.add_argument("--limit", type=int, default=IMAGES, help="images that each training sees")
    parser.add_argument("--output_dir", type=Path, default=Path("output/vqvae_claims"))
    parser.add_argument("--num_processes", type=int, default=1, help="trainings at a time, each on one thread; 0: here")
    options = parser.parse_args()
    results = run_jobs(options.output_dir, trainings(options.dataset_name, options.limit), options.num_processes)
    text = verdict(results)
    draw(options.output_dir, results)
    (options.output_dir / "verdict.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\npictures in {options.output_dir}")


if __name__ == "__main__":
    main()
