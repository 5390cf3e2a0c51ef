"""Checkpoint folders that are whole or not there: safetensors and JSON, hashed, renamed into place.

    checkpoints/step-500/
        *.safetensors, *.json    one file for each part of the state; parts of one process carry its rank in their name
        manifest.json            sha256 of each of them, written last

With several machines the folder must be on storage they all share.
"""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"

Tensors = dict[str, torch.Tensor]
Parts = dict[str, Any]
"""File name -> content: tensors by name for `*.safetensors`, anything JSON can hold for `*.json`."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they lie, made when the first one is saved.
        limit: how many to keep, the newest; None keeps all.
    """

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self.folder = folder
        self.limit = limit

    def save(self, step: int, shared: Parts, local: Parts, accelerator: Accelerator) -> None:
        """Saves `step`; every process calls it.

        Args:
            step: optimizer steps done.
            shared: parts that are alike in all processes, written by the main one.
            local: parts of this process, under names no other process uses.
            accelerator: says who is who, and waits.
        """
        staging = self.folder / f".step-{step}.tmp"
        if accelerator.is_main_process:
            for abandoned in self.folder.glob(".step-*.tmp"):
                shutil.rmtree(abandoned)
            staging.mkdir(parents=True)
        accelerator.wait_for_everyone()
        write_parts(staging, shared | local if accelerator.is_main_process else local)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            self._publish(staging, step)
        accelerator.wait_for_everyone()

    def latest(self) -> Path | None:
        """The newest whole checkpoint; damaged ones are passed over with a warning. None if there is none at all.

        Raises:
            ValueError: if there are checkpoints, but every one is damaged.
        """
        problems = []
        for step, path in reversed(self._all()):
            problem = find_damage(path)
            if problem is None:
                return path
            logger.warning("checkpoint of step %d is damaged and not used: %s", step, problem)
            problems.append(problem)
        if problems:
            raise ValueError(
                f"every checkpoint in {self.folder} is damaged ({'; '.join(problems)}): restore one, or remove them "
                "all to begin anew"
            )
        return None

    def discard_after(self, step: int) -> None:
        """Removes every checkpoint later than `step`: damaged, or of a future that will be trained anew."""
        for later, path in self._all():
            if later > step:
                logger.warning("training continues at step %d: %s is removed", step, path)
                shutil.rmtree(path)

    def _publish(self, staging: Path, step: int) -> None:
        write_part(staging / MANIFEST, {path.name: sha256(path) for path in sorted(staging.iterdir())})
        flush_to_disk(staging)
        os.replace(staging, self.folder / f"step-{step}")
        flush_to_disk(self.folder)
        for _, path in self._all()[: -self.limit] if self.limit else []:
            shutil.rmtree(path)

    def _all(self) -> list[tuple[int, Path]]:
        found = ((path.name.removeprefix("step-"), path) for path in self.folder.glob("step-*"))
        return sorted((int(step), path) for step, path in found if step.isdecimal())


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if every file is there and has its sha256."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        changed = [name for name, digest in manifest.items() if sha256(checkpoint / name) != digest]
    except (OSError, ValueError, AttributeError) as error:
        return f"{checkpoint}: {error}"
    return f"{checkpoint}: {', '.join(changed)} changed since it was written" if changed else None


def read_part(checkpoint: Path, name: str) -> Any:
    """The content of one file of a checkpoint, tensors on the CPU."""
    path = checkpoint / name
    return load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text())


def write_parts(folder: Path, parts: Parts) -> None:
    for name, content in parts.items():
        write_part(folder / name, content)


def write_part(path: Path, content: Any) -> None:
    if path.suffix == ".safetensors":
        # copied, because safetensors refuses tensors that share their memory
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in content.items()}
        save_file(copies, path)
    else:
        path.write_text(json.dumps(content))
    flush_to_disk(path)


def flush_to_disk(path: Path) -> None:
    """Waits until a file, or the names in a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def split_optimizer_state(state: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """`optimizer.state_dict()` -> its tensors, named `parameter.entry`, and the rest, which JSON can hold."""
    tensors: Tensors = {}
    numbers: dict[str, Any] = {}
    for parameter, entries in state["state"].items():
        for name, value in entries.items():
            kind = tensors if isinstance(value, torch.Tensor) else numbers
            kind[f"{parameter}.{name}"] = value
    return tensors, {"numbers": numbers, "param_groups": state["param_groups"]}


def join_optimizer_state(tensors: Tensors, rest: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The inverse of `split_optimizer_state`; tuples, of which JSON makes lists, are those of the optimizer's own
    `groups`."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in (tensors | rest["numbers"]).items():
        parameter, _, name = key.partition(".")
        state.setdefault(int(parameter), {})[name] = value
    pairs = zip(groups, rest["param_groups"], strict=True)
    return {"state": state, "param_groups": [_with_tuples(own, saved) for own, saved in pairs]}


def _with_tuples(own: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    return {k: own[k] if isinstance(v, list) and k != "params" else v for k, v in saved.items()}


def named_state(module: torch.nn.Module) -> Tensors:
    """Every parameter and buffer of a module, non-persistent buffers too."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


@torch.no_grad()
def restore_(targets: Tensors, saved: Tensors) -> None:
    """Copies saved tensors into those of the same name.

    Raises:
        ValueError: if the names or shapes differ.
    """
    if targets.keys() != saved.keys():
        names = ", ".join(sorted(targets.keys() ^ saved.keys()))
        raise ValueError(f"the checkpoint is of another model: {names} is only in one of the two")
    for name, target in targets.items():
        if target.shape != saved[name].shape:
            there, here = tuple(saved[name].shape), tuple(target.shape)
            raise ValueError(f"the checkpoint is of another model: {name} is {there} there and {here} here")
        target.copy_(saved[name])
