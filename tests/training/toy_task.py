"""A task small enough to train in a test: an autoencoder of vectors with state of every kind. Also a script.

python toy_task.py '{"output_dir": ..., "max_train_steps": 10}' ...      one run for each JSON object
"""

import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import ModelOutput

from engine import EngineArguments, fit


@dataclass
class ToyOutput(ModelOutput):
    loss: Tensor | None = None
    noise_level: Tensor | None = None
    decoded: Tensor | None = None


class ToyModel(nn.Module):
    """Linear autoencoder with noise; `centre` follows the data as an EMA codebook would, `seen` is of one process."""

    _ddp_params_and_buffers_to_ignore = ("pending_sum", "pending_count", "seen")

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.noise = noise
        self.encoder, self.decoder = nn.Linear(6, 3), nn.Linear(3, 6)
        self.register_buffer("centre", torch.zeros(6))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("recent", torch.zeros(6), persistent=False)
        self.register_buffer("seen", torch.zeros(6), persistent=False)
        self.register_buffer("pending_sum", torch.zeros(6), persistent=False)
        self.register_buffer("pending_count", torch.zeros(()), persistent=False)

    def forward(self, values: Tensor) -> ToyOutput:
        if self.training:
            self.seen += values.sum(0)
            self.pending_sum += values.sum(0)
            self.pending_count += len(values)
            values = values + self.noise * torch.randn_like(values)
        decoded = self.decoder(self.encoder(values - self.centre).tanh())
        loss = (decoded - values).square().mean()
        return ToyOutput(loss=loss, noise_level=values.detach().std(), decoded=decoded)

    @torch.no_grad()
    def step(self) -> None:
        if dist.is_initialized():
            dist.all_reduce(self.pending_sum)
            dist.all_reduce(self.pending_count)
        self.recent.copy_(self.pending_sum / self.pending_count)
        self.centre.lerp_(self.recent, 0.1)
        self.steps += 1
        self.pending_sum.zero_()
        self.pending_count.zero_()


class ToyBatches:
    """Endless batches; those of all processes make contiguous pieces of one sequence. Can kill its process."""

    def __init__(self, rows: Tensor, batch_size: int, rank: int, world_size: int, kill_at: int | None) -> None:
        self.rows, self.batch_size, self.rank, self.world_size, self.kill_at = (
            rows,
            batch_size,
            rank,
            world_size,
            kill_at,
        )
        self.drawn = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            if self.drawn == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            first = (self.drawn * self.world_size + self.rank) * self.batch_size
            self.drawn += 1
            yield {"values": self.rows[torch.arange(first, first + self.batch_size) % len(self.rows)]}

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]


class ToyTask:
    """See `Task`. `kill_at` counts batches, `nan_at` the example that is not a number."""

    def __init__(
        self,
        noise: float = 0.1,
        num_train_examples: int | None = 61,
        kill_at: int | None = None,
        nan_at: int | None = None,
    ) -> None:
        self.noise, self.num_train_examples, self.kill_at = noise, num_train_examples, kill_at
        self.rows = torch.randn(61, 6, generator=torch.Generator().manual_seed(1))
        self.held_out = torch.randn(16, 6, generator=torch.Generator().manual_seed(2))
        if nan_at is not None:
            self.rows[nan_at] = torch.nan
        self.evaluated: list[int] = []
        self.asked_at: list[int] = []
        self.num_processes = 0

    def build(self, total_steps: int) -> ToyModel:
        self.total_steps = total_steps
        return ToyModel(self.noise)

    def train_batches(self, batch_size: int, rank: int, world_size: int) -> ToyBatches:
        return ToyBatches(self.rows, batch_size, rank, world_size, self.kill_at)

    def evaluate(self, model: nn.Module, run_dir: Path, step: int, accelerator: Accelerator) -> dict[str, float | None]:
        assert not model.training and isinstance(model, ToyModel)
        self.num_processes = accelerator.num_processes
        self.evaluated.append(step)
        output = model(self.held_out.to(accelerator.device))
        self.output_dtype = output.decoded.dtype
        return {"loss": output.loss.item(), "ssim": None}

    def scalars(self, model: nn.Module) -> Mapping[str, Tensor]:
        assert model.training and isinstance(model, ToyModel)
        self.asked_at.append(int(model.steps))
        return {"centre": model.centre[0], "steps": model.steps}

    def save(self, model: nn.Module, run_dir: Path) -> None:
        save_file(model.state_dict(), run_dir / "model.safetensors")
        (run_dir / "config.json").write_text("{}")


def arguments(output_dir: Path, **changes: Any) -> EngineArguments:
    """Ten steps of four rows, everything often."""
    usual = {
        "max_train_steps": 10,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.03,
        "warmup_steps": 2,
        "logging_steps": 2,
        "eval_steps": 4,
        "checkpointing_steps": 5,
        "checkpoints_total_limit": None,
    }
    return EngineArguments(output_dir=str(output_dir), **(usual | changes))


def train(output_dir: Path, task: ToyTask | None = None, **changes: Any) -> ToyTask:
    task = task or ToyTask()
    args = arguments(output_dir, **changes)
    fit(task, args, {"engine": asdict(args), "task": {"noise": task.noise}})
    return task


def saved_model(run_dir: Path) -> dict[str, Tensor]:
    return load_file(run_dir / "model.safetensors")


def metrics(run_dir: Path, keep: str = "") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times; only those with the key `keep`, if it is given."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    times = ("seconds", "images_per_second", "eval_seconds")
    return [{k: v for k, v in line.items() if k not in times} for line in lines if not keep or keep in line]


def assert_same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def assert_close_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], rtol=1e-4, atol=1e-6)


def main() -> None:
    for run in sys.argv[1:]:
        changes = json.loads(run)
        task = ToyTask(noise=changes.pop("noise", 0.1), kill_at=changes.pop("kill_at", None))
        train(Path(changes.pop("output_dir")), task, **changes)
        assert task.num_processes == int(os.environ.get("WORLD_SIZE", "1"))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
