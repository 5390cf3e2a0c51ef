"""`evaluate` on a network whose every number can be computed by hand, alone and in two processes; its files."""

import json
import math
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModel, ResNetConfig, ViTConfig

from hf_vq import SQVAEConfig, SQVAEModel, VQImageProcessor, VQVAEConfig
from hf_vq.evaluation import STATISTICS, Evaluation, evaluate, to_uint8, write_evaluation
from hf_vq.features import FeatureNetwork
from hf_vq.metrics import FrechetDistance, mse, perplexity, psnr, ssim, usage

PROCESSOR = SimpleNamespace(do_rescale=True, rescale_factor=1 / 255, do_normalize=True, image_mean=0.5, image_std=0.5)
KEYS = "loss reconstruction_loss embedding_loss mse psnr ssim psnr_of_mse perplexity usage num_images images_per_second"


class GreyLevels(nn.Module):
    """Each 4x4 patch becomes the nearest of K grey levels. It has the face of the tokenizers, and nothing to learn."""

    def __init__(self, codebook_size: int = 16) -> None:
        super().__init__()
        self.config = SimpleNamespace(codebook_size=codebook_size, num_codebooks=1)
        self.levels = nn.Parameter(torch.linspace(-1, 1, codebook_size))
        self.frozen = nn.Dropout(0.5)
        self.seen: list[tuple[torch.dtype, torch.dtype, bool]] = []

    def forward(self, pixel_values: Tensor, return_loss: bool = True) -> SimpleNamespace:
        patches = nn.functional.avg_pool2d(pixel_values.mean(1), 4)
        tokens = (patches[..., None] - self.levels).abs().argmin(-1)
        decoded = self.levels[tokens].repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand_as(pixel_values)
        self.seen.append((pixel_values.dtype, (self.levels @ self.levels).dtype, torch.is_grad_enabled()))
        decoded = 1.2 * decoded + float(self.training)
        error = (decoded - pixel_values).square().mean()
        return SimpleNamespace(
            loss=error + 2, reconstruction_loss=error, embedding_loss=torch.tensor(2.0),
            decoded_pixel_values=decoded, image_tokens=tokens, perplexity=torch.tensor(math.nan),
        )  # fmt: skip


