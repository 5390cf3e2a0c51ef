"""Trainings of an experiment, each in its own file: what is done stays done, and a second start goes on from there.

A job is a function and the settings that it takes by name. What it gives is kept under the job's name, with settings,
commit and versions. A job that fails keeps no other from its turn; what went wrong stands beside the others' numbers.
"""

import json
import multiprocessing
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm.auto import tqdm

from run_log import git_commit, installed_versions, refuse_other_settings, replace_text

Numbers = dict[str, Any]
Count = Callable[[int], object]


class Job(NamedTuple):
    """One training.

    Attributes:
        function: of a module, so that another process finds it; called as function(count=count, **settings), where
            count(n) says that n images were seen, it returns what JSON can hold.
        settings: what JSON can hold.
        images: that its training sees, for the bar.
    """

    function: Callable[..., Numbers]
    settings: dict[str, Any]
    images: int


def run_jobs(folder: Path, jobs: Mapping[str, Job], num_processes: int) -> dict[str, Numbers]:
    """Runs what is missing and returns every job's numbers by its name; `seconds` is the processor time it took.

    Args:
        folder: gets `NAME.json` for each job.
        num_processes: jobs at a time, each with one thread; with 0 they run in this process.

    Raises:
        ValueError: if numbers that are there were taken under other settings; nothing has run then.
        SystemExit: that tells what went wrong, after all other jobs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = {name: job for name, job in jobs.items() if not is_done(folder / f"{name}.json", job)}
    print(f"{len(jobs) - len(missing)} of {len(jobs)} trainings are done, in {folder}", flush=True)
    if failures := work_off(folder, missing, num_processes):
        sys.exit("\n".join([f"{len(failures)} of {len(missing)} trainings failed:", *failures]))
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in jobs}


def is_done(path: Path, job: Job) -> bool:
    """Whether the numbers of this job are there.

    Raises: ValueError that names the settings, if those that are there were other ones.
    """
    if not path.exists():
        return False
    refuse_other_settings(path, json.loads(path.read_text()).get("settings", {}), job.settings)
    return True


def work_off(folder: Path, jobs: Mapping[str, Job], num_processes: int) -> list[str]:
    """Runs the jobs, `num_processes` at once, or with 0 in this process; returns what went wrong, and with which."""
    context = multiprocessing.get_context("spawn")
    seen = context.Value("q", 0)  # images of all jobs, for the bar
    waiting, failures = deque(jobs), []
    running: dict[Any, str] = {}
    pace = {"miniters": 1, "mininterval": 1 if sys.stderr.isatty() else 60}
    with tqdm(total=sum(job.images for job in jobs.values()), unit="img", **pace) as bar:
        while waiting or running:
            while waiting and len(running) < num_processes:
                name = waiting.popleft()
                process = context.Process(target=run_job, args=(folder, name, jobs[name], seen), daemon=True)
                process.start()
                running[process] = name
            if num_processes:
                wait([process.sentinel for process in running], timeout=1)
                over = {running.pop(process): process.exitcode for process in list(running) if not process.is_alive()}
            else:
                run_job(folder, waiting[0], jobs[waiting[0]], seen)
                over = {waiting.popleft(): 0}
            bar.update(seen.value - bar.n)
            for name, exit_code in over.items():
                failure = failure_of(folder, name, exit_code)
                tqdm.write(failure or f"{name}: done")
                failures += [failure] if failure else []
    return failures


def run_job(folder: Path, name: str, job: Job, seen: Any) -> None:
    """Runs a job and writes its numbers, whole or not at all, or beside them what went wrong."""
    torch.set_num_threads(1)  # more threads than cores only wait for each other
    began = time.process_time()
    error_file(folder, name).unlink(missing_ok=True)

    def count(images: int) -> None:
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            sys.exit("whoever started this job was killed")
        with seen.get_lock():
            seen.value += images

    try:
        numbers = job.function(count=count, **job.settings)
    except Exception:
        error_file(folder, name).write_text(traceback.format_exc())
        return
    origin = {"git_commit": git_commit(Path(__file__).parent), "versions": installed_versions()}
    record = {"settings": job.settings, **numbers, "seconds": round(time.process_time() - began, 1), **origin}
    replace_text(folder / f"{name}.json", json.dumps(record, indent=2) + "\n")


def failure_of(folder: Path, name: str, exit_code: int | None) -> str | None:
    """The last line of a job's error, or None if its numbers are there; one that was killed has left no word."""
    if (folder / f"{name}.json").exists():
        return None
    path = error_file(folder, name)
    if not path.exists():
        return f"{name}: ended with exit code {exit_code} and without a word"
    return f"{name}: {path.read_text().strip().splitlines()[-1]} ({path})"


def error_file(folder: Path, name: str) -> Path:
    """What is written about a job that failed."""
    return folder / f"{name}.error.txt"
