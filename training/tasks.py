"""What the engine can be asked to train. A task joins data, model and judgement; the engine brings the loop."""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from engine import EngineArguments, ResumableBatches
from hf_vq.code_counts import save_code_counts
from hf_vq.code_health import WARN_PERPLEXITY_BELOW, collapse_warning
from hf_vq.code_pictures import save_code_history, save_code_usage
from hf_vq.evaluation import Evaluation, about_weights, evaluate, to_uint8
from hf_vq.models.image_processing_vq import VQImageProcessor
from hf_vq.observation_fit import fit_observation_variance
from hf_vq.other_decoder import with_other_decoder
from hf_vq.pictures import save_reconstructions
from hf_vq.reference_tokens import save_reference_tokens
from hf_vq.streams import ImageSplits, ToPixelValues, TrainBatches
from image_task import ImageTask, logged
from random_views import AS_THEY_ARE, Views

logger = logging.getLogger(__name__)

PICTURED = 32
REFERENCES = 8
HISTORY = "code-history.png"
IMAGES_FOR_DATA_VARIANCE = 50_000
IMAGES_FOR_DECODER_VARIANCE = 10_000


class TokenizerTask(ImageTask):
    """Trains an image tokenizer.

    Args:
        splits: the data.
        args: batch sizes, seed and loader workers.
        model_type: `hf_vqvae` or `hf_sqvae`.
        model_fields: fields of its config.
        model_name_or_path: a saved model to fine-tune instead, with its processor.
        train_only: "decoder" to leave the tokens of that model as they are.
        max_bad_examples: undecodable images to pass over.
        warn_perplexity_below: share of K under which the perplexity of an evaluation is warned of; 0 for never.
        views: how training images are varied.
    """

    reported = (
        "psnr", "psnr_of_mse", "ssim", "mse", "perplexity", "usage", "posterior_entropy", "argmax_probability",
        "images_per_second",
    )  # fmt: skip

    def __init__(
        self,
        splits: ImageSplits,
        args: EngineArguments,
        model_type: str,
        model_fields: dict[str, Any],
        model_name_or_path: str | None = None,
        train_only: str | None = None,
        max_bad_examples: int = 100,
        warn_perplexity_below: float = WARN_PERPLEXITY_BELOW,
        views: Views = AS_THEY_ARE,
    ) -> None:
        super().__init__(splits, args, max_bad_examples, views)
        self.model_type, self.model_fields = model_type, dict(model_fields)
        self.model_name_or_path, self.train_only = model_name_or_path, train_only
        self.warn_perplexity_below = warn_perplexity_below

    @cached_property
    def processor(self) -> VQImageProcessor:
        """The saved model's, or one that fits the new model."""
        if self.model_name_or_path:
            return AutoImageProcessor.from_pretrained(self.model_name_or_path)
        return VQImageProcessor.for_config(AutoConfig.for_model(self.model_type, **self.model_fields))

    def build(self, total_steps: int) -> nn.Module:
        """The model, its annealing spread over `total_steps`."""
        if self.train_only == "decoder":
            saved = AutoModel.from_pretrained(str(self.model_name_or_path), dtype=torch.float32)
            return with_other_decoder(saved, **self.model_fields)
        if self.model_name_or_path:
            config = AutoConfig.from_pretrained(self.model_name_or_path)
            if self.args.gradient_accumulation_steps > 1 and getattr(config, "variance_update", None) == "batch":
                config.variance_update = "lagged"  # one micro-batch does not know the joint squared error
            return AutoModel.from_pretrained(self.model_name_or_path, config=config, dtype=torch.float32)
        known = AutoConfig.for_model(self.model_type)
        planned = {name: value for name, value in self._planned_fields(total_steps).items() if hasattr(known, name)}
        return AutoModel.from_config(AutoConfig.for_model(self.model_type, **planned | self.model_fields))

    def _planned_fields(self, total_steps: int) -> dict[str, Any]:
        """What a config does not say and the plan or the data tell."""
        planned: dict[str, Any] = {"temperature_decay_steps": total_steps}
        if self.args.gradient_accumulation_steps > 1:
            planned["variance_update"] = "lagged"
        if self.model_type == "hf_vqvae" and "data_variance" not in self.model_fields:
            planned["data_variance"] = self._data_variance()
        return planned

    def _data_variance(self) -> float:
        """Variance of pixel_values over the training set (over the first 50,000 images of a larger one)."""
        count, total, squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for batch in self.in_order(self.splits.train, rank=0, world_size=1):
            values = batch["pixel_values"].double()
            count, total, squares = count + values.numel(), total + values.sum(), squares + values.square().sum()
            if count >= IMAGES_FOR_DATA_VARIANCE * values[0].numel():
                break
        return float(squares / count - (total / count) ** 2)

    @property
    def transform(self) -> ToPixelValues:
        """Rows to pixel_values."""
        return ToPixelValues(self.processor)

    def train_batches(self, batch_size: int, rank: int, world_size: int) -> ResumableBatches:
        """Endless shuffled batches of pixel_values."""
        return self.shuffled(batch_size, rank, world_size)

    def scalars(self, model: Any) -> Mapping[str, Tensor]:
        """The decoder's sigma^2, and with a stochastic quantizer its variance and temperature."""
        return model.scalars()

    def evaluate(self, model: nn.Module, run_dir: Path, step: int, accelerator: Accelerator) -> dict[str, float]:
        """Numbers of the held-out images. Leaves pictures and code counts in `run_dir`; warns of codebook collapse."""
        if self.splits.validation is None:
            return {}
        batches = self.in_order(self.splits.validation, accelerator.process_index, accelerator.num_processes)
        result = evaluate(model, self.processor, batches)
        if accelerator.is_main_process:
            self._leave_pictures(model, run_dir, step, result)
            if warning := collapse_warning(result.code_counts, model.config, self.warn_perplexity_below):
                logger.warning("step %d: %s See %s", step, warning, run_dir / "pictures" / HISTORY)
        return logged(result)

    def _leave_pictures(self, model: nn.Module, run_dir: Path, step: int, result: Evaluation) -> None:
        save_code_counts(run_dir / "codes.safetensors", step, result.code_counts)
        save_code_usage(run_dir / "pictures" / f"step-{step:06d}-codes.png", result.code_counts)
        save_code_history(run_dir / "pictures" / HISTORY, run_dir / "codes.safetensors")
        pixel_values = self._first_images.to(next(model.parameters()).device)
        decoded = model(pixel_values, return_loss=False).decoded_pixel_values
        save_reconstructions(
            run_dir / "pictures" / f"step-{step:06d}-reconstructions.png",
            to_uint8(pixel_values, self.processor),
            to_uint8(decoded, self.processor),
            PICTURED,
        )

    @cached_property
    def _first_images(self) -> Tensor:
        """Held out, if any are."""
        batches = self.in_order(self.splits.validation or self.splits.train, rank=0, world_size=1)
        return next(iter(batches))["pixel_values"][:PICTURED]

    def save(self, model: Any, run_dir: Path) -> None:
        """Model and processor, as `from_pretrained` reads them; the decoder's variance is that of training images."""
        enough = min(self.num_train_examples or IMAGES_FOR_DECODER_VARIANCE, IMAGES_FOR_DECODER_VARIANCE)
        with silenced("hf_vq.streams"):  # training has named the bad examples, and counted them
            fit_observation_variance(model, self._images_to_fit(), enough)
            images = to_uint8(self._first_images[:REFERENCES], self.processor)
        model.save_pretrained(run_dir)
        self.processor.save_pretrained(run_dir)
        save_reference_tokens(run_dir, model, self.processor, images)

    def _images_to_fit(self) -> TrainBatches:
        size = self.args.per_device_eval_batch_size
        return TrainBatches(self.splits.train, self.transform, size, seed=0, max_bad_examples=sys.maxsize)

    def test(self, run_dir: Path, accelerator: Accelerator) -> Evaluation | None:
        """The saved model on the whole test split, in all processes; None without one."""
        if self.splits.test is None:
            return None
        model = AutoModel.from_pretrained(run_dir).to(accelerator.device)
        batches = self.in_order(self.splits.test, accelerator.process_index, accelerator.num_processes)
        return evaluate(model, self.processor, batches, progress=accelerator.is_main_process)

    def describe(self, run_dir: Path) -> dict[str, Any]:
        """What evaluation.json says of the model beside its numbers."""
        model = AutoModel.from_pretrained(run_dir)
        return {"fingerprint": model.fingerprint(), **about_weights(model)}

    def use(self, run_dir: Path) -> list[str]:
        """Lines of Python that use the saved model."""
        return [
            "from hf_vq import ImageTokenizer",
            f'tokenizer = ImageTokenizer.from_pretrained("{run_dir}")',
            'ids = tokenizer.encode("picture.png"); image = tokenizer.decode(ids)',
        ]


@contextmanager
def silenced(name: str) -> Iterator[None]:
    """No word from a logger."""
    noisy = logging.getLogger(name)
    level = noisy.level
    noisy.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        noisy.setLevel(level)
