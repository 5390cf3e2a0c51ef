"""What a run directory says about itself, read back."""

import json
from pathlib import Path

from hf_vq.run_files import LOG, RUN, RunFiles, copy_run, keep_earlier_run
from run_log import METRICS_FILE, RUN_FILE


def test_a_folder_tells_numbers_settings_and_how_far_it_came(tmp_path: Path):
    (tmp_path / "evaluation.json").write_text('{"psnr": 25.0}')
    (tmp_path / "run.yaml").write_text("settings: {seed: 3}\n")
    lines = [{"step": 10, "images": 640, "seconds": 2.0}, {"step": 10, "eval_psnr": 24.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "evaluation-refined.json").write_text('{"psnr": 26.0, "refine": 2}')
    measured = {"psnr": 25.0}, {"psnr": 26.0, "refine": 2}
    assert RunFiles.read(tmp_path) == (*measured, {"settings": {"seed": 3}}, lines[0], None)


def test_what_is_not_there_is_empty(tmp_path: Path):
    assert RunFiles.read(tmp_path) == ({}, {}, {}, {}, None)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "eval_psnr": 20.0}\n')
    assert RunFiles.read(str(tmp_path)).progress == {}


def test_a_torn_last_line_of_the_log_is_passed_over(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "images": 8, "seconds": 1.0}\n{"step": 2, "ima')
    assert RunFiles.read(tmp_path).progress["step"] == 1


def test_runs_that_went_before_are_kept_in_order(tmp_path: Path):
    for number, name in enumerate(("first", "second", "third")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.yaml").write_text(f"seed: {number}\n")
        (tmp_path / name / "model.safetensors").touch()
    keep_earlier_run(tmp_path / "second", tmp_path / "first")
    keep_earlier_run(tmp_path / "third", tmp_path / "second")
    copy_run(tmp_path / "third", tmp_path / "published")
    runs = RunFiles.read(tmp_path / "published").runs
    assert [(place, files.run["seed"]) for place, files in runs.items()] == [
        ("started_from/started_from/run.yaml", 0),
        ("started_from/run.yaml", 1),
        ("run.yaml", 2),
    ]
    assert not list((tmp_path / "published").rglob("*.safetensors"))


def test_of_weights_from_elsewhere_nothing_is_kept(tmp_path: Path):
    keep_earlier_run(tmp_path, None)
    keep_earlier_run(tmp_path, "org/name")
    assert list(RunFiles.read(tmp_path).runs) == ["run.yaml"]


def test_training_and_package_name_the_files_alike():
    assert (RUN, LOG) == (RUN_FILE, METRICS_FILE)
