"""Is SQ-VAE better than VQ-VAE? One net, one plan, four quantizers, three seeds each, all through training/train.py.

    python training/benchmarks/seeds.py --choose        held-out psnr of each learning rate, after a third of the plan
    python training/benchmarks/seeds.py                 trains what is missing, one run after the other
    python training/results.py output/seeds/*-seed?     the rows

Each run is a run directory under --output_dir; one that was killed goes on where it stopped. Prints a table: mean ±
half the range over seeds, of the whole test split. All methods have one learning rate, which --choose puts to the test.
"""

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hf_vq.run_files import EVALUATION, LOG, RUN
from result_rows import Run, in_rows, markdown, tokenizer_row

TRAINING = Path(__file__).resolve().parent.parent
CONFIG = TRAINING / "configs" / "seeds_cifar10.yaml"
LEARNING_RATES = (2e-3, 4e-3, 8e-3)
SHORT = ("--num_train_epochs", "2", "--test_split", "none")
SHOWN = ("model", "kind", "psnr", "psnr_of_mse", "ssim", "perplexity", "usage")


class Method(NamedTuple):
    """A family, its learning rate, and the fields of its config that make the method."""

    model_type: str
    learning_rate: float
    fields: dict[str, Any]


METHODS = {
    "sqvae": Method("hf_sqvae", 4e-3, {"initial_variance": 0.3, "variance_lr_scale": 20, "temperature_end": 0.4}),
    "vq-gradient": Method("hf_vqvae", 4e-3, {"quantizer": "gradient"}),
    "vq-ema": Method("hf_vqvae", 4e-3, {"quantizer": "ema"}),
    "vq-ema-care": Method("hf_vqvae", 4e-3, {"quantizer": "ema", "codebook_init": "kmeans", "revive_below": 0.1}),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, default=Path("output/seeds"))
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10", help="(default: %(default)s)")
    help = "short runs of the first seed, to choose each method's learning rate on held-out images"
    parser.add_argument("--choose", action="store_true", help=help)
    options = parser.parse_args(arguments)
    print("\n".join(choose(options) if options.choose else compare(options)))


def compare(options: argparse.Namespace) -> list[str]:
    """Trains every method from every seed; the table."""
    folders = []
    for seed, name in itertools.product(options.seeds, options.methods):
        folders.append(options.output_dir / f"{name}-seed{seed}")
        if not (folders[-1] / EVALUATION).exists():
            train(folders[-1], METHODS[name], METHODS[name].learning_rate, seed, options.dataset_name)
    rows = [tokenizer_row(row) for row in in_rows(map(Run.read, folders))]
    return table([{name: row[name] for name in SHOWN} for row in rows])


def choose(options: argparse.Namespace) -> list[str]:
    """Trains every method a little with every learning rate; the table of held-out psnr."""
    rows = []
    for name in options.methods:
        rows.append({"model": name})
        for learning_rate in LEARNING_RATES:
            folder = options.output_dir / "choose" / f"{name}-{learning_rate:g}"
            if not (folder / "config.json").exists():
                train(folder, METHODS[name], learning_rate, options.seeds[0], options.dataset_name, *SHORT)
            rows[-1][f"{learning_rate:g}"] = f"{held_out_psnr(folder):.2f}"
    return table(rows)


def train(folder: Path, method: Method, learning_rate: float, seed: int, dataset_name: str, *more: str) -> None:
    """One run of training/train.py, resumed where it stopped."""
    command = ["accelerate", "launch", str(TRAINING / "train.py"), "--config", str(CONFIG), "--seed", str(seed)]
    command += ["--model_type", method.model_type, "--config_overrides", json.dumps(method.fields)]
    command += ["--learning_rate", str(learning_rate), "--output_dir", str(folder), "--dataset_name", dataset_name]
    command += more
    if (folder / RUN).exists():
        command += ["--resume_from_checkpoint", "latest"]
    print(folder, flush=True)
    subprocess.run(command, check=True)


def held_out_psnr(folder: Path) -> float:
    """Of the last evaluation in a run's log."""
    log = (folder / LOG).read_text(encoding="utf-8").splitlines()
    return next(float(line["eval_psnr"]) for line in map(json.loads, reversed(log)) if "eval_psnr" in line)


def table(rows: list[dict[str, str]]) -> list[str]:
    """Rows as Markdown."""
    return markdown(rows, lambda head: head not in ("model", "kind"))


if __name__ == "__main__":
    main()
