"""The metrics against scikit-image, scipy and loops written from their definitions."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from scipy.linalg import sqrtm
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity

from hf_vq.metrics import (
    CodeCounts,
    FrechetDistance,
    ImageMeans,
    ReconstructionMetrics,
    count_codes,
    frechet_distance,
    mse,
    perplexity,
    psnr,
    psnr_of_mse,
    ssim,
    usage,
)

EXACT_PSNR = 10 * math.log10(12 * 255**2)


def image_pairs(shape: tuple[int, ...], noise: int = 20, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth images with flat parts, and noisy copies of them: uint8, (B, C, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = 255 * torch.rand(*shape[:2], 4, 4, generator=generator)
    originals = torch.nn.functional.interpolate(coarse, size=shape[2:], mode="bilinear")
    originals[: shape[0] // 2, ..., : shape[3] // 2] = 200
    error = torch.randint(-noise, noise + 1, shape, generator=generator)
    return originals.to(torch.uint8), (originals + error).clamp(0, 255).to(torch.uint8)


def unit_arrays(images: torch.Tensor) -> list[np.ndarray]:
    return list(images.permute(0, 2, 3, 1).numpy() / 255)


SHAPES = [(4, 3, 32, 32), (3, 1, 11, 17), (2, 3, 64, 40)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mse_and_psnr_equal_scikit_image(shape):
    originals, reconstructions = image_pairs(shape)
    pairs = list(zip(unit_arrays(originals), unit_arrays(reconstructions), strict=True))
    errors = [mean_squared_error(x, y) for x, y in pairs]
    torch.testing.assert_close(mse(originals, reconstructions), torch.tensor(errors, dtype=torch.float64))
    ratios = [peak_signal_noise_ratio(x, y, data_range=1) for x, y in pairs]
    torch.testing.assert_close(psnr(originals, reconstructions), torch.tensor(ratios, dtype=torch.float64))


@pytest.mark.parametrize("noise", [1, 60])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ssim_equals_scikit_image(shape, noise, monkeypatch):
    monkeypatch.setattr("hf_vq.metrics._SSIM_CHUNK", 2 * shape[1] * shape[2] * shape[3])
    originals, reconstructions = image_pairs(shape, noise)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1}
    expected = [
        structural_similarity(x, y, channel_axis=-1, **settings)
        for x, y in zip(unit_arrays(originals), unit_arrays(reconstructions), strict=True)
    ]
    torch.testing.assert_close(ssim(originals, reconstructions).numpy(), np.array(expected), rtol=0, atol=1e-9)


def test_ssim_of_an_image_with_itself_is_one_and_needs_a_whole_window():
    originals, _ = image_pairs((2, 3, 16, 16))
    torch.testing.assert_close(ssim(originals, originals), torch.ones(2, dtype=torch.float64))
    assert ssim(originals[..., :11, :11], originals[..., :11, :11]) is not None
    assert ssim(originals[..., :10, :], originals[..., :10, :]) is None


def test_an_exact_image_counts_as_rounding_noise_and_only_that_one():
    originals = torch.full((2, 1, 8, 8), 7, dtype=torch.uint8)
    reconstructions = originals.clone()
    reconstructions[1, 0, 0, 0] += 1
    assert mse(originals, reconstructions).tolist() == [0, 1 / (64 * 255**2)]
    assert psnr(originals, reconstructions).tolist() == pytest.approx([EXACT_PSNR, 10 * math.log10(64 * 255**2)])
    assert psnr_of_mse(torch.tensor(0.0)).item() == pytest.approx(EXACT_PSNR)
    assert psnr_of_mse(torch.tensor(0.01, dtype=torch.float64)).item() == pytest.approx(20)


@pytest.mark.parametrize("function", [mse, psnr, ssim])
def test_a_batch_may_be_empty(function):
    images = torch.zeros(0, 3, 16, 16, dtype=torch.uint8)
    assert function(images, images).shape == (0,)


@pytest.mark.parametrize("function", [mse, psnr, ssim])
def test_images_must_be_8_bit_and_alike(function):
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"reconstructions must be uint8.*float32"):
        function(images, images.float())
    with pytest.raises(ValueError, match=r"\(2, 3, 16, 16\) and \(2, 3, 16, 12\)"):
        function(images, images[..., :12])
    with pytest.raises(ValueError, match="one shape"):
        function(images[0], images[0])


def naive_perplexity(counts: list[list[int]]) -> float:
    values = []
    for row in counts:
        shares = [count / sum(row) for count in row]
        values.append(math.exp(-sum(share * math.log(share) for share in shares if share)))
    return sum(values) / len(values)


def test_perplexity_and_usage_are_means_over_codebooks():
    counts = [[5, 0, 3, 2], [1, 1, 1, 1]]
    assert perplexity(torch.tensor(counts)) == pytest.approx(naive_perplexity(counts), rel=1e-12)
    assert usage(torch.tensor(counts)) == pytest.approx((3 / 4 + 1) / 2)
    assert perplexity(torch.tensor([[0, 9, 0]])) == 1
    assert perplexity(torch.full((1, 512), 10**12)) == pytest.approx(512)
    with pytest.raises(ValueError, match="at least one image"):
        perplexity(torch.tensor([[1, 2], [0, 0]]))


@pytest.mark.parametrize("num_codebooks", [1, 3])
def test_count_codes_equals_a_loop(num_codebooks):
    tokens = torch.randint(0, 6, (2, 4, 5, num_codebooks), generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(num_codebooks, 7, dtype=torch.int64)
    for row in tokens.reshape(-1, num_codebooks).tolist():
        for codebook, token in enumerate(row):
            expected[codebook, token] += 1
    shaped = tokens.squeeze(-1) if num_codebooks == 1 else tokens
    assert torch.equal(count_codes(shaped, 7, num_codebooks), expected)
    counts = CodeCounts(7, num_codebooks)
    counts.update(shaped[:1])
    counts.update(shaped[1:].to(torch.uint8))
    assert torch.equal(counts.compute(), expected)


@pytest.mark.parametrize("num_codebooks", [1, 3])
def test_flat_tokens_count_as_those_on_the_grid(num_codebooks):
    tokens = torch.randint(0, 6, (2, 4, 5, num_codebooks), generator=torch.Generator().manual_seed(0))
    expected = count_codes(tokens, 6, num_codebooks)
    assert torch.equal(count_codes(tokens.flatten(1), 6, num_codebooks), expected)
    assert torch.equal(count_codes(tokens.flatten(), 6, num_codebooks), expected)


@pytest.mark.parametrize(
    ("shape", "num_codebooks"),
    [((2, 4, 4), 3), ((2, 4, 6), 3), ((2, 4, 4, 2), 3), ((2, 16), 3), ((2, 4, 4, 3), 1), ((2, 4, 4, 6), 3)],
    ids=["one-codebook", "width-divisible", "two", "flat", "several-as-one", "multiple"],
)
def test_tokens_of_another_number_of_codebooks_are_refused(shape, num_codebooks):
    # Counting them would mix codebooks, and nobody would see it.
    with pytest.raises(ValueError, match=rf"{re.escape(str(shape))} do not fit {num_codebooks} codebooks"):
        count_codes(torch.zeros(shape, dtype=torch.int64), 4, num_codebooks)


@pytest.mark.parametrize("token", [-1, 4])
def test_a_token_out_of_range_is_refused(token):
    with pytest.raises(ValueError, match=rf"\[0, 4\), got .*{token}"):
        count_codes(torch.tensor([[[2, token]]]), 4)


def test_means_weigh_batches_by_their_images():
    means = ImageMeans("loss")
    means.update(3, loss=torch.tensor(1.0))
    means.update(1, loss=torch.tensor(5.0, dtype=torch.bfloat16))
    assert means.compute() == means.compute() == {"loss": 2.0}
    with pytest.raises(ValueError, match="No images"):
        ImageMeans("loss").compute()


def test_sums_do_not_lose_small_terms():
    means = ImageMeans("loss")
    means.update(1, loss=torch.tensor(2.0**24))
    for _ in range(3):
        means.update(1, loss=torch.tensor(1.0))
    assert means.compute()["loss"] == (2**24 + 3) / 4


def test_reconstruction_metrics_do_not_depend_on_the_batches():
    originals, reconstructions = image_pairs((5, 3, 16, 16))
    reconstructions[0] = originals[0]
    metrics = ReconstructionMetrics()
    metrics.update(originals[:4], reconstructions[:4])
    metrics.update(originals[4:], reconstructions[4:])
    errors = mse(originals, reconstructions)
    assert metrics.compute() == pytest.approx(
        {
            "mse": errors.mean().item(),
            "psnr": psnr(originals, reconstructions).mean().item(),
            "psnr_of_mse": -10 * math.log10(errors.mean()),
            "ssim": ssim(originals, reconstructions).mean().item(),
        }
    )
    assert metrics.compute()["psnr"] != pytest.approx(metrics.compute()["psnr_of_mse"])


def test_one_image_too_small_for_ssim_leaves_it_out():
    metrics = ReconstructionMetrics()
    metrics.update(*image_pairs((2, 3, 16, 16)))
    metrics.update(*image_pairs((2, 3, 8, 8)))
    result = metrics.compute()
    assert result["ssim"] is None and result["psnr"] > 0


def reference_frechet(x: np.ndarray, y: np.ndarray) -> float:
    covariances = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = np.real(sqrtm(covariances[0] @ covariances[1]))
    return np.square(x.mean(0) - y.mean(0)).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)


@pytest.mark.parametrize("offset", [0.0, 1000.0], ids=["centred", "far from zero"])
def test_streamed_frechet_distance_equals_scipy(offset):
    generator = np.random.default_rng(0)
    x = offset + generator.normal(size=(200, 6)) @ generator.normal(size=(6, 6))
    y = offset + 0.5 + generator.normal(size=(200, 6)) @ generator.normal(size=(6, 6))
    distance = FrechetDistance()
    for part in (slice(0, 1), slice(1, 120), slice(120, None)):
        distance.update(torch.from_numpy(x[part]), torch.from_numpy(y[part]))
    assert distance.compute() == pytest.approx(reference_frechet(x, y), rel=1e-6)
    assert distance.compute() == distance.compute()


def test_frechet_distance_with_singular_covariances():
    # Two commuting Gaussians on a line in 4 dimensions: |m1 - m2|² + (s1 - s2)².
    direction = torch.tensor([0.5, 0.5, 0.5, 0.5])
    line = direction.outer(direction)
    distance = frechet_distance(torch.zeros(4), 9 * line, 3 * direction, 4 * line)
    assert distance == pytest.approx(9 + 1, rel=1e-6)
    assert frechet_distance(direction, line, direction, line) == pytest.approx(0, abs=1e-6)


def test_a_distance_needs_two_images():
    distance = FrechetDistance()
    assert distance.compute() is None
    distance.update(torch.ones(1, 3), torch.zeros(1, 3))
    assert distance.compute() is None


# Two processes.


def tokens_of(rank: int) -> torch.Tensor:
    """Unequal numbers of images, three codebooks of 8; a code that only one of the processes sees in each."""
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(0, 4, (2 + 3 * rank, 4, 4, 3), generator=generator)
    tokens[0, 0, 0] = torch.tensor([5, 6, 7]) if rank else torch.tensor([4, 4, 4])
    return tokens


def count_on_a_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    counts = CodeCounts(8, 3)
    for part in tokens_of(rank).split(2):
        counts.update(part)
    joint, again = counts.compute(), counts.compute()
    assert torch.equal(joint, again)
    (Path(folder) / f"{rank}.json").write_text(json.dumps([joint.tolist(), perplexity(joint), usage(joint)]))
    dist.destroy_process_group()


def test_two_processes_count_codebook_by_codebook(tmp_path):
    mp.spawn(count_on_a_rank, args=(str(tmp_path),), nprocs=2)
    joint = torch.cat([tokens_of(0), tokens_of(1)]).reshape(-1, 3)
    counts = [[int((joint[:, book] == code).sum()) for code in range(8)] for book in range(3)]
    assert counts[0] != counts[1] != counts[2]
    for rank in range(2):
        found, joint_perplexity, joint_usage = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == counts
        assert joint_perplexity == pytest.approx(naive_perplexity(counts), rel=1e-12)
        assert joint_usage == pytest.approx(sum(sum(map(bool, row)) for row in counts) / 24)
