import json
import math
import os
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import LoggerType
from safetensors.torch import load_file
from toy_task import ToyModel, ToyTask, arguments, assert_close_tensors, metrics, saved_model, train

from engine import EngineArguments, fit, share_cores
from training_run import planned_steps, seed_noise, update_average_

# Refusals.


def test_an_occupied_folder_is_refused_with_the_way_out(tmp_path: Path):
    train(tmp_path / "run", max_train_steps=1)
    with pytest.raises(FileExistsError, match="--resume_from_checkpoint latest"):
        train(tmp_path / "run", max_train_steps=1)


def test_a_run_of_other_settings_is_refused_by_name(tmp_path: Path):
    train(tmp_path / "run", max_train_steps=2, checkpointing_steps=1)
    with pytest.raises(ValueError, match=r"engine\.learning_rate is 0\.03 there and 0\.5 here"):
        train(tmp_path / "run", max_train_steps=2, learning_rate=0.5, resume_from_checkpoint="latest")
    checkpoint = str(tmp_path / "run" / "checkpoints" / "step-1")
    with pytest.raises(ValueError, match=r"step-1 belongs to another run: task\.noise is 0\.1"):
        train(tmp_path / "new", ToyTask(noise=0.5), max_train_steps=2, resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("logging_steps", [1, 7], ids=["log_every_step", "log_rarely"])
def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path: Path, logging_steps: int):
    with pytest.raises(FloatingPointError, match=r"at step 6.*step-5"):
        train(tmp_path / "run", ToyTask(nan_at=21), logging_steps=logging_steps, checkpointing_steps=5)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-5"]
    assert max(line["step"] for line in metrics(tmp_path / "run")) <= 5


def test_a_stream_of_unknown_length_needs_a_number_of_steps(tmp_path: Path):
    with pytest.raises(ValueError, match="max_train_steps"):
        train(tmp_path / "run", ToyTask(num_train_examples=None), max_train_steps=None)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [("learning_rate", -1.0), ("logging_steps", 0), ("mixed_precision", "fp16"), ("lr_scheduler_type", "cosin")],
)
def test_arguments_out_of_range_are_named(field: str, value: object):
    with pytest.raises(ValueError, match=f"{field} must be .* {value}"):
        EngineArguments(**{field: value})


def test_a_missing_tracker_and_lone_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.raises(ValueError, match="report_to names wandb; installed are none"):
        train(tmp_path / "run", report_to="wandb")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="ACCELERATE_USE_CPU=true"):
        train(tmp_path / "run")


# The step.


def test_accumulation_equals_the_joint_batch(tmp_path: Path):
    train(tmp_path / "joint", ToyTask(noise=0.0), per_device_train_batch_size=8, max_grad_norm=0.5)
    train(
        tmp_path / "parts",
        ToyTask(noise=0.0),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_grad_norm=0.5,
    )
    assert_close_tensors(saved_model(tmp_path / "joint"), saved_model(tmp_path / "parts"))
    losses = [[line["loss"] for line in metrics(tmp_path / run, "loss")] for run in ("joint", "parts")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_clipping_is_off_by_default(tmp_path: Path):
    runs = [
        train(tmp_path / name, max_grad_norm=norm) for name, norm in (("off", 0.0), ("loose", 1e9), ("tight", 0.01))
    ]
    off, loose, tight = (saved_model(tmp_path / name)["encoder.weight"] for name in ("off", "loose", "tight"))
    assert len(runs) == 3 and torch.equal(off, loose) and not torch.equal(off, tight)


def test_the_schedule_warms_up_and_falls(tmp_path: Path):
    train(tmp_path / "run", logging_steps=1, lr_scheduler_type="linear")
    rates = [line["learning_rate"] for line in metrics(tmp_path / "run", "learning_rate")]
    assert rates == pytest.approx([0.03 * r for r in (0, 1 / 2, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8)])


def test_the_weight_average_is_what_is_evaluated_and_saved(tmp_path: Path):
    train(tmp_path / "run", average_weights=True, average_decay=0.5, checkpointing_steps=1)
    train(tmp_path / "bare", checkpointing_steps=1)
    average = ToyModel(0.1)
    torch.manual_seed(0)
    expected = torch.nn.Linear(6, 3).weight.detach()
    for step in range(1, 11):
        weights = load_file(tmp_path / "bare" / "checkpoints" / f"step-{step}" / "model.safetensors")["encoder.weight"]
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weights
    average.load_state_dict(saved_model(tmp_path / "run"))
    torch.testing.assert_close(average.encoder.weight.detach(), expected)
    assert int(average.steps) == 10
    loss = average.eval()(ToyTask().held_out).loss.item()
    assert metrics(tmp_path / "run")[-1]["eval_loss"] == pytest.approx(loss)


def test_noise_differs_over_ranks_steps_and_micro_steps():
    draws = []
    for place in [(0, 0, 1, 0), (0, 0, 1, 1), (0, 0, 2, 0), (0, 1, 1, 0), (1, 0, 1, 0), (0, 0, 1, 0)]:
        seed_noise(torch.device("cpu"), *place)
        draws.append(torch.randn(()).item())
    assert len(set(draws)) == 5 and draws[0] == draws[-1]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
@pytest.mark.filterwarnings("ignore")  # the compiler warns about itself
@pytest.mark.uninitialised_memory
def test_bf16_trains_in_autocast_and_evaluates_in_float32(tmp_path: Path, compiled: bool):
    task = train(tmp_path / "run", ToyTask(noise=0.0), mixed_precision="bf16", torch_compile=compiled)
    assert task.output_dtype == torch.float32
    AcceleratorState._reset_state(reset_partial_state=True)
    train(tmp_path / "float32", ToyTask(noise=0.0))
    losses = [[line["loss"] for line in metrics(tmp_path / run, "loss")] for run in ("run", "float32")]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05)


