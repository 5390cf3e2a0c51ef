"""Stage 2: the distribution of a trained tokenizer's tokens."""

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM

from engine import EngineArguments
from hf_vq.canonical import canonical
from hf_vq.evaluation import Evaluation, about_weights, to_uint8, weights_hash
from hf_vq.models.configuration_prior import NO_CLASS
from hf_vq.models.prior_tokenizer import check_tokenizer, seen_from
from hf_vq.pictures import save_samples
from hf_vq.prior_evaluation import PROTOCOL, evaluate_prior
from hf_vq.streams import ImageSplits, ToPixelValues
from hf_vq.token_batches import ToImageTokens, TokenBatches, ToLabelledPixelValues, find_classes
from hf_vq.token_data import TokenDescription
from image_task import ImageTask, logged
from random_views import AS_THEY_ARE, Views
from sequence_batches import SequenceBatches

SAMPLES_OF_A_CLASS, CLASSES_SHOWN = 8, 10
PICTURED_SEED = 0


class PriorTask(ImageTask):
    """Trains a prior over the tokens of a tokenizer.

    Args:
        splits: the images, or their tokens.
        args: batch sizes, seed and loader workers.
        model_type: `hf_vq_transformer_prior` or `hf_vq_pixelcnn`.
        model_fields: fields of its config; sizes and classes come from the tokenizer and the data.
        tokenizer_name_or_path: the tokenizer, a folder or a name on the Hub.
        tokenizer_revision: its revision on the Hub.
        description: of the tokens that the splits hold in place of images.
        label_column: column of the class labels; by default the only one that holds classes, and "none" for none.
        model_name_or_path: a saved prior to fine-tune instead.
        max_bad_examples: undecodable images to pass over.
        views: how training images are varied.

    Raises:
        ValueError: `views` of tokens.
    """

    reported = (
        "bits_per_token", "bits_per_token_of_class", "token_entropy", "position_entropy", "bits_per_dim",
        "images_per_second",
    )  # fmt: skip

    def __init__(
        self,
        splits: ImageSplits,
        args: EngineArguments,
        model_type: str,
        model_fields: dict[str, Any],
        tokenizer_name_or_path: str,
        tokenizer_revision: str | None = None,
        description: TokenDescription | None = None,
        label_column: str | None = None,
        model_name_or_path: str | None = None,
        max_bad_examples: int = 100,
        views: Views = AS_THEY_ARE,
    ) -> None:
        super().__init__(splits, args, max_bad_examples, views)
        if views != AS_THEY_ARE and description is not None:
            raise ValueError(
                "random_flip and random_shift are for images, and the data hold their tokens: name the images, or "
                "drop the flags"
            )
        self.model_type, self.model_fields = model_type, dict(model_fields)
        self.tokenizer_name_or_path, self.tokenizer_revision = tokenizer_name_or_path, tokenizer_revision
        self.description = description
        self.model_name_or_path = model_name_or_path
        self.label_column, self.class_names = find_classes(splits.train, label_column)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer's model, where the training is."""
        model = AutoModel.from_pretrained(self.tokenizer_name_or_path, **self._revision, dtype=torch.float32)
        return model.to(PartialState().device).eval().requires_grad_(False)

    @cached_property
    def processor(self) -> Any:
        """The tokenizer's image processor."""
        return AutoImageProcessor.from_pretrained(self.tokenizer_name_or_path, **self._revision)

    @property
    def _revision(self) -> dict[str, str]:
        return {"revision": self.tokenizer_revision} if self.tokenizer_revision else {}

    def build(self, total_steps: int) -> nn.Module:
        """The prior, of the tokenizer's sizes and the data's classes.

        Raises: ValueError if data or prior were made for another tokenizer.
        """
        if self.description is not None:
            self.description.check_made_by(self.tokenizer)
        if self.model_name_or_path:
            saved = AutoModelForCausalLM.from_pretrained(self.model_name_or_path, dtype=torch.float32)
            check_tokenizer(saved.config, self.tokenizer)
            self._check_classes(saved.config.num_classes)
            self._bind(saved.config)
            return saved
        known = self.tokenizer.config
        sizes = {name: getattr(known, name) for name in ("codebook_size", "num_codebooks", "grid_size")}
        classes = {"num_classes": len(self.class_names)}
        config = AutoConfig.for_model(self.model_type, **{**sizes, **classes, **self.model_fields})
        self._check_classes(config.num_classes)
        if self.class_names:
            config.id2label = dict(enumerate(self.class_names))
            config.label2id = {name: index for index, name in enumerate(self.class_names)}
        self._bind(config)
        check_tokenizer(config, self.tokenizer)
        prior: Any = AutoModelForCausalLM.from_config(config)
        prior.start_from_codebook(self.tokenizer.quantizer.vectors())
        return prior

    def _check_classes(self, num_classes: int) -> None:
        """Raises a ValueError unless prior and labelled data know equally many classes."""
        if self.label_column is not None and num_classes != len(self.class_names):
            raise ValueError(
                f"the prior has num_classes {num_classes}, and {self.label_column!r} of the data has "
                f"{len(self.class_names)}: name another --label_column, or `none`"
            )

    def _bind(self, config: Any) -> None:
        """Writes down which tokenizer the prior is for."""
        config.tokenizer_name_or_path = self.tokenizer_name_or_path
        config.tokenizer_revision = self.tokenizer_revision
        config.tokenizer_fingerprint = self.tokenizer.fingerprint()

    def train_batches(self, batch_size: int, rank: int, world_size: int) -> SequenceBatches:
        """Endless shuffled sequences."""
        start = self.tokenizer.config.codebook_size
        return SequenceBatches(self.shuffled(batch_size, rank, world_size), self.tokenizer, start)

    @property
    def transform(self) -> ToPixelValues | ToImageTokens:
        """Rows to image_tokens or pixel_values, and perhaps class_labels."""
        if self.description is not None:
            return ToImageTokens(self.description, self.label_column)
        if self.label_column is None:
            return ToPixelValues(self.processor)
        return ToLabelledPixelValues(self.processor, self.label_column)

    def _batches(self, dataset: Any, rank: int, world_size: int) -> TokenBatches:
        return TokenBatches(self.in_order(dataset, rank, world_size), self.tokenizer, keep_images=True)

    def scalars(self, model: Any) -> Mapping[str, Tensor]:
        """Nothing of a prior moves but its weights."""
        return {}

    def evaluate(self, model: Any, run_dir: Path, step: int, accelerator: Accelerator) -> dict[str, float]:
        """Bits of the held-out images; leaves a picture of samples in `run_dir`."""
        if accelerator.is_main_process:
            self._leave_samples(model, run_dir / "pictures" / f"step-{step:06d}-samples.png")
        if self.splits.validation is None:
            return {}
        batches = self._batches(self.splits.validation, accelerator.process_index, accelerator.num_processes)
        result = evaluate_prior(model, batches, decoder=self.tokenizer)
        return logged(result)

    @torch.no_grad()
    def _leave_samples(self, model: Any, path: Path) -> None:
        """A row a class, drawn from the same random numbers each time."""
        labels = torch.arange(min(CLASSES_SHOWN, model.config.num_classes))
        labels = labels if len(labels) else torch.tensor([NO_CLASS])
        names = [model.config.class_name(label) for label in labels.tolist()]
        with canonical(model), torch.random.fork_rng():
            torch.manual_seed(PICTURED_SEED)
            sequences = model.generate(class_labels=labels.repeat_interleave(SAMPLES_OF_A_CLASS))
            decoded = self.tokenizer.decode(model.image_tokens(sequences)).pixel_values
        save_samples(path, to_uint8(decoded, self.processor).unflatten(0, (len(names), -1)), names)

    def save(self, model: Any, run_dir: Path) -> None:
        """The prior as `from_pretrained` reads it; a tokenizer in a folder is named as seen from there."""
        if os.path.isdir(self.tokenizer_name_or_path):
            model.config.tokenizer_name_or_path = seen_from(run_dir, self.tokenizer_name_or_path)
            model.config.name_or_path = str(run_dir)
        model.save_pretrained(run_dir)

    def test(self, run_dir: Path, accelerator: Accelerator) -> Evaluation | None:
        """The saved prior on the whole test split, in all processes; None without one."""
        if self.splits.test is None:
            return None
        model = AutoModelForCausalLM.from_pretrained(run_dir).to(accelerator.device)
        batches = self._batches(self.splits.test, accelerator.process_index, accelerator.num_processes)
        return evaluate_prior(model, batches, decoder=self.tokenizer, progress=accelerator.is_main_process)

    def describe(self, run_dir: Path) -> dict[str, Any]:
        """What evaluation.json says of the prior beside its numbers."""
        prior = AutoModelForCausalLM.from_pretrained(run_dir)
        names = ("tokenizer_name_or_path", "tokenizer_revision", "tokenizer_fingerprint")
        of_tokenizer = {name: getattr(prior.config, name) for name in names}
        of_tokenizer["tokenizer_weights_sha256"] = weights_hash(self.tokenizer)  # bits_per_dim is the decoder's, too
        return {"protocol": PROTOCOL, **about_weights(prior), **of_tokenizer}

    def use(self, run_dir: Path) -> list[str]:
        """Lines of Python that use the saved prior."""
        what = "class_labels=[0, 1, 2]" if self.class_names else "num_images=3"
        return [
            "import hf_vq",
            "from transformers import pipeline",
            f'pipe = pipeline("unconditional-image-generation", model="{run_dir}")',
            f"images = pipe({what})",
        ]