class ChannelMeans(nn.Module):
    """A feature network: pooler_output is the mean of each channel, and of its square."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_channels=3, image_size=12)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        features = torch.cat([pixel_values, pixel_values.square()], 1).mean((2, 3)) * self.scale
        return SimpleNamespace(pooler_output=features, last_hidden_state=None)


def images_of(count: int, size: int = 16, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def batches_of(images: Tensor, *sizes: int) -> list[dict[str, Tensor]]:
    return [{"pixel_values": part.float() / 127.5 - 1, "labels": None} for part in images.split(list(sizes))]


def without_time(evaluation: Evaluation) -> dict[str, float | None]:
    return {name: value for name, value in evaluation.metrics.items() if name != "images_per_second"}


def test_every_number_equals_its_definition():
    images, model = images_of(7), GreyLevels().eval()
    output = model(images.float() / 127.5 - 1)
    decoded = ((output.decoded_pixel_values + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    measured = evaluate(model, PROCESSOR, batches_of(images, 4, 3))
    counts = torch.bincount(output.image_tokens.flatten(), minlength=16)[None]
    assert torch.equal(measured.code_counts, counts) and measured.code_counts.dtype == torch.int64
    assert set(measured.metrics) == set(KEYS.split())
    assert without_time(measured) == pytest.approx(
        {
            "loss": output.loss.item(),
            "reconstruction_loss": output.reconstruction_loss.item(),
            "embedding_loss": 2,
            "mse": mse(images, decoded).mean().item(),
            "psnr": psnr(images, decoded).mean().item(),
            "psnr_of_mse": -10 * math.log10(mse(images, decoded).mean()),
            "ssim": ssim(images, decoded).mean().item(),
            "perplexity": perplexity(counts),
            "usage": usage(counts),
            "num_images": 7,
        },
        rel=1e-6,
    )
    assert measured.metrics["images_per_second"] > 0


def test_refined_tokens_have_numbers_of_their_own():
    torch.manual_seed(0)
    config = SQVAEConfig(image_size=8, codebook_size=16, hidden_channels=[4, 8], residual_channels=4)
    model, images = SQVAEModel(config).eval(), images_of(6, size=8)
    plain, refined = (evaluate(model, PROCESSOR, batches_of(images, 4, 2), refine=rounds) for rounds in (0, 2))
    tokens = model.encode(images.float() / 127.5 - 1, refine=2).image_tokens
    assert torch.equal(refined.code_counts, torch.bincount(tokens.flatten(), minlength=16)[None])
    decoded = to_uint8(model.decode(tokens).pixel_values, PROCESSOR)
    assert refined.metrics["mse"] == pytest.approx(mse(images, decoded).mean().item(), rel=1e-6)
    assert refined.metrics["mse"] < plain.metrics["mse"]
    own = {"loss", "reconstruction_loss", "embedding_loss", *STATISTICS}
    assert plain.metrics.keys() - refined.metrics.keys() == own


def test_small_images_have_no_ssim():
    assert evaluate(GreyLevels(), PROCESSOR, batches_of(images_of(3, size=8), 3)).metrics["ssim"] is None


def test_the_model_runs_in_evaluation_mode_and_keeps_its_own():
    model = GreyLevels().train()
    model.frozen.eval()
    expected = without_time(evaluate(GreyLevels().eval(), PROCESSOR, batches_of(images_of(3), 3)))
    assert without_time(evaluate(model, PROCESSOR, batches_of(images_of(3), 3))) == expected
    assert model.training and not model.frozen.training
    with pytest.raises(ValueError, match="No images"):
        evaluate(model, PROCESSOR, [])
    assert model.training and not model.frozen.training


def test_it_runs_in_float32_whatever_surrounds_it():
    model = GreyLevels()
    batches = [{"pixel_values": batch["pixel_values"].double()} for batch in batches_of(images_of(3), 3)]
    expected = without_time(evaluate(model, PROCESSOR, batches))
    # As Accelerate does for mixed precision:
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    with torch.autocast("cpu", torch.bfloat16):
        assert without_time(evaluate(model, PROCESSOR, batches)) == expected
    assert model.seen == [(torch.float32, torch.float32, False)] * 2


def test_a_narrow_model_is_measured_on_a_wide_copy():
    model = GreyLevels().to(torch.bfloat16)
    wide = GreyLevels()
    wide.levels.data = model.levels.data.float()
    batches = batches_of(images_of(3), 3)
    measured = evaluate(model, PROCESSOR, batches)
    assert without_time(measured) == without_time(evaluate(wide, PROCESSOR, batches))
    assert model.levels.dtype == torch.bfloat16


def test_wrappers_are_looked_through():
    wrapped = nn.Module()
    wrapped.module = nn.Module()
    wrapped.module._orig_mod = GreyLevels()
    batches = batches_of(images_of(3), 3)
    assert without_time(evaluate(wrapped, PROCESSOR, batches)) == without_time(
        evaluate(GreyLevels(), PROCESSOR, batches)
    )


def test_a_model_that_diverged_is_not_measured():
    model = GreyLevels()
    model.levels.data[3] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        evaluate(model, PROCESSOR, batches_of(images_of(3), 3))


class Stream:
    """Batches of which only the number of images is known."""

    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self.batches, self.num_images = batches, 9

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.batches)


@pytest.mark.parametrize(
    ("wrap", "totals"),
    [(list, {"7", "8"}), (Stream, {"9", "7"}), (iter, {"7"})],
    ids=["list", "num_images", "iterator"],
)
def test_progress_counts_images_and_knows_their_number(wrap, totals, capsys, monkeypatch):
    monkeypatch.setattr("hf_vq.evaluation.tqdm", partial(tqdm, mininterval=0))
    evaluate(GreyLevels(), PROCESSOR, wrap(batches_of(images_of(7), 4, 3)), progress=True)
    shown = capsys.readouterr().err
    assert "7/7" in shown and "img/s" in shown
    assert set(re.findall(r"\d/(\d+)", shown)) == totals


def test_without_progress_nothing_is_shown(capsys):
    evaluate(GreyLevels(), PROCESSOR, batches_of(images_of(7), 4, 3))
    assert capsys.readouterr().err == ""


def test_pixel_values_become_the_images_that_postprocess_gives():
    values = 1.2 * torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    channels = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    for settings in ({}, {"do_normalize": False}, channels):
        processor = VQImageProcessor(size={"shortest_edge": 8}, **settings)
        expected = np.stack(processor.postprocess(values, output_type="np")).transpose(0, 3, 1, 2)
        assert np.array_equal(to_uint8(values, processor).numpy(), expected)
    every_level = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(every_level.float() / 127.5 - 1, PROCESSOR), every_level)


# The Fréchet distance.


def tiny_vit(pooler: bool = True) -> nn.Module:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16, patch_size=8
    )
    return AutoModel.from_config(config, add_pooling_layer=pooler).eval()


def test_features_come_from_the_models_own_processor_and_pooler(tmp_path):
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    model, images = tiny_vit(), images_of(4, size=8)
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.1, 0.2, 0.3], image_std=[0.5] * 3)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    pictures = [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).numpy()]
    with torch.no_grad():
        expected = model(**processor(pictures, return_tensors="pt")).pooler_output
    torch.testing.assert_close(FeatureNetwork.load(tmp_path)(images), expected)
    torch.testing.assert_close(FeatureNetwork(model, processor)(images), expected)


def test_without_a_processor_images_are_resized_and_scaled(tmp_path):
    model, images = tiny_vit(), images_of(4, size=16)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(images.float() / 127.5 - 1).pooler_output
    torch.testing.assert_close(FeatureNetwork.load(tmp_path)(images), expected)
    grey = images[:, :1]
    torch.testing.assert_close(
        FeatureNetwork(model)(grey), FeatureNetwork(model)(grey.expand(-1, 3, -1, -1)), rtol=0, atol=0
    )
    assert FeatureNetwork(model)(images_of(2, size=40)).shape == (2, 8)


def test_a_pooler_that_nobody_trained_is_not_used(tmp_path):
    model, images = tiny_vit(pooler=False), images_of(4)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(images.float() / 127.5 - 1).last_hidden_state.mean(1)
    torch.testing.assert_close(FeatureNetwork.load(tmp_path)(images), expected)


def test_features_of_a_convolutional_net():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    model = AutoModel.from_config(config).eval()
    images = images_of(2)
    pooled = FeatureNetwork(model)(images)
    assert pooled.shape == (2, 8)
    torch.testing.assert_close(FeatureNetwork(model, use_pooler=False)(images), pooled)


class Perfect(GreyLevels):
    """Returns what it was given."""

    def forward(self, pixel_values: Tensor, return_loss: bool = True) -> SimpleNamespace:
        output = super().forward(pixel_values)
        output.decoded_pixel_values = pixel_values
        return output


def test_frechet_distance_is_that_of_the_features_of_8_bit_images():
    images, features = images_of(12), ChannelMeans()
    decoded = GreyLevels().eval()(images.float() / 127.5 - 1).decoded_pixel_values
    network, distance = FeatureNetwork(features), FrechetDistance()
    distance.update(network(images), network(to_uint8(decoded, PROCESSOR)))
    measured = evaluate(GreyLevels(), PROCESSOR, batches_of(images, 8, 4), fd_model=features).metrics
    assert set(measured) == {*KEYS.split(), "frechet_distance"}
    assert measured["frechet_distance"] == pytest.approx(distance.compute(), rel=1e-6) and distance.compute() > 0.01
    perfect = evaluate(Perfect(), PROCESSOR, batches_of(images, 8, 4), fd_model=features).metrics
    assert perfect["frechet_distance"] == pytest.approx(0, abs=1e-6)


def test_frechet_distance_under_a_model_on_disk(tmp_path):
    tiny_vit().save_pretrained(tmp_path)
    batches = batches_of(images_of(6), 6)
    measured = evaluate(GreyLevels(), PROCESSOR, batches, fd_model=str(tmp_path)).metrics
    loaded = evaluate(GreyLevels(), PROCESSOR, batches, fd_model=tiny_vit()).metrics
    assert measured["frechet_distance"] == pytest.approx(loaded["frechet_distance"], rel=1e-6)
    assert measured["frechet_distance"] > 0


# What the quantizer knows of its posterior.


class Spread(nn.Module):
    """A quantizer with a posterior of its own kind: its entropy is the mean of the latents."""

    def forward(self, latents: Tensor, log_variance: Tensor | None = None) -> Tensor:
        return latents

    def statistics(self, latents: Tensor, log_variance: Tensor | None = None) -> dict[str, Tensor]:
        assert not torch.is_grad_enabled() and not self.training
        return {"posterior_entropy": latents.mean(), "argmax_probability": log_variance.mean(), "own": latents.sum()}


class Stochastic(GreyLevels):
    """Its encoder may be asked once for each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.quantizer = Spread()

    def forward(self, pixel_values: Tensor, return_loss: bool = True) -> SimpleNamespace:
        self.quantizer(pixel_values.mean(1), log_variance=pixel_values.amax((1, 2, 3)))
        return super().forward(pixel_values)


