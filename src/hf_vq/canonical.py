"""The one way in which tokens and numbers that others rely on are computed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def canonical(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no autocast, no TF32; afterwards everything is as it was.

    Args:
        models: put into evaluation mode part by part, because a part may have been frozen there before.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    device: Any = next(models[0].parameters()).device
    for model in models:
        model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False), full_float32():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def full_float32() -> Iterator[None]:
    """Float32 convolutions and matrix products keep all their digits, whatever was allowed before."""
    switches = _precision_switches()
    before = [getattr(switch, name) for switch, name, _ in switches]
    try:
        for switch, name, value in switches:
            setattr(switch, name, value)
        yield
    finally:
        for (switch, name, _), value in zip(switches, before, strict=True):
            setattr(switch, name, value)


def _precision_switches() -> list[tuple[Any, str, Any]]:
    backends: Any = torch.backends
    if hasattr(backends.cudnn, "conv"):
        parts = backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv
        return [(part, "fp32_precision", "ieee") for part in parts]
    # torch before 2.9
    return [(backends.cuda.matmul, "allow_tf32", False), (backends.cudnn, "allow_tf32", False)]


def unwrapped(model: nn.Module) -> Any:
    """The model inside DistributedDataParallel and torch.compile, in whatever order."""
    for name in ("module", "_orig_mod"):
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module):
            return unwrapped(inner)
    return model
