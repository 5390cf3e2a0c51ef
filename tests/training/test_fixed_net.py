"""The benchmark of all quantizers on one net: its rows, its jobs, and what short runs share."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fixed_net
import short_runs
from fixed_net_rows import CURES, ROWS, Row
from hf_vq import SQVAEConfig, SQVAEModel, VQVAEConfig, VQVAEModel
from hf_vq.models.image_processing_vq import VQImageProcessor

SMALL = {"codebook_size": 8, "hidden_channels": [8, 64], "num_residual_blocks": 1, "residual_channels": 8}


@pytest.fixture(autouse=True)
def room(tmp_path, monkeypatch):
    """A folder to work in, and one thread, as the jobs have it: here they run in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(short_runs, "ROWS_AT_ONCE", 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save_pictures(folder: Path, counts: dict[str, int], mode: str = "RGB", seed: int = 0) -> str:
    generator = np.random.default_rng(seed)
    for split, count in counts.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            shape = (8, 8, 3) if mode == "RGB" else (8, 8)
            pixels = generator.integers(256, size=shape, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / split / f"{index:03}.png")
    return str(folder)


@pytest.fixture
def pictures(tmp_path) -> str:
    return save_pictures(tmp_path / "pictures", {"train": 60, "test": 12})


def run(pictures: str, *flags: str) -> None:
    fixed_net.main(["--dataset_name", pictures, "--num_processes", "0", "--batch_size", "4", "--epochs", "1", *flags])


@pytest.fixture
def small_rows(monkeypatch):
    """Two rows that train in a moment, and one whose config refuses it."""
    rows = {
        "wrong": Row("wrong", VQVAEModel, {"quantizer": "ema", "codebook_init": "zeros"}),
        "ema": ROWS["ema"],
        "sqvae-product": ROWS["sqvae-product"],
    }
    monkeypatch.setattr(fixed_net, "ROWS", rows)
    net = fixed_net.authors_net
    monkeypatch.setattr(
        fixed_net, "authors_net", lambda side, channels, **fields: net(side, channels, **SMALL | fields)
    )


class TestPixels:
    @pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)], ids=["colour", "grey"])
    def test_pixels_are_the_pictures_and_are_kept(self, tmp_path, monkeypatch, mode, channels):
        name = save_pictures(tmp_path / "data", {"train": 5, "test": 3}, mode)
        pixels = short_runs.load_pixels(name, "test")
        expected = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "data" / "test").iterdir())]
        assert (pixels.shape, pixels.dtype) == ((3, channels, 8, 8), torch.uint8)
        # A stream of a folder comes in a fixed order of its own.
        assert sorted(x.tobytes() for x in pixels.permute(0, 2, 3, 1).numpy()) == sorted(x.tobytes() for x in expected)
        monkeypatch.setattr(short_runs, "load_images", None)
        assert torch.equal(short_runs.load_pixels(name, "test"), pixels)
        assert torch.equal(short_runs.load_pixels(name, "test", limit=2), pixels[:2])

    def test_changed_data_are_decoded_anew(self, tmp_path):
        name = save_pictures(tmp_path / "data", {"train": 4})
        before = short_runs.load_pixels(name, "train")
        save_pictures(tmp_path / "data", {"train": 4}, seed=1)
        assert not torch.equal(short_runs.load_pixels(name, "train"), before)

    def test_first_images_of_a_split_are_those_of_the_whole(self, pictures):
        first = short_runs.load_pixels(pictures, "train", limit=7)
        assert torch.equal(first, short_runs.load_pixels(pictures, "train")[:7])

    def test_pixel_values_are_those_of_the_processor(self):
        pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
        processor = VQImageProcessor(num_channels=1, downsampling_factor=4, do_resize=False, do_center_crop=False)
        expected = processor([pixels[0, 0].numpy()], return_tensors="pt").pixel_values
        assert torch.equal(short_runs.to_pixel_values(pixels), expected)

    def test_data_variance_is_that_of_the_pixel_values(self):
        pixels = torch.randint(256, (7, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        expected = short_runs.to_pixel_values(pixels).double().var(correction=0)
        assert short_runs.data_variance(pixels) == pytest.approx(float(expected), rel=1e-6)

    def test_held_out_images_are_the_same_and_never_trained_on(self):
        pixels = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1)
        train, held_out = short_runs.hold_out(pixels, 10)
        assert len(held_out) == 10
        assert sorted(torch.cat([train, held_out]).flatten().tolist()) == list(range(50))
        assert torch.equal(short_runs.hold_out(pixels, 10)[1], held_out)
        with pytest.raises(ValueError, match="cannot hold out 50 of 50"):
            short_runs.hold_out(pixels, 50)


class TestTraining:
    def test_each_epoch_has_every_image_once(self):
        pixels = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
        batches = list(short_runs.shuffled_batches(pixels, epochs=3, batch_size=5, seed=1))
        assert len(batches) == short_runs.planned_steps(10, 3, 5)
        epochs = torch.cat(batches).flatten().view(3, 10)
        assert (epochs.sort(1).values == torch.arange(10)).all()
        assert not torch.equal(epochs[0], epochs[1])

    @pytest.mark.parametrize("precision", ["no", "bf16"])
    def test_seed_decides_and_training_trains(self, precision):
        pixels = torch.randint(256, (32, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

        def trained(seed: int) -> list[float]:
            torch.manual_seed(0)
            model = SQVAEModel(SQVAEConfig(**short_runs.authors_net(8, 3, **SMALL, codebook_dim=64)))
            torch.seed()  # what was drawn before must not matter
            losses: list[float] = []
            options = {"epochs": 2, "batch_size": 8, "learning_rate": 3e-3, "mixed_precision": precision, "seed": seed}
            keep = lambda step, model, output: losses.append(output.loss.item())  # noqa: E731  shorter than a def
            short_runs.train_short(model, pixels, on_step=keep, **options)
            return losses

        first = trained(1)
        assert len(first) == 8
        assert first[-1] < first[0]
        assert trained(1) == first
        assert trained(2) != first

    def test_loss_that_is_not_finite_stops(self):
        model = VQVAEModel(VQVAEConfig(**short_runs.authors_net(8, 3, **SMALL)))
        with torch.no_grad():
            next(model.decoder.parameters()).fill_(math.nan)
        pixels = torch.zeros(8, 3, 8, 8, dtype=torch.uint8)
        with pytest.raises(FloatingPointError, match="nan at step 2 of 2"):
            short_runs.train_short(model, pixels, epochs=1, batch_size=4, learning_rate=1e-3, seed=0)


@pytest.mark.parametrize("name", ROWS)
def test_every_row_trains_on_the_authors_net(name):
    row = ROWS[name]
    config = row.model_class.config_class(**short_runs.authors_net(8, 3, **row.fields))
    assert config.codebook_size == 512
    model = row.model_class(config).train()
    output = model(torch.rand(8, 3, 8, 8) * 2 - 1)
    output.loss.backward()
    model.step()
    assert output.loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.encoder.parameters())


def test_plain_rows_have_the_authors_parameters():
    for name in ("gradient", "sqvae-1"):
        row = ROWS[name]
        model = row.model_class(row.model_class.config_class(**short_runs.authors_net(32, 3, **row.fields)))
        # 154,336 in the encoder, 154,147 in the decoder, 32,768 in the codebook, and sigma_phi^2 of SQ-VAE.
        assert sum(p.numel() for p in model.parameters()) - 341_251 in (0, 1)


def test_cures_are_named_where_they_are_on():
    for row in ROWS.values():
        assert ("revival" in row.label) == (row.fields.get("revive_below", 0) == CURES["revive_below"])
        assert ("k-means" in row.label) == (row.fields.get("codebook_init") == "kmeans")


class TestJobs:
    def test_jobs_go_on_after_a_failure_and_are_done_once(self, pictures, small_rows, monkeypatch, tmp_path):
        out = tmp_path / "out"
        flags = ["--output_dir", str(out), "--seeds", "0", "1", "--rows"]
        with pytest.raises(SystemExit, match=r"(?s)1 of 2 trainings failed.*wrong-seed0: .*codebook_init.*zeros"):
            run(pictures, "--output_dir", str(out), "--seeds", "0", "--rows", "wrong", "ema")
        run(pictures, *flags, "ema", "sqvae-product")
        assert sorted(path.name for path in out.glob("*.json")) == [
            "ema-seed0.json", "ema-seed1.json", "sqvae-product-seed0.json", "sqvae-product-seed1.json",
        ]  # fmt: skip
        record = json.loads((out / "sqvae-product-seed1.json").read_text())
        assert record["settings"]["images"] == 54
        assert record["settings"]["model"]["temperature_decay_steps"] == 13
        assert record["metrics"]["num_images"] == 12
        monkeypatch.setattr(fixed_net, "train_short", None)
        run(pictures, *flags, "ema", "sqvae-product")
        with pytest.raises(ValueError, match=r"learning_rate is 0.001 there and 0.1 here"):
            run(pictures, *flags, "ema", "--learning_rate", "0.1")

    def test_first_seed_of_every_row_comes_first(self):
        options = fixed_net.parse(["--rows", "fsq", "ema", "--seeds", "3", "4"])
        jobs = fixed_net.plan(
            options, torch.zeros(64, 3, 32, 32, dtype=torch.uint8) + torch.arange(32, dtype=torch.uint8)
        )
        assert list(jobs) == ["fsq-seed3", "ema-seed3", "fsq-seed4", "ema-seed4"]

    def test_table_and_picture_tell_what_is_there(self, pictures, small_rows, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(fixed_net, "WARM_UP_STEPS", 1)
        monkeypatch.setattr(fixed_net, "TIMED_STEPS", 2)
        flags = ["--output_dir", str(tmp_path / "out"), "--rows", "ema", "sqvae-product"]
        run(pictures, *flags, "--seeds", "0")
        run(pictures, *flags[:2], "--rows", "ema", "--seeds", "1")
        run(pictures, *flags, "--time")
        capsys.readouterr()
        run(pictures, *flags, "--table")
        text = capsys.readouterr().out
        psnr = [json.loads((tmp_path / "out" / f"ema-seed{n}.json").read_text())["metrics"]["psnr"] for n in (0, 1)]
        of_ema, of_sqvae = [line.split(" | ") for line in text.splitlines() if "EMA" in line or "SQ-VAE I" in line]
        assert of_ema[3] == f"{sum(psnr) / 2:.2f} ± {abs(psnr[0] - psnr[1]) / 2:.2f}"
        assert of_ema[2] == str(2 * 2 * 3)
        assert "1 of 2 seeds" in of_sqvae[0]
        rates = json.loads((tmp_path / "out" / "times.json").read_text())
        assert of_ema[-1] == f"{rates['ema']['images_per_second']:.0f} |"
        assert (tmp_path / "out" / "table.md").read_text() in text
        with Image.open(tmp_path / "out" / "figure.png") as figure:
            assert figure.width > 900

    def test_results_of_other_plans_make_no_table(self, pictures, small_rows, tmp_path):
        flags = ["--output_dir", str(tmp_path / "out")]
        with pytest.raises(FileNotFoundError, match="no results yet"):
            run(pictures, *flags, "--table")
        run(pictures, *flags, "--rows", "ema", "--seeds", "0")
        run(pictures, *flags, "--rows", "sqvae-product", "--seeds", "0", "--learning_rate", "0.01")
        with pytest.raises(ValueError, match="learning_rate"):
            run(pictures, *flags, "--table")
