"""What anneals a stochastic quantizer: its learned variance, and the temperature of the relaxed draw (SQ-VAE)."""

import math

import torch
from torch import Tensor, nn

# As in the authors' code; a narrower Gaussian has scores that float32 cannot tell from infinity.
LEAST_VARIANCE = 1e-10
# exp of more would have no finite gradient.
MOST_LOG = 25.0


class DequantizationVariance(nn.Module):
    """sigma_phi^2: one learned scalar, and what the encoder says of its own latents.

    Args:
        form: `product` for exp(head + s), the paper's; `sum` for exp(head) + exp(s), the authors' vision code. Without
            a head, head = 0.
        initial: exp(s) at the start.
        lr_scale: s = log(initial) + lr_scale * parameter.
    """

    def __init__(self, form: str, initial: float, lr_scale: float) -> None:
        super().__init__()
        self.form = form
        self.initial = initial
        self.lr_scale = lr_scale
        self.log_ratio = nn.Parameter(torch.zeros(()))

    def shared(self) -> Tensor:
        """exp(s), ()."""
        return self.initial * (self.lr_scale * self.log_ratio).clamp(max=MOST_LOG).exp()

    def forward(self, head: Tensor | None = None) -> Tensor:
        """The variance, in the shape of the head; () without one."""
        shared = self.shared()
        own = torch.ones_like(shared) if head is None else head.clamp(max=MOST_LOG).exp()
        return (own + shared if self.form == "sum" else own * shared).clamp(min=LEAST_VARIANCE)


class InverseConcentration(DequantizationVariance):
    """1 / kappa of a von Mises-Fisher distribution: `product` for exp(s), `sum` for 1 / (1 + exp(-s)), the authors'."""

    def forward(self, head: Tensor | None = None) -> Tensor:
        """1 / kappa, ()."""
        shared = self.shared()
        return (shared / (1 + shared) if self.form == "sum" else shared).clamp(min=LEAST_VARIANCE)


class AnnealedTemperature(nn.Module):
    """Temperature that decays exponentially from `start` to `end` over `decay_steps`, then stays.

    Buffers:
        steps (): optimizer steps taken; float, since dtype casts of a kept-in-float32 module reach integers too.
    """

    steps: Tensor

    def __init__(self, start: float, end: float, decay_steps: int) -> None:
        super().__init__()
        self.start = start
        self.log_ratio = math.log(end / start)
        self.decay_steps = decay_steps
        self.register_buffer("steps", torch.zeros((), dtype=torch.float32))

    def forward(self) -> Tensor:
        """The temperature of the coming step, ()."""
        return self.start * (self.log_ratio * (self.steps / self.decay_steps).clamp(max=1)).exp()

    def step(self) -> None:
        """Advances by one optimizer step."""
        self.steps += 1


__all__ = ["AnnealedTemperature", "DequantizationVariance", "InverseConcentration"]
