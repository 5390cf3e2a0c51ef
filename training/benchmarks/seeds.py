"""Is SQ-VAE better than VQ-VAE? One net, one plan, four quantizers, three seeds each, all through training/train.py.

    python training/benchmarks/seeds.py                 trains what is missing, one run after the other
    python training/results.py output/seeds/*           the rows

Each run is a run directory under --output_dir; one that was killed goes on where it stopped. Prints a table: mean ±
half the range over seeds, of the whole test split.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from result_rows import Run, in_rows, markdown, tokenizer_row

TRAINING = Path(__file__).resolve().parent.parent
CONFIG = TRAINING / "configs" / "seeds_cifar10.yaml"
SHOWN = ("model", "kind", "psnr", "psnr_of_mse", "ssim", "perplexity", "usage")


class Method(NamedTuple):
    """A family, and the fields of its config that make the method."""

    model_type: str
    fields: dict[str, Any]


METHODS = {
    "sqvae": Method("hf_sqvae", {"initial_variance": 0.3, "variance_lr_scale": 20, "temperature_end": 0.4}),
    "vq-gradient": Method("hf_vqvae", {"quantizer": "gradient"}),
    "vq-ema": Method("hf_vqvae", {"quantizer": "ema"}),
    "vq-ema-care": Method("hf_vqvae", {"quantizer": "ema", "codebook_init": "kmeans", "revive_below": 0.1}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, default=Path("output/seeds"))
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10", help="(default: %(default)s)")
    options = parser.parse_args()
    folders = [options.output_dir / f"{name}-seed{seed}" for seed in options.seeds for name in options.methods]
    for folder in folders:
        if not (folder / "evaluation.json").exists():
            train(folder, options.dataset_name)
    rows = [tokenizer_row(row) for row in in_rows(map(Run.read, folders))]
    shown = [{name: row[name] for name in SHOWN} for row in rows]
    print("\n".join(markdown(shown, lambda head: head not in ("model", "kind"))))


def train(folder: Path, dataset_name: str) -> None:
    """One run of training/train.py, resumed where it stopped."""
    name, _, seed = folder.name.rpartition("-seed")
    method = METHODS[name]
    command = ["accelerate", "launch", str(TRAINING / "train.py"), "--config", str(CONFIG), "--seed", seed]
    command += ["--model_type", method.model_type, "--config_overrides", json.dumps(method.fields)]
    command += ["--output_dir", str(folder), "--dataset_name", dataset_name]
    if (folder / "run.yaml").exists():
        command += ["--resume_from_checkpoint", "latest"]
    print(folder, flush=True)
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
