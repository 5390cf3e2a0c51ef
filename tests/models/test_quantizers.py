"""The contract that every quantizer keeps, whatever its mathematics: shapes, types, layouts, tokens and back."""

import math
from collections.abc import Callable

import naive_quantizers as naive
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantizer_checks import (
    GRIDS,
    LEVELS,
    PROPERTIES,
    QUANTIZERS,
    D,
    K,
    make_latents,
    make_log_variance,
    randn,
    with_codes,
)
from torch import Tensor

from hf_vq.models import quantizer_noise
from hf_vq.models.finite_scalar_quantizer import FiniteScalarQuantizer
from hf_vq.models.quantizers import Quantizer, QuantizerOutput, to_grid, to_rows
from hf_vq.models.vector_quantizers import EMAVectorQuantizer, VectorQuantizer

Make = Callable[[int], Quantizer]
every_quantizer = pytest.mark.parametrize("make", QUANTIZERS.values(), ids=QUANTIZERS)
every_number = pytest.mark.parametrize("num_codebooks", [1, 3], ids=["M=1", "M=3"])


def tokens_shape(latents: Tensor, num_codebooks: int) -> tuple[int, ...]:
    shape = (len(latents), *latents.shape[2:])
    return shape if num_codebooks == 1 else (*shape, num_codebooks)


@every_quantizer
@every_number
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_shapes_and_types(make: Make, num_codebooks: int, grid: tuple[int, ...], training: bool):
    quantizer, latents = make(num_codebooks).train(training), make_latents(grid, num_codebooks)
    output = quantizer(latents, make_log_variance(latents))
    assert isinstance(output, QuantizerOutput)
    assert output._fields == ("quantized", "image_tokens", "loss", "perplexity")
    assert output.quantized.shape == latents.shape and output.quantized.dtype == torch.float64
    assert output.image_tokens.shape == tokens_shape(latents, num_codebooks)
    assert output.image_tokens.dtype == torch.int64
    assert output.image_tokens.min() >= 0 and output.image_tokens.max() < quantizer.codebook_size
    assert output.loss.shape == output.perplexity.shape == ()
    assert quantizer.codebook.weight.shape == (num_codebooks * quantizer.codebook_size, D)
    assert quantizer.vectors().shape == (num_codebooks, quantizer.codebook_size, D)


@every_quantizer
@every_number
def test_the_grid_does_not_matter_and_the_tokens_are_deterministic(make: Make, num_codebooks: int):
    quantizer = make(num_codebooks).eval()
    latents = make_latents((12,), num_codebooks).detach()
    head = make_log_variance(latents)
    expected = quantizer(latents, head)
    for grid in ((12,), (2, 6), (2, 3, 2)):
        own = [one.unflatten(2, grid) for one in (latents, head)]
        output = quantizer(*own)
        assert torch.equal(output.image_tokens.flatten(), expected.image_tokens.flatten())
        assert torch.equal(output.quantized.flatten(2), expected.quantized)
        assert torch.equal(quantizer.lookup(output.image_tokens), output.quantized)
        assert torch.equal(quantizer.search(*own), output.image_tokens)
        assert torch.equal(quantizer.train()(*own).image_tokens, output.image_tokens)
        quantizer.eval()


@every_quantizer
def test_codebooks_do_not_mix(make: Make):
    quantizer, latents = make(3).eval(), make_latents((2, 3), 3).detach()
    head = make_log_variance(latents)
    tokens = quantizer.search(latents, head)
    changed = latents.clone()
    changed[:, D : 2 * D] = randn(2, D, 2, 3, seed=11)
    again = quantizer.search(changed, head)
    assert torch.equal(again[..., [0, 2]], tokens[..., [0, 2]]) and not torch.equal(again[..., 1], tokens[..., 1])
    vectors = quantizer.vectors()
    for b, i, j in naive.positions(latents):
        for m in range(3):
            looked_up = quantizer.lookup(tokens)[b, m * D : (m + 1) * D, i, j]
            assert torch.equal(looked_up, vectors[m, tokens[b, i, j, m]])


@every_quantizer
@every_number
def test_perplexity_is_that_of_the_deterministic_tokens(make: Make, num_codebooks: int):
    latents = make_latents((4, 5), num_codebooks)
    output = make(num_codebooks)(latents, make_log_variance(latents))
    expected = naive.perplexity(output.image_tokens, num_codebooks)
    assert output.perplexity.item() == pytest.approx(expected, rel=1e-6)
    assert 1 < expected <= math.prod(LEVELS)


