"""`hf-vq publish`: a trained model becomes a repository on the Hub."""

import argparse
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from hf_vq.commands.shared import check_output_folder
from hf_vq.models.prior_tokenizer import is_prior, seen_from, tokenizer_location
from hf_vq.publishing import (
    TokenizerPlace,
    choose_tokenizer,
    find_on_hub,
    publish,
    read_config,
    write_repository,
)


def add_publish(commands: Any) -> None:
    """`hf-vq publish RUN_DIR --repo_id org/name`."""
    help = "Publish a trained tokenizer or prior on the Hub, with a card made of its measured numbers."
    parser = commands.add_parser("publish", help=help, description=help, allow_abbrev=False)
    parser.set_defaults(run=publish_run)
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the output_dir of a training run")
    parser.add_argument("--repo_id", required=True, help="the repository, org/name; made if it does not exist")
    parser.add_argument("--tokenizer_repo_id", help="of a prior: the repository of its tokenizer")
    parser.add_argument("--with_tokenizer", action="store_true", help="of a prior: publish its tokenizer first")
    parser.add_argument("--license", help="of the weights, for the card: apache-2.0, mit, ...")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", help="branch to publish to; made if it does not exist (default: main)")
    parser.add_argument("--token", help="of the Hub (default: the one that `hf auth login` keeps)")
    parser.add_argument("--dry_run", action="store_true", help="write the folder, and publish nothing")
    help = "of --dry_run: where it writes the repository's folder (default: published)"
    parser.add_argument("--output", type=Path, help=help)


def publish_run(args: argparse.Namespace) -> None:
    """Publishes, or with --dry_run writes what would be published."""
    if not (args.run_dir / "config.json").is_file():
        raise ValueError(f"{args.run_dir} holds no trained model: name the output_dir of a finished training run.")
    validate_repo_id(args.repo_id)
    if args.dry_run:
        write_folders(args, args.output or Path("published"))
        return
    if args.output is not None:
        raise ValueError("--output is where --dry_run writes, and this would publish: drop it, or add --dry_run")
    names = ("tokenizer_repo_id", "with_tokenizer", "license", "private", "revision", "token")
    commit = publish(args.run_dir, args.repo_id, **{name: getattr(args, name) for name in names})
    print(f"Published {args.repo_id}, commit {commit.oid}: {commit.repo_url}")


def write_folders(args: argparse.Namespace, output: Path) -> None:
    """The folder of the model, and with --with_tokenizer beside it that of its tokenizer, by which it is found."""
    check_output_folder(output)
    folder, tokenizer = output / args.repo_id.split("/")[-1], None
    config = read_config(args.run_dir)
    if is_prior(config):
        name = choose_tokenizer(
            config.tokenizer_name_or_path, args.repo_id, args.tokenizer_repo_id, args.with_tokenizer
        )
        if args.with_tokenizer:
            beside = output / name.split("/")[-1]
            write_repository(tokenizer_location(config), beside, name, license=args.license)
            tokenizer = TokenizerPlace(seen_from(folder, beside))
        else:
            tokenizer = find_on_hub(config, name, HfApi(token=args.token))
    write_repository(args.run_dir, folder, args.repo_id, license=args.license, tokenizer=tokenizer)
    print(f"Wrote {folder}. Nothing was published.")
