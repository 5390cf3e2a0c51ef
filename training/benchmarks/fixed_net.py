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
import multiprocessing
import os
import platform
import statistics
import sys
import time
import traceback
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm.auto import tqdm

from fixed_net_report import report
from fixed_net_rows import ROWS
from run_log import git_commit, installed_versions, refuse_other_settings, replace_text
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
STEPS_BETWEEN_COUNTS = 20
TIMES_FILE = "times.json"
DONE = ": done"
SETTINGS = ("dataset_name", "epochs", "batch_size", "learning_rate", "mixed_precision")
OF_A_STEP = ("batch_size", "learning_rate", "mixed_precision", "seed")


class Job(NamedTuple):
    """One row and seed: what is trained, and where its numbers go."""

    settings: dict[str, Any]
    limit: int | None
    path: Path

    @property
    def name(self) -> str:
        return f"{self.settings['row']}, seed {self.settings['seed']}"

    @property
    def images(self) -> int:
        """Images that its training sees."""
        batch_size: int = self.settings["batch_size"]
        return planned_steps(self.settings["images"], self.settings["epochs"], batch_size) * batch_size


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.table:
        print(report(options.output_dir, TIMES_FILE))
        return
    pixels, _ = training_pixels(options.dataset_name, options.limit)
    jobs = plan(options, pixels)
    if options.time:
        time_rows([job for job in jobs if job.settings["seed"] == options.seeds[0]], pixels, options.output_dir)
        return
    load_pixels(options.dataset_name, "test", options.limit)  # decoded here, so that no two jobs do it
    del pixels
    missing = [job for job in jobs if not is_done(job)]
    print(f"{len(jobs) - len(missing)} of {len(jobs)} jobs are done", flush=True)
    if failures := work_off(missing, options.num_processes):
        sys.exit("\n".join([f"{len(failures)} of {len(missing)} jobs failed:", *failures]))


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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    help_processes = "jobs at once, each with one thread; 0 trains in this process; by default the cores"
    parser.add_argument("--num_processes", type=int, default=cores, help=help_processes)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--time", action="store_true", help="measure images per second instead")
    parser.add_argument("--table", action="store_true", help="print what is there instead")
    return parser.parse_args(arguments)


