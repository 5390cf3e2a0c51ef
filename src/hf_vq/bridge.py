"""Image tokens in front of a language model: one processor of text and images, for any causal LM and its tokenizer."""

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from hf_vq.grid_logits import ImageGridLogitsProcessor
from hf_vq.image_layout import Span
from hf_vq.image_vocabulary import START, add_image_tokens
from hf_vq.interleaved import Part, Segment, from_parts, from_text
from hf_vq.lm_embeddings import extend_embeddings
from hf_vq.sequence_rows import Piece, Row, check_labels, make_row, pad_rows
from hf_vq.tokenizer import ImageTokenizer

__all__ = ["VQBridge"]

FOLDER = "image_tokenizer"
FINGERPRINT, IDS = "image_tokenizer_fingerprint", "image_token_ids"
"""What the config of a language model says of the images that it knows."""
PADDING = ("padding", "padding_side", "pad_to_multiple_of")


class VQBridge(ProcessorMixin):
    """Puts an image tokenizer in front of a causal language model and its text tokenizer.

    The text tokenizer gets new tokens, image-start, image-end, perhaps row-end, and one for each code of each codebook;
    `resize_embeddings` gives the model room for them. Saved beside a model, one folder holds all that
    `AutoProcessor.from_pretrained` needs.

    Args:
        tokenizer: of the text; it gets the new tokens.
        image_tokenizer: of the images, all of one size.
        row_end: whether a token marks the end of each row.
        chat_template: for `apply_chat_template`, with `bridge.image_token` where an image stands; by default the text
            tokenizer's.
        image_tokenizer_fingerprint: what the image tokenizer must have; None for any.

    Raises:
        TypeError: the image tokenizer is no `ImageTokenizer`.
        ValueError: the image tokenizer is another one than was asked for, or than the text tokenizer has the tokens of;
            the text tokenizer has some of the new tokens, or ids beyond its length.
    """

    image_token = "<|vq_image|>"
    """Where an image stands in a text."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_tokenizer: ImageTokenizer,
        row_end: bool = False,
        chat_template: str | dict[str, str] | None = None,
        image_tokenizer_fingerprint: str | None = None,
    ) -> None:
        if not isinstance(image_tokenizer, ImageTokenizer):
            raise TypeError(
                f"image_tokenizer is {image_tokenizer!r:.100}, and must be an ImageTokenizer: load it by "
                f"ImageTokenizer.from_pretrained"
            )
        super().__init__(tokenizer, chat_template=chat_template or getattr(tokenizer, "chat_template", None))
        self.image_tokenizer, self.row_end = image_tokenizer, row_end
        self.image_tokenizer_fingerprint: str = image_tokenizer.model.fingerprint()
        for wanted in (image_tokenizer_fingerprint, tokenizer.init_kwargs.get(FINGERPRINT)):
            if wanted not in (None, self.image_tokenizer_fingerprint):
                raise ValueError(
                    f"bridge or text tokenizer were made for the image tokenizer {wanted}, and the one at hand is "
                    f"{self.image_tokenizer_fingerprint}: load the one whose tokens the language model knows"
                )
        self.layout = add_image_tokens(tokenizer, image_tokenizer.model.config, row_end)
        tokenizer.init_kwargs[FINGERPRINT] = self.image_tokenizer_fingerprint
        with_specials = tokenizer(START)["input_ids"]
        where = with_specials.index(self.layout.start_id)
        self._before, self._after = with_specials[:where], with_specials[where + 1 :]

    @classmethod
    def get_attributes(cls) -> list[str]:
        """What ProcessorMixin loads and saves: the text tokenizer."""
        return ["tokenizer"]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        parts: Sequence[Part] | Sequence[Sequence[Part]] | None = None,
        labels: str | None = None,
        add_image_start: bool = False,
        add_special_tokens: bool = True,
        max_length: int | None = None,
        return_tensors: str | None = None,
        **padding: Any,
    ) -> BatchFeature:
        """Sequences of text and images. The stretches of text between images are tokenized one by one.

        Args:
            images: the pictures, in the order in which `image_token` stands in the texts, or a list of them for each.
            text: one text or many.
            parts: instead of images and text, the parts of one sequence or of many: see `Part`.
            labels: "all", "image" or "text" for labels that train everything, the images alone (from image-start to
                image-end) or the text alone; everything else, and padding, is -100.
            add_image_start: end each sequence with image-start, so that a model goes on with an image.
            add_special_tokens: whether the text tokenizer's own start and end tokens go around each sequence.
            max_length: longest sequence. Nothing is cut off: a longer one is an error.
            return_tensors: "pt" or "np"; None for lists.
            padding: padding, padding_side, pad_to_multiple_of, as for any text tokenizer.

        Returns: input_ids, attention_mask, and perhaps labels.

        Raises:
            ValueError: the numbers of places and images differ; a text that holds tokens of images; an image of another
                size than the tokenizer's; a sequence longer than max_length; an option that is not known.
        """
        if (parts is None) == (text is None) or (parts is not None and images is not None):
            raise ValueError("give text, with its images, or parts, which bring their own")
        if unknown := [name for name, value in padding.items() if name not in PADDING and value is not None]:
            raise ValueError(f"{', '.join(unknown)} is not an option of VQBridge: see its call")
        if parts is None:
            assert text is not None
            sequences = from_text(text, images, self.image_token)
        else:
            sequences = from_parts(parts, self.image_token)
        check_labels(labels)
        rows = list(self._rows(sequences, labels, add_special_tokens, add_image_start))
        longest = max((len(row.ids) for row in rows), default=0)
        if max_length is not None and longest > max_length:
            raise ValueError(f"a sequence has {longest} ids, more than max_length {max_length}: nothing is cut off")
        how = {name: padding.get(name) for name in PADDING} | {"max_length": max_length}
        how["padding"] = how["padding"] or False
        return pad_rows(rows, self.tokenizer, labels is not None, return_tensors, **how)

    def _rows(
        self, sequences: list[list[Segment]], labels: str | None, add_special_tokens: bool, add_image_start: bool
    ) -> Iterator[Row]:
        """Each sequence as ids and labels."""
        segments = list(chain.from_iterable(sequences))
        words = iter(self._words([segment.text for segment in segments if segment.text is not None]))
        images = iter(self._encode([segment.picture for segment in segments if segment.picture is not None]))
        before = self._before if add_special_tokens else []
        # A sequence that the model is to go on with has no end token yet.
        after = self._after if add_special_tokens and not add_image_start else []
        for sequence in sequences:
            pieces = [Piece(before)]
            for text, _, image_tokens, train in sequence:
                if text is not None:
                    pieces.append(Piece(next(words), train=train))
                else:
                    tokens = next(images) if image_tokens is None else image_tokens
                    pieces.append(Piece(self.layout.wrap(tokens), is_image=True, train=train))
            pieces += [Piece(after), Piece([self.layout.start_id] * add_image_start, is_image=True)]
            yield make_row(pieces, labels)

    def _words(self, texts: list[str]) -> list[list[int]]:
        """The ids of texts, without start and end tokens.

        Raises: ValueError for a text that holds tokens of images.
        """
        found: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        for text, ids in zip(texts, found, strict=True):
            if of_image := next((token for token in ids if self.layout.owns(token)), None):
                name = self.tokenizer.convert_ids_to_tokens(of_image)
                raise ValueError(
                    f"the text {text!r:.100} holds {name}, which only images may: name an image by {self.image_token}"
                )
        return found

    def _encode(self, pictures: list[Any]) -> list[list[int]]:
        """The tokens of pictures, which all have the layout's grid."""
        if not pictures:
            return []
        encoded = self.image_tokenizer(pictures)
        for index, grid in enumerate(encoded["image_grid_hw"]):
            if tuple(grid) != tuple(self.layout.grid_size):
                raise ValueError(
                    f"image {index} has a grid of {grid[0]} x {grid[1]} tokens, and this bridge takes "
                    f"{self.layout.grid_size[0]} x {self.layout.grid_size[1]}: let the image processor resize and crop"
                )
        tokens: list[list[int]] = encoded["input_ids"]
        return tokens

    def to_parts(self, sequences: Tensor | Iterable[Sequence[int]]) -> list[list[Part]]:
        """Sequences of ids as texts and PIL images; special tokens of the text, and mere spaces, are left out.

        Args:
            sequences: (B, S), or lists of ids.

        Raises: ValueError where an image is cut off or not a whole grid, for what is no id, and for a single sequence.
        """
        rows = [torch.as_tensor(row).tolist() for row in sequences]
        if not all(isinstance(row, list) for row in rows):
            raise ValueError("to_parts takes many sequences, and this is one: put it in a list")
        if odd := [each for row in rows for each in row if not isinstance(each, int) or each < 0]:
            raise ValueError(f"to_parts takes sequences of ids, and one holds {odd[0]!r:.100}")
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
        return ImageGridLogitsProcessor(self.layout, len(self.tokenizer), max_length, allow_images)

    def resize_embeddings(self, model: Any, from_codebook: bool = True) -> None:
        """Gives a language model embeddings, and scores, of the new tokens; those it has stay to the bit.

        A model that has them already, by this method, is left as it is.

        Args:
            model: the causal LM of the text tokenizer.
            from_codebook: whether image tokens begin alike where their codes are close; see `extend_embeddings`.

        Raises: ValueError for a model that has those of another image tokenizer, or at other ids.
        """
        known = getattr(model.config, FINGERPRINT, None)
        if known is None:
            vectors = self.image_tokenizer.model.quantizer.vectors() if from_codebook else None
            extend_embeddings(model, len(self.tokenizer), self.layout, vectors)
            setattr(model.config, FINGERPRINT, self.image_tokenizer_fingerprint)
            setattr(model.config, IDS, self.layout.first_ids)
            return
        if known != self.image_tokenizer_fingerprint:
            raise ValueError(
                f"the language model knows the image tokenizer {known}, and this bridge has "
                f"{self.image_tokenizer_fingerprint}"
            )
        if getattr(model.config, IDS) != self.layout.first_ids:
            raise ValueError(
                f"the language model knows images at the ids {getattr(model.config, IDS)}, and this bridge has them at "
                f"{self.layout.first_ids}: make it with the text tokenizer and the row_end that the model was made with"
            )

    def to_dict(self) -> dict[str, Any]:
        """What processor_config.json holds; the text tokenizer and the image tokenizer have files of their own."""
        return {
            "processor_class": type(self).__name__,
            "tokenizer_class": type(self.tokenizer).__name__,
            "row_end": self.row_end,
            FINGERPRINT: self.image_tokenizer_fingerprint,
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
            folder = "/".join([*filter(None, [kwargs.get("subfolder")]), FOLDER])
            local = Path(pretrained_model_name_or_path)
            if local.is_dir() and not (local / folder).is_dir():
                raise OSError(
                    f"{local} has no folder {folder}, where a bridge keeps its image tokenizer: pass image_tokenizer="
                )
            settings["image_tokenizer"] = ImageTokenizer.from_pretrained(
                pretrained_model_name_or_path, subfolder=folder, **given
            )
        return settings, rest
