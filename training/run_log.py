"""What a run tells about itself: run.yaml, metrics.jsonl, the progress bar and the clock behind its numbers."""

import json
import logging
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

logger = logging.getLogger(__name__)

RUN_FILE = "run.yaml"
METRICS_FILE = "metrics.jsonl"

PACKAGES = ("hf-vq", "torch", "transformers", "accelerate", "datasets", "safetensors", "numpy", "pillow")

FREE_SETTINGS = frozenset(
    {
        "config",
        "output_dir",
        "resume_from_checkpoint",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "report_to",
        "max_bad_examples",
        "warn_perplexity_below",
        "push_to_hub",
        "hub_model_id",
        "hub_private_repo",
        "hub_token",
    }
)
"""Settings that may change between the start of a run and its resumption: they do not touch what is learned."""


def plain(settings: Any) -> Any:
    """Settings as JSON and YAML hold them: lists for tuples, strings for paths and other objects."""
    return json.loads(json.dumps(settings, default=str))


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def claim(run_dir: Path, settings: dict[str, Any], resuming: bool) -> None:
    """Checks that a run with these settings may use `run_dir`.

    Raises:
        FileExistsError: if a run or a model is there and this one does not resume it.
        ValueError: if the run that is there has other settings.
    """
    occupied = [name for name in (RUN_FILE, METRICS_FILE, "checkpoints", "config.json") if (run_dir / name).exists()]
    if RUN_FILE in occupied and resuming:
        refuse_other_settings(run_dir, yaml.safe_load((run_dir / RUN_FILE).read_text())["settings"], settings)
    elif occupied and resuming:
        raise FileExistsError(
            f"{run_dir} holds {', '.join(occupied)} but no {RUN_FILE}, so there is no run to resume: choose another "
            "--output_dir"
        )
    elif occupied:
        raise FileExistsError(
            f"{run_dir} already holds {', '.join(occupied)}: continue that run with --resume_from_checkpoint latest, "
            "or choose another --output_dir"
        )


def refuse_other_settings(where: Path, recorded: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raises ValueError, naming the settings that differ, if `recorded` at `where` is not this run."""
    there, here = flatten(recorded), flatten(plain(settings))
    differing = [
        f"{name} is {there.get(name, 'absent')!r} there and {here.get(name, 'absent')!r} here"
        for name in sorted(there.keys() | here.keys())
        if name.rpartition(".")[2] not in FREE_SETTINGS and there.get(name, "absent") != here.get(name, "absent")
    ]
    if differing:
        raise ValueError(
            f"{where} belongs to another run: {'; '.join(differing)}. "
            "Give it the recorded settings, or choose another --output_dir"
        )


def record_run(run_dir: Path, settings: dict[str, Any], seed: int) -> None:
    """Writes run.yaml, unless a resumed run has it already."""
    if (run_dir / RUN_FILE).exists():
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    record = {
        "settings": plain(settings),
        "seed": seed,
        "versions": {"python": platform.python_version()} | installed_versions(),
        "machine": machine(),
        "git_commit": git_commit(Path(__file__).parent),
    }
    replace_text(run_dir / RUN_FILE, yaml.safe_dump(record, sort_keys=False))


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> str:
    """What does the work, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cores = usable_cores()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {cores} core{'s' * (cores > 1)}"


def installed_versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def git_commit(folder: Path) -> str | None:
    """The commit of the code in `folder`, with `-dirty` after it if tracked files were changed; None outside git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None


def replace_text(path: Path, text: str) -> None:
    """Writes a file that is never half there."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class RunLog:
    """metrics.jsonl: one JSON object a line, each with its `step`.

    Args:
        run_dir: where the file is.
        enabled: False in all processes but the main one; nothing is written then.
    """

    def __init__(self, run_dir: Path, enabled: bool = True) -> None:
        self.path = run_dir / METRICS_FILE
        self.enabled = enabled

    def append(self, line: dict[str, Any]) -> None:
        """Adds a line; numbers JSON cannot hold (NaN, infinity) become null."""
        if self.enabled:
            with self.path.open("a") as file:
                file.write(json.dumps({name: _finite(value) for name, value in line.items()}) + "\n")

    def cut_back(self, step: int) -> None:
        """Drops all lines after `step`, and a last one that a kill tore."""
        if self.enabled and self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= step]
            replace_text(self.path, "".join(f"{line}\n" for line in kept))

    def flush_to_disk(self) -> None:
        """Waits until every line would survive a power cut."""
        if self.enabled and self.path.exists():
            with self.path.open("a") as file:
                os.fsync(file.fileno())


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


class RunningMeans:
    """Means of a model's scalar outputs since the last log, summed on the device so that nobody waits for it."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.count = 0

    def add(self, output: Mapping[str, Any]) -> None:
        """Counts every floating-point scalar in a model output."""
        for name, value in output.items():
            if isinstance(value, torch.Tensor) and value.ndim == 0 and value.is_floating_point():
                self.sums[name] = self.sums.get(name, 0) + value.detach().float()
        self.count += 1

    def take(self) -> dict[str, torch.Tensor]:
        """The means, as scalars on the device; starts anew."""
        means = {name: total / self.count for name, total in self.sums.items()}
        self.sums, self.count = {}, 0
        return means


class Stopwatch:
    """Time of a run, and its steady throughput: the first step (compilation), evaluations and checkpoints do not count.

    A device works ahead of Python, so whoever calls `restart`, `rate` or `paused` has fetched a result just before.

    Args:
        seconds_before: duration of the run up to the checkpoint it resumed from.
    """

    def __init__(self, seconds_before: float = 0.0) -> None:
        self._began = time.perf_counter() - seconds_before
        self._since: float | None = None
        self._images = 0
        self._total_images = 0
        self._total_seconds = 0.0

    @property
    def running(self) -> bool:
        """Whether the first lap has begun."""
        return self._since is not None

    @property
    def seconds(self) -> float:
        """Wall-clock duration of the run, pauses included, over all its resumptions."""
        return time.perf_counter() - self._began

    @property
    def steady_rate(self) -> float | None:
        """Images per second over all laps since the process began; None before the first."""
        return self._total_images / self._total_seconds if self._total_seconds else None

    def restart(self) -> None:
        """Starts a lap here; what came before is forgotten."""
        self._since, self._images = time.perf_counter(), 0

    def count(self, images: int) -> None:
        self._images += images

    def rate(self) -> float | None:
        """Ends a lap: images per second in it, None if it is empty."""
        if self._since is None or not self._images:
            return None
        images, seconds = self._images, time.perf_counter() - self._since
        self._total_images += images
        self._total_seconds += seconds
        self.restart()
        return images / seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count."""
        stopped = time.perf_counter()
        yield
        if self._since is not None:
            self._since += time.perf_counter() - stopped


def progress_bar(total: int, done: int, enabled: bool) -> "tqdm[Any]":
    """A bar over images on stderr, with images per second and time left; piped, a line every half minute."""
    interval = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(
        total=total, initial=done, unit=" images", unit_scale=True, disable=not enabled, mininterval=interval,
        maxinterval=interval, dynamic_ncols=True, desc="training",
    )  # fmt: skip
