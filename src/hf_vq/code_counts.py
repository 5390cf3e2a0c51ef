"""How often each code occurred at each evaluation of a run: `codes.safetensors`."""

import os
import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_vq.files import replace_file

__all__ = ["read_code_counts", "save_code_counts"]


def save_code_counts(path: str | os.PathLike[str], step: int, code_counts: Tensor) -> None:
    """Adds the counts of one evaluation to `codes.safetensors`, as `step-000500`; the file is replaced as a whole.

    Entries of the same or later steps give way: after a resume they belong to a run that was cut off.

    Args:
        path: the file; it need not exist.
        step: the optimizer step of the evaluation.
        code_counts: (M, K) int64.

    Raises: ValueError if the file is there but damaged, or of something else.
    """
    history = read_code_counts(path) if Path(path).exists() else {}
    kept = {_key(earlier): counts for earlier, counts in history.items() if earlier < step}
    kept[_key(step)] = code_counts.detach().cpu().contiguous()
    replace_file(path, lambda temporary: save_file(kept, temporary, metadata={"format": "pt"}))


def read_code_counts(path: str | os.PathLike[str]) -> dict[int, Tensor]:
    """The counts (M, K) of every evaluation by its step, the earliest first.

    Raises: FileNotFoundError without the file, ValueError if it is damaged or holds something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"there is no file {path}: name the codes.safetensors of a run, which its first evaluation writes"
        )
    try:
        entries = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): move it away, and a new one is begun") from error
    foreign = [name for name, counts in entries.items() if not re.fullmatch(r"step-\d+", name) or counts.ndim != 2]
    shapes = {tuple(counts.shape) for counts in entries.values()}
    if foreign or len(shapes) != 1:
        found = f"entries {', '.join(foreign[:3])}" if foreign else f"{len(shapes)} shapes: {sorted(shapes)}"
        raise ValueError(
            f"{path} has {found}, but the code counts of a run are step-000500 ..., all of one shape (M, K)"
        )
    return {step: entries[name] for step, name in sorted((int(name.removeprefix("step-")), name) for name in entries)}


def _key(step: int) -> str:
    return f"step-{step:06d}"
