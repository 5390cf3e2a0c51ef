"""The wrappers for Hugging Face evaluate give what the plain functions give."""

import numpy as np
import pytest
import torch
from PIL import Image

evaluate = pytest.importorskip("evaluate")

from hf_vq import metrics  # noqa: E402  evaluate is optional
from hf_vq.evaluate_metrics import CodePerplexity, CodeUsage, Mse, Psnr, Ssim  # noqa: E402  evaluate is optional


@pytest.mark.parametrize("channels", [1, 3])
def test_image_metrics(channels):
    generator = np.random.default_rng(0)
    originals, reconstructions = generator.integers(0, 256, (2, 5, 16, 16, channels)).astype(np.uint8)
    pair = [torch.from_numpy(images).permute(0, 3, 1, 2) for images in (originals, reconstructions)]
    pictures = [[Image.fromarray(image.squeeze()) for image in images] for images in (reconstructions, originals)]
    found = evaluate.combine([Mse(), Psnr(), Ssim()]).compute(predictions=pictures[0], references=pictures[1])
    for function in (metrics.mse, metrics.psnr, metrics.ssim):
        assert found[function.__name__] == pytest.approx(function(*pair).mean().item())


def test_arrays_come_in_batches_and_small_ones_have_no_ssim():
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    metric = Ssim()
    metric.add_batch(predictions=list(images[:2]), references=list(images[:2]))
    metric.add_batch(predictions=list(images[2:]), references=list(images[2:]))
    assert metric.compute() == {"ssim": None}


def test_code_metrics():
    tokens = [[0, 0, 1, 2], [2, 2, 2, 2]]
    counts = torch.tensor([[2, 1, 5, 0]])
    assert CodePerplexity().compute(predictions=tokens, codebook_size=4) == {"perplexity": metrics.perplexity(counts)}
    assert CodeUsage().compute(predictions=tokens, codebook_size=4) == {"usage": 0.75}


def test_code_metrics_of_several_codebooks():
    tokens = [[0, 3, 0, 2], [1, 2, 0, 2, 0, 0]]  # codebook fastest; grids of 1x2 and 1x3
    counts = torch.tensor([[4, 1, 0, 0], [1, 0, 3, 1]])
    settings = {"predictions": tokens, "codebook_size": 4, "num_codebooks": 2}
    assert CodePerplexity().compute(**settings) == {"perplexity": metrics.perplexity(counts)}
    assert CodeUsage().compute(**settings) == {"usage": 5 / 8}
    with pytest.raises(ValueError, match=r"predictions have \[1, 3\] tokens, no multiples of num_codebooks=2"):
        CodeUsage().compute(predictions=[[0, 1], [0, 1, 2], [0]], codebook_size=4, num_codebooks=2)
