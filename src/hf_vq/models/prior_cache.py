"""What a prior remembers between two steps of `generate`, as a layer of transformers' `Cache`."""

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


class StateLayer(CacheLayerMixin):
    """Tensors by name, each with the sequences of the batch first, so that beams and copies can reorder them.

    Attributes:
        states: the tensors.
        length: how many tokens they stand for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[str, Tensor] = {}
        self.length = 0

    def get_seq_length(self) -> int:
        """How many tokens the states stand for."""
        return self.length

    def get_max_length(self) -> int:
        """No end is known."""
        return -1

    def reset(self) -> None:
        """Forgets everything."""
        self.states.clear()
        self.length = 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Each sequence takes the place of the one that a beam goes on from."""
        self.states = {name: state.index_select(0, beam_idx.to(state.device)) for name, state in self.states.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence so many times."""
        self.states = {name: state.repeat_interleave(repeats, dim=0) for name, state in self.states.items()}

    def batch_select_indices(self, indices: Tensor) -> None:
        """These sequences only."""
        self.states = {name: state[indices] for name, state in self.states.items()}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Not for this layer."""
        raise NotImplementedError("this layer holds no keys and values")

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Not for this layer."""
        raise NotImplementedError("this layer holds no keys and values")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As if all tokens could be seen."""
        return self.length + query_length, 0


__all__ = ["StateLayer"]
