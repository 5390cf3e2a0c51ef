"""Runs `training/train.py` as a person would, each time in a process of its own, and compares what the runs leave.

Most runs are forked from a server that has done the imports, which otherwise take longer than the training.
"""

import io
import json
import multiprocessing
import os
import re
import runpy
import signal
import socket
import sys
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import yaml
from datasets import Dataset, Features, Image
from PIL import Image as PILImage
from safetensors.torch import load_file
from toy_task import assert_same_tensors

TRAIN = Path(__file__).parents[2] / "training" / "train.py"
TIMES = {"seconds", "images_per_second", "eval_images_per_second", "eval_seconds"}
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TRAIN.parents[1] / "src")}
TINY = {"codebook_size": 16, "hidden_channels": [8], "residual_channels": 8, "num_residual_blocks": 1}

PRELOADED = ["train", "matplotlib.figure", "sklearn.datasets", "sklearn.model_selection", "transformers.models.auto"]

START_METHOD = multiprocessing.get_all_start_methods()[0]

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(PRELOADED)


class Finished(NamedTuple):
    """How a run ended: its exit status, -9 if it was killed, and all that it printed."""

    status: int
    output: str


def flags(output_dir: Path, model: dict[str, Any] | None = None, **settings: Any) -> list[str]:
    """The command line of a run of ten steps; `model` goes to the tiny config, None for a setting drops it."""
    usual = {
        "output_dir": output_dir,
        "config_overrides": TINY | (model or {}),
        "max_train_steps": 10,
        "per_device_train_batch_size": 8,
        "validation_size": 24,
        "warmup_steps": 2,
        "logging_steps": 3,
        "eval_steps": 6,
        "checkpointing_steps": 5,
    }
    given = {name: value for name, value in (usual | settings).items() if value is not None}
    return [
        part
        for name, value in given.items()
        for part in (f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value))
    ]


def run(arguments: list[str], *, processes: int = 1, kill_at: int | None = None, use_cpu: str = "true") -> Finished:
    """Runs train.py in new processes, which get SIGKILL when they are about to take step `kill_at`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_PORT": free.getsockname()[1]}
    _start_server()
    log = Path(arguments[arguments.index("--output_dir") + 1]).with_suffix(".log")
    children = []
    for rank in range(processes):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "localhost", "ACCELERATE_USE_CPU": use_cpu}
        environment = {name: str(value) for name, value in (shared | ranks).items()} if processes > 1 else {}
        children.append(server.Process(target=_train, args=(arguments, kill_at, environment, log)))
        children[-1].start()
    for child in children:
        child.join(300)
        if child.exitcode is None:
            child.kill()
    statuses = [child.exitcode for child in children]
    output = log.read_text()
    log.unlink()
    return Finished(next((status for status in statuses if status == -signal.SIGKILL), max(statuses)), output)


def _start_server() -> None:
    # Until Python 3.13 the server looks for its modules on the path of a new interpreter.
    path = os.pathsep.join([str(TRAIN.parent), ENVIRONMENT["PYTHONPATH"]])
    with mock.patch.dict(os.environ, ENVIRONMENT, PYTHONPATH=path):
        forkserver.ensure_running()


def _train(arguments: list[str], kill_at: int | None, environment: dict[str, str], log: Path) -> None:
    # Loader workers start as in a program of its own, not as this process did.
    multiprocessing.set_start_method(START_METHOD, force=True)
    descriptor = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.environ.update(environment)
    if kill_at is not None:
        from training_run import Training

        take_step = Training.take_step

        def take_step_or_die(self: Training) -> None:
            if self.step + 1 == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            take_step(self)

        Training.take_step = take_step_or_die
    sys.argv = [str(TRAIN), *arguments]
    runpy.run_path(str(TRAIN), run_name="__main__")


def train(*args: Any, processes: int = 1, **kwargs: Any) -> str:
    """Runs `flags(...)` to the end; returns what was printed."""
    finished = run(flags(*args, **kwargs), processes=processes)
    assert finished.status == 0, finished.output
    return finished.output


def log_of(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without times."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def settings_of(run_dir: Path) -> dict[str, Any]:
    return yaml.safe_load((run_dir / "run.yaml").read_text())["settings"]


def config_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "config.json").read_text())


def evaluation_of(run_dir: Path) -> dict[str, Any]:
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    return {name: value for name, value in evaluation.items() if name not in TIMES | {"git_commit"}}


def state_of(checkpoint: Path) -> dict[str, Any]:
    """The JSON parts of a checkpoint, without what names its own time and place."""
    parts = {path.name: json.loads(path.read_text()) for path in checkpoint.glob("*.json") if path.stem != "manifest"}
    parts["state.json"] = {k: v for k, v in parts["state.json"].items() if k not in ("seconds", "settings")}
    return parts


def assert_same_run(left: Path, right: Path, step: int = 10) -> None:
    """Two runs agree bit for bit: last checkpoint, saved model, code counts, log, test numbers."""
    ours, theirs = (folder / "checkpoints" / f"step-{step}" for folder in (left, right))
    tensors = sorted(path.name for path in ours.glob("*.safetensors"))
    assert tensors == sorted(path.name for path in theirs.glob("*.safetensors"))
    assert {"model.safetensors", "optimizer.safetensors", "rank-0-buffers.safetensors"} <= set(tensors)
    for name in tensors:
        assert_same_tensors(load_file(ours / name), load_file(theirs / name))
    assert state_of(ours) == state_of(theirs)
    kept = sorted(path.name for path in left.glob("*.safetensors"))
    assert "model.safetensors" in kept and kept == sorted(path.name for path in right.glob("*.safetensors"))
    for name in kept:
        assert_same_tensors(load_file(left / name), load_file(right / name))
    assert log_of(left) == log_of(right)
    assert evaluation_of(left) == evaluation_of(right)


def three_lines(output: str) -> str:
    """The Python that a run prints at its end, without its indentation."""
    found = re.search(r"^Use it:\n((?:    .*\n){3})", output, re.MULTILINE)
    assert found, output
    return re.sub(r"^    ", "", found[1], flags=re.MULTILINE)


def smooth_picture(number: int, height: int, width: int) -> PILImage.Image:
    """Random colours that change slowly, so that JPEG keeps them."""
    colours = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return PILImage.fromarray(colours).resize((width, height), PILImage.Resampling.BICUBIC)


def write_jpegs(folder: Path, sizes: list[tuple[int, int]]) -> None:
    """Pictures of the given (height, width), with names in their order."""
    folder.mkdir(parents=True)
    for number, (height, width) in enumerate(sizes):
        smooth_picture(number, height, width).save(folder / f"{number:03}.jpg", quality=90)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_parquet(folder: Path, files: int = 4, rows: int = 12) -> None:
    """8x8 colour pictures: `files` files to train on, and one to test on."""
    folder.mkdir(parents=True)
    for number in range(files + 1):
        name = f"train-{number:05}.parquet" if number < files else "test-00000.parquet"
        pictures = [_png(smooth_picture(number * rows + row, 8, 8)) for row in range(rows)]
        cells = {"image": [{"bytes": picture, "path": None} for picture in pictures]}
        Dataset.from_dict(cells, features=Features({"image": Image()})).to_parquet(folder / name)


def _png(picture: PILImage.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return buffer.getvalue()
