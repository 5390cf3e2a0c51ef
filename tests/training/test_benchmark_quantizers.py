"""The benchmark of quantizers: its contenders compute the same, and its tables hold every ratio."""

import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import quantizer_contenders as contenders
from hf_vq.models import stochastic_quantizers
from quantizer_contenders import Problem, Size

BENCHMARKS = Path(__file__).resolve().parents[2] / "training" / "benchmarks"

needs_lucid = pytest.mark.skipif(
    importlib.util.find_spec("vector_quantize_pytorch") is None, reason="vector-quantize-pytorch is not installed"
)
needs_faiss = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss-cpu is not installed")


@pytest.fixture
def problem():
    return Problem(Size(256, 128, 16))


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Latents (B, D, h, w) or sequences (B, n, D) as rows (N, D)."""
    return (tensor.movedim(1, -1) if tensor.ndim == 4 else tensor).detach().reshape(-1, 16)


def nearest(problem: Problem) -> torch.Tensor:
    return torch.cdist(problem.rows, problem.vectors).argmin(dim=1)


@pytest.mark.filterwarnings("ignore")  # the peer warns of what it calls
@pytest.mark.parametrize(
    "name",
    [
        "train_ours",
        "evaluate_ours",
        pytest.param("train_lucid", marks=needs_lucid),
        pytest.param("evaluate_lucid", marks=needs_lucid),
    ],
)
def test_every_step_quantizes_the_same_rows_with_the_same_codes(problem, name):
    quantized = as_rows(getattr(contenders, name)(problem)())
    torch.testing.assert_close(quantized, problem.vectors[nearest(problem)])


@pytest.mark.parametrize("name", ["search_ours", pytest.param("search_faiss", marks=needs_faiss)])
def test_every_search_finds_the_nearest_code(problem, name):
    assert torch.equal(getattr(contenders, name)(problem)(), nearest(problem))


def test_the_floors_do_run(problem):
    contenders.search_floor(problem)()
    assert contenders.anneal_floor(problem)().shape == (256, 16)


def test_both_relaxed_draws_agree_on_the_same_noise(problem, monkeypatch):
    # Uniform numbers of exp(-1) are Gumbel noise of zero.
    monkeypatch.setattr(torch, "rand_like", lambda like: torch.full_like(like, math.exp(-1)))
    monkeypatch.setattr(stochastic_quantizers, "gumbel_noise", lambda like: torch.zeros(like.shape))
    ours, authors = (step(problem)() for step in (contenders.anneal_ours, contenders.anneal_authors))
    torch.testing.assert_close(ours, authors, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the memory of a step")
def test_one_run_prints_every_table():
    result = subprocess.run(
        [sys.executable, str(BENCHMARKS / "quantizers.py"), "--quick", "--threads", "1"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    rows = re.findall(r"^\| 256, 128, 16 \|.*$", result.stdout, re.MULTILINE)
    assert len(rows) == result.stdout.count("\n## ") == 4
    assert all(float(cell) >= 0 for row in rows for cell in row.split("|")[2:-1])
    for module, package in (("vector_quantize_pytorch", "vector-quantize-pytorch"), ("faiss", "faiss-cpu")):
        assert ("pip install " + package in result.stdout) == (importlib.util.find_spec(module) is None)
