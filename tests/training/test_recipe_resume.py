"""A run of train.py that was killed and resumed equals one that was not, bit for bit on a CPU."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from recipes import (
    ENVIRONMENT,
    TRAIN,
    assert_same_run,
    config_of,
    flags,
    log_of,
    run,
    settings_of,
    three_lines,
    train,
    write_parquet,
)
from safetensors.torch import load_file

EMA_CODES = {"model_type": "hf_vqvae", "dataset_name": "digits", "model": {"num_channels": 1, "image_size": 8}}


def stream(folder: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a run that streams four Parquet files, one of them held out."""
    write_parquet(folder)
    return {"dataset_name": folder, "streaming": True, "validation_size": 5, "model": {"image_size": 8}} | changes


VARIANTS = {
    "accumulation": {"gradient_accumulation_steps": 2},
    "workers": {"dataloader_num_workers": 2},
    "average": {"average_weights": True},
    "clipped_bf16": {"mixed_precision": "bf16", "max_grad_norm": 0.5},
    "ema_codes": EMA_CODES,
    "muon": {"optim": "muon", "average_weights": True},
}


def check(tmp_path: Path, kill_at: int = 7, processes: int = 1, **settings: Any) -> Path:
    """Trains with and without a kill, compares, and returns the folder of the uninterrupted run."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(whole, processes=processes, **settings)
    finished = run(flags(killed, **settings), processes=processes, kill_at=kill_at)
    assert finished.status == -signal.SIGKILL, finished.output
    assert [path.name for path in (killed / "checkpoints").iterdir()] == ["step-5"]
    assert not (killed / "model.safetensors").exists()
    train(killed, processes=processes, resume_from_checkpoint="latest", **settings)
    assert_same_run(whole, killed)
    assert settings_of(killed)["num_processes"] == processes
    return whole


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
def test_killed_and_resumed(tmp_path: Path, settings: dict[str, Any]):
    whole = check(tmp_path, **settings)
    last = load_file(whole / "checkpoints" / "step-10" / "model.safetensors")
    if settings is EMA_CODES:
        assert 0 < last["quantizer.cluster_size"].sum() < 80 * 16
        assert config_of(whole)["quantizer"] == "ema"
    else:
        assert last["quantizer.temperature.steps"] == 10
    lines = log_of(whole)
    assert [line["step"] for line in lines] == [3, 6, 6, 9, 10, 10]
    assert all("loss" in line or "eval_psnr" in line for line in lines)


@pytest.mark.parametrize("workers", [0, 2], ids=["no_workers", "two_workers"])
def test_killed_and_resumed_while_streaming(tmp_path: Path, workers: int):
    # 36 rows to train on: the 80 images of the run cross the ends of two epochs, before the kill and after.
    check(tmp_path, **stream(tmp_path / "data", dataloader_num_workers=workers))


def test_killed_and_resumed_while_streaming_in_two_processes_with_ema_codes(tmp_path: Path):
    settings = stream(tmp_path / "data", model_type="hf_vqvae", gradient_accumulation_steps=2)
    check(tmp_path, processes=2, **settings)


def test_killed_before_the_first_checkpoint_it_begins_anew(tmp_path: Path):
    train(tmp_path / "whole", max_train_steps=6)
    killed = flags(tmp_path / "killed", max_train_steps=6)
    assert run(killed, kill_at=4).status == -signal.SIGKILL
    assert log_of(tmp_path / "killed")[-1]["step"] == 3 and not (tmp_path / "killed" / "checkpoints").exists()
    assert run([*killed, "--resume_from_checkpoint", "latest"]).status == 0
    assert_same_run(tmp_path / "whole", tmp_path / "killed", step=6)


def test_other_settings_do_not_resume(tmp_path: Path):
    assert run(flags(tmp_path / "run"), kill_at=7).status == -signal.SIGKILL
    changed = {"learning_rate": 0.5, "model": {"codebook_dim": 2}}
    finished = run(flags(tmp_path / "run", resume_from_checkpoint="latest", **changed))
    assert finished.status == 1 and "Traceback" not in finished.output
    assert "learning_rate is 0.002 there and 0.5 here" in finished.output
    assert "model.codebook_dim is 4 there and 2 here" in finished.output
    assert (tmp_path / "run" / "checkpoints" / "step-5").exists()


def test_a_real_command_killed_from_outside(tmp_path: Path):
    settings = {"max_train_steps": 30, "eval_steps": 10, "checkpoints_total_limit": 100}
    killed = tmp_path / "killed"
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, TRAIN, *flags(killed, **settings)]
        process = subprocess.Popen(command, env=os.environ | ENVIRONMENT, stdout=log, stderr=log)
        first, deadline = killed / "checkpoints" / "step-5", time.monotonic() + 200
        while not first.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert first.exists() and not (killed / "model.safetensors").exists()
    train(killed, resume_from_checkpoint="latest", **settings)
    train(tmp_path / "whole", **settings)
    for step in (10, 30):
        assert_same_run(tmp_path / "whole", killed, step)


def test_torchrun_starts_two_processes_which_resume_exactly(tmp_path: Path):
    """The uninterrupted run by torchrun itself, killed and resumed ones in processes that get the same variables."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", TRAIN]
    environment = os.environ | ENVIRONMENT | {"ACCELERATE_USE_CPU": "true"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finished = subprocess.run(
        [*command, *flags(whole)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert settings_of(whole)["num_processes"] == 2
    assert finished.stdout.count("The model is in") == 1 and three_lines(finished.stdout)
    assert log_of(whole)[-1]["images"] == 160

    assert run(flags(killed), processes=2, kill_at=7).status == -signal.SIGKILL
    train(killed, processes=2, resume_from_checkpoint="latest")
    assert_same_run(whole, killed)


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path: Path):
    finished = run(flags(tmp_path / "run"), processes=2, use_cpu="false")
    assert finished.status == 1 and "ACCELERATE_USE_CPU=true" in finished.output
    assert not (tmp_path / "run").exists()