# Budgets, log and threads.


def test_budgets_count_joint_batches(tmp_path: Path):
    args = arguments(tmp_path, max_train_steps=None, num_train_epochs=2.5)
    assert planned_steps(args, 1000, 64) == math.ceil(2500 / 64)
    assert planned_steps(arguments(tmp_path, max_train_steps=7), None, 64) == 7


def test_evaluation_and_log_come_when_due_and_at_the_end(tmp_path: Path):
    task = train(tmp_path / "run")
    assert task.evaluated == [4, 8, 10] and task.total_steps == 10
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8, 10]
    assert lines[2] == {"step": 4, "images": 16, "eval_loss": lines[2]["eval_loss"], "eval_ssim": None}
    first, second = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[:2])
    assert first["images_per_second"] > 0 and first["seconds"] <= second["seconds"]


def test_the_log_shows_scalars_of_the_model_that_are_asked_for_when_a_line_is_written(tmp_path: Path):
    task = train(tmp_path / "run", average_weights=True, checkpointing_steps=1)
    lines = metrics(tmp_path / "run", "loss")
    assert task.asked_at == [2, 4, 6, 8, 10] == [line["steps"] for line in lines]
    for line in lines:
        # The value after the step, of the trained model and not of its average.
        saved = load_file(tmp_path / "run" / "checkpoints" / f"step-{line['step']}" / "model.safetensors")
        assert line["centre"] == pytest.approx(saved["centre"][0].item(), rel=1e-6)
    assert not any("centre" in line for line in metrics(tmp_path / "run", "eval_loss"))


def test_trackers_get_what_the_log_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Recorder(GeneralTracker):
        name, requires_logging_directory, main_process_only = "recorder", False, True
        tracker, config, lines, finished = None, {}, [], False

        def __init__(self, run_name: str, **kwargs: object) -> None:
            super().__init__()

        def store_init_configuration(self, values: dict) -> None:
            self.config.update(values)

        def log(self, values: dict, step: int | None = None, **kwargs: object) -> None:
            self.lines.append((step, values))

        def finish(self) -> None:
            type(self).finished = True

    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Recorder)
    train(tmp_path / "run", report_to="wandb")
    assert Recorder.config["engine.learning_rate"] == 0.03 and Recorder.finished
    assert [(step, "eval_loss" in values) for step, values in Recorder.lines][:3] == [(2, False), (4, False), (4, True)]
    assert Recorder.lines[0][1]["loss"] == metrics(tmp_path / "run")[0]["loss"]


def test_run_yaml_says_how_to_do_it_again(tmp_path: Path):
    train(tmp_path / "run", max_train_steps=1, seed=5)
    record = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert record["seed"] == 5 and record["settings"]["num_processes"] == 1
    assert record["settings"]["engine"]["learning_rate"] == 0.03
    assert record["versions"]["torch"] == torch.__version__


def test_the_seed_decides(tmp_path: Path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tmp_path / name, seed=seed)
    a, b, c = (saved_model(tmp_path / name)["encoder.weight"] for name in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_cores_are_shared_by_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    for processes, expected in ((1, 6), (2, 3), (4, 1), (12, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert share_cores() == torch.get_num_threads() == expected
    torch.set_num_threads(threads)


def test_fit_returns_the_run_directory(tmp_path: Path):
    assert fit(ToyTask(), arguments(tmp_path / "run", max_train_steps=1), {}) == tmp_path / "run"


def test_what_no_gradient_moves_is_copied_into_the_average():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Embedding(3, 2).requires_grad_(False))
    average = deepcopy(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    before = average[0].weight.clone()
    update_average_(average, module, 0.9, step=1_000_000)
    torch.testing.assert_close(average[0].weight, before + 0.1)
    assert torch.equal(average[1].weight, module[1].weight)
