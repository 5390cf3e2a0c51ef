"""What tasks share: how images come to the processes of a run, and what of an evaluation is logged."""

from typing import Any

from engine import EngineArguments, ResumableBatches
from hf_vq.evaluation import Evaluation
from hf_vq.streams import EvaluationBatches, ImageSplits, TrainBatches, Transform, num_examples
from random_views import AS_THEY_ARE, RandomViews, Views


class ImageTask:
    """A task on splits of images, or of their tokens.

    Args:
        splits: the rows.
        args: batch sizes, seed and loader workers.
        max_bad_examples: undecodable images to pass over.
        views: how training images are varied.
    """

    def __init__(
        self, splits: ImageSplits, args: EngineArguments, max_bad_examples: int, views: Views = AS_THEY_ARE
    ) -> None:
        self.splits, self.args = splits, args
        self.max_bad_examples, self.views = max_bad_examples, views

    @property
    def num_train_examples(self) -> int | None:
        """Images of the training split, None if nobody knows."""
        return num_examples(self.splits.train)

    @property
    def transform(self) -> Transform:
        """From rows to a batch."""
        raise NotImplementedError

    def shuffled(self, batch_size: int, rank: int, world_size: int) -> ResumableBatches:
        """Endless shuffled batches of the training split."""
        batches = TrainBatches(
            self.splits.train,
            self.transform,
            batch_size,
            seed=self.args.seed,
            rank=rank,
            world_size=world_size,
            num_workers=self.args.dataloader_num_workers,
            max_bad_examples=self.max_bad_examples,
        )
        return batches if self.views == AS_THEY_ARE else RandomViews(batches, self.views, self.args.seed)

    def in_order(self, dataset: Any, rank: int, world_size: int) -> EvaluationBatches:
        """A split once, in order."""
        return EvaluationBatches(
            dataset,
            self.transform,
            self.args.per_device_eval_batch_size,
            rank=rank,
            world_size=world_size,
            num_workers=self.args.dataloader_num_workers,
            max_bad_examples=self.max_bad_examples,
        )


def logged(result: Evaluation) -> dict[str, float]:
    """The numbers of a held-out evaluation that the log shows: those that there are."""
    return {name: value for name, value in result.metrics.items() if value is not None and name != "num_images"}
