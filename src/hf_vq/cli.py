"""The command `hf-vq`: encode images, decode tokens, sample images, measure a model, draw the pictures of a run."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError
from transformers import pipeline

from hf_vq.code_counts import read_code_counts
from hf_vq.code_pictures import save_code_history, save_code_usage
from hf_vq.evaluation import Evaluation, evaluate, write_evaluation
from hf_vq.pictures import save_curves, save_samples
from hf_vq.streams import EvaluationBatches, ToPixelValues, load_images
from hf_vq.token_files import grids_of, output_names, read_records, write_records
from hf_vq.tokenizer import ImageTokenizer

__all__ = ["main"]

# Errors that come from what the user gave; their messages are enough.
USER_ERRORS = (ValueError, OSError, ImportError, SafetensorError, StrictDataclassError, DatasetsError)
EXIT_USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `hf-vq` with these arguments (by default those of the process).

    Returns:
        The exit code: 0, or 2 after an error in what was given, whose message went to stderr.
    """
    args = make_parser().parse_args(arguments)
    try:
        args.run(args)
    except USER_ERRORS as error:
        message = "\n".join([str(error) or type(error).__name__, *getattr(error, "__notes__", [])])
        print(f"hf-vq {args.command}: error: {message}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser of `hf-vq`; no flag may be abbreviated."""
    parser = argparse.ArgumentParser(prog="hf-vq", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{encode,decode,sample,evaluate,plot}")
    add_encode(commands)
    add_decode(commands)
    add_sample(commands)
    add_evaluate(commands)
    add_plot(commands)
    return parser


def add_command(commands: Any, name: str, help: str, run: Callable[[argparse.Namespace], None]) -> Any:
    """A subcommand that runs a model, with what all of these take."""
    parser = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="MODEL", help="name on the Hub, or folder")
    parser.add_argument("--revision", help="branch, tag or commit of the model")
    parser.add_argument("--trust_remote_code", action="store_true", help="run model code from the Hub")
    parser.add_argument("--device", type=_device, default="cpu", help="cpu, cuda, ... (default: %(default)s)")
    return parser


def add_encode(commands: Any) -> None:
    """`hf-vq encode MODEL IMAGES... --output tokens.jsonl`."""
    parser = add_command(commands, "encode", "Images to tokens.", encode)
    parser.add_argument("images", metavar="IMAGES", nargs="+", help="image files, or folders of them")
    parser.add_argument("--output", type=Path, required=True, help="tokens.json (a list) or tokens.jsonl (lines)")
    parser.add_argument("--keep_size", action="store_true", help="crop to whole tokens instead of resizing")
    parser.add_argument("--batch_size", type=int, default=64, help="images at once (default: %(default)s)")


def add_decode(commands: Any) -> None:
    """`hf-vq decode MODEL tokens.jsonl --output DIR`."""
    parser = add_command(commands, "decode", "Tokens to images.", decode)
    parser.add_argument("tokens", metavar="TOKENS", type=Path, help="a file that encode wrote, or JSON lists of ids")
    parser.add_argument("--output", type=Path, required=True, help="folder for the PNG files")
    parser.add_argument("--batch_size", type=int, default=64, help="images at once (default: %(default)s)")


def add_sample(commands: Any) -> None:
    """`hf-vq sample PRIOR --num_images 16 --class_labels 0 1 2 --output grid.png`."""
    parser = add_command(commands, "sample", "Sample images from a prior: a row a class.", sample)
    parser.add_argument("--num_images", type=int, default=16, help="images of each class (default: %(default)s)")
    parser.add_argument("--class_labels", type=int, nargs="+", default=[-1], help="classes; -1 is no class (default)")
    parser.add_argument("--output", "--out", type=Path, default=Path("samples.png"), help="(default: %(default)s)")
    parser.add_argument("--guidance_scale", type=float, help="over 1: closer to the class, less variety")
    parser.add_argument("--temperature", type=float, default=1.0, help="(default: %(default)s)")
    parser.add_argument("--top_k", type=int, default=0, help="the likeliest codes only; 0 for all (default)")
    parser.add_argument("--top_p", type=float, default=1.0, help="the likeliest share only (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=64, help="images at once (default: %(default)s)")


def add_evaluate(commands: Any) -> None:
    """`hf-vq evaluate MODEL --dataset_name NAME --split test`."""
    parser = add_command(commands, "evaluate", "Measure a model on a data set of images.", evaluate_on_dataset)
    parser.add_argument("--dataset_name", required=True, help='name on the Hub, folder, or "parquet"')
    parser.add_argument("--dataset_config_name", help="configuration of the data set")
    parser.add_argument("--dataset_revision", help="branch, tag or commit of the data set")
    parser.add_argument("--data_files", nargs="+", help="files of the split, as paths, URLs or patterns")
    parser.add_argument("--split", default="test", help="(default: %(default)s)")
    parser.add_argument("--image_column", help="column of the images, where there are several")
    parser.add_argument("--streaming", action="store_true", help="read without preparing a copy on disk")
    parser.add_argument("--cache_dir", help="where prepared data go")
    parser.add_argument("--fd_model", help="vision model whose features give the Fréchet distance")
    parser.add_argument("--output", type=Path, default=Path("evaluation.json"), help="(default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=256, help="images at once (default: %(default)s)")
    parser.add_argument("--dataloader_num_workers", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--max_bad_examples", type=int, default=100, help="damaged images that are skipped")


def add_plot(commands: Any) -> None:
    """`hf-vq plot RUN_DIR`."""
    help = "Draw the pictures of a training run: its codes over time, and its curves."
    parser = commands.add_parser("plot", help=help, description=help, allow_abbrev=False)
    parser.set_defaults(run=plot)
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the output_dir of a training run")
    parser.add_argument("--output", type=Path, help="folder for the PNG files (default: RUN_DIR/pictures)")


def encode(args: argparse.Namespace) -> None:
    """Writes one record per image: image (its path), image_grid_hw, input_ids, fingerprint (of the model)."""
    if args.output.suffix not in (".json", ".jsonl"):
        raise ValueError(f"--output {args.output}: the name must end in .json or .jsonl.")
    _check_output_file(args.output)
    paths = find_images(args.images)
    tok = _load(args)
    size: dict[str, Any] = {"do_resize": False, "do_center_crop": False} if args.keep_size else {}
    batch = tok(paths, batch_size=args.batch_size, **size)
    shared = {"fingerprint": tok.model.fingerprint()}
    rows = zip(paths, batch["image_grid_hw"], batch["input_ids"], strict=True)
    records = [{"image": str(path), "image_grid_hw": grid, "input_ids": ids, **shared} for path, grid, ids in rows]
    write_records(args.output, records)
    print(f"Wrote the tokens of {len(records)} images to {args.output}.")


def decode(args: argparse.Namespace) -> None:
    """Writes one PNG per record, named after its image or its number."""
    _check_output_folder(args.output)
    records = read_records(args.tokens)
    tok = _load(args)
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


def sample(args: argparse.Namespace) -> None:
    """Writes one picture of all samples, with a row for each class."""
    _check_output_file(args.output)
    if args.num_images < 1:
        raise ValueError(f"--num_images must be at least 1, got {args.num_images}.")
    names = ("guidance_scale", "temperature", "top_k", "top_p")
    settings = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    pipe = pipeline(  # type: ignore[call-overload]  # its overloads know no registered tasks
        "unconditional-image-generation",
        model=args.model,
        revision=args.revision or "main",
        trust_remote_code=args.trust_remote_code,
        device=args.device,
    )
    torch.manual_seed(args.seed)
    labels = [label for label in args.class_labels for _ in range(args.num_images)]
    images = pipe(class_labels=labels, batch_size=args.batch_size, **settings)
    pixels = torch.stack([torch.tensor(np.atleast_3d(np.array(image))).permute(2, 0, 1) for image in images])
    titles = ["no class" if label == -1 else f"class {label}" for label in args.class_labels]
    save_samples(args.output, pixels.unflatten(0, (len(titles), args.num_images)), titles)
    print(f"Wrote {len(images)} images to {args.output}.")


def evaluate_on_dataset(args: argparse.Namespace) -> None:
    """Prints every number and writes them, with the data set, the split and the protocol, to --output."""
    _check_output_file(args.output)
    dataset = load_images(
        args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        data_files={args.split: args.data_files} if args.data_files else None,
        revision=args.dataset_revision,
        streaming=args.streaming,
        image_column=args.image_column,
        train_split=args.split,
        validation_size=0,
        cache_dir=args.cache_dir,
    ).train
    tok = _load(args)
    batches = EvaluationBatches(
        dataset,
        ToPixelValues(tok.processor),
        args.batch_size,
        num_workers=args.dataloader_num_workers,
        max_bad_examples=args.max_bad_examples,
    )
    evaluation = evaluate(tok.model, tok.processor, batches, fd_model=args.fd_model, progress=True)
    names = ["dataset_name", "dataset_config_name", "dataset_revision", "data_files", "split", "fd_model"]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    measured_on = {"model_name_or_path": args.model, **given, "bad_examples": batches.bad_examples}
    write_evaluation(args.output, evaluation, **measured_on, fingerprint=tok.model.fingerprint())
    print_metrics(evaluation)
    print(f"Written to {args.output}.")


def plot(args: argparse.Namespace) -> None:
    """Draws how often each code occurs, over time and at the last evaluation, and the curves of the log."""
    codes, log = args.run_dir / "codes.safetensors", args.run_dir / "metrics.jsonl"
    if not codes.is_file() and not log.is_file():
        raise ValueError(
            f"{args.run_dir} has no {log.name} and no {codes.name}: name the output_dir of a training run."
        )
    folder = args.output or args.run_dir / "pictures"
    _check_output_folder(folder)
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


def print_metrics(evaluation: Evaluation) -> None:
    """Prints one metric per line."""
    width = max(map(len, evaluation.metrics))
    for name, value in evaluation.metrics.items():
        print(f"{name:<{width}}  {'-' if value is None else format(value, '.6g')}")


def _load(args: argparse.Namespace) -> ImageTokenizer:
    return ImageTokenizer.from_pretrained(
        args.model, device=args.device, revision=args.revision or "main", trust_remote_code=args.trust_remote_code
    )


def _check_output_file(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder: name a file.")
    path.parent.mkdir(parents=True, exist_ok=True)


def _check_output_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise ValueError(f"--output {path} is a file: name a folder.")


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{name!r} cannot be used here: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
