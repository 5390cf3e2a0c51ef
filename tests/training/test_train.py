"""`training/train.py` from the command line to the run directory, and what a person does with that."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from recipes import (
    ENVIRONMENT,
    TRAIN,
    config_of,
    evaluation_of,
    flags,
    log_of,
    run,
    settings_of,
    smooth_picture,
    three_lines,
    train,
    write_jpegs,
    write_parquet,
)
from safetensors.torch import load_file
from toy_task import assert_same_tensors
from transformers import AutoImageProcessor, AutoModel

from digits import load_digits_images
from engine import EngineArguments
from hf_vq import ImageTokenizer, SQVAEModel
from hf_vq.models.image_processing_vq import VQImageProcessor
from tasks import TokenizerTask


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run directory of ten steps on the digits, and what was printed."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    return run_dir, train(run_dir, seed=3)


def refused(output_dir: Path, *args: Any, **settings: Any) -> str:
    """What train.py says when it refuses to work: a sentence, no traceback."""
    finished = run(flags(output_dir, *args, **settings))
    assert finished.status == 1 and "Traceback" not in finished.output, finished.output
    return finished.output


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def use(lines: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs the lines that train.py printed beside a picture.png of 8 x 8 pixels; returns their names."""
    monkeypatch.chdir(folder)
    smooth_picture(1, 8, 8).save("picture.png")
    names: dict[str, Any] = {}
    exec(lines, names)
    return names


# The run directory.


def test_the_run_directory_is_a_model_directory(trained: tuple[Path, str]):
    run_dir, _ = trained
    model, processor = AutoModel.from_pretrained(run_dir), AutoImageProcessor.from_pretrained(run_dir)
    assert isinstance(model, SQVAEModel) and isinstance(processor, VQImageProcessor)
    assert (processor.num_channels, processor.crop_size["height"]) == (1, 8)
    tokenizer = ImageTokenizer.from_pretrained(run_dir)
    assert len(tokenizer) == 16 and len(tokenizer.encode(smooth_picture(0, 8, 8))) == 16
    saved = load_file(run_dir / "model.safetensors")
    trained_last = load_file(run_dir / "checkpoints" / "step-10" / "model.safetensors")
    # The decoder's variance is fitted once the weights stand.
    assert not torch.equal(saved.pop("observation_variance"), trained_last.pop("observation_variance"))
    assert_same_tensors(saved, {name: tensor for name, tensor in trained_last.items() if name in model.state_dict()})
    assert config_of(run_dir)["temperature_decay_steps"] == 10 and config_of(run_dir)["variance_update"] == "batch"


def test_the_run_directory_tells_how_it_came_about(trained: tuple[Path, str]):
    run_dir, _ = trained
    settings = settings_of(run_dir)
    expected = {"dataset_name": "digits", "learning_rate": 2e-3, "seed": 3, "max_train_steps": 10, "num_processes": 1}
    assert expected.items() <= settings.items() and settings["model"]["codebook_size"] == 16
    for name in ("versions:", "git_commit:", "machine:", "torch:", "transformers:"):
        assert name in (run_dir / "run.yaml").read_text()
    lines = log_of(run_dir)
    assert [(line["step"], line["images"]) for line in lines if "loss" in line] == [(3, 24), (6, 48), (9, 72), (10, 80)]
    assert [line["step"] for line in lines if "eval_psnr" in line] == [6, 10]
    of_training = {"perplexity", "observation_variance", "dequantization_variance", "temperature"}
    assert all(of_training <= line.keys() for line in lines if "loss" in line)
    measured = "perplexity usage posterior_entropy argmax_probability dequantization_variance".split()
    assert all({f"eval_{name}" for name in measured} <= line.keys() for line in lines if "eval_psnr" in line)
    assert lines[-1]["step"] == 10 and lines[-2]["temperature"] == pytest.approx(0.4)
    assert load_file(run_dir / "codes.safetensors").keys() == {"step-000006", "step-000010"}
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step-10", "step-5"]
    pictures = {path.name for path in (run_dir / "pictures").iterdir()}
    assert {"curves.png", "code-history.png", "step-000010-codes.png", "step-000010-reconstructions.png"} <= pictures
    for name in pictures:
        Image.open(run_dir / "pictures" / name).load()
    assert not [path for path in run_dir.rglob("*") if path.suffix in (".pkl", ".bin", ".pt", ".tmp")]


