"""Every quantizer on one net, data set and plan: the SQ-VAE authors' 341k parameters, CIFAR-10, 4 epochs, 2 seeds.

    python training/benchmarks/fixed_net.py                 # trains what is missing; a second start goes on
    python training/benchmarks/fixed_net.py --time          # images per second of each row, alone and in turn
    python training/benchmarks/fixed_net.py --table         # prints the table; writes table.md and figure.png

One JSON a row and seed under --output_dir, and what is there is not trained again; under other settings that is an
error. Of the training images 5,000 are held out, for whoever wants to choose a setting; the numbers are of the test
images. The training is fair in epochs and in plan, not tuned: no row has a learning rate of its own.
"""

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm.auto import tqdm

from fixed_net_report import report
from fixed_net_rows import ROWS
from kept_jobs import Count, Job, Numbers, run_jobs
from run_log import replace_text, usable_cores
from short_runs import (
    authors_net,
    data_variance,
    evaluate_short,
    hold_out,
    load_pixels,
    planned_steps,
    train_short,
)

HELD_OUT = 5000
WARM_UP_STEPS, TIMED_STEPS, ROUNDS = 10, 60, 5
TIMES_FILE = "times.json"
SETTINGS = ("dataset_name", "epochs", "batch_size", "learning_rate", "mixed_precision")
OF_A_STEP = ("batch_size", "learning_rate", "mixed_precision", "seed")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.table:
        print(report(options.output_dir, TIMES_FILE))
        return
    pixels, _ = training_pixels(options.dataset_name, options.limit)
    jobs = plan(options, pixels)
    if options.time:
        first = [job.settings for job in jobs.values() if job.settings["seed"] == options.seeds[0]]
        time_rows(first, pixels, options.output_dir)
        return
    load_pixels(options.dataset_name, "test", options.limit)  # decoded here, so that no two jobs do it
    run_jobs(options.output_dir, jobs, options.num_processes)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags; rows are checked here, so that a wrong name costs nothing."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10", help="a name on the Hub, or a local folder")
    parser.add_argument("--output_dir", type=Path, default=Path("output/fixed_net"))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no", help="autocast of the forward")
    parser.add_argument("--limit", type=int, help="only the first images of each split, for a trial")
    help_processes = "jobs at once, each with one thread; 0 trains in this process; by default the cores"
    parser.add_argument("--num_processes", type=int, default=usable_cores(), help=help_processes)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--time", action="store_true", help="measure images per second instead")
    parser.add_argument("--table", action="store_true", help="print what is there instead")
    return parser.parse_args(arguments)


def training_pixels(dataset_name: str, limit: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Training images and held-out images, (N, C, H, W) uint8; at most a tenth is held out."""
    pixels = load_pixels(dataset_name, "train", limit)
    return hold_out(pixels, min(HELD_OUT, len(pixels) // 10))


def plan(options: argparse.Namespace, pixels: torch.Tensor) -> dict[str, Job]:
    """The jobs by name, the first seed of every row first, so that a run that is cut short has all rows."""
    steps = planned_steps(len(pixels), options.epochs, options.batch_size)
    shared = {name: getattr(options, name) for name in SETTINGS}
    # Rounded, so that another machine's last bit is not another setting.
    known = {"temperature_decay_steps": steps, "data_variance": round(data_variance(pixels), 6)}
    jobs = {}
    for seed in options.seeds:
        for name in options.rows:
            config_class = ROWS[name].model_class.config_class
            planned = {field: value for field, value in known.items() if hasattr(config_class, field)}
            model = authors_net(pixels.shape[-1], pixels.shape[1], **planned, **ROWS[name].fields)
            images = {"images": len(pixels), "limit": options.limit}
            settings = {"row": name, "seed": seed, **images, **shared, "device": options.device, "model": model}
            jobs[f"{name}-seed{seed}"] = Job(train_and_measure, settings, steps * options.batch_size)
    return jobs


def train_and_measure(count: Count, **settings: Any) -> Numbers:
    """One training, and the test images through `hf_vq.evaluation`."""
    pixels, _ = training_pixels(settings["dataset_name"], settings["limit"])
    model = build(settings)
    options = {name: settings[name] for name in ("epochs", *OF_A_STEP)}
    rate = train_short(model, pixels, **options, count=count)
    evaluation = evaluate_short(model, load_pixels(settings["dataset_name"], "test", settings["limit"]))
    tokens = model.config.grid_size[0] * model.config.grid_size[1] * model.config.num_codebooks
    return {
        "metrics": evaluation.metrics,
        "codebook_size": model.config.codebook_size,
        "bits_per_image": tokens * math.log2(model.config.codebook_size),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training_images_per_second": rate,
    }


def build(settings: Mapping[str, Any]) -> Any:
    """The model of a job, its weights drawn from the job's seed."""
    torch.manual_seed(settings["seed"])
    model_class: Any = ROWS[settings["row"]].model_class
    model = model_class(model_class.config_class(**settings["model"]))
    return model.to(settings["device"], memory_format=torch.channels_last)


def time_rows(jobs: Sequence[Mapping[str, Any]], pixels: torch.Tensor, output_dir: Path) -> None:
    """Images per second of each row: one after the other, in rounds, on one thread; the median stands in `TIMES_FILE`.

    A disturbance of the machine so meets all rows alike; on a busy one, the rounds differ.
    """
    torch.set_num_threads(1)
    rates: dict[str, list[float]] = {settings["row"]: [] for settings in jobs}
    for _ in tqdm(range(ROUNDS), desc="time", unit="round"):
        for settings in jobs:
            rates[settings["row"]].append(rate_of(settings, pixels))
    path = output_dir / TIMES_FILE
    known = json.loads(path.read_text()) if path.exists() else {}
    for settings in jobs:
        name = settings["row"]
        measured = {"images_per_second": statistics.median(rates[name]), "rounds": rates[name]}
        known[name] = {**measured, "settings": settings, "machine": machine(settings["device"])}
        rounds = ", ".join(f"{rate:.0f}" for rate in rates[name])
        print(f"{ROWS[name].label:36}{measured['images_per_second']:8.0f}   of {rounds}")
    output_dir.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(known, indent=2) + "\n")


def rate_of(settings: Mapping[str, Any], pixels: torch.Tensor) -> float:
    """Images per second of a training step of this row, after a warm-up."""
    batch_size = settings["batch_size"]
    marks: dict[int, float] = {}

    def mark(step: int, model: Any, output: Any) -> None:
        if step in (WARM_UP_STEPS, WARM_UP_STEPS + TIMED_STEPS):
            output.loss.item()  # an accelerator is still at work
            marks[step] = time.perf_counter()

    taken = pixels[: (WARM_UP_STEPS + TIMED_STEPS) * batch_size]
    options = {name: settings[name] for name in OF_A_STEP}
    train_short(build(settings), taken, **options, epochs=1, on_step=mark)
    return TIMED_STEPS * batch_size / (marks[WARM_UP_STEPS + TIMED_STEPS] - marks[WARM_UP_STEPS])


def machine(device: str) -> str:
    """What the rates belong to."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


if __name__ == "__main__":
    main()
