"""A run under way: the step, what is logged of it, and what of it survives a crash."""

import math
from collections.abc import Iterator
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import send_to_device, set_seed
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import get_scheduler

from checkpoints import (
    Checkpoints,
    find_damage,
    join_optimizer_state,
    named_state,
    read_part,
    restore_,
    split_optimizer_state,
)
from engine_contract import EngineArguments, Task
from optimizers import build_optimizer
from run_log import RunLog, RunningMeans, Stopwatch, record_run, refuse_other_settings

logger = get_logger(__name__)

NEVER = torch.iinfo(torch.int64).max


class Training:
    """A run under way: all that moves, the moves, and what of it a checkpoint keeps.

    Args:
        task: model and data.
        args: the loop's settings.
        settings: the run's settings, which checkpoints carry.
        accelerator: processes, device and precision.
    """

    def __init__(self, task: Task, args: EngineArguments, settings: dict[str, Any], accelerator: Accelerator) -> None:
        self.task, self.args, self.settings, self.accelerator = task, args, settings, accelerator
        processes = accelerator.num_processes
        self.joint_batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
        self.total_steps = planned_steps(args, task.num_train_examples, self.joint_batch)
        self.step = 0

        set_seed(args.seed)
        self.module = task.build(self.total_steps).to(accelerator.device).train()
        self.average = deepcopy(self.module).eval() if args.average_weights else None
        optimizer = build_optimizer(self.module, args)
        self.schedule = get_scheduler(args.lr_scheduler_type, optimizer, args.warmup_steps, self.total_steps)
        self.model, self.optimizer = accelerator.prepare(TrainedForward(self.module), optimizer)
        self.batches = task.train_batches(args.per_device_train_batch_size, accelerator.process_index, processes)

        self.run_dir = Path(args.output_dir)
        self.checkpoints = Checkpoints(self.run_dir / "checkpoints", args.checkpoints_total_limit)
        self.run_log = RunLog(self.run_dir, accelerator.is_main_process)
        self.means = RunningMeans()
        self.watch = Stopwatch()
        self.first_bad_step = torch.full((1,), NEVER, device=accelerator.device)

    @property
    def images(self) -> int:
        """Images trained on so far, repetitions included."""
        return self.step * self.joint_batch

    @property
    def total_images(self) -> int:
        return self.total_steps * self.joint_batch

    @property
    def result(self) -> nn.Module:
        """The model to evaluate and to save."""
        return self.module if self.average is None else self.average

    @cached_property
    def stream(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.batches)

    def is_due(self, interval: int | None) -> bool:
        """Whether something done every `interval` steps, and at the end, is to be done now."""
        return self.step == self.total_steps or (interval is not None and self.step % interval == 0)

    def take_step(self) -> None:
        self.step += 1
        device = self.accelerator.device
        for micro_step in range(self.args.gradient_accumulation_steps):
            batch = send_to_device(next(self.stream), device, non_blocking=True)
            with self.accelerator.accumulate(self.model):
                seed_noise(device, self.args.seed, self.accelerator.process_index, self.step, micro_step)
                output = self.model(**batch)
                self.accelerator.backward(output["loss"])
            self._note(output)
        self._update()
        if self.watch.running:
            self.watch.count(self.joint_batch)
        else:
            self.stop_if_diverged()
            self.watch.restart()

    def _note(self, output: dict[str, Any]) -> None:
        self.means.add(output)
        bad = self.first_bad_step.clamp(max=self.step)
        self.first_bad_step = torch.where(output["loss"].detach().isfinite(), self.first_bad_step, bad)

    def _update(self) -> None:
        if self.args.max_grad_norm:
            self.accelerator.clip_grad_norm_(self.module.parameters(), self.args.max_grad_norm)
        self.learning_rate = self.schedule.get_last_lr()[0]
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        model_step: Any = getattr(self.module, "step", None)
        if model_step is not None:
            model_step()
        if self.average is not None:
            update_average_(self.average, self.module, self.args.average_decay, self.step)

    def stop_if_diverged(self) -> None:
        """Raises FloatingPointError in all processes if a loss or a weight is not finite. Waits for the device."""
        healthy = torch.stack([p.detach().isfinite().all() for p in self.module.parameters()]).all()
        bad = torch.where(healthy, self.first_bad_step, self.first_bad_step.clamp(max=self.step))
        first = int(self.accelerator.gather(bad).min())
        if first != NEVER:
            raise FloatingPointError(
                f"the loss or a weight became NaN or infinite at step {first}, and no checkpoint was written since; "
                f"the last good one: {self.checkpoints.latest() or 'there is none yet'}. Lower --learning_rate, or "
                "clip with --max_grad_norm"
            )

    def log(self) -> dict[str, str]:
        """Writes the means since the last log, over all processes, and the task's scalars; returns what the progress
        bar shows of them."""
        self.stop_if_diverged()
        means = self.means.take()
        joint = self.accelerator.reduce(torch.stack(list(means.values())), "mean")
        scalars = {name: value.detach().to(joint) for name, value in self.task.scalars(self.module).items()}
        # One transfer: each would wait for the device.
        values = torch.stack([*joint, *scalars.values()]).tolist()
        numbers = dict(zip([*means, *scalars], values, strict=True))
        clock = {"images_per_second": self.watch.rate(), "seconds": self.watch.seconds}
        self._report(numbers | {"learning_rate": self.learning_rate} | clock)
        return {"loss": f"{numbers['loss']:.4g}"}

    def evaluate(self) -> None:
        self.stop_if_diverged()
        began = self.watch.seconds
        with self.watch.paused(), torch.no_grad():
            metrics = self.task.evaluate(self.result.eval(), self.run_dir, self.step, self.accelerator)
            self.module.train()
        metrics = metrics | {"seconds": self.watch.seconds - began}
        self._report({f"eval_{name}": value for name, value in metrics.items()})

    def _report(self, values: dict[str, Any]) -> None:
        self.run_log.append({"step": self.step, "images": self.images} | values)
        self.accelerator.log({name: value for name, value in values.items() if value is not None}, step=self.step)

    def save(self) -> None:
        """Makes the run directory a model directory."""
        if self.accelerator.is_main_process:
            self.task.save(self.result.eval(), self.run_dir)
        self.accelerator.wait_for_everyone()
        logger.info("trained %d steps at %s images per second", self.step, self.watch.steady_rate)

    def checkpoint(self) -> None:
        self.stop_if_diverged()
        with self.watch.paused():
            self.run_log.flush_to_disk()
            self.checkpoints.save(self.step, self._shared_state(), self._local_state(), self.accelerator)

    def _shared_state(self) -> dict[str, Any]:
        tensors, rest = split_optimizer_state(self.optimizer.state_dict())
        progress = {"step": self.step, "seconds": self.watch.seconds, "settings": self.settings}
        average = {} if self.average is None else {"average.safetensors": named_state(self.average)}
        return average | {
            "model.safetensors": named_state(self.module),
            "optimizer.safetensors": tensors,
            "state.json": progress | {"schedule": self.schedule.state_dict(), "optimizer": rest},
        }

    def _local_state(self) -> dict[str, Any]:
        return {
            self._local("buffers.safetensors"): self._local_buffers(),
            self._local("means.safetensors"): self.means.sums,
            self._local("state.json"): {"batches": self.batches.state_dict(), "means_count": self.means.count},
        }

    def _local(self, name: str) -> str:
        return f"rank-{self.accelerator.process_index}-{name}"

    def _local_buffers(self) -> dict[str, Tensor]:
        names = getattr(self.module, "_ddp_params_and_buffers_to_ignore", ())
        return {name: tensor for name, tensor in named_state(self.module).items() if name in names}

    def resume(self) -> None:
        """Takes the run directory: goes back to the checkpoint asked for, if any, and forgets what came after it."""
        checkpoint = find_checkpoint(self.args.resume_from_checkpoint, self.checkpoints)
        if checkpoint is not None:
            self._load(checkpoint)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            record_run(self.run_dir, self.settings, self.args.seed)
            self.checkpoints.discard_after(self.step)
            self.run_log.cut_back(self.step)
        self.accelerator.wait_for_everyone()

    def _load(self, checkpoint: Path) -> None:
        state = read_part(checkpoint, "state.json")
        refuse_other_settings(checkpoint, state["settings"], self.settings)
        self.step, self.watch = state["step"], Stopwatch(state["seconds"])
        restore_(named_state(self.module), read_part(checkpoint, "model.safetensors"))
        if self.average is not None:
            restore_(named_state(self.average), read_part(checkpoint, "average.safetensors"))
        moments, groups = read_part(checkpoint, "optimizer.safetensors"), self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict(join_optimizer_state(moments, state["optimizer"], groups))
        self.schedule.load_state_dict(state["schedule"])

        local = read_part(checkpoint, self._local("state.json"))
        self.batches.load_state_dict(local["batches"])
        restore_(self._local_buffers(), read_part(checkpoint, self._local("buffers.safetensors")))
        sums = read_part(checkpoint, self._local("means.safetensors"))
        self.means.sums = {name: total.to(self.accelerator.device) for name, total in sums.items()}
        self.means.count = local["means_count"]


