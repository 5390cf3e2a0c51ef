"""Mirrored training images: half of them, others in every batch, and the same again after a stop."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from test_tasks import make_task

from arguments import parse
from digits import load_digits_images
from engine import EngineArguments
from hf_vq.streams import TrainBatches
from prior_task import PriorTask
from random_flip import RandomFlip
from train import make_task as task_of_run


def flipped(seed: int = 0, rank: int = 0, world_size: int = 1) -> RandomFlip:
    """Mirrored batches of the digits."""
    task = make_task(seed=seed)
    task.random_flip = True
    batches = task.train_batches(16, rank, world_size)
    assert isinstance(batches, RandomFlip)
    return batches


def taken(batches: Any, count: int) -> torch.Tensor:
    """The next images of `count` batches."""
    return torch.stack([batch["pixel_values"] for batch in islice(iter(batches), count)])


def test_half_of_the_images_are_mirrored_and_the_others_are_as_they_were():
    plain, mirrored = taken(make_task().train_batches(16, 0, 1), 20).flatten(0, 1), taken(flipped(), 20).flatten(0, 1)
    same = (plain == mirrored).flatten(1).all(1)
    turned = (plain.flip(-1) == mirrored).flatten(1).all(1)
    assert bool((same | turned).all())
    assert 120 < int(turned.sum()) < 200  # of 320


def test_what_is_mirrored_follows_seed_process_and_batch():
    assert torch.equal(taken(flipped(), 3), taken(flipped(), 3))
    draws = [flipped(seed, rank, 2)._draw(64) for seed in (0, 1) for rank in (0, 1)]
    later = flipped()
    later.drawn = 1
    draws.append(later._draw(64))
    assert len({tuple(draw.tolist()) for draw in draws}) == 5


def test_a_stopped_run_goes_on_with_the_next_batch():
    whole, first, second = taken(flipped(), 5), flipped(), flipped()
    begun = taken(first, 2)
    second.load_state_dict(first.state_dict())
    assert torch.equal(torch.cat([begun, taken(second, 3)]), whole)


def test_the_flag_reaches_the_batches_and_held_out_images_stay_as_they_are(shared_data: Path):
    flags = ["--dataset_name", str(shared_data / "cifar10"), "--streaming", "True", "--random_flip", "True"]
    task = task_of_run(
        parse(
            [
                *flags,
                "--config",
                "training/configs/sqvae_digits.yaml",
                "--config_overrides",
                "{image_size: 32, num_channels: 3}",
            ]
        )
    )
    assert isinstance(task.train_batches(8, 0, 1), RandomFlip)
    assert not isinstance(task.in_order(task.splits.validation, 0, 1), RandomFlip)


def test_digits_are_not_mirrored():
    with pytest.raises(ValueError, match="random_flip is True, but the embedded digits have no such choice"):
        parse(["--dataset_name", "digits", "--random_flip", "True"])


def test_tokens_cannot_be_mirrored():
    splits: Any = load_digits_images()
    description: Any = object()
    with pytest.raises(ValueError, match="random_flip is for images, and the data hold their tokens"):
        PriorTask(splits, EngineArguments(), "hf_vq_pixelcnn", {}, "x", description=description, random_flip=True)
    assert isinstance(make_task().train_batches(8, 0, 1), TrainBatches)