def test_statistics_of_the_posterior_are_means_over_images():
    images, model = images_of(7), Stochastic()
    measured = evaluate(model, PROCESSOR, batches_of(images, 4, 3)).metrics
    values = images.double() / 127.5 - 1
    assert set(measured) == {*KEYS.split(), "posterior_entropy", "argmax_probability"}
    assert measured["posterior_entropy"] == pytest.approx(values.mean().item(), rel=1e-5)
    assert measured["argmax_probability"] == pytest.approx(values.amax((1, 2, 3)).mean().item(), rel=1e-5)
    assert len(model.seen) == 2 and not model.quantizer._forward_hooks


@pytest.mark.parametrize("fails", ["statistics", "forward"])
def test_whatever_fails_nobody_goes_on_listening(fails: str, monkeypatch: pytest.MonkeyPatch):
    def fail(*args: object, **kwargs: object) -> None:
        raise ValueError("broken")

    model = Stochastic()
    monkeypatch.setattr(Spread, fails, fail)
    with pytest.raises(ValueError, match="broken"):
        evaluate(model, PROCESSOR, batches_of(images_of(3), 3))
    assert not model.quantizer._forward_hooks


FAMILIES = {
    "global": SQVAEConfig,
    "diagonal": partial(SQVAEConfig, covariance="diagonal"),
    "two-codebooks": partial(SQVAEConfig, num_codebooks=2),
    "vmf": partial(SQVAEConfig, quantizer="vmf"),
    "ema": VQVAEConfig,
    "fsq": partial(VQVAEConfig, quantizer="fsq", levels=[4, 4]),
}


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
def test_every_family_is_measured_with_what_it_knows(make: Any):
    torch.manual_seed(0)
    size = {} if make is FAMILIES["fsq"] else {"codebook_size": 16}
    model = AutoModel.from_config(make(image_size=16, hidden_channels=[8], residual_channels=8, **size))
    metrics = evaluate(model, PROCESSOR, batches_of(images_of(6), 4, 2)).metrics
    known = {"posterior_entropy", "argmax_probability", "dequantization_variance"} & metrics.keys()
    if isinstance(model.config, VQVAEConfig):
        assert not known
        return
    pixel_values = images_of(6).float() / 127.5 - 1
    with torch.no_grad():
        encoded = model.eval().encoder(pixel_values)
        latents, log_variance = encoded if isinstance(encoded, tuple) else (encoded, None)
        expected = model.quantizer.statistics(latents, log_variance)
    assert {name: metrics[name] for name in known} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, rel=1e-4
    )
    assert 0 < metrics["posterior_entropy"] <= math.log(16) + 1e-5 and 1 / 16 <= metrics["argmax_probability"] <= 1


