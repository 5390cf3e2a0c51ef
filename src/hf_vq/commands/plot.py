"""`hf-vq plot`: the pictures of a training run."""

import argparse
from pathlib import Path
from typing import Any

from hf_vq.code_counts import read_code_counts
from hf_vq.code_pictures import save_code_history, save_code_usage
from hf_vq.commands.shared import check_output_folder
from hf_vq.pictures import save_curves


def add_plot(commands: Any) -> None:
    """`hf-vq plot RUN_DIR`."""
    help = "Draw the pictures of a training run: its codes over time, and its curves."
    parser = commands.add_parser("plot", help=help, description=help, allow_abbrev=False)
    parser.set_defaults(run=plot)
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the output_dir of a training run")
    parser.add_argument("--output", type=Path, help="folder for the PNG files (default: RUN_DIR/pictures)")


def plot(args: argparse.Namespace) -> None:
    """Draws how often each code occurs, over time and at the last evaluation, and the curves of the log."""
    codes, log = args.run_dir / "codes.safetensors", args.run_dir / "metrics.jsonl"
    if not codes.is_file() and not log.is_file():
        raise ValueError(
            f"{args.run_dir} has no {log.name} and no {codes.name}: name the output_dir of a training run."
        )
    folder = args.output or args.run_dir / "pictures"
    check_output_folder(folder)
    drawn = []
    if codes.is_file():
        step, code_counts = list(read_code_counts(codes).items())[-1]
        drawn += [folder / "code-history.png", folder / f"step-{step:06d}-codes.png"]
        save_code_history(drawn[0], codes)
        save_code_usage(drawn[1], code_counts)
    if log.is_file():
        drawn.append(folder / "curves.png")
        save_curves(drawn[-1], log)
    print("Drew", *drawn, sep="\n  ")
    if not codes.is_file():
        print(f"There is no {codes.name} yet: the codes are counted at each evaluation.")
