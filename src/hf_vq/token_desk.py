"""What one does with tokens at a desk: see them, look up a code's neighbours, change, mix, and draw new ones.

Tokens go about as plain lists, (h, w) or (h, w, M), so that a page can hand them over as JSON.
"""

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from hf_vq.canonical import canonical
from hf_vq.evaluation import to_uint8
from hf_vq.metrics import psnr
from hf_vq.tokenizer import ImageTokenizer

__all__ = ["PATTERNS", "Seen", "TokenDesk"]

SIDE, GRID_SIDE = 384, 768
"""Pixels of a picture on the page, 32 x 32 ones drawn large, with square pixels; and of a grid with its writing."""
SMALLEST_CELL, LEGIBLE = 8, 48
DARK = 380
"""Sum of red, green and blue below which writing on a colour is white."""
MOST_CELLS = 64 * 64
NEIGHBOURS = 8
DRAWN = 8
PATTERNS = ("left and right", "top and bottom", "checkerboard", "at random")

Tokens = list[Any]


class Seen(NamedTuple):
    """A picture through the tokenizer.

    Attributes:
        tokens: its image tokens.
        size: its pixel values, C * H * W.
        reconstruction: what the tokens keep, large.
        bits: of all tokens, each written by itself.
        psnr: of the reconstruction against what the model sees, in dB.
    """

    tokens: Tokens
    size: int
    reconstruction: Image.Image
    bits: float
    psnr: float


