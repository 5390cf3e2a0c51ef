"""What the tokenizer task plans, measures and leaves behind; training itself is in test_train.py."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from recipes import TINY, smooth_picture
from safetensors.torch import load_file
from torch import nn

import image_task
import tasks
from digits import load_digits_images
from engine import EngineArguments, fit
from hf_vq.streams import ImageSplits
from tasks import TokenizerTask, ToPixelValues

SPLITS = load_digits_images(validation_size=37)
GREY = TINY | {"num_channels": 1, "image_size": 8}


def make_task(
    model_type: str = "hf_sqvae", splits: ImageSplits = SPLITS, model: dict[str, Any] | None = None, **settings: Any
) -> TokenizerTask:
    """A task on the digits; `settings` are the engine's."""
    return TokenizerTask(splits, EngineArguments(**settings), model_type, GREY | (model or {}))


def planned(model_type: str = "hf_sqvae", model: dict[str, Any] | None = None, **settings: Any) -> Any:
    """The config of the model that such a task builds for 70 steps."""
    return make_task(model_type, model=model, **settings).build(70).config


# What a config does not say.


def test_the_temperature_decays_over_the_planned_steps_unless_the_config_says_otherwise():
    assert planned().temperature_decay_steps == 70
    assert make_task().build(70).quantizer.temperature.decay_steps == 70
    assert planned(model={"temperature_decay_steps": 5}).temperature_decay_steps == 5


@pytest.mark.parametrize(
    ("steps", "named", "expected"),
    [
        (1, None, "batch"),
        (2, None, "lagged"),
        (2, "batch", "batch"),
        (2, "learned", "learned"),
        (1, "lagged", "lagged"),
    ],
)
def test_accumulation_uses_the_variance_of_the_last_step_unless_the_config_says_otherwise(
    steps: int, named: str | None, expected: str
):
    model = {"variance_update": named} if named else {}
    assert planned(model=model, gradient_accumulation_steps=steps).variance_update == expected


def test_a_vqvae_stores_the_variance_of_the_training_set():
    images = torch.cat([batch["pixel_values"] for batch in make_task().in_order(SPLITS.train, 0, 1)])
    assert len(images) == len(SPLITS.train) == 1400
    measured = planned("hf_vqvae", per_device_eval_batch_size=64).data_variance
    assert measured == pytest.approx(images.double().var(correction=0).item(), rel=1e-9)
    assert planned("hf_vqvae", model={"data_variance": 0.5}).data_variance == 0.5
    assert not hasattr(planned("hf_sqvae"), "data_variance")


def test_the_variance_of_a_large_set_is_that_of_its_first_images(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tasks, "IMAGES_FOR_DATA_VARIANCE", 256)
    first = torch.cat([batch["pixel_values"] for batch in make_task().in_order(SPLITS.train.select(range(256)), 0, 1)])
    measured = planned("hf_vqvae", per_device_eval_batch_size=128).data_variance
    assert measured == pytest.approx(first.double().var(correction=0).item(), rel=1e-9)


def test_the_seed_decides_the_weights():
    torch.manual_seed(1)
    one = make_task().build(1)
    torch.manual_seed(1)
    assert all(torch.equal(*pair) for pair in zip(one.parameters(), make_task().build(1).parameters(), strict=True))


