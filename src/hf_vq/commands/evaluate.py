"""`hf-vq evaluate`: a tokenizer or a prior, measured on a data set."""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_vq.commands.shared import add_command, add_refine, check_output_file, load_image_tokenizer, where_from
from hf_vq.evaluation import PROTOCOL as TOKENIZER_PROTOCOL
from hf_vq.evaluation import Evaluation, about_weights, evaluate, weights_hash, write_evaluation
from hf_vq.models.prior_tokenizer import load_tokenizer
from hf_vq.prior_evaluation import PROTOCOL, evaluate_prior
from hf_vq.run_files import EVALUATION, REFINED
from hf_vq.streams import EvaluationBatches, ImageSplits, ToPixelValues, load_images
from hf_vq.token_batches import TokenBatches, ToLabelledPixelValues, find_classes


def add_evaluate(commands: Any) -> None:
    """`hf-vq evaluate MODEL --dataset_name NAME --split test`."""
    parser = add_command(
        commands, "evaluate", "Measure a tokenizer or a prior on a data set of images.", evaluate_on_dataset
    )
    parser.add_argument("--dataset_name", required=True, help='name on the Hub, folder, or "parquet"')
    parser.add_argument("--dataset_config_name", help="configuration of the data set")
    parser.add_argument("--dataset_revision", help="branch, tag or commit of the data set")
    parser.add_argument("--data_files", nargs="+", help="files of the split, as paths, URLs or patterns")
    parser.add_argument("--split", default="test", help="(default: %(default)s)")
    parser.add_argument("--image_column", help="column of the images, where there are several")
    parser.add_argument("--label_column", help="column of the classes that a prior is given")
    parser.add_argument("--tokenizer_name_or_path", help="of a prior: another decoder for the same tokens")
    parser.add_argument("--streaming", action="store_true", help="read without preparing a copy on disk")
    parser.add_argument("--cache_dir", help="where prepared data go")
    add_refine(parser)
    parser.add_argument("--fd_model", help="vision model whose features give the Fréchet distance")
    parser.add_argument("--output", type=Path, help=f"(default: {EVALUATION}, with --refine {REFINED})")
    parser.add_argument("--batch_size", type=int, default=256, help="images at once (default: %(default)s)")
    parser.add_argument("--dataloader_num_workers", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--max_bad_examples", type=int, default=100, help="damaged images that are skipped")


def evaluate_on_dataset(args: argparse.Namespace) -> None:
    """Prints every number and writes them, with the data set, the split and the protocol, to --output."""
    args.output = args.output or Path(REFINED if args.refine else EVALUATION)
    check_output_file(args.output)
    config = AutoConfig.from_pretrained(args.model, **where_from(args))
    measure = measure_prior if hasattr(config, "tokenizer_fingerprint") else measure_tokenizer
    evaluation, about_model = measure(args)
    names = ["dataset_name", "dataset_config_name", "dataset_revision", "data_files", "split", "fd_model"]
    given = {"model_name_or_path": args.model} | {name: getattr(args, name) for name in names}
    write_evaluation(args.output, evaluation, **known(given) | known(about_model))
    print_metrics(evaluation)
    print(f"Written to {args.output}.")


def known(facts: dict[str, Any]) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in facts.items() if value is not None}


def measure_tokenizer(args: argparse.Namespace) -> tuple[Evaluation, dict[str, Any]]:
    """Numbers of a tokenizer's reconstructions and tokens, and what to write beside them."""
    if args.tokenizer_name_or_path is not None:
        raise ValueError("--tokenizer_name_or_path is for priors, and this is a tokenizer itself.")
    tok = load_image_tokenizer(args)
    splits = open_split(args)
    batches = batches_of(args, splits.train, ToPixelValues(tok.processor))
    evaluation = evaluate(tok.model, tok.processor, batches, fd_model=args.fd_model, refine=args.refine, progress=True)
    about = {"fingerprint": tok.model.fingerprint(), **about_weights(tok.model)}
    if args.refine:
        about |= {"refine": args.refine, "protocol": f"{TOKENIZER_PROTOCOL}; tokens refined in {args.refine} rounds"}
    return evaluation, {**about, "bad_examples": batches.bad_examples, "dataset_revision": splits.revision}


def measure_prior(args: argparse.Namespace) -> tuple[Evaluation, dict[str, Any]]:
    """Bits of a prior, with the decoder of its tokenizer or of another for the same tokens."""
    if args.fd_model is not None:
        raise ValueError("--fd_model compares images with their reconstructions: name a tokenizer, not a prior.")
    if args.refine:
        raise ValueError("--refine chooses tokens by their reconstructions: name a tokenizer, not a prior.")
    prior = AutoModelForCausalLM.from_pretrained(args.model, **where_from(args), dtype=torch.float32).to(args.device)
    trusted = {"trust_remote_code": args.trust_remote_code}
    decoder, processor = load_tokenizer(prior.config, args.tokenizer_name_or_path, **trusted, dtype=torch.float32)
    splits = open_split(args)
    wanted = args.label_column if prior.config.num_classes else "none"
    label_column, _ = find_classes(splits.train, wanted)
    to_pixel_values = ToLabelledPixelValues(processor, label_column) if label_column else ToPixelValues(processor)
    images = batches_of(args, splits.train, to_pixel_values)
    batches = TokenBatches(images, decoder.to(args.device).eval(), keep_images=True)
    evaluation = evaluate_prior(prior, batches, decoder=decoder, progress=True)
    about = {"tokenizer_name_or_path": args.tokenizer_name_or_path or prior.config.tokenizer_name_or_path}
    about |= {"fingerprint": decoder.fingerprint(), "tokenizer_weights_sha256": weights_hash(decoder)}
    about |= {**about_weights(prior), "protocol": PROTOCOL}
    return evaluation, {**about, "bad_examples": images.bad_examples, "dataset_revision": splits.revision}


def open_split(args: argparse.Namespace) -> ImageSplits:
    """The images to measure on, as those to train on."""
    return load_images(
        args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        data_files={args.split: args.data_files} if args.data_files else None,
        revision=args.dataset_revision,
        streaming=args.streaming,
        image_column=args.image_column,
        train_split=args.split,
        validation_size=0,
        cache_dir=args.cache_dir,
    )


def batches_of(args: argparse.Namespace, dataset: Any, transform: ToPixelValues) -> EvaluationBatches:
    """The data set once, in order."""
    return EvaluationBatches(
        dataset,
        transform,
        args.batch_size,
        num_workers=args.dataloader_num_workers,
        max_bad_examples=args.max_bad_examples,
    )


def print_metrics(evaluation: Evaluation) -> None:
    """Prints one metric per line."""
    width = max(map(len, evaluation.metrics))
    for name, value in evaluation.metrics.items():
        print(f"{name:<{width}}  {'-' if value is None else format(value, '.6g')}")
