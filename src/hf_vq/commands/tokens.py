"""`hf-vq encode` and `hf-vq decode`: files of images to a file of tokens, and back."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from hf_vq.commands.shared import add_command, add_refine, check_output_file, check_output_folder, load_image_tokenizer
from hf_vq.token_files import grids_of, output_names, read_records, write_records


def add_encode(commands: Any) -> None:
    """`hf-vq encode MODEL IMAGES... --output tokens.jsonl`."""
    parser = add_command(commands, "encode", "Images to tokens.", encode)
    parser.add_argument("images", metavar="IMAGES", nargs="+", help="image files, or folders of them")
    parser.add_argument("--output", type=Path, required=True, help="tokens.json (a list) or tokens.jsonl (lines)")
    parser.add_argument("--keep_size", action="store_true", help="crop to whole tokens instead of resizing")
    add_refine(parser)
    parser.add_argument("--batch_size", type=int, default=64, help="images at once (default: %(default)s)")


def add_decode(commands: Any) -> None:
    """`hf-vq decode MODEL tokens.jsonl --output DIR`."""
    parser = add_command(commands, "decode", "Tokens to images.", decode)
    parser.add_argument("tokens", metavar="TOKENS", type=Path, help="a file that encode wrote, or JSON lists of ids")
    parser.add_argument("--output", type=Path, required=True, help="folder for the PNG files")
    parser.add_argument("--batch_size", type=int, default=64, help="images at once (default: %(default)s)")


def encode(args: argparse.Namespace) -> None:
    """Writes one record per image: image (its path), image_grid_hw, input_ids, fingerprint (of the model), refine."""
    if args.output.suffix not in (".json", ".jsonl"):
        raise ValueError(f"--output {args.output}: the name must end in .json or .jsonl.")
    check_output_file(args.output)
    paths = find_images(args.images)
    tok = load_image_tokenizer(args)
    size: dict[str, Any] = {"do_resize": False, "do_center_crop": False} if args.keep_size else {}
    batch = tok(paths, batch_size=args.batch_size, refine=args.refine, **size)
    shared = {"fingerprint": tok.model.fingerprint(), **({"refine": args.refine} if args.refine else {})}
    rows = zip(paths, batch["image_grid_hw"], batch["input_ids"], strict=True)
    records = [{"image": str(path), "image_grid_hw": grid, "input_ids": ids, **shared} for path, grid, ids in rows]
    write_records(args.output, records)
    print(f"Wrote the tokens of {len(records)} images to {args.output}.")


def decode(args: argparse.Namespace) -> None:
    """Writes one PNG per record, named after its image or its number."""
    check_output_folder(args.output)
    records = read_records(args.tokens)
    tok = load_image_tokenizer(args)
    fingerprint = tok.model.fingerprint()
    foreign = next(
        (i for i, record in enumerate(records) if record.get("fingerprint", fingerprint) != fingerprint), None
    )
    if foreign is not None:
        raise ValueError(f"record {foreign} of {args.tokens} has tokens of another model: decode it with that one.")
    images = tok.batch_decode([record["input_ids"] for record in records], grids_of(records), args.batch_size)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, image in zip(output_names(records), images, strict=True):
        image.save(args.output / name)
    print(f"Wrote {len(images)} images to {args.output}.")


def find_images(names: Sequence[str]) -> list[Path]:
    """The named files, and the image files in the named folders (and below), in name order.

    Raises:
        ValueError: a name that does not exist, or a folder without images.
    """
    if missing := [name for name in names if not os.path.exists(name)]:
        raise ValueError(f"there is no {', no '.join(missing[:8])}: pass image files, or folders of them.")
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found: list[Path] = []
    for path in map(Path, names):
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        if path.is_dir():
            inside = [file for file in inside if file.suffix.lower() in suffixes and not file.name.startswith(".")]
        if not inside:
            raise ValueError(f"the folder {path} has no image files.")
        found += inside
    return found