# A saved model.


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in bfloat16, its processor with a scaling of its own."""
    folder = tmp_path_factory.mktemp("saved")
    task = make_task("hf_vqvae")
    task.processor.image_mean = 0.25
    task.save(task.build(10).to(torch.bfloat16), folder)
    return folder


def test_fine_tuning_takes_weights_config_and_processor_and_trains_in_float32(saved: Path):
    task = TokenizerTask(SPLITS, EngineArguments(), "hf_sqvae", {}, str(saved))
    model = task.build(70)
    assert type(model).__name__ == "VQVAEModel" and model.config.codebook_size == 16
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    weights = load_file(saved / "model.safetensors")
    assert all(torch.equal(tensor, weights[name].float()) for name, tensor in model.state_dict().items())
    assert task.processor.image_mean == 0.25
    first = next(iter(task.train_batches(4, 0, 1)))["pixel_values"]
    assert first.max() > 1  # (255 / 255 - 0.25) / 0.5


def test_fine_tuning_with_accumulation_uses_the_variance_of_the_last_step_too(tmp_path: Path):
    first = make_task()
    first.save(first.build(10), tmp_path)
    accumulated = TokenizerTask(SPLITS, EngineArguments(gradient_accumulation_steps=2), "hf_sqvae", {}, str(tmp_path))
    assert accumulated.build(70).config.variance_update == "lagged"


# Batches and numbers.


def test_pixel_values_of_pictures_of_many_sizes_are_one_batch():
    processor = make_task(model={"num_channels": 3}).processor
    rows = [{"image": smooth_picture(n, 20 + n, 30 - n), "label": n} for n in range(3)]
    batch = ToPixelValues(processor)(rows)
    assert batch.keys() == {"pixel_values"} and batch["pixel_values"].shape == (3, 3, 8, 8)
    assert -1 <= batch["pixel_values"].min() < batch["pixel_values"].max() <= 1


def test_training_batches_follow_the_seed_and_the_process():
    def first(rank: int = 0, world_size: int = 1, **settings: Any) -> torch.Tensor:
        return next(iter(make_task(**settings).train_batches(8, rank, world_size)))["pixel_values"]

    assert torch.equal(first(), first()) and not torch.equal(first(), first(seed=1))
    joint = next(iter(make_task().train_batches(16, 0, 1)))["pixel_values"]
    parts = torch.stack([first(rank=0, world_size=2), first(rank=1, world_size=2)], dim=1).flatten(0, 1)
    assert torch.equal(joint, parts)


def test_an_evaluation_leaves_pictures_and_counts_and_returns_numbers(tmp_path: Path):
    task = make_task(per_device_eval_batch_size=16)
    model = task.build(10).eval()
    with torch.no_grad():
        metrics = task.evaluate(model, tmp_path, 20, Accelerator())
    assert {"loss", "mse", "psnr", "psnr_of_mse", "perplexity", "usage", "images_per_second"} <= metrics.keys()
    assert "num_images" not in metrics and None not in metrics.values()  # ssim is null on 8 x 8
    counts = load_file(tmp_path / "codes.safetensors")
    assert counts.keys() == {"step-000020"} and counts["step-000020"].sum() == 37 * 16
    assert len(list((tmp_path / "pictures").glob("step-000020-*.png"))) == 2
    assert 1 <= metrics["perplexity"] <= 16
    assert 0 < metrics["posterior_entropy"] <= math.log(16) + 1e-5 and 1 / 16 <= metrics["argmax_probability"] <= 1


def test_the_history_of_the_codes_is_drawn_anew_at_each_evaluation(tmp_path: Path):
    task, drawn = make_task(), []
    model = task.build(10).eval()
    for step in (20, 40):
        with torch.no_grad():
            task.evaluate(model, tmp_path, step, Accelerator())
        drawn.append((tmp_path / "pictures" / "code-history.png").read_bytes())
    assert load_file(tmp_path / "codes.safetensors").keys() == {"step-000020", "step-000040"}
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize(
    ("model_type", "scalars"),
    [
        ("hf_sqvae", {"observation_variance": 0.25, "dequantization_variance": 0.3, "temperature": 1.0}),
        ("hf_vqvae", {"observation_variance": 0.25}),
    ],
    ids=["sqvae", "vqvae"],
)
def test_the_log_shows_variances_and_temperature(model_type: str, scalars: dict[str, float]):
    fields = {"initial_variance": 0.3} if model_type == "hf_sqvae" else {}
    task = make_task(model_type, model=fields)
    found = task.scalars(task.build(10))
    assert {name: value.item() for name, value in found.items()} == pytest.approx(scalars)


@pytest.mark.parametrize(("times", "warned"), [(0.0, False), (0.9, False), (1.1, True)], ids=["never", "over", "under"])
def test_few_codes_are_warned_of_once_for_each_evaluation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, times: float, warned: bool
):
    task = TokenizerTask(SPLITS, EngineArguments(), "hf_vqvae", GREY, warn_perplexity_below=0.0)
    model = task.build(10).eval()
    with torch.no_grad():
        model.quantizer.codebook.weight[2:] += 100.0  # two codes are left
        task.warn_perplexity_below = times * task.evaluate(model, tmp_path, 10, Accelerator())["perplexity"] / 16
        assert caplog.messages == []
        task.evaluate(model, tmp_path, 20, Accelerator())
    assert len(caplog.messages) == warned
    for part in ("step 20: the perplexity is", "2 occur", "kmeans", "code-history.png") if warned else ():
        assert part in caplog.text


def test_other_processes_neither_warn_nor_draw(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    task = TokenizerTask(SPLITS, EngineArguments(), "hf_vqvae", GREY, warn_perplexity_below=1.0)
    accelerator = SimpleNamespace(is_main_process=False, process_index=1, num_processes=2)
    task.evaluate(task.build(10).eval(), tmp_path, 20, accelerator)
    assert caplog.messages == [] and list(tmp_path.iterdir()) == []


def test_without_held_out_rows_there_is_nothing_to_evaluate(tmp_path: Path):
    task = make_task(splits=load_digits_images(validation_size=0))
    assert task.evaluate(task.build(1), tmp_path, 1, Accelerator()) == {}
    assert list(tmp_path.iterdir()) == []


def test_the_test_split_is_read_once_after_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    opened: list[Any] = []
    real = image_task.EvaluationBatches

    def record(dataset: Any, *rest: Any, **named: Any) -> Any:
        opened.append(dataset)
        return real(dataset, *rest, **named)

    monkeypatch.setattr(image_task, "EvaluationBatches", record)
    settings = {"max_train_steps": 2, "eval_steps": 1, "output_dir": str(tmp_path), "per_device_train_batch_size": 4}
    task = make_task("hf_vqvae", **settings)
    fit(task, task.args, {})
    assert any(data is SPLITS.train for data in opened) and any(data is SPLITS.validation for data in opened)
    assert not any(data is SPLITS.test for data in opened)
    opened.clear()
    result = task.test(tmp_path, Accelerator())
    assert [data is SPLITS.test for data in opened] == [True]
    assert result is not None and result.metrics["num_images"] == 360
    assert result.code_counts.sum() == 360 * 16


def test_without_a_test_split_there_is_no_test(tmp_path: Path):
    assert make_task(splits=SPLITS._replace(test=None)).test(tmp_path, Accelerator()) is None


def test_the_saved_average_is_what_is_tested(tmp_path: Path):
    """With weight averaging, the run directory and its test numbers are those of the average."""
    settings = {
        "max_train_steps": 3,
        "average_weights": True,
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4,
    }
    task = make_task(**settings, learning_rate=0.05)
    fit(task, task.args, {})
    saved = load_file(tmp_path / "model.safetensors")
    average, trained = (
        load_file(tmp_path / "checkpoints" / "step-3" / name) for name in ("average.safetensors", "model.safetensors")
    )
    # That one is fitted once the weights stand.
    fitted = saved["observation_variance"] != average.pop("observation_variance")
    assert fitted.all() and all(torch.equal(saved[name], tensor) for name, tensor in average.items() if name in saved)
    weight = next(name for name in saved if name.startswith("encoder") and saved[name].ndim == 4)
    assert not torch.equal(saved[weight], trained[weight])
    result = task.test(tmp_path, Accelerator())
    model = task.build(3)
    model.load_state_dict(saved)
    assert isinstance(model, nn.Module) and result is not None
    again = tasks.evaluate(model, task.processor, task.in_order(SPLITS.test, 0, 1))
    assert np.isclose(result.metrics["psnr"], again.metrics["psnr"])
