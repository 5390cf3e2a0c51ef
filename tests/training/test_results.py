"""The table of results: rows from run directories, and the check that finds a number that is off."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from recipes import train, write_parquet

import results
from hf_vq.cli import main
from result_rows import Run, describe, in_rows, short_commit, with_range

SMALL = {"hidden_size": 16, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer trained from two seeds, and a prior; their pictures lie beside."""
    folder = tmp_path_factory.mktemp("runs")
    write_parquet(folder / "data")
    shared = {"dataset_name": folder / "data", "validation_size": 5, "max_train_steps": 3, "streaming": True}
    for seed in (0, 1):
        train(folder / f"tiny-seed{seed}", {"image_size": 8}, seed=seed, **shared)
    of_prior = {"task": "prior", "tokenizer_name_or_path": folder / "tiny-seed0", "config_overrides": SMALL}
    train(folder / "tiny-prior", **of_prior, **shared)
    return folder


def page_of(folder: Path, *names: str) -> str:
    """The page of some runs."""
    results.main([*(str(folder / name) for name in names), "--output", str(folder / "results.md")])
    return (folder / "results.md").read_text(encoding="utf-8")


def test_seeds_share_a_row_and_priors_have_their_own_table(runs: Path):
    page = page_of(runs, "tiny-seed0", "tiny-seed1", "tiny-prior")
    row = results.printed_row(runs / "results.md", "tiny")
    assert row["seeds"] == "0, 1" and " ± " in row["psnr"] and row["images seen"] == "24"
    assert row["tokens"] == "4 x 4 of 16" and row["kind"] == "SQ-VAE gaussian, global"
    prior = results.printed_row(runs / "results.md", "tiny-prior")
    measured = json.loads((runs / "tiny-prior" / "evaluation.json").read_text())
    assert prior["bits_per_token"] == f"{measured['bits_per_token']:.3f}"
    assert prior["under token_entropy"].endswith(" %")
    assert "28.26" in page and "Wasserstein VQ" in page


def test_the_check_passes_on_what_was_measured_and_names_what_is_off(runs: Path, capsys: pytest.CaptureFixture[str]):
    single = shutil.copytree(runs / "tiny-seed0", runs / "single")
    page = page_of(runs, "single", "tiny-prior")
    options = ["--check", str(single), str(runs / "tiny-prior"), "--output", str(runs / "results.md")]
    results.main(options)
    assert "are those of" in capsys.readouterr().out
    psnr = results.printed_row(runs / "results.md", "single")["psnr"]
    (runs / "results.md").write_text(page.replace(psnr, f"{float(psnr) + 0.03:.2f}"), encoding="utf-8")
    with pytest.raises(SystemExit, match=rf"single: psnr is {psnr}, and .*results.md says"):
        results.main(options)
    (runs / "results.md").write_text(page.replace(f"| {psnr} |", "|  |"), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"single: psnr is .*results.md says nothing"):
        results.main(options)
    (runs / "results.md").write_text(page, encoding="utf-8")
    evaluation = json.loads((single / "evaluation.json").read_text())
    (single / "evaluation.json").write_text(json.dumps(evaluation | {"ssim": None, "perplexity": 1.0}))
    with pytest.raises(SystemExit, match=r"single: perplexity is .*, and .*evaluation.json says 1.0"):
        results.main(options)


def test_refined_tokens_have_a_row_and_are_checked_too(runs: Path, tmp_path: Path):
    folder = shutil.copytree(runs / "tiny-seed0", runs / "searched")
    output = folder / "evaluation-refined.json"
    data = ["--dataset_name", str(runs / "data"), "--streaming"]
    assert main(["evaluate", str(folder), *data, "--refine", "1", "--output", str(output)]) == 0
    page_of(runs, "searched")
    row = results.printed_row(runs / "results.md", "searched, refine=1")
    measured = json.loads(output.read_text())
    assert row["psnr"] == f"{measured['psnr']:.2f}" and row["tokens"] == "4 x 4 of 16"
    options = ["--check", str(folder), "--output", str(runs / "results.md")]
    results.main(options)
    output.write_text(json.dumps(measured | {"mse": 0.5}))
    with pytest.raises(SystemExit, match=r"searched, refine=1: mse is .*, and .*evaluation-refined.json says 0.5"):
        results.main(options)


def test_a_row_of_several_seeds_is_checked_with_all_of_them(runs: Path):
    page_of(runs, "tiny-seed0", "tiny-seed1")
    folders = [str(runs / f"tiny-seed{seed}") for seed in (0, 1)]
    results.main(["--check", *folders, "--output", str(runs / "results.md")])
    with pytest.raises(SystemExit, match=r"tiny: psnr is .*results.md says .* ± "):
        results.main(["--check", folders[0], "--output", str(runs / "results.md")])


def test_what_cannot_be_measured_is_told_with_the_command(runs: Path):
    page_of(runs, "tiny-prior")
    options = ["--check", str(runs / "tiny-prior"), "--data_files", "nowhere.parquet"]
    with pytest.raises(SystemExit, match=r"tiny-prior could not be measured: .*--data_files nowhere.parquet"):
        results.main([*options, "--output", str(runs / "results.md")])


@pytest.mark.parametrize(
    ("printed", "close"), [("1.02", True), ("1.01", True), ("1.04", False), ("", False), ("1.02 ± 0.00", False)]
)
def test_a_number_may_be_off_by_one_in_its_last_digit(printed: str, close: bool):
    assert results.is_close(printed, "1.02", 2) is close


def test_parquet_files_can_take_the_place_of_the_data_set(runs: Path):
    page_of(runs, "tiny-prior")
    files = sorted(str(path) for path in (runs / "data").glob("test*"))
    results.main(["--check", str(runs / "tiny-prior"), "--data_files", *files, "--output", str(runs / "results.md")])


def test_a_model_without_a_row_is_named(runs: Path):
    page_of(runs, "tiny-prior")
    with pytest.raises(ValueError, match="has no row 'tiny'"):
        results.main(["--check", str(runs / "tiny-seed1"), "--output", str(runs / "results.md")])


def test_runs_of_one_name_differ_in_their_seed_alone(runs: Path, tmp_path: Path):
    first, other = (shutil.copytree(runs / "tiny-seed0", tmp_path / f"other-seed{seed}") for seed in (0, 1))
    run = yaml.safe_load((other / "run.yaml").read_text())
    run["settings"]["learning_rate"] = 5.0
    (other / "run.yaml").write_text(yaml.safe_dump(run))
    run["seed"] = 1
    (other / "run.yaml").write_text(yaml.safe_dump(run))
    with pytest.raises(ValueError, match="the runs of other differ in more than their seed: learning_rate"):
        in_rows(map(Run.read, (first, other)))
    with pytest.raises(ValueError, match=r"the runs of other have the seeds \[0, 0\]: name each once"):
        in_rows(map(Run.read, (first, first)))


def test_a_folder_without_numbers_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="has no config.json, run.yaml, evaluation.json"):
        Run.read(tmp_path)


def test_words_of_the_cells():
    cures = {"codebook_init": "kmeans", "revive_below": 0.1, "gradient_estimator": "rotation", "normalize_codes": False}
    assert describe({"model_type": "hf_vqvae", "quantizer": "ema", **cures}) == "VQ-VAE ema, k-means, revival, rotation"
    assert with_range([1.0, 2.0], 1) == "1.5 ± 0.5" and with_range([1.0], 2) == "1.00" and with_range([], 2) == ""
    assert short_commit("0123456789-dirty") == "01234567 with changes"
