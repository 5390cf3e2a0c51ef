"""For people who train with transformers' Trainer."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_vq.canonical import unwrapped

logger = logging.get_logger(__name__)


class QuantizerCallback(TrainerCallback):
    """Does for a tokenizer what Trainer does not know of: calls `model.step()` once after each optimizer step.

    At the start of training it also spreads a new model's annealing over the planned steps, unless the config names
    another `temperature_decay_steps` than the default, and, where gradients are accumulated, replaces the closed form
    `variance_update="batch"`, which no single micro-batch can know, by `lagged`. A model that was trained before keeps
    the temperature it reached.

    Example:
        >>> trainer = Trainer(model=model, args=args, train_dataset=train, callbacks=[QuantizerCallback()])
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Fits the annealing and the likelihood to the plan.

        Raises:
            ValueError: under nn.DataParallel, whose replicas lose what they count.
        """
        if args.n_gpu > 1:
            raise ValueError(
                f"one process drives {args.n_gpu} GPUs, and nn.DataParallel loses the statistics of all but one: start "
                "one process each with `accelerate launch`, or set CUDA_VISIBLE_DEVICES"
            )
        model = unwrapped(kwargs["model"])
        temperature: Any = getattr(model.quantizer, "temperature", None)
        # Trainer's own resumption has taken as many steps as the model has.
        is_new = temperature is not None and int(temperature.steps) == state.global_step
        if is_new and model.config.temperature_decay_steps == type(model.config).temperature_decay_steps:
            temperature.decay_steps = model.config.temperature_decay_steps = state.max_steps
        if args.gradient_accumulation_steps > 1 and getattr(model.config, "variance_update", None) == "batch":
            model.config.variance_update = "lagged"
            logger.warning('variance_update="batch" became "lagged", which is exact under gradient accumulation')

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Moves averages, temperature and observation_variance."""
        unwrapped(kwargs["model"]).step()
