import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_task import ToyTask, assert_close_tensors, assert_same_tensors, metrics, saved_model, train


def launch(*runs: dict, processes: int = 1) -> int:
    """Runs the toy task in new processes; returns their exit status."""
    here, training = Path(__file__).parent, Path(__file__).parents[2] / "training"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    environment = os.environ | {"PYTHONPATH": f"{training}", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(here / "toy_task.py"), *(json.dumps(run, default=str) for run in runs)]
    return subprocess.run(command, env=environment, capture_output=True, timeout=300).returncode


def assert_same_run(left: Path, right: Path, step: int) -> None:
    """Two runs agree bit for bit at a checkpoint, in the saved model, and in their logs."""
    ours, theirs = left / "checkpoints" / f"step-{step}", right / "checkpoints" / f"step-{step}"
    assert sorted(path.name for path in ours.iterdir()) == sorted(path.name for path in theirs.iterdir())
    for path in ours.glob("*.safetensors"):
        assert_same_tensors(load_file(path), load_file(theirs / path.name))
    for name in ("state.json", *(path.name for path in ours.glob("rank-*.json"))):
        one, other = (json.loads((folder / name).read_text()) for folder in (ours, theirs))
        for state in (one, other):
            state.pop("seconds", None), state.pop("settings", None)
        assert one == other
    assert_same_tensors(saved_model(left), saved_model(right))
    assert metrics(left) == metrics(right)


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(tmp_path: Path):
    changes = {"average_weights": True, "gradient_accumulation_steps": 2, "logging_steps": 3}
    assert launch(changes | {"output_dir": tmp_path / "killed", "kill_at": 15}) == -9
    assert [line["step"] for line in metrics(tmp_path / "killed")] == [3, 4, 6]
    train(tmp_path / "killed", resume_from_checkpoint="latest", **changes)
    train(tmp_path / "whole", **changes)
    assert_same_run(tmp_path / "killed", tmp_path / "whole", step=10)
    names = {"step", "images", "loss", "noise_level", "centre", "steps", "learning_rate"}
    assert names == metrics(tmp_path / "whole")[0].keys()


def test_two_processes_equal_one_on_the_joint_batch_and_resume_exactly(tmp_path: Path):
    changes = {"gradient_accumulation_steps": 2, "average_weights": True}
    exact, noisy = (
        changes | {"noise": 0.0, "output_dir": tmp_path / "two"},
        changes | {"output_dir": tmp_path / "whole"},
    )
    killed = changes | {"output_dir": tmp_path / "killed"}
    assert launch(exact, noisy, killed | {"kill_at": 15}, processes=2) != 0
    assert launch(killed | {"resume_from_checkpoint": "latest"}, processes=2) == 0
    assert_same_run(tmp_path / "killed", tmp_path / "whole", step=10)

    for rank in range(2):
        seen = load_file(tmp_path / "two" / "checkpoints" / "step-10" / f"rank-{rank}-buffers.safetensors")["seen"]
        batches = iter(ToyTask().train_batches(batch_size=4, rank=rank, world_size=2))
        torch.testing.assert_close(seen, sum(next(batches)["values"].sum(0) for _ in range(20)))
    train(tmp_path / "one", ToyTask(noise=0.0), **changes | {"per_device_train_batch_size": 8})
    assert_close_tensors(saved_model(tmp_path / "one"), saved_model(tmp_path / "two"))
    for one, two in zip(metrics(tmp_path / "one", "loss"), metrics(tmp_path / "two", "loss"), strict=True):
        assert one["images"] == two["images"] and one["loss"] == pytest.approx(two["loss"], rel=1e-4)


def test_a_finished_run_resumes_at_its_very_last_step(tmp_path: Path):
    train(tmp_path / "run")
    model, log = saved_model(tmp_path / "run"), metrics(tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    assert train(tmp_path / "run", resume_from_checkpoint="latest").evaluated == []
    assert_same_tensors(saved_model(tmp_path / "run"), model)
    assert metrics(tmp_path / "run") == log


def test_a_path_resumes_from_that_checkpoint_and_later_ones_go(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    train(tmp_path / "run", checkpointing_steps=2)
    train(tmp_path / "whole", checkpointing_steps=2)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-4"
    task = train(tmp_path / "run", checkpointing_steps=None, resume_from_checkpoint=str(checkpoint))
    assert task.evaluated == [8, 10] and "step-8 is removed" in caplog.text
    assert {path.name for path in checkpoint.parent.iterdir()} == {"step-2", "step-4", "step-10"}
    assert_same_run(tmp_path / "run", tmp_path / "whole", step=10)


def test_a_checkpoint_of_one_run_continues_in_a_new_folder(tmp_path: Path):
    train(tmp_path / "run")
    train(tmp_path / "new", resume_from_checkpoint=str(tmp_path / "run" / "checkpoints" / "step-5"))
    assert_same_tensors(saved_model(tmp_path / "run"), saved_model(tmp_path / "new"))
    assert [line["step"] for line in metrics(tmp_path / "new", "loss")] == [6, 8, 10]


def test_latest_without_a_checkpoint_begins_at_the_beginning(tmp_path: Path):
    train(tmp_path / "run", resume_from_checkpoint="latest")
    train(tmp_path / "whole")
    assert_same_run(tmp_path / "run", tmp_path / "whole", step=10)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    train(tmp_path / "run")
    train(tmp_path / "whole")
    damaged = tmp_path / "run" / "checkpoints" / "step-10"
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors changed .* `latest`"):
        train(tmp_path / "run", resume_from_checkpoint=str(damaged))
    assert train(tmp_path / "run", resume_from_checkpoint="latest").evaluated == [8, 10]
    assert "step 10 is damaged" in caplog.text
    assert_same_run(tmp_path / "run", tmp_path / "whole", step=10)
