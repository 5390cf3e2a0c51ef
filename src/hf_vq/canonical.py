"""The one way in which tokens and numbers that others rely on are computed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def canonical(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no autocast, no TF32; afterwards everything is as it was.

    Args:
        model: put into evaluation mode part by part, because a part may have been frozen there before.
    """
    modes = [(module, module.training) for module in model.modules()]
    device: Any = next(model.parameters()).device
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    model.eval()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32
        for module, training in modes:
            module.training = training
