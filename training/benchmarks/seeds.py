"""Is SQ-VAE better than VQ-VAE? One net, one plan, four quantizers, three seeds each, all through training/train.py.

    python training/benchmarks/seeds.py --choose        held-out psnr of learning rates and codebook_dims, in short runs
    python training/benchmarks/seeds.py                 trains what is missing, one run after the other

Each run is a run directory under --output_dir, as training/results.py takes them; one that was killed goes on where it
stopped. Prints a table: mean ± half the range over seeds, of the whole test split; draws what the held-out images say
on the way, as seeds.png. Each method has a learning rate and a codebook_dim of its own, which --choose tests.
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

from hf_vq.figures import BLUE, ORANGE, RED, SOFT, new_figure, save_figure
from hf_vq.run_files import EVALUATION, LOG, RUN
from panels import say
from result_rows import Run, in_rows, markdown, tokenizer_row

TRAINING = Path(__file__).resolve().parent.parent
CONFIG = TRAINING / "configs" / "seeds_cifar10.yaml"
SHORT = ("--max_train_steps", "500", "--test_split", "none")
SHOWN = ("model", "kind", "psnr", "psnr_of_mse", "ssim", "perplexity", "usage")


class Method(NamedTuple):
    """A family, the fields of its config that make the method, its colour, and what was chosen for it."""

    model_type: str
    fields: dict[str, Any]
    colour: str
    learning_rate: float = 1.6e-2
    codebook_dim: int = 4


CURES = {"codebook_init": "kmeans", "revive_below": 0.1}
METHODS = {
    "sqvae": Method("hf_sqvae", {"initial_variance": 0.3, "variance_lr_scale": 20, "temperature_end": 0.4}, BLUE),
    "vq-gradient": Method("hf_vqvae", {"quantizer": "gradient"}, RED, learning_rate=6.4e-2, codebook_dim=16),
    "vq-ema": Method("hf_vqvae", {"quantizer": "ema"}, SOFT, codebook_dim=16),
    "vq-ema-care": Method("hf_vqvae", {"quantizer": "ema", **CURES}, ORANGE, learning_rate=8e-3),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, default=Path("output/seeds"))
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10", help="(default: %(default)s)")
    help = "short runs of the first seed, to choose each method's learning rate on held-out images"
    parser.add_argument("--choose", action="store_true", help=help)
    parser.add_argument("--learning_rates", nargs="+", type=float, default=[8e-3, 1.6e-2], help="that --choose tries")
    parser.add_argument("--codebook_dims", nargs="+", type=int, default=[4, 8], help="that --choose tries")
    options = parser.parse_args(arguments)
    print("\n".join(choose(options) if options.choose else compare(options)))


def compare(options: argparse.Namespace) -> list[str]:
    """Trains every method from every seed; the table. Leaves a picture."""
    folders: list[Path] = []
    for seed, name in itertools.product(options.seeds, options.methods):
        folders.append(options.output_dir / f"{name}-seed{seed}")
        if not (folders[-1] / EVALUATION).exists():
            train(folders[-1], METHODS[name], seed, options.dataset_name)
    draw(folders, options.output_dir / "seeds.png")
    rows = [tokenizer_row(row) for row in in_rows(map(Run.read, folders))]
    return table([{name: row[name] for name in SHOWN} for row in rows])


def choose(options: argparse.Namespace) -> list[str]:
    """Trains every method a little with every learning rate and size of codes; the table of held-out psnr."""
    rows = []
    for name in options.methods:
        rows.append({"model": name})
        for learning_rate, codebook_dim in itertools.product(options.learning_rates, options.codebook_dims):
            folder = options.output_dir / "choose" / f"{name}-{learning_rate:g}-{codebook_dim}"
            if not (folder / "config.json").exists():
                method = METHODS[name]._replace(learning_rate=learning_rate, codebook_dim=codebook_dim)
                train(folder, method, options.seeds[0], options.dataset_name, *SHORT)
            rows[-1][f"{learning_rate:g}, D = {codebook_dim}"] = f"{held_out(folder)[-1]['eval_psnr']:.2f}"
    return table(rows)


def train(folder: Path, method: Method, seed: int, dataset_name: str, *more: str) -> None:
    """One run of training/train.py, resumed where it stopped."""
    fields = {"codebook_dim": method.codebook_dim, **method.fields}
    command = ["accelerate", "launch", str(TRAINING / "train.py"), "--config", str(CONFIG), "--seed", str(seed)]
    command += ["--model_type", method.model_type, "--config_overrides", json.dumps(fields)]
    command += ["--learning_rate", str(method.learning_rate), "--output_dir", str(folder)]
    command += ["--dataset_name", dataset_name, *more]
    if (folder / RUN).exists():
        command += ["--resume_from_checkpoint", "latest"]
    print(folder, flush=True)
    subprocess.run(command, check=True)


def held_out(folder: Path) -> list[dict[str, float]]:
    """The evaluations in a run's log, first to last."""
    lines = map(json.loads, (folder / LOG).read_text(encoding="utf-8").splitlines())
    return [line for line in lines if "eval_psnr" in line]


def draw(folders: Sequence[Path], path: Path) -> None:
    """What the evaluations of the runs say, a colour a method and a line a seed."""
    figure, (quality, codes) = new_figure(2, (10, 4), columns=2)
    named: set[str] = set()
    for folder in folders:
        name = folder.name.rpartition("-seed")[0]
        evaluations = held_out(folder)
        for axis, metric in ((quality, "eval_psnr"), (codes, "eval_perplexity")):
            points = [(line["images"] / 1000, line[metric]) for line in evaluations]
            label = name if axis is quality and name not in named else None
            axis.plot(*zip(*points, strict=True), marker=".", color=METHODS[name].colour, label=label)
        named.add(name)
    say(quality, "Reconstruction of held-out images", "thousand training images", "PSNR (dB)", loc="lower right")
    say(codes, "Codes in use", "thousand training images", "perplexity")
    save_figure(figure, path)


def table(rows: list[dict[str, str]]) -> list[str]:
    """Rows as Markdown."""
    return markdown(rows, lambda head: head not in ("model", "kind"))


if __name__ == "__main__":
    main()
