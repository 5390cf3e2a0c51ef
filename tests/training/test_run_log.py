import json
import subprocess
import time
from pathlib import Path

import pytest
import torch

import run_log
from run_log import RunLog, RunningMeans, Stopwatch, claim, git_commit, progress_bar, record_run, refuse_other_settings


def steps(log: RunLog) -> list[int]:
    return [json.loads(line)["step"] for line in log.path.read_text().splitlines()]


def test_the_log_is_cut_back_to_a_step_and_loses_a_torn_line(tmp_path: Path):
    log = RunLog(tmp_path)
    for step in (2, 4, 4, 6):
        log.append({"step": step, "loss": 0.1})
    with log.path.open("a") as file:
        file.write('{"step": 3, "lo')
    log.cut_back(4)
    assert steps(log) == [2, 4, 4]
    log.append({"step": 5})
    assert steps(log) == [2, 4, 4, 5]


def test_the_log_holds_only_numbers_json_knows(tmp_path: Path):
    log = RunLog(tmp_path)
    log.append({"step": 1, "psnr": float("inf"), "ssim": None, "perplexity": float("nan"), "loss": 0.5})
    assert json.loads(log.path.read_text()) == {"step": 1, "psnr": None, "ssim": None, "perplexity": None, "loss": 0.5}


def test_other_processes_write_nothing(tmp_path: Path):
    log = RunLog(tmp_path, enabled=False)
    log.append({"step": 1})
    log.flush_to_disk()
    log.cut_back(0)
    assert not log.path.exists()


def test_a_run_is_recorded_once(tmp_path: Path):
    settings = {"engine": {"seed": 3, "output_dir": tmp_path}, "model": {"hidden_channels": (1, 2)}}
    record_run(tmp_path / "run", settings, seed=3)
    first = (tmp_path / "run" / "run.yaml").read_text()
    assert "seed: 3" in first and "git_commit" in first and "safetensors" in first
    record_run(tmp_path / "run", settings | {"model": {}}, seed=4)
    assert (tmp_path / "run" / "run.yaml").read_text() == first
    claim(tmp_path / "run", settings, resuming=True)


@pytest.mark.parametrize("name", ["run.yaml", "metrics.jsonl", "config.json"])
def test_a_folder_with_a_run_or_a_model_is_refused(tmp_path: Path, name: str):
    claim(tmp_path, {}, resuming=False)
    (tmp_path / name).write_text("")
    with pytest.raises(FileExistsError, match=rf"{name}.*--output_dir"):
        claim(tmp_path, {}, resuming=False)


def test_settings_that_differ_are_named_and_free_ones_are_not(tmp_path: Path):
    there = {"engine": {"seed": 1, "output_dir": "a"}, "model": {"hidden_channels": [1, 2]}, "old": 1}
    here = {"engine": {"seed": 2, "output_dir": "b"}, "model": {"hidden_channels": (1, 2)}}
    with pytest.raises(
        ValueError, match=r"another run: engine\.seed is 1 there and 2 here; old is 1 there and 'absent'"
    ):
        refuse_other_settings(tmp_path, there, here)
    refuse_other_settings(tmp_path, there, there | {"engine": {"seed": 1, "output_dir": "b"}})
    refuse_other_settings(tmp_path, there, there | {"warn_perplexity_below": 0.5})


def test_the_commit_says_whether_the_code_was_changed(tmp_path: Path):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    assert git_commit(tmp_path) is None
    git("init")
    (tmp_path / "code.py").write_text("1")
    git("add", "code.py")
    git("commit", "-m", "one")
    assert git_commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "code.py").write_text("2")
    assert git_commit(tmp_path) == git("rev-parse", "HEAD") + "-dirty"


def test_running_means_take_scalars_and_start_anew():
    means = RunningMeans()
    for value in (1.0, 3.0):
        output = {"loss": torch.tensor(value, requires_grad=True), "tokens": torch.ones(2), "count": torch.tensor(4)}
        means.add(output)
    taken = means.take()
    assert {name: value.item() for name, value in taken.items()} == {"loss": 2.0} and not taken["loss"].requires_grad
    assert means.sums == {} and means.count == 0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_the_rate_counts_neither_the_first_step_nor_pauses(clock: list[float]):
    watch = Stopwatch(seconds_before=7.0)
    clock[0] += 50  # the first step compiles
    assert not watch.running and watch.rate() is None
    watch.restart()
    watch.count(30)
    clock[0] += 1
    with watch.paused():
        clock[0] += 20
    watch.count(30)
    clock[0] += 1
    assert watch.rate() == 30.0
    watch.count(10)
    clock[0] += 2
    assert watch.rate() == 5.0 and watch.steady_rate == 70 / 4
    assert watch.rate() is None and watch.seconds == 7 + 50 + 22 + 2


def test_the_bar_is_for_the_main_process_and_may_be_piped(capsys: pytest.CaptureFixture[str]):
    for enabled in (True, False):
        with progress_bar(100, 20, enabled) as bar:
            bar.update(80)
            bar.set_postfix({"loss": "0.5"})
        assert ("100/100" in capsys.readouterr().err) == enabled
    assert run_log.METRICS_FILE == "metrics.jsonl"
