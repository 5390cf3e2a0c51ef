"""What a prior remembers between two steps of `generate`, as a layer of transformers' `Cache`."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


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


class CodesUnderWay(StateLayer):
    """The codes of a position of which the trunk has not heard yet, and what it said on the way to it."""


def position_under_way(cache: Cache) -> CodesUnderWay:
    """Where, with several codebooks, a cache keeps the codes of the position under way: its last layer.

    Raises: ValueError for a cache without layers, to which the trunk's would be added after it.
    """
    if not cache.layers:
        raise ValueError("past_key_values must be of `new_cache()`, or a static cache: this one has no layers yet")
    if not isinstance(cache.layers[-1], CodesUnderWay):
        cache.layers.append(CodesUnderWay())
    under_way: Any = cache.layers[-1]
    return under_way


def own_cache(cache: Cache | None) -> Cache | None:
    """The trunk's layers of a cache, without the codes under way: masks depend on what layers there are."""
    return None if cache is None else Cache(layers=cache.layers[:-1])


def tokens_seen(cache: Cache | None, num_codebooks: int) -> int:
    """Tokens, the start token among them, that a cache stands for."""
    if cache is None:
        return 0
    return int((cache if num_codebooks == 1 else position_under_way(cache)).get_seq_length())


__all__ = ["CodesUnderWay", "StateLayer", "own_cache", "position_under_way", "tokens_seen"]
