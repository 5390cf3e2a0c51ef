"""What the engine is told: the settings of its loop, and the task it runs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from accelerate import Accelerator
from torch import Tensor, nn

SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
OPTIMIZERS = ("adamw_torch_fused", "muon")


def setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class EngineArguments:
    """Settings of the loop. A step is an optimizer step; its joint batch is
    per_device_train_batch_size x gradient_accumulation_steps x processes."""

    output_dir: str = setting("output", "The run directory: the model, its log, pictures and checkpoints.")
    max_train_steps: int | None = setting(None, "Steps to train; overrides num_train_epochs.")
    num_train_epochs: float = setting(10.0, "Images to train on, in multiples of the training set.")
    per_device_train_batch_size: int = setting(64, "Images in a micro-batch of one process.")
    per_device_eval_batch_size: int = setting(256, "Images in an evaluation batch of one process.")
    gradient_accumulation_steps: int = setting(1, "Micro-batches in a step.")
    learning_rate: float = setting(1e-3, "Highest learning rate.")
    lr_scheduler_type: str = setting("cosine", f"One of {', '.join(SCHEDULES)}.")
    warmup_steps: int = setting(0, "Steps over which the learning rate rises from 0.")
    optim: str = setting(OPTIMIZERS[0], f"One of {', '.join(OPTIMIZERS)}.")
    adam_beta1: float = setting(0.9, "Decay of Adam's first moment.")
    adam_beta2: float = setting(0.999, "Decay of Adam's second moment.")
    adam_epsilon: float = setting(1e-8, "Adam's epsilon.")
    weight_decay: float = setting(0.0, "Decay of parameters with two or more axes.")
    max_grad_norm: float = setting(0.0, "Largest norm of the gradient; 0 does not clip.")
    mixed_precision: Literal["no", "bf16"] = setting("no", "Autocast of the training forward.")
    torch_compile: bool = setting(False, "Compile the training forward with inductor.")
    average_weights: bool = setting(False, "Evaluate and save a running average of the weights.")
    average_decay: float = setting(0.999, "Highest decay of that average, reached by (1 + step) / (10 + step).")
    eval_steps: int | None = setting(None, "Steps between evaluations; there is always one at the end.")
    logging_steps: int = setting(50, "Steps between lines of metrics.jsonl.")
    checkpointing_steps: int = setting(500, "Steps between checkpoints; there is always one at the end.")
    checkpoints_total_limit: int = setting(2, "Checkpoints to keep, the newest.")
    resume_from_checkpoint: str | None = setting(None, "A checkpoint folder, or `latest`.")
    report_to: str = setting("none", "Trackers, comma-separated: tensorboard, wandb, trackio, ..., all, none.")
    seed: int = setting(0, "Seed of initialisation, order of the data and noise.")
    dataloader_num_workers: int = setting(0, "Loader processes of each training process.")

    def __post_init__(self) -> None:
        at_least_one = (
            "max_train_steps per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps "
            "eval_steps logging_steps checkpointing_steps checkpoints_total_limit"
        )
        at_least_zero = (
            "num_train_epochs learning_rate warmup_steps weight_decay max_grad_norm seed dataloader_num_workers"
        )
        for names, least in ((at_least_one, 1), (at_least_zero, 0)):
            for name in names.split():
                value = getattr(self, name)
                if value is not None and value < least:
                    raise ValueError(f"{name} must be at least {least}, and is {value}")
        if self.max_train_steps is None and not self.num_train_epochs > 0:
            raise ValueError(f"num_train_epochs must be above 0, and is {self.num_train_epochs}")
        for name in ("average_decay", "adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), and is {getattr(self, name)}")
        named = {"mixed_precision": ("no", "bf16"), "lr_scheduler_type": SCHEDULES, "optim": OPTIMIZERS}
        for name, choices in named.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, and is {getattr(self, name)}")


class ResumableBatches(Protocol):
    """Endless batches of one process; its state is JSON, and continues with the batch after the last one drawn."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Task(Protocol):
    """What is trained, on what, and how it is judged."""

    @property
    def num_train_examples(self) -> int | None:
        """Length of the training set, None if nobody knows it."""

    def build(self, total_steps: int) -> nn.Module:
        """The model. `model(**batch)` returns a mapping with a scalar `loss`; its other scalars are logged. If it has
        a method `step()`, that is called after each optimizer step, in all processes. Buffers that must stay local to
        a process are named in `_ddp_params_and_buffers_to_ignore`."""

    def train_batches(self, batch_size: int, rank: int, world_size: int) -> ResumableBatches:
        """The micro-batches of one process; those of all processes together make the joint batch."""

    def scalars(self, model: nn.Module) -> Mapping[str, Tensor]:
        """What of the model's own state each line of the log shows, by name: scalars, alike in all processes. They are
        asked for when a line is written, and fetched with it."""

    def evaluate(self, model: nn.Module, run_dir: Path, step: int, accelerator: Accelerator) -> dict[str, float]:
        """Held-out numbers, in all processes; the main one may leave pictures in `run_dir`. The model is in eval mode
        and bare: neither wrapped nor compiled nor under autocast."""

    def save(self, model: nn.Module, run_dir: Path) -> None:
        """Makes `run_dir` a model directory; called in the main process."""
