"""`hf-vq sample`: a page of images from a prior."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import pipeline

from hf_vq.commands.shared import add_command, check_output_picture, where_from
from hf_vq.pictures import save_samples


def add_sample(commands: Any) -> None:
    """`hf-vq sample PRIOR --num_images 16 --class_labels 0 1 2 --output grid.png`."""
    parser = add_command(commands, "sample", "Sample images from a prior: a row a class.", sample)
    parser.add_argument("--num_images", type=int, default=16, help="images of each class (default: %(default)s)")
    help = "classes, by number or name; -1 is no class (default)"
    parser.add_argument("--class_labels", type=label_of, nargs="+", default=[-1], help=help)
    parser.add_argument("--output", "--out", type=Path, default=Path("samples.png"), help="(default: %(default)s)")
    parser.add_argument("--guidance_scale", type=float, help="over 1: closer to the class, less variety")
    parser.add_argument("--temperature", type=float, default=1.0, help="(default: %(default)s)")
    parser.add_argument("--top_k", type=int, default=0, help="the likeliest codes only; 0 for all (default)")
    parser.add_argument("--top_p", type=float, default=1.0, help="the likeliest share only (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=64, help="images at once (default: %(default)s)")


def sample(args: argparse.Namespace) -> None:
    """Writes one picture of all samples, with a row for each class."""
    check_output_picture(args.output)
    for flag in ("num_images", "batch_size"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag} must be at least 1, got {getattr(args, flag)}.")
    names = ("guidance_scale", "temperature", "top_k", "top_p")
    settings = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    pipe = pipeline(  # type: ignore[call-overload]  # its overloads know no registered tasks
        "unconditional-image-generation",
        model=args.model,
        **where_from(args),
        device=args.device,
    )
    torch.manual_seed(args.seed)
    labels = [label for label in args.class_labels for _ in range(args.num_images)]
    images = pipe(class_labels=labels, batch_size=args.batch_size, **settings)
    pixels = torch.stack([torch.tensor(np.atleast_3d(np.array(image))).permute(2, 0, 1) for image in images])
    titles = [label if isinstance(label, str) else pipe.model.config.class_name(label) for label in args.class_labels]
    save_samples(args.output, pixels.unflatten(0, (len(titles), args.num_images)), titles)
    print(f"Wrote {len(images)} images to {args.output}.")


def label_of(text: str) -> int | str:
    """A class by its number, or else by its name."""
    return int(text) if text.removeprefix("-").isdigit() else text
