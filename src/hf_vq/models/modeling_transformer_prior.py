"""The Transformer prior: decoder-only, with the stack's own attention, and learned positions of two dimensions."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_transformer_prior import TransformerPriorConfig
from .modeling_prior import PriorPreTrainedModel


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, which also gives its weights; see transformers' attention interface."""
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    mixed = F.dropout(weights, dropout, module.training) @ value
    return mixed.transpose(1, 2).contiguous(), weights


class CausalAttention(nn.Module):
    """Each position sees itself and those before it."""

    is_causal = True
    num_key_value_groups = 1

    def __init__(self, config: TransformerPriorConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.heads = config.num_attention_heads
        self.scaling = (config.hidden_size // self.heads) ** -0.5
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, mask: Tensor | None, cache: Cache | None) -> tuple[Tensor, Tensor | None]:
        """hidden (B, S, W) to the same, and the weights where the attention implementation gives them."""
        query, key, value = self.project(hidden)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        dropout = self.config.dropout if self.training else 0.0
        mixed, weights = attend(self, query, key, value, mask, dropout=dropout, scaling=self.scaling)
        return self.output(mixed.flatten(2)), weights

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, heads, S, W / heads) each."""
        query, key, value = self.query_key_value(hidden).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return query, key, value


class TransformerBlock(GradientCheckpointingLayer):
    """Attention, then an MLP of four times the width, each on normalised input and added to it."""

    def __init__(self, config: TransformerPriorConfig, layer_idx: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = CausalAttention(config, layer_idx)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor, mask: Tensor | None = None, past_key_values: Cache | None = None) -> Tensor:
        """hidden (B, S, W) to the same. Checkpointing drops a cache of this name: running twice would fill it twice."""
        hidden = hidden + self.dropout(self.attention(self.attention_norm(hidden), mask, past_key_values)[0])
        return hidden + self.dropout(self.narrow(F.gelu(self.widen(self.mlp_norm(hidden)))))


class TransformerTrunk(nn.Module):
    """Blocks over a sequence of positions, each told the row and the column of the position after it."""

    def __init__(self, config: TransformerPriorConfig) -> None:
        super().__init__()
        self.config = config
        height, self.columns = config.grid
        # What follows the last position has a row of its own.
        self.row, self.column = (nn.Embedding(count, config.hidden_size) for count in (height + 1, self.columns))
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(TransformerBlock(config, index) for index in range(config.num_hidden_layers))

    def forward(self, inputs: Tensor, cache: Cache | None = None) -> Tensor:
        """inputs (B, S, W) to the same; `cache` holds the positions before them."""
        seen = 0 if cache is None else cache.get_seq_length()
        places = torch.arange(inputs.shape[1], device=inputs.device) + seen
        positions = self.row(places // self.columns) + self.column(places % self.columns)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs,
            attention_mask=None,
            past_key_values=cache,
            position_ids=places.expand(len(inputs), -1),
        )
        hidden = self.dropout(inputs + positions)
        for layer in self.layers:
            hidden = layer(hidden, mask=mask, past_key_values=cache)
        return hidden


class TransformerPrior(PriorPreTrainedModel, GenerationMixin):
    """P(image_tokens | class) by a decoder-only Transformer; see `PriorPreTrainedModel` for what it does."""

    config: TransformerPriorConfig
    _no_split_modules = ["TransformerBlock"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": TransformerBlock, "attentions": CausalAttention}

    def __init__(self, config: TransformerPriorConfig) -> None:
        super().__init__(config)
        self.post_init()

    def make_trunk(self) -> nn.Module:
        return TransformerTrunk(self.config)

    def new_cache(self) -> Cache:
        return DynamicCache(config=self.config)


TransformerPrior.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["TransformerPrior"]
