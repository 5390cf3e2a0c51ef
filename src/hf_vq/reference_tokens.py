"""Tokens of a few images, kept beside a tokenizer: do other machines give the same ones?"""

import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_vq.canonical import canonical
from hf_vq.files import replace_file

__all__ = ["REFERENCE_FILE", "Verification", "compare", "compare_tokens", "hash_of_reference", "save_reference_tokens"]

REFERENCE_FILE = "reference_tokens.safetensors"
HASH = "sha256_of_tokens"


class Verification(NamedTuple):
    """How the tokens that a tokenizer gives here compare with those that were saved with it.

    Near-ties flip between machines and kernels: a few tokens that differ by a small margin are to be expected, one
    that differs by a large margin is another tokenizer.

    Attributes:
        num_tokens: that were compared.
        num_differing: of them that are others here.
        largest_margin: of those, how much nearer the latent is to one code than to the other, as a share of its
            squared distance; 0 if none differ.
    """

    num_tokens: int
    num_differing: int
    largest_margin: float

    @property
    def share_differing(self) -> float:
        """num_differing / num_tokens."""
        return self.num_differing / self.num_tokens

    def __str__(self) -> str:
        if not self.num_differing:
            return f"all {self.num_tokens:,} tokens are the published ones"
        return (
            f"{self.num_differing:,} of {self.num_tokens:,} tokens ({self.share_differing:.3%}) are not the published "
            f"ones; the two codes differ by at most {self.largest_margin:.1e} of the squared distance"
        )


def save_reference_tokens(folder: str | os.PathLike[str], model: Any, processor: Any, images: Tensor) -> None:
    """Writes images and their tokens to `reference_tokens.safetensors`.

    Args:
        folder: of the tokenizer.
        model: the tokenizer's model.
        processor: its image processor.
        images: (B, C, H, W) uint8.
    """
    image_tokens, _, _ = _encode(model, processor, images)
    tensors = {"images": images.contiguous().cpu(), "image_tokens": image_tokens.contiguous()}
    metadata = {HASH: hash_of(image_tokens)}
    replace_file(Path(folder) / REFERENCE_FILE, lambda path: save_file(tensors, path, metadata=metadata))


def compare(file: str | os.PathLike[str], model: Any, processor: Any) -> Verification:
    """Encodes the images of `file` anew, canonically.

    Raises: ValueError if the tokens in the file are not those of its hash.
    """
    with safe_open(file, framework="pt") as reference:
        images, there = reference.get_tensor("images"), reference.get_tensor("image_tokens")
        if hash_of(there) != reference.metadata()[HASH]:
            raise ValueError(f"{file} is damaged: its tokens have another hash than it says. Download it again.")
    here, latents, log_variance = _encode(model, processor, images)
    return compare_tokens(model, latents, log_variance, here, there.to(here.device))


def compare_tokens(
    model: Any, latents: Tensor, log_variance: Tensor | None, image_tokens: Tensor, others: Tensor
) -> Verification:
    """How other tokens of the same images compare with `image_tokens`.

    Args:
        model: the tokenizer's model.
        latents, log_variance: as its encoder gives them.
        image_tokens, others: (B, h, w[, M]).
    """
    differing = image_tokens != others
    with canonical(model):
        near, far = (
            model.quantizer.squared_distances(latents, tokens, log_variance)[differing]
            for tokens in (image_tokens, others)
        )
    margins = (far - near).abs() / torch.maximum(near, far)
    return Verification(image_tokens.numel(), int(differing.sum()), float(margins.max()) if len(margins) else 0.0)


def hash_of_reference(folder: str | os.PathLike[str]) -> str | None:
    """The hash of the reference tokens in a tokenizer's folder, None if there are none."""
    file = Path(folder) / REFERENCE_FILE
    if not file.is_file():
        return None
    with safe_open(file, framework="pt") as reference:
        return reference.metadata()[HASH]


def hash_of(image_tokens: Tensor) -> str:
    """sha256 of the shape and of the tokens, as int64, little-endian, in raster order."""
    digest = hashlib.sha256(repr(tuple(image_tokens.shape)).encode())
    digest.update(image_tokens.cpu().to(torch.int64).contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _encode(model: Any, processor: Any, images: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """image_tokens, and what the encoder gives: latents and log_variance."""
    pictures = list(images.movedim(1, -1).cpu().numpy())
    pixel_values = processor(pictures, return_tensors="pt")["pixel_values"]
    with canonical(model):
        latents, log_variance = model.encoder(pixel_values.to(model.device, model.dtype))
        return model.quantizer.search(latents, log_variance), latents, log_variance
