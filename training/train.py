"""Trains an image tokenizer on any images, or a prior over its tokens, and measures it on the test split.

accelerate launch training/train.py                                       the embedded digits, no network
accelerate launch training/train.py --config training/configs/prior_digits.yaml
accelerate launch training/train.py --config training/configs/sqvae_cifar10.yaml
accelerate launch training/train.py --dataset_name path/to/pictures --output_dir output/mine
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator, PartialState
from huggingface_hub import HfApi
from huggingface_hub.errors import StrictDataclassError

from arguments import DataArguments, RunArguments, parse
from digits import load_digits_images
from engine import fit, share_cores
from hf_vq.evaluation import Evaluation, write_evaluation
from hf_vq.hub_commit import full_name
from hf_vq.pictures import save_curves
from hf_vq.publishing import choose_tokenizer, publish
from hf_vq.run_files import keep_earlier_run
from hf_vq.streams import ImageSplits, describe_tokens, load_images
from hf_vq.token_data import TokenDescription
from prior_task import PriorTask
from tasks import TokenizerTask


def main(arguments: Sequence[str]) -> None:
    """Trains, tests, and says how to use the result."""
    run = parse(arguments)
    share_cores()
    task = make_task(run)
    if run.hub.push_to_hub and PartialState().is_main_process:
        check_publishing(run)
    run_dir = fit(task, run.engine, run.settings)
    accelerator = Accelerator()
    result = task.test(run_dir, accelerator)
    if accelerator.is_main_process:
        keep_earlier_run(run_dir, run.model.model_name_or_path)
        save_curves(run_dir / "pictures" / "curves.png", run_dir / "metrics.jsonl")
        if result is not None:
            record_test(run_dir, result, run, task)
        print(farewell(run_dir, result, task))
        if run.hub.push_to_hub:
            publish_run(run_dir, run)
    PartialState().destroy_process_group()


def make_task(run: RunArguments) -> TokenizerTask | PriorTask:
    """What the settings ask for, on the data they name."""
    model, data = run.model, run.data
    assert model.model_type is not None
    if model.tokenizer_name_or_path is None:
        return TokenizerTask(
            open_data(data),
            run.engine,
            model.model_type,
            run.model_fields,
            model_name_or_path=model.model_name_or_path,
            train_only=model.train_only,
            max_bad_examples=data.max_bad_examples,
            warn_perplexity_below=model.warn_perplexity_below,
            views=data.views,
        )
    description = describe_data(data)
    return PriorTask(
        open_data(data, take_tokens=description is not None),
        run.engine,
        model.model_type,
        run.model_fields,
        tokenizer_name_or_path=model.tokenizer_name_or_path,
        tokenizer_revision=model.tokenizer_revision,
        description=description,
        label_column=data.label_column,
        model_name_or_path=model.model_name_or_path,
        max_bad_examples=data.max_bad_examples,
        views=data.views,
    )


def describe_data(data: DataArguments) -> TokenDescription | None:
    """What tokens the data hold; None for images."""
    if data.dataset_name in (None, "digits"):
        return None
    return describe_tokens(
        data.dataset_name,
        dataset_config_name=data.dataset_config_name,
        data_files=named_files(data.data_files),
        revision=data.dataset_revision,
        cache_dir=data.cache_dir,
    )


def open_data(data: DataArguments, take_tokens: bool = False) -> ImageSplits:
    """The images that the settings name, or their tokens.

    Raises:
        ValueError: if they name none.
    """
    if data.dataset_name is None:
        raise ValueError("name the data: --dataset_name takes a Hub name, a local folder, `parquet` or `digits`")
    untested = data.test_split == "none"
    if data.dataset_name == "digits":
        splits = load_digits_images(data.validation_size)
        return splits._replace(test=None) if untested else splits
    splits = load_images(
        data.dataset_name,
        dataset_config_name=data.dataset_config_name,
        data_files=named_files(data.data_files),
        revision=data.dataset_revision,
        streaming=data.streaming,
        image_column=data.image_column,
        train_split=data.train_split,
        validation_split=data.validation_split,
        test_split=None if untested else data.test_split,
        validation_size=data.validation_size,
        keep_in_memory=data.keep_in_memory,
        cache_dir=data.cache_dir,
        take_tokens=take_tokens,
    )
    return splits._replace(test=None) if untested else splits


def named_files(text: str | None) -> Any:
    """--data_files: a YAML mapping or list of files, or a single pattern, which may begin with a bracket, too."""
    is_collection = text is not None and (text.startswith("{") or (text.startswith("[") and text.endswith("]")))
    return yaml.safe_load(text) if is_collection else text


def record_test(run_dir: Path, result: Evaluation, run: RunArguments, task: TokenizerTask | PriorTask) -> None:
    """Writes evaluation.json: the numbers, and what they were measured on."""
    recorded = yaml.safe_load((run_dir / "run.yaml").read_text(encoding="utf-8"))
    write_evaluation(
        run_dir / "evaluation.json",
        result,
        dataset_name=run.data.dataset_name,
        dataset_config_name=run.data.dataset_config_name,
        dataset_revision=task.splits.revision or run.data.dataset_revision,
        data_files=run.data.data_files,
        split=run.data.test_split or "test",
        seed=run.engine.seed,
        **task.describe(run_dir),
        git_commit=recorded["git_commit"],
        machine=recorded["machine"],
    )


def check_publishing(run: RunArguments) -> None:
    """Makes the repository, so that what stands in the way of publishing shows before the training.

    Raises:
        ValueError: a prior whose tokenizer nobody would find.
        HfHubHTTPError: the Hub refuses.
    """
    api = HfApi(token=run.hub.hub_token)
    repo_id = full_name(api, repo_id_of(run))
    if run.model.tokenizer_name_or_path is not None:
        hub = run.hub
        name = choose_tokenizer(run.model.tokenizer_name_or_path, repo_id, hub.tokenizer_repo_id, hub.with_tokenizer)
        if not hub.with_tokenizer:
            api.model_info(name)
    api.create_repo(repo_id, private=run.hub.hub_private_repo, exist_ok=True)


def repo_id_of(run: RunArguments) -> str:
    """The repository to publish to."""
    return run.hub.hub_model_id or Path(run.engine.output_dir).resolve().name


def publish_run(run_dir: Path, run: RunArguments) -> None:
    """Publishes what was trained."""
    try:
        commit = publish(
            run_dir,
            repo_id_of(run),
            tokenizer_repo_id=run.hub.tokenizer_repo_id,
            with_tokenizer=run.hub.with_tokenizer,
            license=run.hub.hub_license,
            private=run.hub.hub_private_repo,
            token=run.hub.hub_token,
        )
    except Exception as error:
        flags = ["--with_tokenizer"] if run.hub.with_tokenizer else []
        flags += ["--tokenizer_repo_id", run.hub.tokenizer_repo_id] if run.hub.tokenizer_repo_id else []
        again = " ".join(["hf-vq publish", str(run_dir), "--repo_id", repo_id_of(run), *flags])
        error.add_note(f"The training is done, and lies in {run_dir}; this publishes it: {again}")
        raise
    print(f"Published {commit.repo_url}, commit {commit.oid}")


def farewell(run_dir: Path, result: Evaluation | None, task: TokenizerTask | PriorTask) -> str:
    """What a person wants to know when training ends."""
    lines = ["", f"The model is in {run_dir}, with pictures of its work in {run_dir / 'pictures'}."]
    if result is not None:
        shown: dict[str, Any] = {name: result.metrics[name] for name in task.reported if name in result.metrics}
        lines += [f"Test images: {result.metrics['num_images']:,}"]
        lines += [f"  {name:18} {'-' if value is None else format(value, ',.5g')}" for name, value in shown.items()]
    return "\n".join([*lines, "Use it:", *(f"    {line}" for line in task.use(run_dir))])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, FloatingPointError, StrictDataclassError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