class TokenDesk:
    """An image tokenizer, and perhaps a prior over its tokens, at hand.

    Args:
        tokenizer: of images.
        prior: an `ImageGenerationPipeline`, or None.

    Raises: ValueError for a tokenizer whose grid is too large to be shown.
    """

    def __init__(self, tokenizer: ImageTokenizer, prior: Any = None) -> None:
        self.tokenizer, self.prior = tokenizer, prior
        self.config: Any = tokenizer.model.config
        height, width = self.config.grid_size
        if height * width > MOST_CELLS:
            raise ValueError(
                f"a grid of {height} x {width} tokens is too large for this page, which shows {MOST_CELLS}"
            )

    @property
    def class_names(self) -> list[str]:
        """Of the prior's classes; [] without a prior or classes."""
        config = None if self.prior is None else self.prior.model.config
        return [] if config is None else [config.class_name(label) for label in range(config.num_classes)]

    def see(self, image: Image.Image) -> Seen:
        """A picture through the tokenizer."""
        processor: Any = self.tokenizer.processor
        pixel_values = processor(image, return_tensors="pt")["pixel_values"]
        height, width = pixel_values.shape[-2:]
        if height * width > MOST_CELLS * self.config.downsampling_factor**2:
            raise ValueError(f"a picture of {width} x {height} pixels is too large for this page")
        tokens = self._tokens(pixel_values)
        kept = self._pixels(tokens)
        decibels = float(psnr(to_uint8(pixel_values, processor), kept)[0])
        bits = tokens.numel() * float(np.log2(self.config.codebook_size))
        return Seen(tokens[0].tolist(), pixel_values.numel(), enlarged(kept), bits, decibels)

    def decode(self, tokens: Tokens) -> Image.Image:
        """The picture of tokens, large.

        Raises: ValueError for what is no grid of codes.
        """
        return enlarged(self._pixels(self._checked(tokens)))

    def change(self, tokens: Tokens, row: int, column: int, code: int, codebook: int = 0) -> Tokens:
        """The tokens with another code at a place.

        Raises: ValueError for a place or code that is not there.
        """
        table = self._checked(tokens).clone()
        self._check_place(table, row, column, codebook)
        if not 0 <= code < self.config.codebook_size:
            raise ValueError(f"code {code} is none of 0 to {self.config.codebook_size - 1}")
        table[(0, row, column, *self._axis(codebook))] = code
        changed: Tokens = table[0].tolist()
        return changed

    def neighbours(self, tokens: Tokens, row: int, column: int, codebook: int = 0) -> list[dict[str, Any]]:
        """The eight codes nearest to the one at a place, itself first: code, distance and colour (#rrggbb)."""
        table = self._checked(tokens)
        self._check_place(table, row, column, codebook)
        code = int(table[(0, row, column, *self._axis(codebook))])
        distances = torch.linalg.vector_norm(self._vectors[codebook] - self._vectors[codebook, code], dim=1)
        others = [near for near in distances.argsort(stable=True).tolist() if near != code]
        nearest = [code, *others[: NEIGHBOURS - 1]]
        colours = ("#" + bytes(self.colours[codebook][near]).hex() for near in nearest)
        rounded = (round(float(distances[near]), 4) for near in nearest)
        return [
            {"code": near, "distance": distance, "colour": colour}
            for near, distance, colour in zip(nearest, rounded, colours, strict=True)
        ]

    def mix(self, first: Tokens, second: Tokens, pattern: str, share: float) -> Tokens:
        """Tokens of two pictures in one grid.

        Args:
            pattern: one of `PATTERNS`.
            share: of the second picture, in [0, 1]; a checkerboard has half of each.

        Raises: ValueError for an unknown pattern, another share, or grids that differ.
        """
        if pattern not in PATTERNS:
            raise ValueError(f"pattern {pattern!r} is none of {', '.join(PATTERNS)}")
        if not 0 <= share <= 1:
            raise ValueError(f"share must lie in [0, 1], and is {share}")
        one, other = self._checked(first), self._checked(second)
        if one.shape != other.shape:
            raise ValueError(f"grids of {tuple(one.shape[1:])} and {tuple(other.shape[1:])} tokens cannot be mixed")
        height, width = one.shape[1:3]
        rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
        chance = torch.rand(height, width, generator=torch.Generator().manual_seed(0))
        takes_second = {
            "left and right": (columns >= round((1 - share) * width)).expand(height, width),
            "top and bottom": (rows >= round((1 - share) * height)).expand(height, width),
            "checkerboard": (rows + columns) % 2 == 1,
            "at random": chance < share,
        }[pattern]
        mask = takes_second.view(1, height, width, *([1] if one.ndim == 4 else []))
        mixed: Tokens = torch.where(mask, other, one)[0].tolist()
        return mixed

    def sample(
        self, label: int, guidance_scale: float = 1.0, temperature: float = 1.0, seed: int = 0
    ) -> list[Image.Image]:
        """Eight pictures that the prior draws, large.

        Args:
            label: the class, -1 for none, which has no guidance.

        Raises: ValueError without a prior.
        """
        if self.prior is None:
            raise ValueError("there is no prior to sample from: name one with --prior")
        guidance = {"guidance_scale": guidance_scale} if guidance_scale != 1 and label >= 0 else {}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            images = self.prior(class_labels=[label] * DRAWN, temperature=temperature, **guidance)
        return [enlarged(image) for image in images]

    def draw_grid(self, tokens: Tokens, codebook: int = 0, selected: tuple[int, int] | None = None) -> Image.Image:
        """The tokens as a picture: a cell a token, close codes in close colours, the one at `selected` framed."""
        checked = self._checked(tokens)
        self._check_place(checked, 0, 0, codebook)
        table = checked[0].numpy()
        codes = table[..., codebook] if table.ndim == 3 else table
        cell, colours = cell_size(codes.shape), self.colours[codebook][codes]
        size = (codes.shape[1] * cell, codes.shape[0] * cell)
        picture = Image.fromarray(colours).resize(size, Image.Resampling.NEAREST)
        pen = ImageDraw.Draw(picture)
        for (row, column), code in np.ndenumerate(codes):
            left, top = column * cell, row * cell
            is_selected = selected == (row, column)
            edge, width = ("black", 8) if is_selected else ("white", 2)
            pen.rectangle((left, top, left + cell - 1, top + cell - 1), outline=edge, width=width)
            if cell >= LEGIBLE:
                ink = ink_on(colours[row, column].tobytes())
                pen.text((left + cell / 2, top + cell / 2), str(code), fill=ink, anchor="mm", font_size=0.34 * cell)
        return picture

    def place_of(self, tokens: Tokens, x: int, y: int) -> tuple[int, int]:
        """Row and column of the cell at a pixel of `draw_grid`."""
        height, width = self._checked(tokens).shape[1:3]
        cell = cell_size((height, width))
        return min(y // cell, height - 1), min(x // cell, width - 1)

    @cached_property
    def colours(self) -> np.ndarray:
        """(M, K, 3) uint8: the first three principal components of the codes as red, green and blue."""
        found = []
        for own in self._vectors:
            centred = own - own.mean(0)
            _, _, directions = torch.linalg.svd(centred, full_matrices=False)
            parts = torch.nn.functional.pad(centred @ directions[:3].T, (0, max(0, 3 - len(directions))))
            ranks = parts.argsort(0).argsort(0).float() / max(len(own) - 1, 1)
            found.append((48 + 190 * ranks).round().to(torch.uint8).numpy())
        return np.stack(found)

    @cached_property
    def _vectors(self) -> Tensor:
        return self.tokenizer.model.quantizer.vectors().detach().float().cpu()

    def _axis(self, codebook: int) -> tuple[int, ...]:
        return (codebook,) if self.config.num_codebooks > 1 else ()

    @torch.no_grad()
    def _tokens(self, pixel_values: Tensor) -> Tensor:
        model: Any = self.tokenizer.model
        with canonical(model):
            return model.encode(pixel_values.to(model.device)).image_tokens.cpu()

    @torch.no_grad()
    def _pixels(self, tokens: Tensor) -> Tensor:
        model: Any = self.tokenizer.model
        with canonical(model):
            decoded = model.decode(tokens.to(model.device)).pixel_values
        return to_uint8(decoded, self.tokenizer.processor).cpu()

    def _checked(self, tokens: Tokens) -> Tensor:
        """Tokens as (1, h, w[, M]) int64.

        Raises: ValueError for what is no grid of codes, or is too large for a page.
        """
        try:
            array = np.asarray(tokens)
        except ValueError as error:
            raise ValueError(f"the tokens are not a grid, row by row: {error}") from error
        shape = array.shape[2:]
        expected = (self.config.num_codebooks,) if self.config.num_codebooks > 1 else ()
        if array.dtype.kind not in "iu" or array.ndim < 2 or shape != expected or array.size == 0:
            form = "rows of whole numbers" if not expected else f"rows of lists of {expected[0]} whole numbers"
            raise ValueError(f"tokens are {form}, and these are {array.dtype} of shape {array.shape}")
        if array.shape[0] * array.shape[1] > MOST_CELLS:
            raise ValueError(f"a grid of {array.shape[0]} x {array.shape[1]} is too large for this page")
        odd = array[(array < 0) | (array >= self.config.codebook_size)]
        if odd.size:
            raise ValueError(f"codes lie in 0 to {self.config.codebook_size - 1}, and one is {odd[0]}")
        return torch.from_numpy(array.astype(np.int64))[None]

    def _check_place(self, table: Tensor, row: int, column: int, codebook: int) -> None:
        height, width = table.shape[1:3]
        if not (0 <= row < height and 0 <= column < width and 0 <= codebook < self.config.num_codebooks):
            raise ValueError(
                f"row {row}, column {column}, codebook {codebook} is no place of a {height} x {width} grid"
            )


def ink_on(colour: bytes) -> str:
    """Black or white, whichever can be read on red, green and blue."""
    return "white" if sum(colour) < DARK else "black"


def cell_size(grid: tuple[int, ...]) -> int:
    """Pixels along the edge of a token's cell."""
    return max(GRID_SIDE // max(grid[:2]), SMALLEST_CELL)


def enlarged(picture: Any) -> Image.Image:
    """A PIL image, or uint8 (1, C, H, W), with square pixels and about `SIDE` of them along the longer edge."""
    if isinstance(picture, Tensor):
        pixels = picture[0].movedim(0, -1).numpy()
        picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    factor = max(SIDE // max(picture.size), 1)
    return picture.convert("RGB").resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