@every_quantizer
def test_statistics_and_scalars_are_numbers_by_name(make: Make):
    quantizer, latents = make(2), make_latents((2, 3), 2)
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    statistics = quantizer.statistics(latents, make_log_variance(latents))
    stochastic = hasattr(quantizer, "temperature")
    is_one_number = getattr(quantizer, "covariance", "global") == "global"
    logged = {"temperature", *(["dequantization_variance"] if is_one_number else [])}
    assert set(quantizer.scalars()) == (logged if stochastic else set())
    names = {"posterior_entropy", "argmax_probability", "dequantization_variance"}
    assert set(statistics) == (names if stochastic else set())
    assert all(value.shape == () and value.isfinite() for value in (statistics | quantizer.scalars()).values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantizer.state_dict().items())


def close_calls(quantizer: Quantizer, latents: Tensor) -> Tensor:
    """Where the two best of all codes are as good as equal, in the shape of the tokens."""
    rows, vectors = quantizer.rows(latents.double()), quantizer.vectors().double()
    if isinstance(quantizer, FiniteScalarQuantizer):
        rows = quantizer.bound(rows) / quantizer.half_widths(rows)
    best, second = torch.cdist(rows, vectors).topk(2, largest=False).values.unbind(-1)
    return quantizer.to_tokens(second - best < 1e-3 * second + 1e-4, latents)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda latents: latents.contiguous(),
    "channels_last": lambda latents: latents.contiguous(memory_format=torch.channels_last),
    "transposed": lambda latents: latents.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda latents: torch.cat([latents, latents], dim=1)[:, ::2].copy_(latents),
    "expanded": lambda latents: latents[:1].expand_as(latents),
}
PRECISIONS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@PROPERTIES
@given(
    normalize=st.booleans(),
    codes=st.integers(2, 600),
    dim=st.integers(1, 9),
    num_codebooks=st.integers(1, 3),
    batch=st.integers(1, 3),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    dtype=st.sampled_from(PRECISIONS),
    layout=st.sampled_from(sorted(LAYOUTS)),
    seed=st.integers(0, 1000),
)
def test_any_size_type_and_layout(
    normalize: bool,
    codes: int,
    dim: int,
    num_codebooks: int,
    batch: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    layout: str,
    seed: int,
):
    latents = randn(batch, num_codebooks * dim, height, width, seed=seed)
    latents = LAYOUTS[layout](latents.to(dtype))
    quantizer = VectorQuantizer(codes, dim, num_codebooks, normalize_codes=normalize).to(dtype)
    check_contract(quantizer, latents, seed)


@PROPERTIES
@given(
    levels=st.lists(st.integers(3, 9), min_size=1, max_size=4),
    num_codebooks=st.integers(1, 3),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    dtype=st.sampled_from(PRECISIONS),
    layout=st.sampled_from(sorted(LAYOUTS)),
    seed=st.integers(0, 1000),
)
def test_any_levels_type_and_layout(
    levels: list[int], num_codebooks: int, height: int, width: int, dtype: torch.dtype, layout: str, seed: int
):
    latents = randn(2, num_codebooks * len(levels), height, width, seed=seed) * 2
    latents = LAYOUTS[layout](latents.to(dtype))
    check_contract(FiniteScalarQuantizer(levels, num_codebooks).to(dtype), latents, seed)


def check_contract(quantizer: Quantizer, latents: Tensor, seed: int) -> None:
    """Codebook and results in float32 or wider, the nearest codes up to ties, and lookup the way back."""
    torch.manual_seed(seed)
    wide = torch.promote_types(latents.dtype, torch.float32)
    with torch.no_grad():
        for name, start in quantizer.initial_state().items():
            quantizer.get_parameter(name).copy_(start)
        if not isinstance(quantizer, FiniteScalarQuantizer):
            quantizer.codebook.weight.normal_()
    assert quantizer.codebook.weight.dtype == wide
    output = quantizer.eval()(latents)
    assert output.quantized.dtype == output.loss.dtype == wide
    assert output.quantized.shape == latents.shape
    tokens = quantizer.search(latents)
    assert torch.equal(tokens, output.image_tokens)
    assert tokens.shape == tokens_shape(latents, quantizer.num_codebooks) and tokens.dtype == torch.int64
    assert torch.equal(quantizer.lookup(tokens), output.quantized)
    wide_quantizer = quantizer.double()
    exact = wide_quantizer.search(latents.double())
    assert not (tokens != exact)[~close_calls(wide_quantizer, latents)].any()


