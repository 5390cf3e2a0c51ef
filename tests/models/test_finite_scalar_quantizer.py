"""Finite scalar quantization against its naive twin, and the grid that stands in for a codebook."""

import itertools
import math

import naive_vector_quantizers as loops
import pytest
import torch
from quantizer_checks import GRIDS, assert_all_close, gradients, make_latents, randn, with_codes
from torch import Tensor

from hf_vq.models.finite_scalar_quantizer import FiniteScalarQuantizer

EVERY_LEVELS = [[3], [4], [5, 4], [8, 5, 5, 5], [7, 3, 6], [8, 6, 5], [3, 3, 3, 3, 3]]
every_levels = pytest.mark.parametrize("levels", EVERY_LEVELS, ids=lambda levels: "x".join(map(str, levels)))
every_number = pytest.mark.parametrize("num_codebooks", [1, 3], ids=["M=1", "M=3"])


def make(levels: list[int], num_codebooks: int = 1) -> FiniteScalarQuantizer:
    return with_codes(FiniteScalarQuantizer(levels, num_codebooks))


@every_levels
@every_number
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_it_equals_the_loops(levels: list[int], num_codebooks: int, grid: tuple[int, ...]):
    quantizer, latents = make(levels, num_codebooks), make_latents(grid, num_codebooks, dim=len(levels))
    output, expected = quantizer(latents), loops.finite_scalar(latents, levels, num_codebooks)
    assert torch.equal(output.image_tokens, expected.image_tokens)
    assert_all_close((output.quantized, output.loss), (expected.quantized, expected.loss))
    decoders = [gradients(one.quantized, one.quantized.new_zeros(()), [latents]) for one in (output, expected)]
    assert_all_close(*decoders)
    assert decoders[0][0].abs().min() > 1e-6, "the gradient passes the rounding"
    evaluated = quantizer.eval()(latents)
    assert torch.equal(evaluated.image_tokens, output.image_tokens)
    # The grid is made in single precision.
    torch.testing.assert_close(evaluated.quantized, expected.quantized, rtol=1e-7, atol=0)


@every_levels
def test_the_first_component_counts_fastest(levels: list[int]):
    quantizer = make(levels, 2)
    assert quantizer.codebook_size == math.prod(levels)
    # itertools counts the last one fastest.
    digits = [tuple(reversed(place)) for place in itertools.product(*(range(level) for level in reversed(levels)))]
    grid = [[(digit - level // 2) / (level // 2) for digit, level in zip(own, levels, strict=True)] for own in digits]
    expected = torch.tensor(grid, dtype=torch.float64)
    torch.testing.assert_close(quantizer.vectors(), expected.expand(2, -1, -1), rtol=1e-7, atol=0)
    torch.testing.assert_close(quantizer.codebook.weight, expected.repeat(2, 1), rtol=1e-7, atol=0)


def latents_of(vectors: Tensor, levels: list[int]) -> Tensor:
    """Latents (N, D) that the bound takes to these vectors."""
    columns = []
    for level, values in zip(levels, vectors.T, strict=True):
        h, o = loops.half_width(level)
        columns.append(torch.atanh((values * (level // 2) + o) / h) - math.atanh(o / h))
    return torch.stack(columns, dim=1)


@every_levels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_code_can_be_reached_and_is_a_fixed_point(levels: list[int], dtype: torch.dtype):
    quantizer = make(levels).eval()
    tokens = torch.arange(math.prod(levels))[None]
    vectors = quantizer.lookup(tokens)
    latents = latents_of(vectors[0].T, levels).T[None]
    assert latents.isfinite().all()
    assert torch.equal(quantizer.search(latents.to(dtype)), tokens)
    assert torch.equal(quantizer.lookup(quantizer.search(latents)), vectors)


@every_levels
def test_no_latent_leaves_the_grid(levels: list[int]):
    quantizer = make(levels).float().eval()
    for dtype in (torch.float32, torch.bfloat16):
        corners = torch.tensor(list(itertools.product([-1e4, 0.0, 1e4], repeat=len(levels))), dtype=dtype)
        tokens = quantizer.search(corners.T[None])
        assert tokens.min() >= 0 and tokens.max() < math.prod(levels)
        assert tokens[0, 0] == 0 and tokens[0, -1] == math.prod(levels) - 1
    assert len(quantizer.search(3 * randn(1, len(levels), 4000)).unique()) > 0.5 * math.prod(levels)


def test_there_is_nothing_to_learn_and_no_loss():
    quantizer, latents = make([5, 4], 2), make_latents((2, 3), 2, dim=2)
    output = quantizer(latents)
    assert output.loss == 0
    assert not [name for name, parameter in quantizer.named_parameters() if parameter.requires_grad]
    before = quantizer.codebook.weight.clone()
    output.quantized.sum().backward()
    quantizer.step()
    assert torch.equal(quantizer.codebook.weight, before) and quantizer.codebook.weight.grad is None


def test_latents_that_are_not_numbers_reach_the_quantized_ones_and_no_index():
    quantizer, latents = make([8, 5, 5]), torch.full((1, 3, 2), torch.nan)
    for training in (True, False):
        output = quantizer.train(training)(latents)
        assert output.image_tokens.min() >= 0 and output.image_tokens.max() < 200
    assert quantizer.train()(latents).quantized.isnan().all()


def test_codes_of_a_large_grid_are_exact():
    levels = [32, 32, 32, 32, 15]
    codes = torch.randint(math.prod(levels), (2000,), generator=torch.Generator().manual_seed(0))
    places = torch.tensor([math.prod(levels[:place]) for place in range(5)])
    steps = codes[:, None] // places % torch.tensor(levels) - torch.tensor([level // 2 for level in levels])
    quantizer = FiniteScalarQuantizer([3])
    quantizer.levels = tuple(levels)
    assert torch.equal(quantizer.to_codes(steps.float()[None]), codes[None])


def test_at_zero_latents_are_at_zero():
    for levels in EVERY_LEVELS:
        output = make(levels)(torch.zeros(1, len(levels), 1, dtype=torch.float64))
        assert not output.quantized.any()
