"""Self-annealing of SQ-VAE, shown: Figure 2 of the paper (arXiv 2205.07547) and its Proposition 1, on Fashion-MNIST.

    python training/benchmarks/self_annealing.py --dataset_name zalando-datasets/fashion_mnist

(a) sigma^2 of the decoder and sigma_phi^2 of the quantizer over a training of 3 epochs; (b) the posterior over codes:
its entropy, and how often a draw equals the deterministic code, on held-out images; (c) the test error of a trained
sigma_phi^2 against fixed ones, each after as many epochs; (d) Proposition 1: with decoder, codebook and sigma^2 held
still, the sigma_phi^2 that encoder and sigma_phi^2 together arrive at, for a ladder of sigma^2, from (a)'s model.

The model is an `SQVAEConfig` as it comes (D = 4, sigma_phi^2 = exp(s), 1 at the start) with K = 256 and half the width.

Writes figure.png, verdict.md and a JSON file for each training to output/self_annealing; a second start goes on with
what is missing. `--num_processes` trainings at a time, each on one thread.
"""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_vq import SQVAEConfig, SQVAEModel
from kept_jobs import Count, Job, Numbers, run_jobs
from self_annealing_report import draw, verdict
from short_runs import evaluate_short, hold_out, load_pixels, planned_steps, to_pixel_values, train_short

MODEL: dict[str, Any] = {
    "image_size": 28,
    "num_channels": 1,
    "codebook_size": 256,
    "hidden_channels": [32, 64],
    "residual_channels": 32,
}
PLAN = {"batch_size": 64, "learning_rate": 4e-3}

# From the start of the trained one downwards.
FIXED_VARIANCES = (1.0, 0.3, 0.1, 0.03, 0.01)
TRAINED_SEEDS = (0, 1)

# (d): about tenfold above and below the sigma^2 at which (a) ends.
OBSERVATION_VARIANCES = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
ROUND_IMAGES = 12_800
MIN_ROUNDS, MAX_ROUNDS = 2, 8
STILL = 0.05

HELD_OUT, WATCHED = 5000, 256


class EncoderOnly(SQVAEModel):
    """Decoder, codebook and sigma^2 stand still; encoder and sigma_phi^2 learn from S / (2 sigma^2) and the rest."""

    def train(self, mode: bool = True) -> "EncoderOnly":
        super().train(mode)
        self.decoder.eval()  # batch statistics would move it
        return self

    @torch.no_grad()
    def step(self) -> None:
        held = self.observation_variance.clone()
        super().step()
        self.observation_variance.copy_(held)


class Watch:
    """What `train_short` calls after each step: keeps sigma^2, sigma_phi^2 and the posterior on the same images."""

    def __init__(self, pixels: Tensor, steps: int) -> None:
        self.pixel_values = to_pixel_values(pixels)
        self.points = points_to_watch(steps)
        self.errors: list[float] = []
        self.rows: list[dict[str, float]] = []

    def __call__(self, step: int, model: SQVAEModel, output: Any) -> None:
        self.errors.append(float(model.observation_variance.mean()))
        if step in self.points:
            # That of one batch jumps: the mean since the last point.
            sigma2 = sum(self.errors) / len(self.errors)
            self.rows.append({"step": step, "observation_variance": sigma2, **posterior(model, self.pixel_values)})
            self.errors.clear()


def points_to_watch(steps: int) -> set[int]:
    """Steps from 1 to the last: close to each other at the start, where most happens, then evenly."""
    early = {round(math.exp(index / 4)) for index in range(25)}
    return {step for step in early if step <= steps} | {round(steps * part / 60) for part in range(1, 61)} - {0}


@torch.no_grad()
def posterior(model: SQVAEModel, pixel_values: Tensor) -> dict[str, float]:
    """Statistics of the posterior over codes on images (B, C, H, W), and the share of draws equal to the argmax."""
    training = model.training
    model.eval()
    latents, log_variance = model.encoder(pixel_values)
    numbers = {name: float(value) for name, value in model.quantizer.statistics(latents, log_variance).items()}
    # The scale of the latents is free: what tells is sigma_phi^2 as a share of their variance per component.
    numbers["latent_variance"] = float(latents.var(dim=(0, 2, 3)).mean())
    drawn = model.quantizer.sample(latents, log_variance, torch.Generator().manual_seed(0))
    numbers["drawn_argmax"] = float((drawn == model.quantizer.search(latents, log_variance)).float().mean())
    model.train(training)
    return numbers


def make_model(steps: int, seed: int, fields: Mapping[str, Any]) -> SQVAEModel:
    """A model at its start."""
    torch.manual_seed(seed)
    model: Any = SQVAEModel(SQVAEConfig(**fields, temperature_decay_steps=max(1, steps)))
    return model.to(memory_format=torch.channels_last)


def train(
    count: Count, data: Mapping[str, Any], model: Mapping[str, Any], plan: Mapping[str, Any], folder: str | None
) -> Numbers:
    """One training, what was seen of it, and its numbers on the test split; `folder` keeps the model."""
    pixels, held_out = read(**data)
    steps = planned_steps(len(pixels), plan["epochs"], plan["batch_size"])
    trained = make_model(steps, plan["seed"], model)
    watch = Watch(held_out[:WATCHED], steps)
    train_short(trained, pixels, **plan, on_step=watch, count=count)
    if folder is not None:
        trained.save_pretrained(folder)
    metrics = evaluate_short(trained, load_pixels(data["dataset_name"], "test")).metrics
    return {"rows": watch.rows, "initial_variance": trained.config.initial_variance, **metrics}


