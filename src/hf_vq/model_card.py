"""The card of a published model. Its numbers come from the files of the run; what was not measured is not there."""

import math
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from hf_vq.cards import is_on_hub, write_readme
from hf_vq.models.prior_tokenizer import is_prior, sibling
from hf_vq.reference_tokens import REFERENCE_FILE, hash_of_reference
from hf_vq.run_files import RunFiles

__all__ = ["write_card"]

METHODS = {
    "hf_vqvae": "A VQ-VAE (van den Oord et al. 2017)",
    "hf_sqvae": "An SQ-VAE (Takida et al. 2022)",
    "hf_vq_transformer_prior": "A Transformer prior",
    "hf_vq_pixelcnn": "A gated PixelCNN prior (van den Oord et al. 2016)",
}
FSQ = "An autoencoder with finite scalar quantization (Mentzer et al. 2023)"
METRICS = {
    "psnr": ("PSNR, mean over images (dB)", ".2f"),
    "psnr_of_mse": ("PSNR of the mean error (dB)", ".2f"),
    "ssim": ("SSIM", ".4f"),
    "mse": ("MSE on [0, 1]", ".3e"),
    "frechet_distance": ("Fréchet distance", ".2f"),
    "perplexity": ("perplexity of the codes", ".1f"),
    "usage": ("share of codes that occur", ".1%"),
    "bits_per_token": ("bits per token", ".3f"),
    "bits_per_token_of_class": ("bits per token, given the class", ".3f"),
    "token_entropy": ("entropy of single tokens (bits)", ".3f"),
    "position_entropy": ("entropy of single tokens by position (bits)", ".3f"),
    "bits_per_dim": ("bits per dim (upper bound)", ".3f"),
}
"""What a card shows of an evaluation: its words and its digits."""


def write_card(folder: Path, model: Any, repo_id: str, license: str | None = None) -> None:
    """Writes README.md into the folder of a model, from its config, evaluation.json, run.yaml, log and pictures.

    Args:
        folder: as it will be published.
        model: the model in it.
        repo_id: its name on the Hub.
        license: identifier of the weights' licence, "apache-2.0" for instance; the card names none if it is None.
    """
    config = model.config
    files = RunFiles.read(folder)
    evaluation, runs = files.evaluation, {place: it for place, it in files.runs.items() if it.run}
    measured = [evaluation, files.refined] if files.refined else [evaluation]
    tokenizer = _tokenizer(config, repo_id) if is_prior(config) else None
    base_model = tokenizer if tokenizer is not None and is_on_hub(tokenizer) else None
    pictures = {path.stem.replace("-", "_"): f"pictures/{path.name}" for path in folder.glob("pictures/*.png")}
    write_readme(
        folder,
        "prior.md" if is_prior(config) else "tokenizer.md",
        _card_data(config, repo_id, license, evaluation, runs.values(), base_model),
        repo_id=repo_id,
        config=config,
        method=FSQ if getattr(config, "quantizer", None) == "fsq" else METHODS[config.model_type],
        tokenizer=tokenizer,
        base_model=base_model,
        grid=_grid(config),
        bits=f"{_bits(config):,}",
        evaluation={"dataset_revision": None, **evaluation},
        refine=files.refined.get("refine"),
        metrics=[
            (label, [format(numbers[name], digits) if numbers.get(name) is not None else "" for numbers in measured])
            for name, label, digits in _measured(evaluation)
        ],
        runs=runs,
        training=_training(list(runs.values())),
        parameters=model.num_parameters(),
        reference_file=REFERENCE_FILE,
        reference_hash=hash_of_reference(folder),
        **{name: pictures.get(name) for name in ("reconstructions", "codes", "samples", "curves")},
    )


def _card_data(
    config: Any,
    repo_id: str,
    license: str | None,
    evaluation: dict[str, Any],
    runs: Iterable[RunFiles],
    base_model: str | None,
) -> ModelCardData:
    """What the Hub indexes."""
    task = "unconditional-image-generation" if is_prior(config) else "image-feature-extraction"
    trained_on = {it.run["settings"].get("dataset_name") for it in runs}
    results = [
        EvalResult(
            task_type=task,
            dataset_type=evaluation["dataset_name"],
            dataset_name=evaluation["dataset_name"],
            dataset_config=evaluation.get("dataset_config_name"),
            dataset_split=evaluation["split"],
            dataset_revision=evaluation.get("dataset_revision"),
            metric_type=name,
            metric_name=label,
            metric_value=evaluation[name],
        )
        for name, label, _ in _measured(evaluation)
    ]
    return ModelCardData(
        library_name="hf-vq",
        pipeline_tag=task,
        license=license,
        tags=[config.model_type, "discrete image tokens" if is_prior(config) else "image tokenizer"],
        datasets=sorted(name for name in trained_on if name and is_on_hub(name)) or None,
        base_model=base_model,
        model_name=repo_id.split("/")[-1] if results else None,
        eval_results=results or None,
    )


def _tokenizer(config: Any, repo_id: str) -> str:
    """The name of a prior's tokenizer on the Hub, or where it lies."""
    name: str = config.tokenizer_name_or_path or "none"
    return sibling(repo_id, name) or name


def _training(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """What there is to tell of the training, with a cell for each run."""
    cells: dict[str, list[str]] = {
        "data": [_data(it.run["settings"]) for it in runs],
        "images seen": [_seen(it.progress) for it in runs],
        "duration": [str(timedelta(seconds=round(it.progress["seconds"]))) if it.progress else "" for it in runs],
        "seed": [str(it.run["seed"]) for it in runs],
        "machine": [it.run["machine"] for it in runs],
        "commit": [f"`{it.run['git_commit']}`" for it in runs],
        "versions": [", ".join(f"{name} {version}" for name, version in it.run["versions"].items()) for it in runs],
    }
    return [(label, row) for label, row in cells.items() if any(row)]


def _data(settings: dict[str, Any]) -> str:
    return f"`{settings.get('dataset_name')}`, split `{settings.get('train_split') or 'train'}`"


def _seen(progress: dict[str, Any]) -> str:
    return f"{progress['images']:,} in {progress['step']:,} steps" if progress else ""


def _measured(evaluation: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The metrics that there are: name, words, digits."""
    return [(name, *words) for name, words in METRICS.items() if evaluation.get(name) is not None]


def _grid(config: Any) -> str:
    """The tokens of an image in words."""
    codebooks = f" x {config.num_codebooks}" if config.num_codebooks > 1 else ""
    return " x ".join(map(str, config.grid_size)) + codebooks


def _bits(config: Any) -> int:
    """Of an image's tokens, each written by itself."""
    return math.ceil(math.prod(config.grid_size) * config.num_codebooks * math.log2(config.codebook_size))
