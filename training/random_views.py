"""Training images seen anew: mirrored, and moved by a few pixels."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_vq.streams import TrainBatches


class Views(NamedTuple):
    """How training images are varied.

    Attributes:
        random_flip: mirror each left to right with probability one half.
        random_shift: move each by up to so many pixels, across and down; what comes in repeats the edge.
    """

    random_flip: bool = False
    random_shift: int = 0


AS_THEY_ARE = Views()


class RandomViews:
    """Batches of pixel_values, each image varied; resumable as `batches` are.

    How depends on the seed, the process and the number of the batch alone.

    Args:
        batches: `TrainBatches` of images.
        views: what is varied.
        seed: of the random numbers.

    Raises: ValueError for images that are not larger than `views.random_shift`.
    """

    def __init__(self, batches: TrainBatches, views: Views, seed: int) -> None:
        self.batches, self.views, self.seed = batches, views, seed
        self.drawn = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.batches:
            pixel_values = batch["pixel_values"]
            count, _, height, width = pixel_values.shape
            if self.views.random_shift >= min(height, width):
                raise ValueError(
                    f"random_shift {self.views.random_shift} moves images of {height} x {width} pixels out of sight: "
                    f"it must be below {min(height, width)}"
                )
            rows, columns = self._draw(count, height, width)
            self.drawn += 1
            yield batch | {"pixel_values": taken_at(pixel_values, rows, columns)}

    def _draw(self, count: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Which row (count, height) and which column (count, width) stands at each place of the images."""
        generator = np.random.default_rng((self.seed, self.batches.rank, self.drawn))
        mirrored = self.views.random_flip & (generator.random((count, 1)) < 0.5)
        most = self.views.random_shift
        down, across = generator.integers(-most, most, size=(2, count, 1), endpoint=True)
        rows = (np.arange(height) + down).clip(0, height - 1)
        columns = (np.arange(width) + across).clip(0, width - 1)
        columns = np.where(mirrored, width - 1 - columns, columns)
        return torch.from_numpy(rows), torch.from_numpy(columns)

    def state_dict(self) -> dict[str, Any]:
        """Where `batches` stand, and how many were drawn."""
        return self.batches.state_dict() | {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after the batch at which `state` was taken."""
        self.batches.load_state_dict(state)
        self.drawn = state["drawn"]


def taken_at(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Images (B, C, H, W) made of the pixels that stand at rows (B, H) and columns (B, W)."""
    index = torch.arange(len(images))[:, None, None]
    return images.movedim(1, -1)[index, rows[:, :, None], columns[:, None]].movedim(-1, 1).contiguous()
