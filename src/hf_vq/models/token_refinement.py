"""Tokens that decode to less error than the encoder's: tokens change where the reconstruction gets closer to the image.

An encoder takes the code nearest to each latent; what codes beside each other make together in the decoder, it does not
weigh. Analysis by synthesis, as coders of speech and video do it, weighs just that. The model stays as it is, and so
does its fingerprint; only which tokens stand for an image changes.
"""

from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .code_search import nearest_code
from .quantizers import to_rows

STRIDE = 2
NEIGHBOURHOOD = 3
# Of the codes' root mean square: about half the way to the next code, as steps of refinement are.
PROBE = 0.15


class Error(NamedTuple):
    """What an image loses with certain tokens.

    Attributes:
        cells: (B, h, w), the squared error of the pixels that each position stands for.
        gradient: (B, M * D, h, w), of the squared error of each image by its quantized latents.
    """

    cells: Tensor
    gradient: Tensor


class TokenRefinement:
    """Lowers the squared error of reconstructions by changing tokens.

    A round visits the positions in four groups, every second one along both axes. Each position of a group proposes
    the code nearest to z_q - g / (2 c), a Gauss-Newton step: g is the gradient of its image's squared error, and c, the
    mean eigenvalue of J^T J for the decoder's Jacobian J, is taken from one small random step v of an image's quantized
    latents, ||f(z_q + v) - f(z_q)||^2 / ||v||^2. A position keeps its proposal if the error of the 3 x 3 cells around
    it falls; an image keeps the changes of a group if its whole error falls. So the squared error of an image, clipped
    to the range of pixel_values, never rises.

    Args:
        model: the tokenizer, in evaluation mode.
        pixel_values: (B, C, H, W), what the tokens are for.
    """

    def __init__(self, model: Any, pixel_values: Tensor) -> None:
        self.model, self.quantizer = model, model.quantizer
        self.pixel_values = pixel_values
        self.cell = model.config.downsampling_factor

    def __call__(self, image_tokens: Tensor, rounds: int) -> Tensor:
        """image_tokens (B, h, w[, M]) after so many rounds."""
        curvature = self.curvature(image_tokens)
        error = self.error(image_tokens)
        for row, column in list(product(range(STRIDE), repeat=2)) * rounds:
            proposed = self.propose(image_tokens, error.gradient, curvature)
            group = torch.zeros_like(error.cells, dtype=torch.bool)
            group[:, row::STRIDE, column::STRIDE] = True
            trial = choose(group, proposed, image_tokens)
            helps = around(self.cells(self.quantizer.lookup(trial))) < around(error.cells)
            kept = choose(group & helps, proposed, image_tokens)
            its_error = self.error(kept)
            better = its_error.cells.sum((1, 2)) < error.cells.sum((1, 2))
            image_tokens = choose(better, kept, image_tokens)
            error = Error(*(choose(better, new, old) for new, old in zip(its_error, error, strict=True)))
        return image_tokens

    def propose(self, image_tokens: Tensor, gradient: Tensor, curvature: Tensor) -> Tensor:
        """The codes nearest to a step down the gradient, in the shape of image_tokens."""
        target = self.quantizer.lookup(image_tokens) - gradient / (2 * curvature.view(-1, 1, 1, 1))
        codes = nearest_code(to_rows(target, self.quantizer.num_codebooks), self.quantizer.vectors())
        return self.quantizer.to_tokens(codes, target)

    def error(self, image_tokens: Tensor) -> Error:
        """The error with these tokens, and its gradient."""
        with torch.inference_mode(False), torch.enable_grad():
            quantized = self.quantizer.lookup(image_tokens).detach().clone().requires_grad_()
            cells = self.cells(quantized)
            (gradient,) = torch.autograd.grad(cells.sum(), quantized)
        return Error(cells.detach(), gradient)

    def cells(self, quantized: Tensor) -> Tensor:
        """The squared error (B, h, w) of the pixels that each position stands for."""
        squares = (self.decode(quantized) - self.pixel_values).square().sum(dim=1, keepdim=True)
        return F.avg_pool2d(squares, self.cell, divisor_override=1).squeeze(1)

    def curvature(self, image_tokens: Tensor) -> Tensor:
        """How far each image's pixels move by a small random step of its quantized latents: squares, (B,), per unit.

        The step is the same for all images and calls, so that an image's tokens do not depend on its batch.
        """
        quantized = self.quantizer.lookup(image_tokens)
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, quantized.shape[1:], generator=generator, device="cpu") * 2 - 1
        step = PROBE * self.quantizer.vectors().square().mean().sqrt() * signs.to(quantized)
        response = (self.decode(quantized + step) - self.decode(quantized)).square().flatten(1).sum(dim=1)
        return (response / step.square().sum()).clamp(min=torch.finfo(response.dtype).tiny)

    def decode(self, quantized: Tensor) -> Tensor:
        """The reconstruction, clipped to the range of pixel_values, in float32 or wider."""
        decoded = self.model.decode(quantized_last_hidden_state=quantized).pixel_values
        return decoded.to(torch.promote_types(decoded.dtype, torch.float32)).clamp(-1, 1)


def around(cells: Tensor) -> Tensor:
    """The sum (B, h, w) over the 3 x 3 cells around each, as far as they are there."""
    return F.avg_pool2d(cells.unsqueeze(1), NEIGHBOURHOOD, 1, NEIGHBOURHOOD // 2, divisor_override=1).squeeze(1)


def choose(where: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """`yes` where a condition on the first axes holds, else `no`."""
    return torch.where(where.view(*where.shape, *[1] * (yes.ndim - where.ndim)), yes, no)


__all__ = ["TokenRefinement"]
