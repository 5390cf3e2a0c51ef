"""Rows of results: what run directories say about themselves, runs that differ in their seed alone in one row."""

import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from hf_vq.run_files import EVALUATION, REFINED, RUN, RunFiles
from run_log import FREE_SETTINGS, flatten

# Metric -> digits.
TOKENIZER_METRICS = {"mse": 5, "psnr": 2, "psnr_of_mse": 2, "ssim": 4, "perplexity": 1, "usage": 3}
PRIOR_METRICS = {
    "bits_per_token": 3, "bits_per_token_of_class": 3, "token_entropy": 3, "position_entropy": 3, "bits_per_dim": 3,
}  # fmt: skip
OF_A_SEED = FREE_SETTINGS | {"seed"}


class Run(NamedTuple):
    """A run directory, or a repository made of one.

    Attributes:
        folder: where it lies.
        name: of the folder, without `-seedN`.
        config: the model's, from config.json.
        files: what it says about itself.
        evaluation_file: which of these its numbers are from.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    files: RunFiles
    evaluation_file: str = EVALUATION

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Raises: FileNotFoundError unless the folder has a config, settings and numbers."""
        files = RunFiles.read(folder)
        missing = [name for name in ("config.json", RUN, EVALUATION) if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{folder} has no {', '.join(missing)}: name folders of runs that were measured")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return cls(folder, re.sub(r"-seed\d+$", "", folder.resolve().name), config, files)

    @property
    def refined(self) -> "Run | None":
        """The same with the numbers of its refined tokens, if these were measured."""
        numbers = self.files.refined
        name = f"{self.name}, refine={numbers.get('refine')}"
        files = self.files._replace(evaluation=numbers)
        return self._replace(name=name, files=files, evaluation_file=REFINED) if numbers else None

    @property
    def is_prior(self) -> bool:
        """Whether it is a prior."""
        return "tokenizer_fingerprint" in self.config

    @property
    def plan(self) -> dict[str, Any]:
        """All settings but the seed and those that teach the model nothing."""
        earlier = {place: files.run["settings"] for place, files in self.files.runs.items() if place != RUN}
        settings = flatten(earlier | self.files.run["settings"])
        return {name: value for name, value in settings.items() if name.rpartition(".")[2] not in OF_A_SEED}


def in_rows(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs of one name together, in the order of the first of each; refined tokens have rows of their own.

    Raises: ValueError if such runs differ in more than their seed, or two of them have the same.
    """
    rows: dict[str, list[Run]] = {}
    for run in runs:
        for measured in filter(None, (run, run.refined)):
            rows.setdefault(measured.name, []).append(measured)
    for name, row in rows.items():
        seeds = [run.files.run["seed"] for run in row]
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"the runs of {name} have the seeds {seeds}: name each once")
        for run in row[1:]:
            differing = {key for key in row[0].plan | run.plan if row[0].plan.get(key) != run.plan.get(key)}
            if differing:
                raise ValueError(f"the runs of {name} differ in more than their seed: {', '.join(sorted(differing))}")
    return list(rows.values())


def tokenizer_row(row: Sequence[Run]) -> dict[str, str]:
    """The cells of a tokenizer."""
    return _model(row) | {"tokens": _tokens(row[0].config)} | _measured(row, TOKENIZER_METRICS) | _training(row)


def prior_row(row: Sequence[Run]) -> dict[str, str]:
    """The cells of a prior."""
    won = [1 - run.files.evaluation["bits_per_token"] / run.files.evaluation["token_entropy"] for run in row]
    gain = {"under token_entropy": f"{100 * statistics.mean(won):.1f} %"}
    return _model(row) | _measured(row, PRIOR_METRICS) | gain | _training(row)


def _model(row: Sequence[Run]) -> dict[str, str]:
    first = row[0]
    parameters = first.files.evaluation.get("parameters")
    counted = f"{parameters / 1e6:.2f}M" if parameters else ""
    data = str(first.files.evaluation["dataset_name"])
    return {"model": first.name, "kind": describe(first.config), "data": data, "parameters": counted}


def describe(config: dict[str, Any]) -> str:
    """The method in a few words."""
    kind = config["model_type"]
    if kind == "hf_sqvae":
        return ", ".join([f"SQ-VAE {config['quantizer']}", config["covariance"], *_body(config)])
    if kind == "hf_vqvae":
        cures = [name for name, there in _cures(config).items() if there]
        return ", ".join([f"VQ-VAE {config['quantizer']}", *cures, *_body(config)])
    return {"hf_vq_transformer_prior": "Transformer", "hf_vq_pixelcnn": "PixelCNN"}[kind]


def _cures(config: dict[str, Any]) -> dict[str, bool]:
    return {
        "k-means": config["codebook_init"] == "kmeans",
        "revival": config["revive_below"] > 0,
        "rotation": config["gradient_estimator"] == "rotation",
        "normalised codes": config["normalize_codes"],
        "SimVQ": config.get("codebook_transform") == "linear",
    }


def _body(config: dict[str, Any]) -> list[str]:
    return ["U-Net"] if config.get("body") == "unet" else []


def _tokens(config: dict[str, Any]) -> str:
    halvings = len(config["hidden_channels"]) - (config.get("body") == "unet")
    side = config["image_size"] // 2**halvings
    several = f" x {config['num_codebooks']}" if config["num_codebooks"] > 1 else ""
    return f"{side} x {side}{several} of {config['codebook_size']}"


def _measured(row: Sequence[Run], digits: dict[str, int]) -> dict[str, str]:
    found = {name: [run.files.evaluation.get(name) for run in row] for name in digits}
    return {name: with_range([v for v in values if v is not None], digits[name]) for name, values in found.items()}


def with_range(values: Sequence[float], digits: int) -> str:
    """The mean, of several values with half their range: "24.40 ± 0.06"; nothing of none."""
    if not values:
        return ""
    half_range = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{half_range}"


def _training(row: Sequence[Run]) -> dict[str, str]:
    trainings = [list(run.files.runs.values()) for run in row]
    images, *_ = (sum(part.progress.get("images", 0) for part in parts) for parts in trainings)
    seconds = statistics.mean(sum(part.progress.get("seconds", 0) for part in parts) for parts in trainings)
    runs = [part.run for parts in trainings for part in parts]
    return {
        "images seen": f"{images:,}",
        "wall time": str(timedelta(seconds=round(seconds))),
        "machine": _joined(run["machine"] for run in runs),
        "seeds": _joined(str(run["seed"]) for run in runs),
        "commit": _joined(short_commit(str(run["git_commit"])) for run in runs),
    }


def _joined(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def short_commit(commit: str) -> str:
    """The first eight digits, and a word on changes that were not committed."""
    digits, _, dirty = commit.partition("-")
    return f"{digits[:8]} with changes" if dirty else digits[:8]


def markdown(rows: Sequence[dict[str, Any]], is_number: Callable[[str], bool]) -> list[str]:
    """A Markdown table of rows with the same keys; columns of numbers are set to the right."""
    if not rows:
        return []
    heads = list(rows[0])
    lines = [f"| {' | '.join(heads)} |", f"|{'|'.join('--:' if is_number(head) else '---' for head in heads)}|"]
    return lines + [f"| {' | '.join(str(row.get(head) or '') for head in heads)} |" for row in rows]
