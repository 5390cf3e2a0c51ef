"""The training loop, on Accelerate. It knows steps, processes, logs and checkpoints, and nothing of what is trained.

A step, with J = gradient_accumulation_steps: for each of J micro-batches draw noise from (seed, rank, step, micro
step) and accumulate the gradient of loss / J; clip; optimizer; schedule; the model's own `step()`; weight average.
Then, when they are due: log, evaluate, checkpoint. A run that was killed and resumed equals one that was not, bit for
bit on a CPU.
"""

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from engine_contract import EngineArguments, ResumableBatches, Task
from run_log import claim, flatten, plain, progress_bar, usable_cores
from training_run import Training

__all__ = ["EngineArguments", "ResumableBatches", "Task", "fit", "share_cores"]


def fit(task: Task, args: EngineArguments, settings: dict[str, Any]) -> Path:
    """Trains, evaluates, checkpoints and saves the model of a task.

    The process group is left standing, so that the caller can go on evaluating in all processes.

    Args:
        task: model and data.
        args: the loop's settings.
        settings: every setting of the run, for run.yaml. A resumed run must have the same.

    Returns:
        The run directory, which is a model directory now.

    Raises:
        FileExistsError, ValueError: before any work, if the settings or `output_dir` do not fit.
        FloatingPointError: if the loss or the weights become NaN or infinite.
    """
    accelerator = start_accelerator(args)
    settings = plain(settings | {"num_processes": accelerator.num_processes})
    claim(Path(args.output_dir), settings, resuming=args.resume_from_checkpoint is not None)
    training = Training(task, args, settings, accelerator)
    training.resume()
    start_trackers(accelerator, training.run_dir, settings)

    with progress_bar(training.total_images, training.images, accelerator.is_main_process) as bar:
        while training.step < training.total_steps:
            training.take_step()
            bar.update(training.joint_batch)
            if training.is_due(args.logging_steps):
                bar.set_postfix(training.log())
            if training.is_due(args.eval_steps):
                training.evaluate()
            if training.is_due(args.checkpointing_steps):
                training.checkpoint()

    training.save()
    for tracker in accelerator.trackers:
        tracker.finish()
    return training.run_dir


def share_cores() -> int:
    """Sets torch's threads to usable cores // processes on this machine, and returns their number.

    `accelerate launch` and torchrun allow each process a single thread."""
    threads = max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(threads)
    return threads


def start_accelerator(args: EngineArguments) -> Accelerator:
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        dynamo_backend="inductor" if args.torch_compile else "no",
        log_with=choose_trackers(args.report_to),
        project_dir=args.output_dir,
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but each would train alone: without GPUs, set ACCELERATE_USE_CPU=true"
        )
    return accelerator


def choose_trackers(report_to: str) -> list[str] | None:
    if report_to == "none":
        return None
    installed = {tracker.value for tracker in get_available_trackers()}
    missing = set(report_to.split(",")) - installed - {"all"}
    if missing:
        raise ValueError(f"report_to names {', '.join(missing)}; installed are {', '.join(installed) or 'none'}")
    return report_to.split(",") if installed else None


def start_trackers(accelerator: Accelerator, run_dir: Path, settings: dict[str, Any]) -> None:
    simple = {name: v if isinstance(v, bool | int | float | str) else str(v) for name, v in flatten(settings).items()}
    accelerator.init_trackers(run_dir.resolve().name, config=simple)
