"""Lists of ids <-> token grids, with the checks that ids from outside need.

Letters: h, w the token grid; M codebooks, K codes.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchEncoding

__all__ = ["broadcast_grids", "depth", "on_grid", "to_encoding", "to_ids"]

Grid = tuple[int, int]


def to_encoding(tokens: list[Tensor], return_tensors: str | None) -> BatchEncoding:
    """Tokens per image, (h, w) or (h, w, M), as `input_ids` and `image_grid_hw`; see `ImageTokenizer`.

    Raises:
        ValueError: return_tensors with grids that differ.
    """
    grids = [list(token.shape[:2]) for token in tokens]
    if return_tensors is None:
        return BatchEncoding({"input_ids": [token.flatten().tolist() for token in tokens], "image_grid_hw": grids})
    if len({tuple(grid) for grid in grids}) > 1:
        different = sorted({tuple(grid) for grid in grids})
        raise ValueError(
            f"return_tensors={return_tensors!r} needs images of one grid, but theirs are {different[:8]} (h, w): "
            f"leave return_tensors out to get lists, or keep do_resize and do_center_crop on."
        )
    data = {"input_ids": torch.stack(tokens).flatten(1), "image_grid_hw": torch.tensor(grids)}
    return BatchEncoding(data, tensor_type=return_tensors)


def depth(token_ids: Any) -> int:
    """1 for the ids of one image, 2 for those of several."""
    if isinstance(token_ids, (np.ndarray, Tensor)):
        return token_ids.ndim
    return 2 if np.ndim(next(iter(token_ids), 0)) else 1


def to_ids(sequence: Any, index: int) -> Tensor:
    """The ids of one image, a list, array or tensor, as int64 (h * w * M,).

    Raises:
        ValueError: anything that is no flat list of integers; `index` is its number in the message.
    """
    try:
        ids = torch.as_tensor(sequence)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"sequence {index} is no list of ids: {error}") from error
    if ids.ndim != 1:
        raise ValueError(
            f"sequence {index} has shape {tuple(ids.shape)}: the ids of an image are one flat list, "
            f"image_tokens.flatten(1) of a model's."
        )
    if len(ids) and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise ValueError(f"sequence {index} holds {ids.dtype}: ids are integers.")
    return ids.to("cpu", torch.int64)


def broadcast_grids(image_grid_hw: Any, count: int) -> list[Grid | None]:
    """None, one (h, w) for all or one per image -> one per image.

    Raises:
        ValueError: any other shape.
    """
    if image_grid_hw is None:
        return [None] * count
    try:
        grids = torch.as_tensor(image_grid_hw).cpu()
    except (TypeError, ValueError) as error:
        raise ValueError(f"image_grid_hw is {image_grid_hw!r}: pass (h, w), or one per image.") from error
    if grids.is_floating_point() or grids.dtype == torch.bool:
        raise ValueError(f"image_grid_hw holds {grids.dtype}: height and width are integers.")
    if grids.shape == (2,):
        grids = grids.expand(count, 2)
    if grids.shape != (count, 2):
        raise ValueError(f"image_grid_hw has shape {tuple(grids.shape)}: pass (h, w), or one per image, ({count}, 2).")
    return [(int(height), int(width)) for height, width in grids.tolist()]


def on_grid(ids: Tensor, grid: Grid | None, codes: int, codebooks: int, index: int) -> Tensor:
    """The ids of one image, checked, as (h, w), or (h, w, M) with M > 1 codebooks.

    Args:
        ids: int64 (h * w * M,), codebook fastest.
        grid: (h, w); None means square.
        codes: number of codes K.
        codebooks: number of codebooks M.
        index: number of the sequence, for the error messages.

    Raises:
        ValueError: ids outside [0, K), or a number of ids that does not fit the grid or the codebooks.
    """
    if len(ids) == 0 or len(ids) % codebooks:
        raise ValueError(
            f"sequence {index} has {len(ids)} ids: a model of {codebooks} codebook{'s' * (codebooks > 1)} has "
            f"{codebooks} for each position of a grid, and at least one position."
        )
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= codes:
        hint = f" Id {codes} is the start token of a prior: leave it out." if most == codes else ""
        raise ValueError(f"sequence {index} has ids from {least} to {most}, outside [0, {codes}).{hint}")
    positions = len(ids) // codebooks
    height, width = grid or (math.isqrt(positions), math.isqrt(positions))
    if min(height, width) < 1 or height * width != positions:
        way_out = "pass its own image_grid_hw" if grid else "a grid that is not square needs image_grid_hw"
        shape = f"{height}x{width}" + (f" with {codebooks} codebooks" if codebooks > 1 else "")
        raise ValueError(f"sequence {index} has {len(ids)} ids, not those of a grid of {shape}: {way_out}.")
    return ids.view(height, width) if codebooks == 1 else ids.view(height, width, codebooks)
