"""`hf-vq tokenize`: a data set of images becomes a data set of their tokens."""

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HOME
from tqdm.auto import tqdm

from hf_vq.cards import is_on_hub
from hf_vq.commands.shared import add_command, add_refine, check_device
from hf_vq.corpus.card import write_corpus_card
from hf_vq.corpus.corpus import JOB_FILE, Corpus
from hf_vq.corpus.job import TokenizationJob
from hf_vq.hub_commit import commit_folder, full_name

HUB_PREFIX = "hf://datasets/"


def add_tokenize(commands: Any) -> None:
    """`hf-vq tokenize MODEL --dataset_name NAME --output DIR`."""
    help = "Turn a data set of images into a data set of their tokens; run it again to go on after a stop."
    # The device of Ray's actors need not be on this machine.
    parser = add_command(commands, "tokenize", help, tokenize, device_type=str)
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
    add_refine(parser)
    help = f"folder of the token data set, or {HUB_PREFIX}org/name to publish it"
    parser.add_argument("--output", required=True, help=help)
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--token", help="of the Hub (default: the one that `hf auth login` keeps)")
    parser.add_argument("--license", help="of the tokens, for the card: cc-by-4.0, ...")
    parser.add_argument("--batch_size", type=int, default=64, help="images at once (default: %(default)s)")
    help = "that decode, each a file at a time (default: %(default)s)"
    parser.add_argument("--dataloader_num_workers", type=int, default=1, help=help)
    help = "rows from which on a file of the data set becomes several (default: %(default)s)"
    parser.add_argument("--rows_per_file", type=int, default=100_000, help=help)
    parser.add_argument("--max_bad_examples", type=int, default=100, help="images that may be left out as unusable")
    parser.add_argument("--engine", choices=["local", "ray"], default="local", help="where (default: %(default)s)")
    parser.add_argument("--ray_address", help="of the cluster: auto, ray://...; by default Ray starts one here")
    parser.add_argument("--num_actors", type=int, help="of Ray, each with its own model (default: 1)")


def tokenize(args: argparse.Namespace) -> None:
    """Writes the files that are missing, and the card; publishes them if --output is on the Hub."""
    check_flags(args)
    job, api = job_of(args), HfApi(token=args.token)
    repo_id = full_name(api, args.output.removeprefix(HUB_PREFIX)) if is_repository(args) else None
    folder = working_folder(repo_id, job) if repo_id else Path(args.output)
    opened = {"batch_size": args.batch_size, "max_bad_examples": args.max_bad_examples, "token": args.token}
    corpus = job.open(folder, device=args.device if args.engine == "local" else "cpu", **opened)
    if repo_id:
        take_repository(api, repo_id, args.private)
    actor = {"job": job, "folder": str(folder.resolve()), "opened": opened | {"device": args.device}}
    with corpus.claimed():
        try:
            fill(args, corpus, actor)
        except KeyboardInterrupt as error:
            error.add_note("What is finished stays: run the same command again to go on.")
            raise
        write_corpus_card(corpus, repo_id or str(folder), args.license)
        print(f"{corpus.num_rows():,} images are tokenized in {folder}; {len(corpus.bad_examples()):,} were left out.")
        if repo_id:
            commit = commit_folder(api, folder, repo_id, repo_type="dataset", private=args.private, replaced=["data/*"])
            print(f"Published {commit.repo_url}, commit {commit.oid}")
    if repo_id:
        shutil.rmtree(folder)


def check_flags(args: argparse.Namespace) -> None:
    """Raises a ValueError if a flag would be ignored, or others would not find the tokenizer."""
    if args.engine == "local":
        check_device(args.device)
        if args.ray_address is not None or args.num_actors is not None:
            raise ValueError("--ray_address and --num_actors are for --engine ray: add it, or drop them")
    if not is_repository(args) and args.private:
        raise ValueError(f"--private is for a repository, and --output {args.output} is a folder: drop it")
    if is_repository(args) and not is_on_hub(args.model):
        raise ValueError(
            f"others would not find the tokenizer {args.model}: publish it first, and name it by its repository"
        )


def is_repository(args: argparse.Namespace) -> bool:
    """Whether the tokens go to the Hub."""
    return args.output.startswith(HUB_PREFIX)


def working_folder(repo_id: str, job: TokenizationJob) -> Path:
    """Where the files lie until they are published: a folder of this job, so that the same command goes on."""
    key = hashlib.sha256(json.dumps(job.settings, sort_keys=True).encode()).hexdigest()[:16]
    return Path(HF_HOME) / "hf_vq" / "tokenized" / f"{repo_id.replace('/', '--')}-{key}"


def take_repository(api: HfApi, repo_id: str, private: bool | None) -> None:
    """Makes the repository, so that what stands in the way of publishing shows before the work.

    Raises:
        ValueError: if it holds something else than a tokenization.
        HfHubHTTPError: the Hub refuses.
    """
    api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    there = [file.rfilename for file in api.dataset_info(repo_id).siblings or []]
    others = [name for name in there if name not in (".gitattributes", "README.md")]
    if others and JOB_FILE not in there:
        raise ValueError(f"the data set {repo_id} holds {others[0]}, which no tokenization made: name another")


def job_of(args: argparse.Namespace) -> TokenizationJob:
    """What is asked for; local paths as every process finds them."""
    given = {field.name: getattr(args, field.name) for field in fields(TokenizationJob)}
    given |= {name: os.path.abspath(given[name]) for name in ("model", "dataset_name") if os.path.isdir(given[name])}
    if args.data_files:
        given["data_files"] = [file if "://" in file else os.path.abspath(file) for file in args.data_files]
    plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    return TokenizationJob(**plain)


def fill(args: argparse.Namespace, corpus: Corpus, actor: dict[str, Any]) -> None:
    """Does what is missing, here or by actors."""
    with tqdm(desc="tokenize", unit="img", total=corpus.units.num_rows, initial=corpus.num_images()) as bar:
        if args.engine == "local":
            corpus.run(corpus.missing(), args.dataloader_num_workers, bar.update)
        else:
            run_actors(args, corpus, actor | {"num_workers": args.dataloader_num_workers}, bar.update)


def run_actors(
    args: argparse.Namespace, corpus: Corpus, actor: dict[str, Any], report: Callable[[int], object]
) -> None:
    """Does it on Ray."""
    try:
        from hf_vq.corpus.on_ray import run_on_ray
    except ImportError as error:
        raise ValueError(f"--engine ray needs Ray ({error}): pip install 'hf-vq[ray]'") from error
    run_on_ray(corpus, actor, args.num_actors or 1, args.ray_address, report)
