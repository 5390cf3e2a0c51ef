"""What a run directory says about itself, read back."""

import json
from pathlib import Path

from hf_vq.run_files import RunFiles


def test_a_folder_tells_numbers_settings_and_how_far_it_came(tmp_path: Path):
    (tmp_path / "evaluation.json").write_text('{"psnr": 25.0}')
    (tmp_path / "run.yaml").write_text("settings: {seed: 3}\n")
    lines = [{"step": 10, "images": 640, "seconds": 2.0}, {"step": 10, "eval_psnr": 24.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert RunFiles.read(tmp_path) == ({"psnr": 25.0}, {"settings": {"seed": 3}}, lines[0])


def test_what_is_not_there_is_empty(tmp_path: Path):
    assert RunFiles.read(tmp_path) == ({}, {}, {})
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "eval_psnr": 20.0}\n')
    assert RunFiles.read(str(tmp_path)).progress == {}
