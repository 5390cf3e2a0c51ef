"""For people who train with transformers' Trainer."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)


class QuantizerCallback(TrainerCallback):
    """Does for a tokenizer what Trainer does not know of: calls `model.step()` once after each optimizer step.

    At the start of training it also spreads the temperature's decay over the planned steps and, where gradients are
    accumulated, replaces the closed form `variance_update="batch"`, which no single micro-batch can know, by `lagged`.

    Example:
        >>> trainer = Trainer(model=model, args=args, train_dataset=train, callbacks=[QuantizerCallback()])
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Fits the annealing and the likelihood to the plan."""
        model = _bare(kwargs["model"])
        if hasattr(model.quantizer, "temperature"):
            model.quantizer.temperature.decay_steps = model.config.temperature_decay_steps = state.max_steps
        if args.gradient_accumulation_steps > 1 and getattr(model.config, "variance_update", None) == "batch":
            model.config.variance_update = "lagged"
            logger.warning('variance_update="batch" became "lagged", which is exact under gradient accumulation')

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Moves averages, temperature and observation_variance."""
        _bare(kwargs["model"]).step()


def _bare(model: nn.Module) -> Any:
    """The model inside DistributedDataParallel and torch.compile."""
    for wrapper in ("module", "_orig_mod"):
        model = getattr(model, wrapper, model)
    return model
