"""The card of a published model. Its numbers come from the files of the run; what was not measured is not there."""

import math
from datetime import timedelta
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from hf_vq.cards import is_on_hub, write_readme
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
    evaluation, run, progress = RunFiles.read(folder)
    is_prior = hasattr(config, "tokenizer_fingerprint")
    pictures = {path.stem.replace("-", "_"): f"pictures/{path.name}" for path in folder.glob("pictures/*.png")}
    write_readme(
        folder,
        "prior.md" if is_prior else "tokenizer.md",
        _card_data(config, repo_id, license, evaluation, run),
        repo_id=repo_id,
        config=config,
        method=FSQ if getattr(config, "quantizer", None) == "fsq" else METHODS[config.model_type],
        grid=_grid(config),
        bits=f"{_bits(config):,}",
        evaluation={"dataset_revision": None, **evaluation},
        metrics=[(label, format(evaluation[name], digits)) for name, label, digits in _measured(evaluation)],
        run=run,
        progress=progress,
        duration=str(timedelta(seconds=round(progress.get("seconds", 0)))),
        parameters=model.num_parameters(),
        reference_file=REFERENCE_FILE,
        reference_hash=hash_of_reference(folder),
        **{name: pictures.get(name) for name in ("reconstructions", "codes", "samples", "curves")},
    )


def _card_data(
    config: Any, repo_id: str, license: str | None, evaluation: dict[str, Any], run: dict[str, Any]
) -> ModelCardData:
    """What the Hub indexes."""
    is_prior = hasattr(config, "tokenizer_fingerprint")
    task = "unconditional-image-generation" if is_prior else "image-feature-extraction"
    trained_on = run.get("settings", {}).get("dataset_name")
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
        tags=[config.model_type, "discrete image tokens" if is_prior else "image tokenizer"],
        datasets=[trained_on] if trained_on and is_on_hub(trained_on) else None,
        base_model=config.tokenizer_name_or_path if is_prior else None,
        model_name=repo_id.split("/")[-1] if results else None,
        eval_results=results or None,
    )


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
