"""What the short experiments share: decoded pixels kept on disk, a plain training loop, and the numbers of a model.

Pixels are uint8 (N, C, H, W) in memory, so that a loop measures the model and not the reading. Nothing here chooses an
experiment: the scripts beside it do.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from hf_vq.evaluation import Evaluation, evaluate, to_uint8
from hf_vq.files import replace_file
from hf_vq.models.image_processing_vq import VQImageProcessor
from hf_vq.streams import decode_image, load_images

PIXELS_DIR = Path("output/pixels")
STEPS_BETWEEN_CHECKS = 100
ROWS_AT_ONCE = 1000

OnStep = Callable[[int, Any, Any], object]


def load_pixels(dataset_name: str, split: str, limit: int | None = None) -> Tensor:
    """The images of a split, decoded once and kept under output/pixels/, so that a second start is instant.

    Args:
        dataset_name: what `hf_vq.streams.load_images` takes: a name on the Hub, or a local folder.
        split: "train", "test", or whatever the data set calls it.
        limit: only the first images.

    Returns: uint8 (N, C, H, W), C = 1 where the first picture is grey and 3 else, in the order of the data set.

    Raises: ValueError if the pictures differ in size, or there are none.
    """
    whole = _pixels_file(dataset_name, split)
    path = whole if limit is None or whole.exists() else whole.with_name(f"{whole.stem}-first{limit}.safetensors")
    if not path.exists():
        pixels = _decode(dataset_name, split, limit)
        origin = {"dataset_name": dataset_name, "split": split}
        replace_file(path, lambda temporary: save_file({"pixels": pixels}, temporary, metadata=origin))
    return load_file(path)["pixels"][:limit]


def _pixels_file(dataset_name: str, split: str) -> Path:
    """Named by data set and split; of a local folder also by its files, so that changed data are decoded anew."""
    folder, seen = Path(dataset_name), [dataset_name]
    if folder.is_dir():
        found = sorted(path for path in folder.rglob("*") if path.is_file())
        seen = [str(folder.resolve()), *(f"{path.name} {path.stat().st_size} {path.stat().st_mtime}" for path in found)]
    digest = hashlib.sha256("\n".join(seen).encode()).hexdigest()[:8]
    name = folder.name if folder.is_dir() else dataset_name.replace("/", "--")
    return PIXELS_DIR / f"{name}-{split}-{digest}.safetensors"


def _decode(dataset_name: str, split: str, limit: int | None) -> Tensor:
    stream = load_images(dataset_name, streaming=True, train_split=split, validation_size=0).train
    rows = iter(stream if limit is None else stream.take(limit))
    batches: list[Tensor] = []
    processor = None
    with tqdm(desc=f"decode {split}", unit="img", total=limit) as bar:
        while pictures := [decode_image(row["image"]) for row in islice(rows, ROWS_AT_ONCE)]:
            if processor is None:
                channels = 1 if pictures[0].mode in ("1", "L", "LA", "I;16") else 3
                sizes_as_they_are: dict[str, Any] = {"do_resize": False, "do_center_crop": False}
                processor = VQImageProcessor(num_channels=channels, downsampling_factor=1, **sizes_as_they_are)
            batches.append(to_uint8(processor(pictures, return_tensors="pt")["pixel_values"], processor))
            if batches[-1].shape[1:] != batches[0].shape[1:]:
                raise ValueError(f"{dataset_name} has images of {batches[0].shape[2:]} and of {batches[-1].shape[2:]}")
            bar.update(len(pictures))
    if not batches:
        raise ValueError(f"{dataset_name} has no images in its split {split!r}")
    return torch.cat(batches)


def hold_out(pixels: Tensor, count: int = 5000) -> tuple[Tensor, Tensor]:
    """The images to train on, and those that no run may train on: the last `count` of a permutation seeded 0.

    Raises: ValueError unless images remain to train on.
    """
    if not 0 < count < len(pixels):
        raise ValueError(f"cannot hold out {count} of {len(pixels)} images: choose fewer")
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return pixels[order[:-count]], pixels[order[-count:]]


def to_pixel_values(pixels: Tensor) -> Tensor:
    """uint8 pixels -> float32 in [-1, 1], what the image processor makes of them."""
    return (pixels.float() - 127.5) * (1 / 127.5)


def data_variance(pixels: Tensor) -> float:
    """Variance of pixel_values over all elements, in float64 (`VQVAEConfig.data_variance`)."""
    counts = torch.bincount(pixels.flatten(), minlength=256).double()
    values = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    mean = (counts @ values) / counts.sum()
    return float(counts @ (values - mean).square() / counts.sum())


def authors_net(image_size: int, num_channels: int, **fields: Any) -> dict[str, Any]:
    """Config fields of the SQ-VAE authors' net (341k parameters with K = 512, D = 64), `fields` on top."""
    return {
        "image_size": image_size,
        "num_channels": num_channels,
        "codebook_size": 512,
        "codebook_dim": 64,
        "hidden_channels": [32, 64],
        "num_residual_blocks": 2,
        "residual_channels": 64,
        "norm": "batch",
        "activation": "relu",
        "latent_projection": False,
        "output_activation": "sigmoid",
        "initializer_range": 0.02,
        **fields,
    }


