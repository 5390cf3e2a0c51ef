"""`hf-vq tokenize`: a data set of images becomes a data set of their tokens."""

import argparse
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HOME
from tqdm.auto import tqdm

from hf_vq.cards import is_on_hub
from hf_vq.commands.shared import add_command
from hf_vq.corpus.card import write_corpus_card
from hf_vq.corpus.corpus import Corpus
from hf_vq.corpus.job import TokenizationJob
from hf_vq.hub_commit import commit_folder

HUB_PREFIX = "hf://datasets/"


def add_tokenize(commands: Any) -> None:
    """`hf-vq tokenize MODEL --dataset_name NAME --output DIR`."""
    help = "Turn a data set of images into a data set of their tokens; run it again to go on after a stop."
    parser = add_command(commands, "tokenize", help, tokenize)
    parser.add_argument("--dataset_name", required=True, help='name on the Hub, folder, or "parquet"')
    parser.add_argument("--dataset_config_name", help="configuration of the data set")
    parser.add_argument("--dataset_revision", help="branch, tag or commit of the data set")
    parser.add_argument("--data_files", nargs="+", help="files, as paths, URLs or patterns")
    parser.add_argument("--splits", nargs="+", help="splits to tokenize (default: all)")
    parser.add_argument("--image_column", help="column of the images, where there are several")
    help = "columns that stay beside the tokens (default: all but pictures, sounds and the like)"
    parser.add_argument("--keep_columns", nargs="*", help=help)
    parser.add_argument(
        "--keep_size", action="store_true", help="neither resize nor crop: every image has its own grid"
    )
    help = f"folder of the token data set, or {HUB_PREFIX}org/name to publish it"
    parser.add_argument("--output", required=True, help=help)
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--token", help="of the Hub (default: the one that `hf auth login` keeps)")
    parser.add_argument("--license", help="of the tokens, for the card: cc-by-4.0, ...")
    parser.add_argument("--batch_size", type=int, default=64, help="images at once (default: %(default)s)")
    parser.add_argument("--dataloader_num_workers", type=int, default=1, help="that decode (default: %(default)s)")
    help = "rows from which on a file of the data set becomes several (default: %(default)s)"
    parser.add_argument("--rows_per_file", type=int, default=100_000, help=help)
    parser.add_argument("--max_bad_examples", type=int, default=100, help="images that may be left out as unusable")
    parser.add_argument("--engine", choices=["local", "ray"], default="local", help="where (default: %(default)s)")
    parser.add_argument("--ray_address", help="of the cluster: auto, ray://...; by default Ray starts one here")
    parser.add_argument("--num_actors", type=int, default=1, help="of Ray, each with its own model")


def tokenize(args: argparse.Namespace) -> None:
    """Writes the files that are missing, and the card; publishes them if --output is on the Hub."""
    repo_id = args.output.removeprefix(HUB_PREFIX) if args.output.startswith(HUB_PREFIX) else None
    folder = Path(HF_HOME) / "hf_vq" / "tokenized" / repo_id if repo_id else Path(args.output)
    if repo_id and not is_on_hub(args.model):
        raise ValueError(
            f"others would not find the tokenizer {args.model}: publish it first, and name it by its repository"
        )
    job = job_of(args)
    opened = {"device": args.device, "batch_size": args.batch_size, "max_bad_examples": args.max_bad_examples}
    corpus = job.open(folder, **opened)
    corpus.claim()
    with tqdm(desc="tokenize", unit="img", total=corpus.units.num_rows, initial=corpus.num_images()) as bar:
        if args.engine == "local":
            corpus.run(corpus.missing(), args.dataloader_num_workers, bar.update)
        else:
            run_actors(args, corpus, {"job": job, "folder": str(folder.resolve()), "opened": opened}, bar.update)
    write_corpus_card(corpus, repo_id or str(folder), args.license)
    print(f"{corpus.num_rows():,} images are tokenized in {folder}; {len(corpus.bad_examples()):,} were left out.")
    if repo_id:
        api = HfApi(token=args.token)
        commit = commit_folder(api, folder, repo_id, repo_type="dataset", private=args.private, replaced=["data/*"])
        print(f"Published {commit.repo_url}, commit {commit.oid}")


def job_of(args: argparse.Namespace) -> TokenizationJob:
    """What is asked for."""
    given = {field.name: getattr(args, field.name) for field in fields(TokenizationJob)}
    plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    return TokenizationJob(**plain)


def run_actors(
    args: argparse.Namespace, corpus: Corpus, actor: dict[str, Any], report: Callable[[int], object]
) -> None:
    """Does it on Ray."""
    try:
        from hf_vq.corpus.on_ray import run_on_ray
    except ImportError as error:
        raise ValueError(f"--engine ray needs Ray ({error}): pip install 'hf-vq[ray]'") from error
    actor |= {"num_workers": args.dataloader_num_workers}
    run_on_ray(corpus, actor, args.num_actors, args.ray_address, report)
