"""The PixelCNN prior: gated masked convolutions without a blind spot (van den Oord et al. 2016, arXiv 1606.05328).

The vertical stack sees the rows above a position, the horizontal one the positions to its left, and what the vertical
stack says of its own. Letters: B images, C channels, h x w positions, k the kernel size, r = k // 2 its reach.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.output_capturing import OutputRecorder

from .configuration_pixelcnn import PixelCNNPriorConfig
from .modeling_prior import PriorPreTrainedModel
from .prior_cache import StateLayer


def gate(features: Tensor) -> Tensor:
    """tanh of one half of the channels times the sigmoid of the other (Eq. 2)."""
    value, weight = features.chunk(2, dim=1)
    return value.tanh() * weight.sigmoid()


class GatedLayer(GradientCheckpointingLayer):
    """One layer of both stacks.

    A mask would only zero the weights of what is not to be seen: the kernels here leave it out. The first layer sees
    nothing of a position's own row in the vertical stack and nothing of the position itself in the horizontal one.
    """

    def __init__(self, config: PixelCNNPriorConfig, first: bool) -> None:
        super().__init__()
        width, side = config.hidden_size, config.kernel_size
        self.first, self.reach = first, side // 2
        seen = self.reach if first else self.reach + 1
        self.vertical = nn.Conv2d(width, 2 * width, (seen, side), padding=(0, self.reach))
        self.horizontal = nn.Conv2d(width, 2 * width, (1, seen))
        self.link = nn.Conv2d(2 * width, 2 * width, 1)
        self.condition = nn.Linear(width, 4 * width)
        self.output = nn.Conv2d(width, width, 1)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, above: Tensor, left: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Both stacks over whole rows.

        Args:
            above: (B, C, h, w), the vertical stack.
            left: (B, C, h, w), the horizontal stack.
            start: (B, C), the start token's embedding, that is, the class.
        """
        rows, columns = above.shape[2:]
        seen_above = self.vertical(F.pad(above, (0, 0, self.reach, 0)))[:, :, :rows]
        seen_left = self.horizontal(F.pad(left, (self.reach, 0)))[..., :columns]
        next_above, linked = self.look_up(above, seen_above, start)
        gated = self.dropout(gate(seen_left + linked))
        return next_above, self.output(gated) if self.first else left + self.output(gated)

    def look_up(self, above: Tensor, seen_above: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """The vertical stack's next layer, and what it and the class tell the horizontal stack, (B, 2C, h, w)."""
        for_above, for_left = self.condition(start)[..., None, None].chunk(2, dim=1)
        gated = self.dropout(gate(seen_above + for_above))
        return gated if self.first else above + gated, self.link(seen_above) + for_left

    def next_row(self, above: Tensor, row: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """`look_up` for one row (B, C, 1, w), given it and the r rows above it, (B, C, r, w)."""
        seen_above = self.vertical(above if self.first else torch.cat([above, row], dim=2))
        return self.look_up(row, seen_above, start)

    def next_position(self, window: Tensor, here: Tensor, linked: Tensor) -> Tensor:
        """The horizontal stack's next layer at one position, (B, C).

        Args:
            window: (B, C, r), or with the position itself (B, C, r + 1) after the first layer.
            here: (B, C), the horizontal stack at the position.
            linked: (B, 2C), from `look_up`.
        """
        seen_left = F.linear(window.flatten(1), self.horizontal.weight.flatten(1), self.horizontal.bias)
        output = F.linear(gate(seen_left + linked), self.output.weight.flatten(1), self.output.bias)
        return output if self.first else here + output


class PixelCNNTrunk(nn.Module):
    """The layers over the grid, whole rows at once, or one position after the other from what a cache holds.

    For each layer i a cache holds, of what it gets: `above{i}` (B, C, r, w), the vertical stack in the r rows above the
    present one; `row{i}` (B, C, 1, w), in the present one; `left{i}` (B, C, r), the horizontal stack at the last r
    positions of this row; and `linked{i}` (B, 2C, w), what `look_up` gives for this row.
    """

    def __init__(self, config: PixelCNNPriorConfig) -> None:
        super().__init__()
        self.height, self.width = config.grid
        self.reach = config.kernel_size // 2
        layers = [GatedLayer(config, first=index == 0) for index in range(config.num_hidden_layers)]
        self.layers: Any = nn.ModuleList(layers)

    def forward(self, inputs: Tensor, cache: Cache | None = None) -> Tensor:
        """inputs (B, S, C), the start token's embedding and then those of positions, to (B, S, C)."""
        if cache is None:
            return self.run_rows(inputs, None)
        state: Any = cache.layers[0] if cache.layers else None
        if not isinstance(state, StateLayer):
            raise ValueError("past_key_values of a PixelCNN must be of `new_cache()`: it keeps no keys and values")
        if not state.length:
            return self.run_rows(inputs, state)
        return torch.stack([self.run_position(embedding, state) for embedding in inputs.unbind(1)], dim=1)

    def run_rows(self, inputs: Tensor, state: StateLayer | None) -> Tensor:
        """From the start: all rows down to that of the last position asked for."""
        count = inputs.shape[1]
        rows = min(self.height, (count - 1) // self.width + 1)
        start, codes = inputs[:, 0], inputs[:, 1:].mT
        grid = F.pad(codes, (0, rows * self.width - codes.shape[2])).unflatten(2, (rows, self.width))
        above = left = grid
        for index, layer in enumerate(self.layers):
            if state is not None:
                self.remember(state, index, above, left, start, place=count - 1)
            above, left = layer(above, left, start)
        if state is not None:
            state.states["start"], state.length = start, count
        # After the last position there is nothing to say.
        return F.pad(left.flatten(2), (0, max(0, count - rows * self.width)))[..., :count].mT

    def remember(self, state: StateLayer, index: int, above: Tensor, left: Tensor, start: Tensor, place: int) -> None:
        """Keeps of a layer's input what the position after `place` will ask for."""
        row, column = divmod(place, self.width)
        if row == self.height:
            return
        window = F.pad(above, (0, 0, self.reach, 0))[:, :, row : row + self.reach]
        own = above[:, :, row : row + 1]
        # The first layer has yet to get the code of `place`.
        known = column + (index > 0)
        state.states |= {
            f"above{index}": window,
            f"row{index}": own,
            f"left{index}": F.pad(left[:, :, row], (self.reach, 0))[..., known : known + self.reach],
            f"linked{index}": self.layers[index].next_row(window, own, start)[1].squeeze(2),
        }

    def run_position(self, embedding: Tensor, state: StateLayer) -> Tensor:
        """From the code of the last position, (B, C), to what is said of the next, (B, C)."""
        states, place = state.states, state.length
        state.length += 1
        row, column = divmod(place, self.width)
        before = column - 1 if column else self.width - 1
        line = states["row0"]
        states["row0"] = torch.cat([line[..., :before], embedding[..., None, None], line[..., before + 1 :]], dim=3)
        if row == self.height:
            return torch.zeros_like(embedding)
        if column:
            states["left0"] = torch.cat([states["left0"], embedding.unsqueeze(2)], dim=2)[..., 1:]
        else:
            self.begin_row(states)
        here = embedding
        for index, layer in enumerate(self.layers):
            window = states[f"left{index}"]
            if index:
                window = torch.cat([window, here.unsqueeze(2)], dim=2)
                states[f"left{index}"] = window[..., 1:]
            here = layer.next_position(window, here, states[f"linked{index}"][..., column])
        return here

    def begin_row(self, states: dict[str, Tensor]) -> None:
        """The vertical stack for the next row, of which no code is known."""
        row = torch.zeros_like(states["row0"])
        for index, layer in enumerate(self.layers):
            above = torch.cat([states[f"above{index}"], states[f"row{index}"]], dim=2)[:, :, 1:]
            left = torch.zeros_like(states[f"left{index}"])
            states |= {f"above{index}": above, f"row{index}": row, f"left{index}": left}
            row, linked = layer.next_row(above, row, states["start"])
            states[f"linked{index}"] = linked.squeeze(2)


class PixelCNNPrior(PriorPreTrainedModel, GenerationMixin):
    """P(image_tokens | class) by a gated PixelCNN; see `PriorPreTrainedModel` for what it does."""

    config: PixelCNNPriorConfig
    _no_split_modules = ["GatedLayer"]
    _can_record_outputs = {"hidden_states": OutputRecorder(GatedLayer, index=1)}

    def __init__(self, config: PixelCNNPriorConfig) -> None:
        super().__init__(config)
        self.post_init()

    def make_trunk(self) -> nn.Module:
        return PixelCNNTrunk(self.config)

    def new_cache(self) -> Cache:
        return Cache(layers=[StateLayer()])

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """No keys and values are kept: `forward` makes the cache."""
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Convolutions scaled by fan-in, the rest as everywhere."""
        if isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            assert module.bias is not None
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)


PixelCNNPrior.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["PixelCNNPrior"]
