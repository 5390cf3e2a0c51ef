"""What the commands share: flags of those that run a model, and where they may write."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hf_vq.tokenizer import ImageTokenizer


def add_command(
    commands: Any,
    name: str,
    help: str,
    run: Callable[[argparse.Namespace], None],
    device_type: Callable[[str], Any] | None = None,
) -> Any:
    """A subcommand that runs a model, with what all of these take; devices are those of this machine by default."""
    parser = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="MODEL", help="name on the Hub, or folder")
    parser.add_argument("--revision", help="branch, tag or commit of the model")
    parser.add_argument("--trust_remote_code", action="store_true", help="run model code from the Hub")
    help = "cpu, cuda, ... (default: %(default)s)"
    parser.add_argument("--device", type=device_type or device_of, default="cpu", help=help)
    return parser


def add_refine(parser: Any) -> None:
    """The flag of commands that choose tokens for images."""
    help = "rounds in which tokens change where the decoded image gets closer; takes time, and memory as training does "
    help += "(default: %(default)s)"
    parser.add_argument("--refine", type=count_of, default=0, metavar="ROUNDS", help=help)


def load_image_tokenizer(args: argparse.Namespace) -> ImageTokenizer:
    """The tokenizer that the arguments name."""
    return ImageTokenizer.from_pretrained(args.model, device=args.device, **where_from(args))


def where_from(args: argparse.Namespace) -> dict[str, Any]:
    """What `from_pretrained` needs to know beside the name."""
    return {"revision": args.revision or "main", "trust_remote_code": args.trust_remote_code}


def check_output_file(path: Path) -> None:
    """Raises a ValueError if a file cannot be written there; makes its folder."""
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder: name a file.")
    path.parent.mkdir(parents=True, exist_ok=True)


def check_output_picture(path: Path) -> None:
    """Raises a ValueError if no picture can be written there."""
    check_output_file(path)
    if path.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--output {path}: {path.suffix or 'no suffix'} is no kind of picture: take .png.")


def check_output_folder(path: Path) -> None:
    """Raises a ValueError if a folder cannot be there."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"--output {path} is a file: name a folder.")


def count_of(text: str) -> int:
    """A whole number, 0 or more, for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is no whole number, 0 or more")
    return int(text)


def device_of(name: str) -> torch.device:
    """The device of this name, for argparse."""
    try:
        return check_device(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def check_device(name: str) -> torch.device:
    """The device of this name; raises a ValueError if it is not there."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{name!r} cannot be used here: {error}") from error
