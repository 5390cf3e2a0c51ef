"""What the short experiments on priors share: tokens of pixels in memory, and a plain training loop."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hf_vq.canonical import canonical
from kept_jobs import Count
from short_runs import planned_steps, shuffled_batches, to_pixel_values

AT_ONCE = 250


def tokenized(model: Any, pixels: Tensor) -> Iterator[dict[str, Tensor]]:
    """Batches of images with their canonical tokens."""
    for part in pixels.split(AT_ONCE):
        pixel_values = to_pixel_values(part)
        with canonical(model):
            image_tokens = model.encode(pixel_values).image_tokens
        yield {"pixel_values": pixel_values, "image_tokens": image_tokens}


def tokens_of(model: Any, pixels: Tensor) -> Tensor:
    """The canonical tokens of all images, (N, h, w[, M])."""
    return torch.cat([batch["image_tokens"] for batch in tokenized(model, pixels)])


def train_prior(
    prior: Any,
    image_tokens: Tensor,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    count: Count,
) -> None:
    """AdamW, the learning rate rising for a hundred steps and then falling to 0 along a cosine; autocast to bf16."""
    sequences = prior.sequences(image_tokens)
    steps = planned_steps(len(sequences), epochs, batch_size)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=learning_rate, weight_decay=0.1)
    torch.manual_seed(seed)
    prior.train()
    for step, batch in enumerate(shuffled_batches(sequences, epochs, batch_size, seed)):
        rate = min(1.0, (step + 1) / 100) * (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate
        with torch.autocast("cpu", torch.bfloat16):
            loss = prior(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        count(batch_size)
    if not bool(loss.isfinite()):
        raise FloatingPointError(f"the prior's loss is {loss.item()} after {steps} steps")
