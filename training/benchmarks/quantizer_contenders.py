"""What quantizers.py compares: our quantizers, their peers, their floors; each a step that can be called repeatedly.

A contender takes a problem and returns its step; everything before the step (modules, an index, a layout) is free.
"""

import time
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_vq.models.annealing import AnnealedTemperature, DequantizationVariance
from hf_vq.models.code_search import nearest_code
from hf_vq.models.quantizers import Quantizer
from hf_vq.models.stochastic_quantizers import GaussianQuantizer
from hf_vq.models.vector_quantizers import EMAVectorQuantizer

LUCID, FAISS, AUTHORS, OURS, FLOOR = "vector-quantize-pytorch", "faiss", "authors' formula", "ours", "floor"
CHUNKS = [2**17, 2**18, 2**19, 2**20, 2**21]

Step = Callable[[], object]


def seconds(step: Step, repeats: int = 1) -> float:
    """Time of one step, the mean of some in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats


class Size(NamedTuple):
    """N rows meet K codes of dimension D."""

    rows: int
    codes: int
    dim: int

    def __str__(self) -> str:
        return ", ".join(f"{number:,}" for number in self)


class Problem:
    """Rows and codes of a size, alike in every process; `compiled`: whether our own training steps are."""

    def __init__(self, size: Size, compiled: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.size, self.compiled = size, compiled
        self.rows = torch.randn(size.rows, size.dim, generator=generator)
        self.vectors = torch.randn(size.codes, size.dim, generator=generator)
        self.gradient = torch.randn(size.rows, size.dim, generator=generator)

    def as_latents(self, rows: Tensor) -> Tensor:
        """Rows (N, D) as latents (B, D, h, w) of 32 x 32 positions, or of 8 x 8 if they are few."""
        side = 32 if len(rows) % 1024 == 0 else 8
        return rows.view(-1, side, side, self.size.dim).permute(0, 3, 1, 2).contiguous()

    def forward_backward(self, module: Callable[[Tensor], tuple[Tensor, Tensor]], latents: Tensor) -> Step:
        """A step of a module from latents to quantized and loss, which returns quantized."""
        gradient = self.as_latents(self.gradient) if latents.ndim == 4 else self.gradient.view_as(latents)
        latents.requires_grad_()

        def step() -> Tensor:
            latents.grad = None
            quantized, loss = module(latents)
            torch.autograd.backward([quantized, loss], [gradient, torch.ones_like(loss)])
            return quantized

        return step

    def forward_backward_ours(self, quantizer: Quantizer) -> Step:
        """The same of one of our quantizers, on latents (B, D, h, w)."""
        forward = torch.compile(quantizer) if self.compiled else quantizer

        def quantize(latents: Tensor) -> tuple[Tensor, Tensor]:
            output = forward(latents)
            return output.quantized, output.loss

        return self.forward_backward(quantize, self.as_latents(self.rows))


def our_moving_average(problem: Problem) -> EMAVectorQuantizer:
    quantizer = EMAVectorQuantizer(problem.size.codes, problem.size.dim)
    with torch.no_grad():
        quantizer.codebook.weight.copy_(problem.vectors)
    return quantizer


def train_ours(problem: Problem) -> Step:
    quantizer = our_moving_average(problem)
    passes = problem.forward_backward_ours(quantizer)

    def step() -> object:
        quantized = passes()
        quantizer.step()
        return quantized

    return step


def evaluate_ours(problem: Problem) -> Step:
    quantizer, latents = our_moving_average(problem).eval(), problem.as_latents(problem.rows)
    return torch.inference_mode()(lambda: quantizer.lookup(quantizer.search(latents)))


def lucid_moving_average(problem: Problem) -> Any:
    quantizer = import_module("vector_quantize_pytorch").VectorQuantize(
        dim=problem.size.dim,
        codebook_size=problem.size.codes,
        decay=0.99,
        commitment_weight=0.25,
        kmeans_init=False,
        threshold_ema_dead_code=0,
        rotation_trick=False,
    )
    quantizer._codebook.embed.data.copy_(problem.vectors)
    quantizer._codebook.embed_avg.data.copy_(problem.vectors)
    return quantizer


def train_lucid(problem: Problem) -> Step:
    quantizer = lucid_moving_average(problem)
    sequences = problem.rows.view(len(problem.as_latents(problem.rows)), -1, problem.size.dim)

    def quantize(latents: Tensor) -> tuple[Tensor, Tensor]:
        quantized, _, loss = quantizer(latents)
        return quantized, loss

    return problem.forward_backward(quantize, sequences)


def evaluate_lucid(problem: Problem) -> Step:
    quantizer, sequences = lucid_moving_average(problem).eval(), problem.rows.unsqueeze(0)
    return torch.inference_mode()(lambda: quantizer(sequences)[0])


def search_ours(problem: Problem) -> Step:
    return lambda: nearest_code(problem.rows[None], problem.vectors[None])[0]


def search_faiss(problem: Problem) -> Step:
    faiss = import_module("faiss")
    faiss.omp_set_num_threads(torch.get_num_threads())
    index, rows = faiss.IndexFlatL2(problem.size.dim), problem.rows.numpy()
    index.add(problem.vectors.numpy())
    return lambda: torch.from_numpy(index.search(rows, 1)[1][:, 0])


def search_floor(problem: Problem) -> Step:
    """The least that a search in chunks does, with the best chunk."""

    def with_chunk(scores: int) -> Step:
        def lowest() -> None:
            offsets = problem.vectors.square().sum(dim=1) / 2
            for rows in problem.rows.split(max(1, scores // problem.size.codes)):
                torch.addmm(offsets, rows, problem.vectors.T, alpha=-1).amin(dim=1)

        return lowest

    return min(map(with_chunk, CHUNKS), key=lambda step: min(seconds(step) for _ in range(2)))


def anneal_ours(problem: Problem) -> Step:
    variance, temperature = DequantizationVariance("product", 1.0, 1.0), AnnealedTemperature(0.7, 0.1, 1000)
    quantizer = GaussianQuantizer(problem.size.codes, problem.size.dim, variance=variance, temperature=temperature)
    with torch.no_grad():
        quantizer.codebook.weight.copy_(problem.vectors)
    return problem.forward_backward_ours(quantizer)


def anneal_authors(problem: Problem) -> Step:
    """Gaussian SQ-VAE of one variance as its authors write it down, step by step over whole N x K matrices."""
    codebook, log_variance = nn.Parameter(problem.vectors.clone()), nn.Parameter(torch.zeros(()))

    def quantize(latents: Tensor) -> tuple[Tensor, Tensor]:
        moved = latents.permute(0, 2, 3, 1).contiguous()
        rows = moved.view(-1, problem.size.dim)
        precision = 0.5 / log_variance.exp().clamp(min=1e-10)
        distances = (rows**2).sum(dim=1, keepdim=True) + (codebook**2).sum(dim=1) - 2 * rows @ codebook.T
        logits = -precision * distances
        posterior, log_posterior = F.softmax(logits, dim=-1), F.log_softmax(logits, dim=-1)
        gumbel = -torch.log(-torch.log(torch.rand_like(logits) + 1e-10) + 1e-10)
        quantized = F.softmax((logits + gumbel) / 0.7, dim=-1) @ codebook
        loss = (posterior * log_posterior).sum() + precision * (rows - quantized).square().sum()
        return quantized.view_as(moved).permute(0, 3, 1, 2), loss / len(latents)

    return problem.forward_backward(quantize, problem.as_latents(problem.rows))


def anneal_floor(problem: Problem) -> Step:
    codebook = nn.Parameter(problem.vectors.clone())

    def mix(rows: Tensor) -> tuple[Tensor, Tensor]:
        return F.softmax(rows @ codebook.T, dim=-1) @ codebook, codebook.new_zeros((), requires_grad=True)

    return problem.forward_backward(mix, problem.rows.clone())
