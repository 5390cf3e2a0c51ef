"""Mirrored training images."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_vq.streams import TrainBatches


class RandomFlip:
    """Batches of pixel_values, each image mirrored left to right with probability one half; resumable as `batches` are.

    What is mirrored depends on the seed, the process and the number of the batch alone.

    Args:
        batches: `TrainBatches` of images.
        seed: of what is mirrored.
    """

    def __init__(self, batches: TrainBatches, seed: int) -> None:
        self.batches, self.seed = batches, seed
        self.drawn = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.batches:
            mirrored = self._draw(len(batch["pixel_values"]))
            self.drawn += 1
            pixel_values = batch["pixel_values"]
            yield batch | {"pixel_values": torch.where(mirrored.view(-1, 1, 1, 1), pixel_values.flip(-1), pixel_values)}

    def _draw(self, count: int) -> Tensor:
        generator = np.random.default_rng((self.seed, self.batches.rank, self.drawn))
        return torch.from_numpy(generator.random(count) < 0.5)

    def state_dict(self) -> dict[str, Any]:
        """Where `batches` stand, and how many were drawn."""
        return self.batches.state_dict() | {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after the batch at which `state` was taken."""
        self.batches.load_state_dict(state)
        self.drawn = state["drawn"]