def planned_steps(args: EngineArguments, num_train_examples: int | None, joint_batch: int) -> int:
    """Optimizer steps of a run, from its budget in steps or in epochs."""
    if args.max_train_steps is not None:
        return args.max_train_steps
    if num_train_examples is None:
        raise ValueError(
            "the length of the training set is not known: give --max_train_steps instead of num_train_epochs"
        )
    return math.ceil(args.num_train_epochs * num_train_examples / joint_batch)


def seed_noise(device: torch.device, seed: int, rank: int, step: int, micro_step: int) -> None:
    """Seeds the generators of one forward, so that there is no generator state to save.

    (`torch.manual_seed` looks at every kind of device, which takes as long as a small model's forward.)"""
    words = np.random.SeedSequence((seed, rank, step, micro_step)).generate_state(1, np.uint64)
    torch.default_generator.manual_seed(int(words[0]))
    if device.type != "cpu":
        getattr(torch, device.type).manual_seed(int(words[0]))


@torch.no_grad()
def update_average_(average: nn.Module, module: nn.Module, highest_decay: float, step: int) -> None:
    """Moves averaged parameters towards the trained ones; what no gradient moves is copied.

    The decay rises with the step, so that the first weights do not outlive a short run. (`AveragedModel` counts its
    updates in a tensor and looks at it each time, for which a GPU would have to wait.)"""
    move_ = get_ema_multi_avg_fn(min(highest_decay, (1 + step) / (10 + step)))
    pairs = list(zip(average.parameters(), module.parameters(), strict=True))
    move_(*map(list, zip(*(pair for pair in pairs if pair[1].requires_grad), strict=True)), step)
    # Moving averages and revived codes, which would be half their dead selves.
    kept = [pair for pair in pairs if not pair[1].requires_grad]
    for mean, value in (*kept, *zip(average.buffers(), module.buffers(), strict=True)):
        mean.copy_(value)


def find_checkpoint(wanted: str | None, checkpoints: Checkpoints) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means; None to begin at step 0."""
    if wanted is None:
        return None
    if wanted == "latest":
        return checkpoints.latest()
    problem = find_damage(Path(wanted))
    if problem is not None:
        raise ValueError(f"cannot resume from {problem}. Name another checkpoint, or `latest` for the newest whole one")
    return Path(wanted)


class TrainedForward(nn.Module):
    """What is wrapped, compiled and put under autocast; for evaluation the model inside stays as it was written."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        local = getattr(module, "_ddp_params_and_buffers_to_ignore", ())
        self._ddp_params_and_buffers_to_ignore = [f"module.{name}" for name in local]

    def forward(self, **batch: Tensor) -> Any:
        return self.module(**batch)
