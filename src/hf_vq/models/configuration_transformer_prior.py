"""Config of the Transformer prior."""

from huggingface_hub.dataclasses import strict

from .configuration_prior import PriorConfig


@strict
class TransformerPriorConfig(PriorConfig):
    """Config of `TransformerPrior`: the fields of `PriorConfig`, and

    Args:
        num_attention_heads: heads of each layer's attention.

    Example:
        >>> from hf_vq import TransformerPrior, TransformerPriorConfig
        >>> prior = TransformerPrior(TransformerPriorConfig(codebook_size=512, grid_size=8, num_classes=10))
    """

    model_type = "hf_vq_transformer_prior"

    num_attention_heads: int = 4

    def validate_heads(self) -> None:
        """The heads share the width."""
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be divisible by num_attention_heads "
                f"({self.num_attention_heads})"
            )


TransformerPriorConfig.register_for_auto_class()

__all__ = ["TransformerPriorConfig"]
