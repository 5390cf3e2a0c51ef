"""Trainings of an experiment, each in its own file: what is done stays done, and a second start goes on from there.

A job is a function of the module that asks, and its arguments as JSON can hold them. Its result is written under its
name, with the arguments; as long as those are the same, it is not run again.
"""

import json
import multiprocessing
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch

Result = dict[str, Any]


class Job(NamedTuple):
    """A function that picks up its arguments by name and returns what JSON can hold."""

    function: Callable[..., Result]
    arguments: dict[str, Any]


def run_jobs(folder: Path, jobs: Mapping[str, Job], num_processes: int = 1) -> dict[str, Result]:
    """Runs what is not done yet, each process with one thread, and returns every result by the name of its job.

    Each result also holds `seconds`, the processor time that the job took.

    Args:
        folder: gets `NAME.json` for each job.
        num_processes: how many jobs at a time; with 1, they run in this process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    waiting = {name: job for name, job in jobs.items() if read_result(folder / f"{name}.json", job) is None}
    if len(waiting) < len(jobs):
        print(f"{len(jobs) - len(waiting)} of {len(jobs)} trainings are done already, in {folder}", flush=True)
    if num_processes == 1:
        use_one_thread()
        for name, job in waiting.items():
            run_job(folder / f"{name}.json", job)
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(num_processes, mp_context=context, initializer=use_one_thread) as pool:
            for future in as_completed(
                [pool.submit(run_job, folder / f"{name}.json", waiting[name]) for name in waiting]
            ):
                future.result()
    results = {name: read_result(folder / f"{name}.json", job) for name, job in jobs.items()}
    return {name: result for name, result in results.items() if result is not None}


def use_one_thread() -> None:
    """More threads per process than cores only wait for each other."""
    torch.set_num_threads(1)


def run_job(path: Path, job: Job) -> None:
    """Runs a job and writes its result, whole or not at all."""
    print(f"== {path.stem}", flush=True)
    began = time.process_time()
    result = {**job.function(**job.arguments), "seconds": round(time.process_time() - began, 1)}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"arguments": job.arguments, "result": result}), encoding="utf-8")
    temporary.replace(path)


def read_result(path: Path, job: Job) -> Result | None:
    """What a job gave, or None if it has not run yet with these arguments."""
    if not path.exists():
        return None
    kept = json.loads(path.read_text(encoding="utf-8"))
    same = kept["arguments"] == json.loads(json.dumps(job.arguments))
    return kept["result"] if same else None
