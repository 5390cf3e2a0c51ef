"""What the bodies share."""

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_autoencoder import AutoencoderConfig


class BodyBlock(GradientCheckpointingLayer):
    """A piece of a body that stays on one device, is checkpointed as a whole, and whose output can be recorded."""


def make_activation(config: AutoencoderConfig) -> nn.Module:
    """The config's nonlinearity."""
    return nn.SiLU() if config.activation == "silu" else nn.ReLU()


__all__ = ["BodyBlock", "make_activation"]