# Two processes.

SPLITS = {"unequal": ([5, 4], [2]), "one without images": ([5, 4, 2], [])}


def measure(rank: int, folder: Path, sizes: tuple[list[int], list[int]]) -> Evaluation:
    before = 0 if rank == 0 else sum(sizes[0])
    images = images_of(11)[before : before + sum(sizes[rank])]
    batches = batches_of(images, *sizes[rank]) if sizes[rank] else []
    return evaluate(Stochastic(), PROCESSOR, batches, fd_model=ChannelMeans())


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {
        name: (without_time(found := measure(rank, folder, sizes)), found.code_counts.tolist())
        for name, sizes in SPLITS.items()
    }
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def test_two_processes_with_unequal_batches_equal_one(tmp_path):
    mp.spawn(worker, args=(tmp_path,), nprocs=2)
    expected = evaluate(Stochastic(), PROCESSOR, batches_of(images_of(11), 11), fd_model=ChannelMeans())
    assert "posterior_entropy" in expected.metrics
    for rank in range(2):
        results = json.loads((tmp_path / f"{rank}.json").read_text())
        assert set(results) == set(SPLITS)
        for metrics, counts in results.values():
            assert metrics == pytest.approx(without_time(expected), rel=1e-6)
            assert counts == expected.code_counts.tolist()


# Files.


def test_evaluation_json_holds_numbers_and_protocol(tmp_path):
    path = tmp_path / "run" / "evaluation.json"
    metrics = {"psnr": 25.5, "ssim": None, "loss": math.inf, "num_images": 10}
    for split in ("validation", "test"):
        write_evaluation(path, Evaluation(metrics, torch.ones(1, 4)), dataset_name="uoft-cs/cifar10", split=split)
    written = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert written["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert written.pop("versions").keys() == {"python", "hf-vq", "torch", "transformers"}
    assert "deterministic" in written.pop("protocol")
    assert written == metrics | {"loss": None, "dataset_name": "uoft-cs/cifar10", "split": "test"}
    assert [file.name for file in path.parent.iterdir()] == ["evaluation.json"]
    with pytest.raises(ValueError, match="psnr: a metric has this name"):
        write_evaluation(path, Evaluation(metrics, torch.ones(1, 4)), psnr=3)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "evaluation.json"
    write_evaluation(path, Evaluation({"psnr": 1.0}, torch.ones(1, 4)))
    before = path.read_text()

    def fill_the_disk(self: Path, text: str, **_: str) -> None:
        with self.open("w") as file:
            file.write(text[:5])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", fill_the_disk)
    with pytest.raises(OSError, match="No space"):
        write_evaluation(path, Evaluation({"psnr": 2.0}, torch.ones(1, 4)))
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]
