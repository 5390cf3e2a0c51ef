"""What a run directory, or a repository made of one, says about itself in files that people can read, too."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import yaml

__all__ = ["EVALUATION", "LOG", "REFINED", "RUN", "STARTED_FROM", "RunFiles", "copy_run", "keep_earlier_run"]

EVALUATION, REFINED = "evaluation.json", "evaluation-refined.json"
RUN, LOG, STARTED_FROM = "run.yaml", "metrics.jsonl", "started_from"


class RunFiles(NamedTuple):
    """The files of a run, read.

    Attributes:
        evaluation: the final numbers, and what they were measured on; {} where nothing was measured.
        refined: the same of a tokenizer's refined tokens (`hf-vq evaluate --refine`).
        run: settings, seed, versions, machine and commit; {} where nobody wrote them down.
        progress: the log's last line that tells how far the training came, in images and seconds; {} without a log.
        started_from: the run that trained the weights this one began with; None if it began with random ones.
    """

    evaluation: dict[str, Any]
    refined: dict[str, Any]
    run: dict[str, Any]
    progress: dict[str, Any]
    started_from: "RunFiles | None" = None

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> "RunFiles":
        """Those of a folder, as far as they are there."""
        folder = Path(folder)
        earlier = folder / STARTED_FROM
        return cls(
            json.loads(_text(folder / EVALUATION) or "{}"),
            json.loads(_text(folder / REFINED) or "{}"),
            yaml.safe_load(_text(folder / RUN)) or {},
            _last_with_seconds(_text(folder / LOG)),
            cls.read(earlier) if earlier.is_dir() else None,
        )

    @property
    def runs(self) -> "dict[str, RunFiles]":
        """All that trained these weights, the first one first, by their run.yaml as seen from here."""
        earlier = self.started_from.runs if self.started_from else {}
        return {f"{STARTED_FROM}/{place}": run for place, run in earlier.items()} | {RUN: self}


def copy_run(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Copies settings and log, and those of the runs before, as far as they are there."""
    source, target = Path(source), Path(target)
    if source.resolve() == target.resolve():
        return
    for name in (RUN, LOG):
        if (source / name).is_file():
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)
    if (source / STARTED_FROM).is_dir():
        copy_run(source / STARTED_FROM, target / STARTED_FROM)


def keep_earlier_run(run_dir: str | os.PathLike[str], earlier: str | os.PathLike[str] | None) -> None:
    """Copies settings and log of the run whose weights this one began with into its directory.

    Args:
        run_dir: of the run.
        earlier: what it began with: a run directory, or anything else, of which nothing is known.
    """
    if earlier is not None:
        copy_run(earlier, Path(run_dir) / STARTED_FROM)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _last_with_seconds(log: str) -> dict[str, Any]:
    told = [line for line in map(_object, log.splitlines()) if "seconds" in line and "images" in line]
    return told[-1] if told else {}


def _object(line: str) -> dict[str, Any]:
    """A line of a log; {} of one that was torn."""
    try:
        return dict(json.loads(line))
    except ValueError:
        return {}