def training_pixels(dataset_name: str, limit: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Training images and held-out images, (N, C, H, W) uint8; at most a tenth is held out."""
    pixels = load_pixels(dataset_name, "train", limit)
    return hold_out(pixels, min(HELD_OUT, len(pixels) // 10))


def plan(options: argparse.Namespace, pixels: torch.Tensor) -> list[Job]:
    """The jobs, the first seed of every row first, so that a run that is cut short has all rows."""
    steps = planned_steps(len(pixels), options.epochs, options.batch_size)
    shared = {name: getattr(options, name) for name in SETTINGS}
    # Rounded, so that another machine's last bit is not another setting.
    known = {"temperature_decay_steps": steps, "data_variance": round(data_variance(pixels), 6)}
    jobs = []
    for seed in options.seeds:
        for name in options.rows:
            config_class = ROWS[name].model_class.config_class
            planned = {field: value for field, value in known.items() if hasattr(config_class, field)}
            model = authors_net(pixels.shape[-1], pixels.shape[1], **planned, **ROWS[name].fields)
            settings = {"row": name, "seed": seed, "images": len(pixels), **shared, "device": options.device}
            path = options.output_dir / f"{name}-seed{seed}.json"
            jobs.append(Job({**settings, "model": model}, options.limit, path))
    return jobs


def is_done(job: Job) -> bool:
    """Whether the numbers of this job are there.

    Raises: ValueError that names the settings, if those that are there were other ones.
    """
    if not job.path.exists():
        return False
    refuse_other_settings(job.path, json.loads(job.path.read_text())["settings"], job.settings)
    return True


def work_off(jobs: Sequence[Job], num_processes: int) -> list[str]:
    """Runs the jobs, `num_processes` at once, or with 0 in this process; returns what went wrong, and with which."""
    context = multiprocessing.get_context("spawn")
    seen = context.Value("q", 0)  # images of all jobs, for the bar
    waiting, failures = deque(jobs), []
    running: dict[Any, Job] = {}
    pace = {"miniters": 1, "mininterval": 1 if sys.stderr.isatty() else 60}
    with tqdm(total=sum(job.images for job in jobs), unit="img", **pace) as bar:
        while waiting or running:
            while waiting and len(running) < num_processes:
                job = waiting.popleft()
                process = context.Process(target=run_job, args=(job, seen), daemon=True)
                process.start()
                running[process] = job
            if num_processes:
                wait([process.sentinel for process in running], timeout=1)
                over = [process for process in running if not process.is_alive()]
                outcomes = [_outcome(running.pop(process), process.exitcode) for process in over]
            else:
                run_job(waiting[0], seen)
                outcomes = [_outcome(waiting.popleft(), None)]
            bar.update(seen.value - bar.n)
            for outcome in outcomes:
                tqdm.write(outcome)
            failures += [outcome for outcome in outcomes if not outcome.endswith(DONE)]
    return failures


def _outcome(job: Job, exit_code: int | None) -> str:
    """What became of a job: the last line of its error; one that was killed has left none."""
    if job.path.exists():
        return f"{job.name}{DONE}"
    error_file = _error_file(job)
    if not error_file.exists():
        return f"{job.name}: ended with exit code {exit_code} and without a word"
    return f"{job.name}: {error_file.read_text().strip().splitlines()[-1]} ({error_file})"


def run_job(job: Job, seen: Any) -> None:
    """Trains and measures, and writes the numbers, or beside them what went wrong."""
    error_file = _error_file(job)
    error_file.unlink(missing_ok=True)
    job.path.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    try:
        replace_text(job.path, json.dumps(train_and_measure(job, seen), indent=2) + "\n")
    except Exception:
        error_file.write_text(traceback.format_exc())


def _error_file(job: Job) -> Path:
    return job.path.with_suffix(".error.txt")


def train_and_measure(job: Job, seen: Any) -> dict[str, Any]:
    """One training, and the test images through `hf_vq.evaluation`."""
    settings = job.settings
    pixels, _ = training_pixels(settings["dataset_name"], job.limit)
    model = build(job)

    def count(step: int, *_: Any) -> None:
        if step % STEPS_BETWEEN_COUNTS == 0:
            with seen.get_lock():
                seen.value += STEPS_BETWEEN_COUNTS * settings["batch_size"]

    options = {name: settings[name] for name in ("epochs", *OF_A_STEP)}
    rate = train_short(model, pixels, **options, on_step=count, progress=False)
    evaluation = evaluate_short(model, load_pixels(settings["dataset_name"], "test", job.limit))
    tokens = model.config.grid_size[0] * model.config.grid_size[1] * model.config.num_codebooks
    return {
        "settings": settings,
        "metrics": evaluation.metrics,
        "codebook_size": model.config.codebook_size,
        "bits_per_image": tokens * math.log2(model.config.codebook_size),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training_images_per_second": rate,
        "git_commit": git_commit(Path(__file__).parent),
        "versions": installed_versions(),
    }


def build(job: Job) -> Any:
    """The model of a job, its weights drawn from the job's seed."""
    torch.manual_seed(job.settings["seed"])
    model_class: Any = ROWS[job.settings["row"]].model_class
    model = model_class(model_class.config_class(**job.settings["model"]))
    return model.to(job.settings["device"], memory_format=torch.channels_last)


def time_rows(jobs: Sequence[Job], pixels: torch.Tensor, output_dir: Path) -> None:
    """Images per second of each row: one after the other, in rounds, on one thread; the median stands in `TIMES_FILE`.

    A disturbance of the machine so meets all rows alike; on a busy one, the rounds differ.
    """
    torch.set_num_threads(1)
    rates: dict[str, list[float]] = {job.settings["row"]: [] for job in jobs}
    for _ in tqdm(range(ROUNDS), desc="time", unit="round"):
        for job in jobs:
            rates[job.settings["row"]].append(rate_of(job, pixels))
    path = output_dir / TIMES_FILE
    known = json.loads(path.read_text()) if path.exists() else {}
    for job in jobs:
        name = job.settings["row"]
        measured = {"images_per_second": statistics.median(rates[name]), "rounds": rates[name]}
        known[name] = {**measured, "settings": job.settings, "machine": machine(job.settings["device"])}
        rounds = ", ".join(f"{rate:.0f}" for rate in rates[name])
        print(f"{ROWS[name].label:36}{measured['images_per_second']:8.0f}   of {rounds}")
    output_dir.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(known, indent=2) + "\n")


def rate_of(job: Job, pixels: torch.Tensor) -> float:
    """Images per second of a training step of this row, after a warm-up."""
    batch_size = job.settings["batch_size"]
    marks: dict[int, float] = {}

    def mark(step: int, model: Any, output: Any) -> None:
        if step in (WARM_UP_STEPS, WARM_UP_STEPS + TIMED_STEPS):
            output.loss.item()  # an accelerator is still at work
            marks[step] = time.perf_counter()

    taken = pixels[: (WARM_UP_STEPS + TIMED_STEPS) * batch_size]
    options = {name: job.settings[name] for name in OF_A_STEP}
    train_short(build(job), taken, **options, epochs=1, on_step=mark, progress=False)
    return TIMED_STEPS * batch_size / (marks[WARM_UP_STEPS + TIMED_STEPS] - marks[WARM_UP_STEPS])


def machine(device: str) -> str:
    """What the rates belong to."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


if __name__ == "__main__":
    main()
