"""`pipeline("unconditional-image-generation", model=PRIOR)`: images from nothing, or from a class."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import Pipeline

from .configuration_prior import NO_CLASS
from .prior_tokenizer import check_tokenizer, load_tokenizer

BATCH_SIZE = 64


class ImageGenerationPipeline(Pipeline):
    """Samples image tokens from a prior and decodes them with the tokenizer that the prior names.

    Args:
        model: the prior.
        decoder: the tokenizer's model; by default the one that the prior's config names.
        image_processor: the tokenizer's image processor.

    Example:
        >>> from transformers import pipeline
        >>> pipe = pipeline("unconditional-image-generation", model="org/sqvae-cifar10-prior")
        >>> images = pipe(num_images=16)
        >>> images = pipe(class_labels=[3, 3, 7], guidance_scale=2.0)
    """

    model: Any
    image_processor: Any

    _load_processor: Any = False
    _load_image_processor: Any = False
    _load_feature_extractor: Any = False
    _load_tokenizer: Any = False

    def __init__(self, model: Any, decoder: Any = None, image_processor: Any = None, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        if decoder is None or image_processor is None:
            # Who trusts the prior's own code has trusted that of the tokenizer it names.
            own_code: dict[str, Any] = {"trust_remote_code": True} if self.model.is_remote_code() else {}
            decoder, image_processor = load_tokenizer(self.model.config, **own_code)
        check_tokenizer(self.model.config, decoder)
        self.decoder, self.image_processor = decoder.to(self.device).eval(), image_processor

    def __call__(  # type: ignore[override]  # there is nothing that has to be put in
        self,
        class_labels: int | str | Sequence[int | str | None] | None = None,
        num_images: int | None = None,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> list[Image.Image]:
        """Images, one for each label.

        Args:
            class_labels: a class for each image, or one for all, by number or by a name of `model.config.label2id`;
                None or -1 for no class.
            num_images: how many, unless the labels say so; 1 by default.
            batch_size: images at a time; by default that of the pipeline, or 64.
            kwargs: for `generate`: `guidance_scale`, `temperature`, `top_k`, `top_p` ...

        Raises: ValueError for a label that the prior does not know, or if num_images is not the number of labels.
        """
        labels = one_label_each(class_labels, num_images, self.model.config.label2id)
        return super().__call__(labels, images_at_once=batch_size or self._batch_size or BATCH_SIZE, **kwargs)

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return {}, kwargs, {}

    def preprocess(self, input_: Any, **kwargs: Any) -> Any:
        """Labels as the prior takes them."""
        return {"class_labels": input_}

    def _forward(self, input_tensors: dict[str, Any], images_at_once: Any = BATCH_SIZE, **kwargs: Any) -> Any:
        decoded = []
        for labels in input_tensors["class_labels"].split(images_at_once):
            image_tokens = self.model.image_tokens(self.model.generate(class_labels=labels, **kwargs))
            decoded.append(self.decoder.decode(image_tokens).pixel_values)
        return {"pixel_values": torch.cat(decoded)}

    def postprocess(self, model_outputs: Any, **kwargs: Any) -> Any:
        """Pictures of decoded pixels."""
        return self.image_processor.postprocess(model_outputs["pixel_values"])


def one_label_each(class_labels: Any, num_images: int | None, label2id: dict[str, int]) -> Tensor:
    """A label for each image, (B,); -1 for no class.

    Raises: ValueError if num_images is not the number of labels, there is no image to make, or nobody has that name.
    """
    if class_labels is None or isinstance(class_labels, str | Integral):
        class_labels = [class_labels] * (1 if num_images is None else num_images)
    if not len(class_labels) or num_images not in (None, len(class_labels)):
        raise ValueError(f"{len(class_labels)} class_labels do not make {num_images} images: give one for each, or one")
    return torch.tensor([label_number(label, label2id) for label in class_labels])


def label_number(label: Any, label2id: dict[str, int]) -> int:
    """The number of a class, given that or its name; None is no class."""
    if isinstance(label, str):
        if label not in label2id:
            raise ValueError(f"there is no class {label!r}: the prior knows {', '.join(label2id)}")
        return label2id[label]
    return NO_CLASS if label is None else int(label)


__all__ = ["ImageGenerationPipeline"]
