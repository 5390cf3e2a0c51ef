"""What a run directory, or a repository made of one, says about itself in files that people can read, too."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import yaml

__all__ = ["EVALUATION", "LOG", "RUN", "RunFiles"]

EVALUATION, RUN, LOG = "evaluation.json", "run.yaml", "metrics.jsonl"


class RunFiles(NamedTuple):
    """The files of a run, read.

    Attributes:
        evaluation: the final numbers, and what they were measured on; {} where nothing was measured.
        run: settings, seed, versions, machine and commit; {} where nobody wrote them down.
        progress: the log's last line that tells how far the training came, in images and seconds; {} without a log.
    """

    evaluation: dict[str, Any]
    run: dict[str, Any]
    progress: dict[str, Any]

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> "RunFiles":
        """Those of a folder, as far as they are there."""
        folder = Path(folder)
        return cls(
            json.loads(_text(folder / EVALUATION) or "{}"),
            yaml.safe_load(_text(folder / RUN)) or {},
            _last_with_seconds(_text(folder / LOG)),
        )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _last_with_seconds(log: str) -> dict[str, Any]:
    told = [line for line in map(json.loads, log.splitlines()) if "seconds" in line]
    return told[-1] if told else {}