def test_the_final_numbers_are_those_of_the_saved_model_on_the_test_digits(trained: tuple[Path, str]):
    run_dir, _ = trained
    written = json.loads((run_dir / "evaluation.json").read_text())
    described = {"dataset_name": "digits", "split": "test", "seed": 3, "num_images": 360, "ssim": None}
    assert described.items() <= written.items() and "8 bits" in written["protocol"] and written["versions"]
    task = TokenizerTask(load_digits_images(), EngineArguments(), "hf_sqvae", {}, str(run_dir))
    result = task.test(run_dir, Accelerator())
    assert result is not None
    for name in "loss mse psnr psnr_of_mse perplexity usage posterior_entropy argmax_probability".split():
        assert written[name] == pytest.approx(result.metrics[name], rel=1e-5), name


def test_the_last_words_say_where_the_model_is_how_good_and_how_to_use_it(
    trained: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run_dir, output = trained
    numbers = evaluation_of(run_dir)
    assert f"The model is in {run_dir}" in output and "Test images: 360" in output
    for name in ("psnr", "psnr_of_mse", "mse", "perplexity", "usage", "posterior_entropy", "argmax_probability"):
        assert f"  {name:18} {numbers[name]:,.5g}\n" in output
    names = use(three_lines(output), tmp_path, monkeypatch)
    assert len(names["ids"]) == 16 and all(0 <= token < 16 for token in names["ids"])
    assert names["image"].size == (8, 8) and names["image"].mode == "L"


def test_accelerate_launch_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    command = [sys.executable, "-m", "accelerate.commands.launch", TRAIN, *flags(Path("out/run"), eval_steps=None)]
    finished = subprocess.run(
        command, cwd=tmp_path, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert "The model is in out/run" in finished.stdout and "Test images: 360" in finished.stdout
    names = use(three_lines(finished.stdout), tmp_path, monkeypatch)
    assert len(names["ids"]) == 16 and names["image"].size == (8, 8)
    assert settings_of(tmp_path / "out" / "run")["model"]["num_channels"] == 1  # the digits config stands behind


def test_without_a_test_split_there_are_no_numbers(tmp_path: Path):
    write_jpegs(tmp_path / "jpegs", [(8, 8)] * 12)
    output = train(tmp_path / "run", {"image_size": 8}, dataset_name=tmp_path / "jpegs", validation_size=2)
    assert "Test images" not in output and three_lines(output)
    assert not (tmp_path / "run" / "evaluation.json").exists()


def test_test_split_none_leaves_the_test_split_alone(tmp_path: Path):
    write_parquet(tmp_path / "data")
    for number, name in enumerate(("digits", tmp_path / "data")):
        run_dir = tmp_path / f"run-{number}"
        model = {"image_size": 8, "num_channels": 1}
        output = train(run_dir, model, dataset_name=name, test_split="none", max_train_steps=1, validation_size=2)
        assert "Test images" not in output and not (run_dir / "evaluation.json").exists()


def test_planned_fields_are_saved(tmp_path: Path):
    settings = {"dataset_name": "digits", "model_type": "hf_vqvae", "max_train_steps": 2}
    train(tmp_path / "vqvae", {"num_channels": 1, "image_size": 8}, **settings)
    # Of the pixel values of the 1,413 training digits: about 0.56; that of all bytes from 0 to 255 would be 0.33.
    assert config_of(tmp_path / "vqvae")["data_variance"] == pytest.approx(0.56, abs=0.02)
    train(tmp_path / "sqvae", {"temperature_decay_steps": 5}, gradient_accumulation_steps=2, max_train_steps=2)
    saved = config_of(tmp_path / "sqvae")
    assert (saved["variance_update"], saved["temperature_decay_steps"]) == ("lagged", 5)


# Fine-tuning.


def test_fine_tuning_continues_from_a_saved_model(trained: tuple[Path, str], tmp_path: Path):
    base, _ = trained
    saved = {"config_overrides": None, "model_name_or_path": base, "dataset_name": "digits", "max_train_steps": 4}
    train(tmp_path / "still", learning_rate=0, **saved)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "still"))
    parameters = dict(AutoModel.from_pretrained(base).named_parameters())
    for name in parameters:
        assert torch.equal(before[name], after[name]), name
    assert after["quantizer.temperature.steps"] == 14
    assert evaluation_of(tmp_path / "still")["psnr"] == evaluation_of(base)["psnr"]

    train(tmp_path / "tuned", learning_rate=1e-2, **saved)
    tuned = load_file(tmp_path / "tuned" / "model.safetensors")
    assert any(not torch.equal(before[name], tuned[name]) for name in parameters)
    processors = [(folder / "preprocessor_config.json").read_text() for folder in (base, tmp_path / "tuned")]
    assert processors[0] == processors[1]
    assert settings_of(tmp_path / "tuned")["model_name_or_path"] == str(base)
    assert len(ImageTokenizer.from_pretrained(tmp_path / "tuned")) == 16


