"""The comparison over seeds: which runs it starts, with which settings, and the tables it prints."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import seeds
import yaml

from arguments import RunArguments, parse

METRICS = {"psnr": 25.0, "psnr_of_mse": 24.5, "ssim": 0.85, "perplexity": 430.0, "usage": 1.0, "mse": 0.003}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[RunArguments]:
    """The runs that were started; each leaves what a real one does, its psnr being seed + 1000 learning_rate."""
    runs: list[RunArguments] = []

    def leave_run(command: list[str], check: bool) -> None:
        assert check and command[:2] == ["accelerate", "launch"]
        run = parse(command[3:])
        runs.append(run)
        folder, psnr = Path(run.engine.output_dir), run.engine.seed + run.engine.learning_rate * 1000
        folder.mkdir(parents=True, exist_ok=True)
        fields: dict[str, Any] = {
            "codebook_init": "uniform",
            "revive_below": 0,
            "gradient_estimator": "straight_through",
        }
        fields |= {"normalize_codes": False, "num_codebooks": 1, "covariance": "global", "quantizer": "gaussian"}
        fields |= {"model_type": run.model.model_type, **run.model_fields}
        record = {"settings": run.settings, "seed": run.engine.seed, "git_commit": "c0ffee", "machine": "x86_64"}
        (folder / "run.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(record, default=str))))
        (folder / "config.json").write_text(json.dumps(fields))
        evaluated = {"step": 1, "images": 8, "eval_psnr": psnr, "eval_perplexity": 430.0}
        lines: list[dict[str, Any]] = [{"step": 1, "images": 8, "seconds": 1.0}, evaluated]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if run.data.test_split != "none":
            evaluation = METRICS | {"psnr": psnr, "dataset_name": "x", "split": "test"}
            (folder / "evaluation.json").write_text(json.dumps(evaluation))

    monkeypatch.setattr("subprocess.run", leave_run)
    return runs


def test_every_method_is_trained_once_from_every_seed(
    started: list[RunArguments], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options = ["--output_dir", str(tmp_path), "--seeds", "3", "5"]
    seeds.main(options)
    trained = {(Path(run.engine.output_dir).name, run.engine.seed) for run in started}
    assert trained == {(f"{name}-seed{seed}", seed) for name in seeds.METHODS for seed in (3, 5)}
    by_name = {Path(run.engine.output_dir).name: run for run in started}
    assert by_name["vq-ema-care-seed3"].model_fields["revive_below"] == 0.1
    assert by_name["vq-ema-seed3"].model_fields["quantizer"] == "ema"
    assert by_name["sqvae-seed3"].model.model_type == "hf_sqvae"
    table = capsys.readouterr().out
    mean = 4 + 1000 * seeds.METHODS["vq-ema"].learning_rate
    assert f"| vq-ema | VQ-VAE ema | {mean:.2f} ± 1.00 |" in table
    assert (tmp_path / "seeds.png").stat().st_size > 0
    started.clear()
    seeds.main(options)
    assert started == []


def test_a_run_that_was_stopped_goes_on(started: list[RunArguments], tmp_path: Path):
    (tmp_path / "vq-ema-seed0").mkdir()
    (tmp_path / "vq-ema-seed0" / "run.yaml").touch()
    seeds.main(["--output_dir", str(tmp_path), "--methods", "vq-ema", "--seeds", "0", "1"])
    assert [run.engine.resume_from_checkpoint for run in started] == ["latest", None]


def test_learning_rates_and_sizes_are_chosen_on_held_out_images_of_short_runs(
    started: list[RunArguments], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    grid = ["--learning_rates", "0.008", "0.016", "--codebook_dims", "4", "16"]
    seeds.main(["--choose", "--output_dir", str(tmp_path), "--methods", "vq-gradient", "--seeds", "7", *grid])
    tried = [(run.engine.learning_rate, run.model_fields["codebook_dim"]) for run in started]
    assert tried == list(itertools.product([8e-3, 1.6e-2], [4, 16]))
    assert all(run.data.test_split == "none" and run.engine.seed == 7 for run in started)
    assert all(run.engine.max_train_steps == 500 for run in started)
    assert "| vq-gradient | 15.00 | 15.00 | 23.00 | 23.00 |" in capsys.readouterr().out