def read(dataset_name: str, limit: int | None) -> tuple[Tensor, Tensor]:
    """Pixels to train on, at most `limit`, and held-out ones."""
    pixels, held_out = hold_out(load_pixels(dataset_name, "train"), HELD_OUT)
    return pixels[:limit], held_out


def climb(count: Count, start: Mapping[str, Any], observation_variance: float) -> Numbers:
    """One rung of (d): rounds of training until sigma_phi^2 no longer moves by 5 % over a round.

    Args:
        start: the settings of the training that the rung starts from.
    """
    pixels, held_out = read(**start["data"])
    model = with_fixed_decoder(start["folder"], observation_variance)
    size = min(ROUND_IMAGES, len(pixels))
    ends, last_fifth = [sigma_phi2(model)], math.inf
    while len(ends) <= MAX_ROUNDS and not (len(ends) > MIN_ROUNDS and is_still(ends, last_fifth)):
        part = pixels.roll(-(len(ends) - 1) * size, 0)[:size]
        track: list[float] = []
        train_short(
            model,
            part,
            **{**start["plan"], "epochs": 1, "seed": len(ends)},
            on_step=lambda *args, track=track: track.append(sigma_phi2(model)),
            count=count,
        )
        tail = track[-max(1, len(track) // 5) :]
        last_fifth = max(tail) / min(tail) - 1
        ends.append(track[-1])
    return {
        "observation_variance": observation_variance,
        "round_ends": ends,
        "last_fifth": last_fifth,
        "converged": is_still(ends, last_fifth),
        **posterior(model, to_pixel_values(held_out[:WATCHED])),
    }


def sigma_phi2(model: SQVAEModel) -> float:
    """The quantizer's variance."""
    return float(model.quantizer.scalars()["dequantization_variance"])


def with_fixed_decoder(folder: str, observation_variance: float) -> EncoderOnly:
    """The model of (a), of which only encoder and sigma_phi^2 learn, under this sigma^2 and the last temperature."""
    config = SQVAEConfig.from_pretrained(folder, variance_update="lagged")
    config.temperature_start = config.temperature_end
    model = EncoderOnly.from_pretrained(folder, config=config)
    model.observation_variance.fill_(observation_variance)
    model.decoder.requires_grad_(False)
    model.quantizer.codebook.requires_grad_(False)
    return model


def is_still(round_ends: list[float], last_fifth: float) -> bool:
    """Whether neither the last fifth of the last round nor the last round as a whole moved sigma_phi^2 by 5 %."""
    # The learning rate falls to 0 in a round and starts anew in the next: the end of a round alone would prove little.
    return last_fifth < STILL and abs(math.log(round_ends[-1] / round_ends[-2])) < math.log1p(STILL)


def trainings(dataset_name: str, limit: int | None, folder: Path, epochs: int) -> dict[str, Job]:
    """The jobs of (a), (b) and (c); the first seed's model is kept, as the start of (d)."""
    data = {"dataset_name": dataset_name, "limit": limit}
    images = epochs * len(read(dataset_name, limit)[0])

    def job(seed: int, folder: str | None = None, **fields: Any) -> Job:
        plan = {**PLAN, "epochs": epochs, "seed": seed}
        return Job(train, {"data": data, "model": {**MODEL, **fields}, "plan": plan, "folder": folder}, images)

    first, *others = TRAINED_SEEDS
    jobs = {f"trained-seed-{first}": job(first, str(folder / "trained"))}
    jobs |= {f"trained-seed-{seed}": job(seed) for seed in others}
    still = {f"fixed-{value:g}": job(first, variance_lr_scale=0.0, initial_variance=value) for value in FIXED_VARIANCES}
    return {**jobs, **still}


def rungs(start: Mapping[str, Any]) -> dict[str, Job]:
    """The jobs of (d), from the training with these settings."""
    images = MIN_ROUNDS * min(ROUND_IMAGES, start["data"]["limit"] or ROUND_IMAGES)
    return {
        f"rung-{value:g}": Job(climb, {"start": start, "observation_variance": value}, images)
        for value in OBSERVATION_VARIANCES
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--dataset_name", default="zalando-datasets/fashion_mnist")
    parser.add_argument("--epochs", type=int, default=3, help="of each training of (a) to (c)")
    parser.add_argument("--limit", type=int, help="train on the first so many images only, to try the command out")
    parser.add_argument("--output_dir", type=Path, default=Path("output/self_annealing"))
    parser.add_argument("--num_processes", type=int, default=1, help="trainings at a time, each on one thread; 0: here")
    options = parser.parse_args()
    jobs = trainings(options.dataset_name, options.limit, options.output_dir, options.epochs)
    results = run_jobs(options.output_dir, jobs, options.num_processes)
    start = jobs[f"trained-seed-{TRAINED_SEEDS[0]}"].settings
    results |= run_jobs(options.output_dir, rungs(start), options.num_processes)
    codes = MODEL["codebook_size"]
    text = verdict(results, codes)
    draw(options.output_dir / "figure.png", results, codes)
    (options.output_dir / "verdict.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\n{options.output_dir / 'figure.png'}")


if __name__ == "__main__":
    main()