def planned_steps(images: int, epochs: int, batch_size: int) -> int:
    """Optimizer steps that `train_short` takes: what `temperature_decay_steps` should be."""
    return images * epochs // batch_size


def train_short(
    model: Any,
    pixels: Tensor,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    mixed_precision: str = "no",
    on_step: OnStep | None = None,
    count: Callable[[int], object] | None = None,
) -> float:
    """Trains by Adam, the learning rate falling to 0 along a cosine. Batches run across the end of an epoch.

    Args:
        model: a `VQVAEModel` or `SQVAEModel`, on the device it is to be trained on.
        pixels: (N, C, H, W) uint8.
        seed: of the order of the images and of the default generator, from which quantizers draw; the weights are
            the caller's.
        mixed_precision: "no", or "bf16" for autocast of the forward; quantizers stay in float32 either way.
        on_step: called as on_step(step, model, output) after each step, counted from 1.
        count: called with the number of images of each step, as a bar wants it.

    Returns: images per second.

    Raises: FloatingPointError if the loss is not finite, with the step at which that was seen (every 100th and the
        last are looked at).
    """
    steps = planned_steps(len(pixels), epochs, batch_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    torch.manual_seed(seed)
    model.train()
    began = time.perf_counter()
    for step, batch in enumerate(shuffled_batches(pixels, epochs, batch_size, seed), start=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        with torch.autocast(model.device.type, torch.bfloat16, enabled=mixed_precision == "bf16"):
            output = model(to_pixel_values(batch.to(model.device)))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.step()
        if (step % STEPS_BETWEEN_CHECKS == 0 or step == steps) and not bool(output.loss.isfinite()):
            raise FloatingPointError(f"the loss is {output.loss.item()} at step {step} of {steps}")
        if on_step is not None:
            on_step(step, model, output)
        if count is not None:
            count(batch_size)
    return steps * batch_size / (time.perf_counter() - began)


def shuffled_batches(rows: Tensor, epochs: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Full batches, across the ends of epochs, each of which has its own order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(epochs)])
    for index in range(len(order) // batch_size):
        yield rows[order[index * batch_size : (index + 1) * batch_size]]


def evaluate_short(model: Any, pixels: Tensor, batch_size: int = 250) -> Evaluation:
    """`hf_vq.evaluation.evaluate` on pixels (N, C, H, W), each image once; perplexity is over all of them."""
    processor = VQImageProcessor.for_config(model.config)
    return evaluate(model, processor, ({"pixel_values": to_pixel_values(part)} for part in pixels.split(batch_size)))