def test_a_model_that_is_not_there_is_said_so(tmp_path: Path):
    name = str(tmp_path / "nowhere")
    choices = {"model_name_or_path": name, "dataset_name": "digits", "config_overrides": None}
    assert name in refused(tmp_path / "run", **choices)
    assert not (tmp_path / "run").exists()


# Folders that are taken, data that are not there, training that diverges.


def test_an_occupied_folder_is_refused_with_the_way_out(trained: tuple[Path, str]):
    run_dir, _ = trained
    before = contents(run_dir)
    message = refused(run_dir, seed=3)
    assert str(run_dir) in message and "--resume_from_checkpoint latest" in message and "--output_dir" in message
    assert contents(run_dir) == before


def test_the_folder_of_another_model_is_refused(trained: tuple[Path, str], tmp_path: Path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "vit"}')
    assert "already holds config.json" in refused(foreign)
    assert "holds config.json but no run.yaml" in refused(foreign, resume_from_checkpoint="latest")
    assert contents(foreign) == {"config.json": b'{"model_type": "vit"}'}


def test_another_run_is_not_resumed(trained: tuple[Path, str], tmp_path: Path):
    run_dir, _ = trained
    before = contents(run_dir)
    assert "seed is 3 there and 0 here" in refused(run_dir, resume_from_checkpoint="latest")
    checkpoint = run_dir / "checkpoints" / "step-5"
    message = refused(tmp_path / "new", {"codebook_size": 32}, seed=3, resume_from_checkpoint=checkpoint)
    assert "codebook_size is 16 there and 32 here" in message
    assert contents(run_dir) == before and not (tmp_path / "new" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"dataset_name": "./nowhere"}, "there is no folder ./nowhere"),
        ({"dataset_name": "parquet"}, "data_files"),
        ({"validation_size": 1437}, "validation_size"),
        ({"report_to": "smoke_signals"}, "smoke_signals"),
        ({"num_train_epochs": 0, "max_train_steps": None}, "num_train_epochs"),
        ({"config_overrides": "{"}, "config_overrides"),
        ({"resume_from_checkpoint": "nowhere/step-3"}, "nowhere/step-3"),
    ],
    ids="folder parquet held_out tracker no_epochs overrides checkpoint".split(),
)
def test_what_is_refused_leaves_no_run_behind(tmp_path: Path, settings: dict[str, Any], named: str):
    assert named in refused(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("learning_rate", "last_good"), [("1e30", 2), ("1e39", 1)], ids=["huge", "infinite"])
def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path: Path, learning_rate: str, last_good: int):
    """The first step has learning rate 0, the second makes the weights huge or infinite."""
    message = refused(tmp_path / "run", learning_rate=learning_rate, checkpointing_steps=1)
    assert f"NaN or infinite at step {last_good + 1}" in message and "--learning_rate" in message
    kept = tmp_path / "run" / "checkpoints" / f"step-{last_good}"
    assert str(kept) in message and kept == max((tmp_path / "run" / "checkpoints").iterdir())
    weights = load_file(kept / "model.safetensors").values()
    assert all(tensor.isfinite().all() for tensor in weights)
    assert not (tmp_path / "run" / "model.safetensors").exists()
