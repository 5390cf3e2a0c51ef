"""Which tokenizer made these tokens? A digest that tokens and priors carry with them."""

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


def token_fingerprint(encoder: nn.Module, quantizer: nn.Module, options: Mapping[str, object]) -> str:
    """sha256 over the parameters of both and the encoder's BatchNorm statistics, by name, cast to bfloat16.

    Args:
        options: what else decides on tokens, where it differs from the usual.
    """
    digest = hashlib.sha256()
    for option, value in sorted(options.items()):
        digest.update(f"{option} {value}\n".encode())
    for name, tensor in sorted(_token_state(encoder, quantizer)):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        narrow = tensor.detach().cpu().to(torch.bfloat16).reshape(-1)
        digest.update(narrow.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _token_state(encoder: nn.Module, quantizer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from encoder.named_parameters(prefix="encoder")
    yield from quantizer.named_parameters(prefix="quantizer")
    for name, buffer in encoder.named_buffers(prefix="encoder"):
        if name.endswith(("running_mean", "running_var")):
            yield name, buffer


__all__ = ["token_fingerprint"]
