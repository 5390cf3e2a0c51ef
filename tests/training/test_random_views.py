"""Varied training images: mirrored and moved, others in every batch, and the same again after a stop."""

from collections import Counter
from itertools import islice, product
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
from random_views import RandomViews, Views
from train import make_task as task_of_run

BOTH = Views(random_flip=True, random_shift=2)


def varied(views: Views = BOTH, seed: int = 0, rank: int = 0, world_size: int = 1) -> RandomViews:
    """Varied batches of the digits."""
    task = make_task(seed=seed)
    task.views = views
    batches = task.train_batches(16, rank, world_size)
    assert isinstance(batches, RandomViews)
    return batches


def taken(batches: Any, count: int) -> torch.Tensor:
    """The next images of `count` batches."""
    return torch.stack([batch["pixel_values"] for batch in islice(iter(batches), count)])


def plain(count: int) -> torch.Tensor:
    """The images of `count` batches, as they are."""
    return taken(make_task().train_batches(16, 0, 1), count).flatten(0, 1)


def moved(image: torch.Tensor, down: int, across: int) -> torch.Tensor:
    """An image (C, H, W) moved so that pixel (r, c) shows what was at (r + down, c + across), edges repeated."""
    padded = torch.nn.functional.pad(image[None], (2, 2, 2, 2), mode="replicate")[0]
    return padded[:, 2 + down : 2 + down + image.shape[1], 2 + across : 2 + across + image.shape[2]]


def test_half_of_the_images_are_mirrored_and_the_others_are_as_they_were():
    mirrored = taken(varied(Views(random_flip=True)), 20).flatten(0, 1)
    same = (plain(20) == mirrored).flatten(1).all(1)
    turned = (plain(20).flip(-1) == mirrored).flatten(1).all(1)
    assert bool((same | turned).all())
    assert 120 < int(turned.sum()) < 200  # of 320


@pytest.mark.parametrize("flip", [False, True])
def test_images_are_moved_by_all_shifts_and_no_others(flip: bool):
    seen = taken(varied(Views(flip, random_shift=2)), 30).flatten(0, 1)
    shifts = list(product(range(-2, 3), repeat=2))
    counts: Counter[tuple[int, ...]] = Counter()
    for image, view in zip(plain(30), seen, strict=True):
        candidates = {(*shift, 0): moved(image, *shift) for shift in shifts}
        if flip:
            candidates |= {(*shift, 1): moved(image, *shift).flip(-1) for shift in shifts}
        counts.update([next(found for found, candidate in candidates.items() if torch.equal(candidate, view))])
    assert len(counts) == 25 * (1 + flip)
    assert max(counts.values()) < 5 * sum(counts.values()) / len(counts)


def test_what_is_varied_follows_seed_process_and_batch():
    assert torch.equal(taken(varied(), 3), taken(varied(), 3))
    draws = [varied(BOTH, seed, rank, 2)._draw(64, 8, 8) for seed in (0, 1) for rank in (0, 1)]
    later = varied()
    later.drawn = 1
    draws.append(later._draw(64, 8, 8))
    assert len({tuple(torch.cat(draw, 1).flatten().tolist()) for draw in draws}) == 5


def test_a_stopped_run_goes_on_with_the_next_batch():
    whole, first, second = taken(varied(), 5), varied(), varied()
    begun = taken(first, 2)
    second.load_state_dict(first.state_dict())
    assert torch.equal(torch.cat([begun, taken(second, 3)]), whole)


def test_the_flag_reaches_the_batches_and_held_out_images_stay_as_they_are(shared_data: Path):
    flags = ["--dataset_name", str(shared_data / "cifar10"), "--streaming", "True", "--random_shift", "2"]
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
    assert isinstance(task.train_batches(8, 0, 1), RandomViews)
    assert not isinstance(task.in_order(task.splits.validation, 0, 1), RandomViews)


def test_images_are_not_moved_out_of_sight():
    with pytest.raises(ValueError, match="moves images of 8 x 8 pixels out of sight: it must be below 8"):
        next(iter(varied(Views(random_shift=8))))


def test_digits_are_not_varied():
    with pytest.raises(ValueError, match="random_flip is True, but the embedded digits have no such choice"):
        parse(["--dataset_name", "digits", "--random_flip", "True"])
    with pytest.raises(ValueError, match="random_shift must be 0 or more pixels, and is -1"):
        parse(["--dataset_name", "pictures", "--random_shift", "-1"])


def test_tokens_cannot_be_varied():
    splits: Any = load_digits_images()
    description: Any = object()
    with pytest.raises(ValueError, match="random_flip and random_shift are for images, and the data hold their tokens"):
        PriorTask(splits, EngineArguments(), "hf_vq_pixelcnn", {}, "x", description=description, views=BOTH)
    assert isinstance(make_task().train_batches(8, 0, 1), TrainBatches)
