"""Images to tokens, a batch at a time: the same object for `datasets.map`, for one machine and for many."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_vq.canonical import canonical
from hf_vq.corpus.token_file import GRID_COLUMNS
from hf_vq.token_data import TOKEN_COLUMN, TokenDescription
from hf_vq.tokenizer import ImageTokenizer

__all__ = ["ProcessImages", "TokenizeImages"]

PixelBatches = list[tuple[list[int], Tensor]]
"""Pictures by size: their numbers, and pixel_values (B, C, H, W)."""


class ProcessImages:
    """Pictures to pixel_values: the part that loader workers do, without the model.

    Args:
        processor: an image processor.
        settings: of its call, over its own: `do_resize`, `do_center_crop`, ...
    """

    def __init__(self, processor: Any, **settings: Any) -> None:
        self.processor, self.settings = processor, settings

    def __call__(self, images: Sequence[Any]) -> PixelBatches:
        by_size: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
        for number, pixels in enumerate(
            map(torch.as_tensor, self.processor(list(images), **self.settings).pixel_values)
        ):
            by_size.setdefault(tuple(pixels.shape), []).append((number, pixels))
        return [
            ([number for number, _ in same], torch.stack([pixels for _, pixels in same])) for same in by_size.values()
        ]

    def size(self) -> tuple[int, int] | None:
        """(height, width) of what comes out, None where it depends on the picture."""
        asked = {**vars(self.processor), **self.settings}
        fixed = asked["crop_size"] if asked["do_center_crop"] else asked["size"] if asked["do_resize"] else None
        if fixed is None or dict(fixed).keys() != {"height", "width"}:
            return None
        return fixed["height"], fixed["width"]

    def hash(self) -> str:
        """sha256 of all settings."""
        settings = {**json.loads(self.processor.to_json_string()), **self.settings}
        settings.pop("auto_map", None)  # where its code is, if it was saved
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


class TokenizeImages:
    """Adds the column `image_tokens` to batches of rows: flat lists, raster order, codebook fastest.

    Where pictures keep their sizes, there are also `grid_h` and `grid_w`.

    Example:
        >>> tokenize = TokenizeImages(ImageTokenizer.from_pretrained("org/sqvae-cifar10"))
        >>> tokens = dataset.map(tokenize, batched=True, batch_size=64, remove_columns="image")

    Args:
        tokenizer: an image tokenizer; tokens are computed where it is, and in its precision.
        image_column: holds the pictures.
        refine: rounds of refinement of the tokens; see the model's encode.
        settings: of the image processor's call: `do_resize=False, do_center_crop=False` keeps sizes, for instance.
    """

    def __init__(
        self, tokenizer: ImageTokenizer, image_column: str = "image", refine: int = 0, **settings: Any
    ) -> None:
        self.tokenizer, self.image_column, self.refine = tokenizer, image_column, refine
        self.process = ProcessImages(tokenizer.processor, **settings)
        self.size = self.process.size()

    def __call__(self, columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
        tokens = self.encode(self.process(columns[self.image_column]))
        added: dict[str, list[Any]] = {TOKEN_COLUMN: [token.reshape(-1) for token in tokens]}
        if self.size is None:
            added |= {name: [token.shape[axis] for token in tokens] for axis, name in enumerate(GRID_COLUMNS)}
        return added

    def encode(self, batches: PixelBatches) -> list[np.ndarray]:
        """The tokens of each picture, (h, w) or (h, w, M), unsigned, in the order of the pictures."""
        model, tokens = self.tokenizer.model, dict[int, np.ndarray]()
        kind = np.min_scalar_type(model.config.codebook_size - 1)
        with canonical(model):
            for numbers, pixel_values in batches:
                pixel_values = pixel_values.to(model.device, non_blocking=True)
                encoded = model.encode(pixel_values, refine=self.refine).image_tokens
                tokens.update(zip(numbers, encoded.cpu().numpy().astype(kind), strict=True))
        return [tokens[number] for number in range(len(tokens))]

    @property
    def description(self) -> TokenDescription:
        """What a data set tells of these tokens."""
        model, size = self.tokenizer.model, self.size
        factor = model.config.downsampling_factor
        return TokenDescription(
            codebook_size=model.config.codebook_size,
            num_codebooks=model.config.num_codebooks,
            grid_size=None if size is None else (size[0] // factor, size[1] // factor),
            tokenizer_fingerprint=model.fingerprint(),
            tokenizer_name_or_path=model.config.name_or_path or None,
            tokenizer_revision=self.tokenizer.revision,
            processor_hash=self.process.hash(),
            precision=str(model.dtype).removeprefix("torch."),
            refine=self.refine,
        )