@PROPERTIES
@given(
    num_codebooks=st.integers(1, 4),
    dim=st.integers(1, 5),
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    batch=st.integers(1, 3),
)
def test_rows_and_grid_are_inverse(num_codebooks: int, dim: int, shape: list[int], batch: int):
    latents = randn(batch, num_codebooks * dim, *shape)
    rows = to_rows(latents, num_codebooks)
    assert torch.equal(to_grid(rows, latents), latents)
    expected = [site.latent for site in naive.sites(latents, num_codebooks)]
    assert torch.equal(rows.transpose(0, 1).reshape(-1, dim), torch.stack(expected))


@pytest.mark.parametrize("cast", [lambda q: q.half(), lambda q: q.to(torch.bfloat16), lambda q: q.bfloat16().float()])
@every_quantizer
def test_nothing_falls_below_single_precision(make: Make, cast: Callable[[Quantizer], Quantizer]):
    quantizer = make(2).float()
    before = {name: tensor.clone() for name, tensor in (*quantizer.named_parameters(), *quantizer.named_buffers())}
    quantizer = cast(quantizer)
    for name, tensor in (*quantizer.named_parameters(), *quantizer.named_buffers()):
        assert tensor.dtype == torch.float32 and torch.equal(tensor, before[name]), name
    latents = make_latents((2, 3), 2).to(torch.bfloat16).detach().requires_grad_()
    output = quantizer(latents, make_log_variance(latents))
    (output.quantized.sum() + output.loss).backward()
    assert output.loss.dtype == output.quantized.dtype == torch.float32 and latents.grad.dtype == torch.bfloat16


@every_quantizer
def test_initial_state_names_what_it_starts(make: Make):
    quantizer = make(2)
    for name, start in quantizer.initial_state().items():
        assert start.shape == quantizer.get_parameter(name).shape and start.isfinite().all()
    assert "codebook.weight" in quantizer.initial_state()


def test_a_learned_codebook_starts_random_and_small():
    codes = EMAVectorQuantizer(K, 64, 3).initial_state()["codebook.weight"]
    assert 0.9 / K < codes.abs().max() <= 1 / K and not torch.equal(codes[:K], codes[K : 2 * K])


def test_the_noise_has_its_distribution():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        like = torch.empty(200_000, dtype=dtype)
        gumbel, normal = quantizer_noise.gumbel_noise(like), quantizer_noise.gaussian_noise(like)
        uniform = quantizer_noise.uniform_noise(like.view(-1, 4), 3)
        assert gumbel.dtype == normal.dtype == uniform.dtype == dtype and uniform.shape == (50_000, 3)
        assert gumbel.isfinite().all()
        assert gumbel.mean().item() == pytest.approx(0.5772, abs=0.02)
        assert gumbel.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)
        assert normal.mean().item() == pytest.approx(0, abs=0.01)
        assert normal.var().item() == pytest.approx(1, rel=0.02)
        assert uniform.min() >= 0 and uniform.max() < 1
        assert uniform.var().item() == pytest.approx(1 / 12, rel=0.02)
    generator = torch.Generator().manual_seed(3)
    first = quantizer_noise.uniform_noise(like.view(-1, 4), 3, generator)
    assert torch.equal(quantizer_noise.uniform_noise(like.view(-1, 4), 3, generator.manual_seed(3)), first)


def test_uniform_noise_of_single_precision_never_reaches_one():
    draws = quantizer_noise.uniform_noise(torch.empty(2_000_000, 1), 8, torch.Generator().manual_seed(0))
    assert draws.max() < 1


@pytest.mark.parametrize("make", [lambda: with_codes(VectorQuantizer(K, D, 2)), lambda: QUANTIZERS["gaussian"](2)])
def test_the_tokens_of_a_loaded_copy_are_the_same(make: Callable[[], Quantizer]):
    quantizer, copy = make(), make()
    torch.nn.init.zeros_(copy.codebook.weight)
    copy.load_state_dict(quantizer.state_dict())
    latents = make_latents((2, 3), 2)
    assert torch.equal(copy.search(latents), quantizer.search(latents))
