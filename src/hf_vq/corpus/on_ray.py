"""Bulk tokenization on many machines: Ray Data hands the units to actors, each with its own model.

Scheduling, retries, back-pressure and autoscaling are Ray's. A unit is done as on one machine, by the same objects, and
its file appears whole: a unit that a lost actor began is done again, one that is finished is not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext

from hf_vq.corpus.corpus import Corpus
from hf_vq.corpus.job import TokenizationJob

__all__ = ["UnitTokenizer", "run_on_ray"]


@dataclass
class UnitTokenizer:
    """An actor: opens the job once, then does units.

    Args:
        job: what to tokenize.
        folder: of the token data set, which all machines see.
        opened: further arguments of `TokenizationJob.open`.
        num_workers: loader processes that decode.
    """

    job: TokenizationJob
    folder: str
    opened: dict[str, Any]
    num_workers: int

    def __post_init__(self) -> None:
        self.corpus: Corpus = self.job.open(Path(self.folder), **self.opened)
        self.corpus.refuse_other()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        done: list[int] = []
        units = [self.corpus.units.units[number] for number in batch["unit"]]
        # One that was lost after its file appeared comes again.
        left = [unit for unit in units if not self.corpus.path(unit).is_file()]
        self.corpus.run(left, self.num_workers, done.append)
        return {"images": [sum(done)]}


def run_on_ray(
    corpus: Corpus,
    actor: dict[str, Any],
    num_actors: int,
    address: str | None = None,
    report: Callable[[int], object] | None = None,
) -> None:
    """Does the units of a corpus whose files are missing.

    Args:
        corpus: opened and claimed.
        actor: arguments of `UnitTokenizer`, alike for all; "cuda" as a device asks Ray for a GPU each.
        num_actors: how many.
        address: of the cluster, "auto" or "ray://...". By default the one that this process is connected to, or a new
            one on this machine.
        report: is called with the number of images done since the last call.

    Raises: ValueError if the cluster cannot hold the actors, or an actor met what nothing can be done about.
    """
    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False)
    on_gpu = actor["opened"]["device"].startswith("cuda")
    check_room(num_actors, on_gpu)
    context = DataContext.get_current()
    context.enable_progress_bars, context.raise_original_map_exception = False, True
    missing = [number for number, unit in enumerate(corpus.units.units) if not corpus.path(unit).is_file()]
    if not missing:
        return
    items = ray.data.from_items([{"unit": number} for number in missing], override_num_blocks=len(missing))
    done = items.map_batches(
        UnitTokenizer,
        fn_constructor_kwargs=actor,
        batch_size=1,
        num_cpus=1,
        num_gpus=1 if on_gpu else 0,
        compute=ActorPoolStrategy(size=num_actors),
    )
    try:
        for row in done.iter_rows():
            if report is not None:
                report(row["images"])
    except ray.exceptions.RayTaskError as error:
        raise ValueError(f"an actor stopped: {error.cause}") from error


def check_room(num_actors: int, on_gpu: bool) -> None:
    """Raises a ValueError if actors would wait, without a word, for ever: for a GPU, or with every CPU held for one."""
    there = ray.cluster_resources()
    cpus, gpus = int(there.get("CPU", 0)), int(there.get("GPU", 0))
    if on_gpu and gpus < num_actors:
        raise ValueError(f"{num_actors} actors need a GPU each, and the cluster has {gpus}: lower --num_actors")
    if num_actors < 1 or cpus < num_actors + 1:
        raise ValueError(
            f"{num_actors} actors hold a CPU each, and reading needs one more; the cluster has {cpus}: lower "
            f"--num_actors, or start Ray with more (ray start --head --num-cpus={num_actors + 2})"
        )
