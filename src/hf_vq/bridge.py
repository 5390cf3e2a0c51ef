"""Image tokens in front of a language model: one processor of text and images, for any causal LM and its tokenizer."""

import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from hf_vq.grid_logits import ImageGridLogitsProcessor
from hf_vq.image_layout import ImageLayout, Span
from hf_vq.lm_embeddings import extend_embeddings
from hf_vq.tokenizer import ImageTokenizer

__all__ = ["VQBridge"]

START, END, ROW_END = "<|image_start|>", "<|image_end|>", "<|image_row_end|>"
OF_IMAGES = re.compile(r"<\|image_(?:start|end|row_end|token_\d+)\|>")
FOLDER = "image_tokenizer"
IGNORED = -100
LABELS = ("all", "image", "text")

Part = dict[str, Any]
"""{"type": "text", "text": str}, {"type": "image", "image": picture} or {"type": "image", "image_tokens": ids}."""


class VQBridge(ProcessorMixin):
    """Puts an image tokenizer in front of a causal language model and its text tokenizer.

    The text tokenizer gets new tokens, image-start, image-end, perhaps row-end, and one for each code of each codebook;
    `resize_embeddings` gives the model room for them. Saved beside a model, one folder holds all that
    `AutoProcessor.from_pretrained` needs.

    Args:
        tokenizer: of the text; it gets the new tokens.
        image_tokenizer: of the images, all of one size.
        row_end: whether a token marks the end of each row.
        chat_template: for `apply_chat_template`, with `bridge.image_token` where an image stands.
        image_tokenizer_fingerprint: what the image tokenizer must have; None for any.

    Raises:
        ValueError: the image tokenizer is another one, or the text tokenizer has image tokens of another.
    """

    image_token = "<|image|>"
    """Where an image stands in a text."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_tokenizer: ImageTokenizer,
        row_end: bool = False,
        chat_template: str | dict[str, str] | None = None,
        image_tokenizer_fingerprint: str | None = None,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template)
        self.image_tokenizer, self.row_end = image_tokenizer, row_end
        self.image_tokenizer_fingerprint = image_tokenizer.model.fingerprint()
        if image_tokenizer_fingerprint not in (None, self.image_tokenizer_fingerprint):
            raise ValueError(
                f"this bridge was made for the image tokenizer {image_tokenizer_fingerprint}, and the one at hand is "
                f"{self.image_tokenizer_fingerprint}: load the one it was made for, whose tokens the model knows"
            )
        self.layout = self._extend(tokenizer)

    @classmethod
    def get_attributes(cls) -> list[str]:
        """What ProcessorMixin loads and saves: the text tokenizer."""
        return ["tokenizer"]

    def _extend(self, tokenizer: Any) -> ImageLayout:
        """Adds the tokens of images to a text tokenizer, unless it has them."""
        config = self.image_tokenizer.model.config
        count = config.codebook_size * config.num_codebooks
        added = [START, END, *([ROW_END] if self.row_end else []), *(f"<|image_token_{n}|>" for n in range(count))]
        known = [token for token in tokenizer.get_added_vocab() if OF_IMAGES.fullmatch(token)]
        if known and set(known) != set(added):
            raise ValueError(
                f"the text tokenizer has {len(known)} tokens of images, and this image tokenizer needs {len(added)}: "
                f"take the text tokenizer as it was before"
            )
        tokenizer.add_tokens(added, special_tokens=True)
        start, end, *others = tokenizer.convert_tokens_to_ids(added)
        row_end_id = others[0] if self.row_end else None
        sizes = (config.codebook_size, config.num_codebooks, config.grid_size)
        return ImageLayout(start, end, row_end_id, others[int(self.row_end)], *sizes)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        parts: Sequence[Part] | Sequence[Sequence[Part]] | None = None,
        labels: str | None = None,
        add_image_start: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """Sequences of text and images.

        Args:
            images: the pictures, in the order in which `image_token` stands in the texts.
            text: one text or many.
            parts: instead of images and text, the parts of one sequence or of many: see `Part`.
            labels: "all", "image" or "text" for labels that train everything, the images alone (from image-start to
                image-end) or the text alone; whatever else, and padding, is -100.
            add_image_start: end each sequence with image-start, so that a model goes on with an image.
            kwargs: for the text tokenizer: padding, padding_side, return_tensors, max_length, ...

        Returns: input_ids, attention_mask, and perhaps labels.

        Raises:
            ValueError: as many places as images there are not; a text that holds tokens of images; an image of another
                size than the tokenizer's; a sequence whose images were cut off.
        """
        if (parts is None) == (text is None):
            raise ValueError("give text, with its images, or parts")
        if labels not in (None, *LABELS):
            raise ValueError(f"labels must be one of {', '.join(LABELS)} or None, and is {labels!r}")
        texts, tokens = self._from_text(text, images) if parts is None else self._from_parts(parts)
        texts = [each + START * add_image_start for each in self._with_images(texts, tokens)]
        return_tensors = kwargs.pop("return_tensors", None)
        data = dict(self.tokenizer(texts, **kwargs))
        masks = data.get("attention_mask", [[1] * len(ids) for ids in data["input_ids"]])
        rows = list(zip(data["input_ids"], masks, strict=True))
        spans = [self._spans(ids, mask, add_image_start) for ids, mask in rows]
        if labels is not None:
            data["labels"] = [_labels(*row, found, labels) for row, found in zip(rows, spans, strict=True)]
        return BatchFeature(data, tensor_type=return_tensors)

    def _from_text(self, text: Any, images: Any) -> tuple[list[str], list[list[int]]]:
        """Texts with places for images, and the tokens of all images."""
        nested = isinstance(images, list | tuple) and any(isinstance(image, list | tuple) for image in images)
        flat = [image for group in images for image in group] if nested else images
        return [text] if isinstance(text, str) else list(text), self._encode(flat)

    def _from_parts(self, parts: Any) -> tuple[list[str], list[list[int]]]:
        """The same of parts; only pictures are encoded."""
        batch = [parts] if parts and isinstance(parts[0], dict) else parts
        texts = ["".join(self._text_of(part) for part in sequence) for sequence in batch]
        of_images = [part for sequence in batch for part in sequence if part["type"] == "image"]
        encoded = iter(self._encode([part["image"] for part in of_images if "image_tokens" not in part]))
        return texts, [
            torch.as_tensor(part["image_tokens"]).flatten().tolist() if "image_tokens" in part else next(encoded)
            for part in of_images
        ]

    def _text_of(self, part: Part) -> str:
        """A part's text, or where it has an image the place of that."""
        if part["type"] == "image":
            return self.image_token
        if part["type"] != "text" or self.image_token in part["text"]:
            raise ValueError(f"a part is a text without {self.image_token}, or an image, and this is {part!r:.200}")
        return str(part["text"])

    def _encode(self, images: Any) -> list[list[int]]:
        """The tokens of pictures, which all have the layout's grid."""
        if images is None or (isinstance(images, list | tuple) and not images):
            return []
        encoded = self.image_tokenizer(images)
        for index, grid in enumerate(encoded["image_grid_hw"]):
            if tuple(grid) != tuple(self.layout.grid_size):
                raise ValueError(
                    f"image {index} has a grid of {grid[0]} x {grid[1]} tokens, and this bridge takes "
                    f"{self.layout.grid_size[0]} x {self.layout.grid_size[1]}: let the image processor resize and crop"
                )
        tokens: list[list[int]] = encoded["input_ids"]
        return tokens

    def _with_images(self, texts: list[str], tokens: list[list[int]]) -> list[str]:
        """Texts with each `image_token` replaced by the tokens of an image."""
        for index, text in enumerate(texts):
            if found := OF_IMAGES.search(text):
                raise ValueError(
                    f"text {index} holds {found.group()}, which only images may: name images by {self.image_token}"
                )
        places = sum(text.count(self.image_token) for text in texts)
        if places != len(tokens):
            raise ValueError(
                f"the texts have {places} places for images ({self.image_token}), and there are {len(tokens)} images"
            )
        written = iter("".join(self.tokenizer.convert_ids_to_tokens(self.layout.wrap(row))) for row in tokens)
        return [re.sub(re.escape(self.image_token), lambda _: next(written), text) for text in texts]

    def _spans(self, ids: list[int], mask: list[int], is_open: bool = False) -> list[Span]:
        """The images of a sequence, which may be padded, and if `is_open` end with an image-start."""
        padding = mask.index(1) if 1 in mask else 0
        own = [token for token, there in zip(ids, mask, strict=True) if there]
        own = own[:-1] if is_open and own[-1:] == [self.layout.start_id] else own
        return [Span(start + padding, stop + padding, tokens) for start, stop, tokens in self.layout.spans(own)]

    def to_parts(self, sequences: Tensor | Iterable[Sequence[int]]) -> list[list[Part]]:
        """Sequences of ids as texts and PIL images, the inverse of the call; special tokens of the text are left out.

        Raises: ValueError where an image is cut off or no whole grid.
        """
        rows = [torch.as_tensor(row).tolist() for row in sequences]
        spans = [self.layout.spans(row) for row in rows]
        tokens = [span.image_tokens for found in spans for span in found]
        grids = [self.layout.grid_size] * len(tokens)
        images = iter(self.image_tokenizer.batch_decode(tokens, grids) if tokens else [])
        return [self._parts(row, found, images) for row, found in zip(rows, spans, strict=True)]

    def _parts(self, row: list[int], spans: list[Span], images: Any) -> list[Part]:
        """The parts of a sequence, whose images come next in `images`."""
        parts: list[Part] = []
        begin = 0
        for span in [*spans, None]:
            text = self.tokenizer.decode(row[begin : span.start if span else None], skip_special_tokens=True)
            parts += [{"type": "text", "text": text}] if text.strip() else []
            if span:
                parts.append({"type": "image", "image": next(images), "image_tokens": span.image_tokens})
                begin = span.stop
        return parts

    def logits_processor(self, max_length: int | None = None, allow_images: bool = True) -> ImageGridLogitsProcessor:
        """For `generate(logits_processor=[...])`: whole images only; arguments as in `ImageGridLogitsProcessor`."""
        return ImageGridLogitsProcessor(self.layout, max_length, allow_images)

    def resize_embeddings(self, model: Any, from_codebook: bool = True, seed: int = 0) -> None:
        """Gives a language model embeddings, and scores, of the new tokens; those it has stay to the bit.

        Args:
            model: the causal LM of the text tokenizer.
            from_codebook: whether image tokens begin alike where their codes are close; see `extend_embeddings`.
            seed: of their start.
        """
        vectors = self.image_tokenizer.model.quantizer.vectors() if from_codebook else None
        extend_embeddings(model, len(self.tokenizer), self.layout, vectors, seed)

    def to_dict(self) -> dict[str, Any]:
        """What processor_config.json holds; the text tokenizer and the image tokenizer have files of their own."""
        return {
            "processor_class": type(self).__name__,
            "tokenizer_class": type(self.tokenizer).__name__,
            "row_end": self.row_end,
            "image_tokenizer_fingerprint": self.image_tokenizer_fingerprint,
        }

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Saves the text tokenizer, the settings, and in `image_tokenizer/` the image tokenizer; as everywhere."""
        self.image_tokenizer.save_pretrained(os.path.join(save_directory, FOLDER))
        files = super().save_pretrained(save_directory)
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", os.path.basename(os.path.normpath(save_directory)))
            self.push_to_hub(repo_id, **kwargs)
        return files

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: Any = None, **kwargs: Any
    ) -> list[Any]:
        """The text tokenizer, of the class that was saved: AutoTokenizer would go by the language model's config."""
        kwargs.pop("image_tokenizer", None)
        tokenizer_class = getattr(transformers, (processor_dict or {}).get("tokenizer_class", ""), AutoTokenizer)
        return [tokenizer_class.from_pretrained(pretrained_model_name_or_path, **kwargs)]

    @classmethod
    def get_processor_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The settings, and the image tokenizer, unless another is given."""
        settings, rest = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if "image_tokenizer" not in kwargs:
            names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "trust_remote_code")
            given = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            settings["image_tokenizer"] = ImageTokenizer.from_pretrained(
                pretrained_model_name_or_path, subfolder=FOLDER, **given
            )
        return settings, rest


def _labels(ids: list[int], mask: list[int], spans: list[Span], kind: str) -> list[int]:
    """The ids that are to be trained, -100 for the others."""
    in_image = [False] * len(ids)
    for span in spans:
        in_image[span.start : span.stop] = [True] * (span.stop - span.start)
    wanted = {"all": (True, True), "image": (True, False), "text": (False, True)}[kind]
    return [
        token if there and wanted[0 if image else 1] else IGNORED
        for token, there, image in zip(ids, mask, in_image, strict=True)
    ]
