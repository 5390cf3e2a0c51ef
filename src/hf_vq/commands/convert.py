"""`hf-vq convert`: a tokenizer of another library becomes one of ours."""

import argparse
from pathlib import Path
from typing import Any

from hf_vq.commands.shared import check_output_folder
from hf_vq.convert import convert


def add_convert(commands: Any) -> None:
    """`hf-vq convert org/model --subfolder vqvae --output FOLDER`."""
    help = "Convert a VQModel of diffusers: the same tokens, the same pixels."
    parser = commands.add_parser("convert", help=help, description=help, allow_abbrev=False)
    parser.set_defaults(run=convert_model)
    parser.add_argument("model", metavar="MODEL", help="name on the Hub, or folder")
    parser.add_argument("--subfolder", default="", help='where it is in there, "vqvae" in a pipeline\'s repository')
    parser.add_argument("--revision", help="branch, tag or commit of the model")
    help = "of the images it was trained on (default: sample_size of its config, which need not be true)"
    parser.add_argument("--image_size", type=int, help=help)
    parser.add_argument("--output", type=Path, required=True, help="folder of the converted model")


def convert_model(args: argparse.Namespace) -> None:
    """Writes the converted model and its image processor."""
    check_output_folder(args.output)
    source = Path(args.model, args.subfolder)
    if args.output.resolve() in (source.resolve(), Path(args.model).resolve()):
        raise ValueError(f"--output {args.output} is the model itself, which would be lost: name another folder.")
    tokenizer = convert(args.model, args.subfolder, args.revision, args.image_size)
    tokenizer.save_pretrained(args.output)
    print(f"{tokenizer} is in {args.output}.")
