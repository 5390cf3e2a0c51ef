"""For people who train with transformers' Trainer."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_vq.canonical import unwrapped
from hf_vq.code_health import WARN_PERPLEXITY_BELOW, collapse_warning
from hf_vq.metrics import over_ranks

logger = logging.get_logger(__name__)


class QuantizerCallback(TrainerCallback):
    """Does for a tokenizer what Trainer does not know of: calls `model.step()` once after each optimizer step.

    At the start of training it also spreads a new model's annealing over the planned steps, unless the config names
    another `temperature_decay_steps` than the default, and, where gradients are accumulated, replaces the closed form
    `variance_update="batch"`, which no single micro-batch can know, by `lagged`. A model that was trained before keeps
    the temperature it reached.

    It counts the codes of each evaluation that Trainer runs while it trains, and warns if they are few.

    Args:
        warn_perplexity_below: share of codebook_size under which the perplexity of an evaluation is warned of; 0 never.

    Example:
        >>> trainer = Trainer(model=model, args=args, train_dataset=train, callbacks=[QuantizerCallback()])
    """

    def __init__(self, warn_perplexity_below: float = WARN_PERPLEXITY_BELOW) -> None:
        self.warn_perplexity_below = warn_perplexity_below
        self._counts: Tensor | None = None
        self._hook: RemovableHandle | None = None

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
        self._stop_counting()
        self._hook = model.quantizer.register_forward_hook(self._count)
        shape = (model.config.num_codebooks, model.config.codebook_size)
        self._counts = torch.zeros(shape, dtype=torch.int64, device=model.device)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Moves averages, temperature and observation_variance."""
        unwrapped(kwargs["model"]).step()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Warns, in the main process, of a codebook that collapses."""
        if self._counts is None:
            return
        model, code_counts = unwrapped(kwargs["model"]), over_ranks(self._counts).cpu()
        # A new tensor would make torch.compile begin anew.
        self._counts.zero_()
        if not code_counts.any() or not state.is_world_process_zero:
            return
        if warning := collapse_warning(code_counts, model.config, self.warn_perplexity_below):
            logger.warning("step %d: %s", state.global_step, warning)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves the model as it was."""
        self._stop_counting()

    def _count(self, quantizer: nn.Module, args: object, output: Any) -> None:
        if self._counts is not None and not quantizer.training:
            codes = output.image_tokens.reshape(-1, len(self._counts)).T
            self._counts.scatter_add_(1, codes, torch.ones_like(codes))

    def _stop_counting(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._counts = self._hook = None
