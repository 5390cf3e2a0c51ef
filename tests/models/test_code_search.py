"""Search, sampling and counting against brute force; their memory; what torch.export and torch.compile see of them."""

import math
from collections.abc import Callable

import naive_stochastic_quantizers as loops
import naive_vector_quantizers as vector_loops
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantizer_checks import PROPERTIES, make_gaussian, rand, randn
from torch import Tensor, nn

from hf_vq.models import code_search
from hf_vq.models.code_search import add_codes, likeliest_code, nearest_code, sample_codes
from hf_vq.models.vector_quantizers import EMAVectorQuantizer, SoftEMVectorQuantizer, VectorQuantizer

# Around the sizes at which a search in blocks changes its ways.
SIZES = [1, 2, 63, 64, 255, 256, 257, 406, 1000, 2047, 2048, 4096, 4097, 5001]


def squared_distances(rows: Tensor, vectors: Tensor, variance: Tensor | float = 1.0) -> Tensor:
    """(M, N, K) in float64."""
    weights = 1 / (variance.double().unsqueeze(2) if isinstance(variance, Tensor) else variance)
    return ((rows.double().unsqueeze(2) - vectors.double().unsqueeze(1)).square() * weights).sum(-1)


def assert_best(codes: Tensor, distances: Tensor, tolerance: float) -> None:
    """Codes (M, N) are within [0, K), and as good as the best of distances (M, N, K)."""
    assert codes.dtype == torch.int64 and codes.shape == distances.shape[:2]
    assert codes.min() >= 0 and codes.max() < distances.shape[2]
    chosen = distances.gather(2, codes.unsqueeze(2)).squeeze(2)
    assert (chosen <= distances.amin(2) + tolerance).all()


@PROPERTIES
@given(
    num_codebooks=st.integers(1, 3),
    num_rows=st.integers(1, 70),
    codes=st.one_of(st.integers(1, 700), st.sampled_from(SIZES)),
    dim=st.integers(1, 20),
    double=st.booleans(),
    weighted=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_best_code_of_any_sizes(
    num_codebooks: int, num_rows: int, codes: int, dim: int, double: bool, weighted: bool, seed: int
):
    dtype, tolerance = (torch.float64, 1e-10) if double else (torch.float32, 1e-3)
    rows, vectors = randn(num_codebooks, num_rows, dim, seed=seed), randn(num_codebooks, codes, dim, seed=seed + 1)
    rows, vectors, variance = rows.to(dtype), vectors.to(dtype), (rand(*rows.shape, seed=seed) + 0.2).to(dtype)
    if weighted:
        assert_best(likeliest_code(rows, vectors, variance), squared_distances(rows, vectors, variance), tolerance)
    else:
        assert_best(nearest_code(rows, vectors), squared_distances(rows, vectors), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("codes", SIZES)
def test_rows_beside_each_of_the_last_codes_find_it(codes: int, dtype: torch.dtype):
    vectors = randn(2, codes, 5, seed=1).to(dtype)
    last = torch.arange(max(0, codes - 70), codes).repeat(3)
    rows = vectors[:, last] + 1e-3 * randn(2, len(last), 5).to(dtype)
    assert_best(nearest_code(rows, vectors), squared_distances(rows, vectors), 1e-4)
    ones = torch.ones_like(rows)
    assert_best(likeliest_code(rows, vectors, ones), squared_distances(rows, vectors), 1e-4)


@pytest.mark.parametrize("codes", SIZES)
def test_of_equal_codes_the_first_is_found(codes: int):
    # Small integers, with which every sum is exact.
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randint(-3, 4, (2, codes, 2), generator=generator)
    rows = torch.randint(-4, 5, (2, 50, 2), generator=generator)
    distances = (rows.unsqueeze(2) - vectors.unsqueeze(1)).square().sum(-1).tolist()
    expected = [[own.index(min(own)) for own in some] for some in distances]
    rows, vectors = rows.float(), vectors.float()
    assert nearest_code(rows, vectors).tolist() == expected
    assert likeliest_code(rows, vectors, torch.full_like(rows, 0.5)).tolist() == expected


@pytest.mark.parametrize("codes", [3, 300, 1000])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_that_are_no_numbers_get_codes_that_exist(value: float, codes: int):
    rows, vectors = randn(1, 20, 4).float(), randn(1, codes, 4, seed=1).float()
    rows[0, 7] = value
    rows[0, 11, 2] = value
    for found in (nearest_code(rows, vectors), likeliest_code(rows, vectors, torch.ones_like(rows))):
        assert found.min() >= 0 and found.max() < codes
    drawn = sample_codes(rows, vectors, 1.0, rand(1, 20, 3).float())
    assert drawn.min() >= 0 and drawn.max() < codes


@PROPERTIES
@given(
    num_codebooks=st.integers(1, 3),
    codes=st.integers(1, 12),
    dim=st.integers(1, 4),
    samples=st.integers(1, 4),
    scale=st.floats(0.05, 3),
    seed=st.integers(0, 1000),
)
def test_draws_invert_the_cumulative_distribution(
    num_codebooks: int, codes: int, dim: int, samples: int, scale: float, seed: int
):
    rows, vectors = randn(num_codebooks, 5, dim, seed=seed), randn(num_codebooks, codes, dim, seed=seed + 1)
    uniforms = rand(num_codebooks, 5, samples, seed=seed)
    drawn = sample_codes(rows, vectors, scale, uniforms)
    assert drawn.dtype == torch.int64
    stretch = math.sqrt(scale)
    for m in range(num_codebooks):
        for n in range(5):
            for s in range(samples):
                own = vector_loops.draw(stretch * rows[m, n], stretch * vectors[m], uniforms[m, n, s].item())
                assert drawn[m, n, s] == own
    assert torch.equal(sample_codes(rows, vectors, scale, uniforms), drawn)


def test_draws_have_their_probabilities():
    row, vectors = torch.tensor([0.3, -0.2]), randn(1, 6, 2, seed=1).float()
    drawn = sample_codes(row.expand(1, 3000, 2), vectors, 1.0, rand(1, 3000, 10).float())
    expected = loops.posterior(row, vectors[0], torch.tensor(0.5))
    frequency = torch.bincount(drawn.flatten(), minlength=6) / drawn.numel()
    torch.testing.assert_close(frequency, torch.stack(expected), rtol=0, atol=0.012)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_ends_of_the_distribution_are_codes_that_can_be_drawn(uniform: float):
    vectors = torch.tensor([[[40.0], [0.0], [1.0], [50.0]]])
    drawn = sample_codes(torch.zeros(1, 1, 1), vectors, 1.0, torch.full((1, 1, 1), uniform))
    assert drawn.item() == (1 if uniform == 0 else 2)


@pytest.mark.parametrize("samples", [None, 1, 3])
def test_counts_and_sums_equal_the_loops(samples: int | None):
    torch.manual_seed(0)
    codes = torch.randint(0, 5, (2, 30) if samples is None else (2, 30, samples))
    rows, counts, sums = randn(2, 30, 3), torch.ones(10, dtype=torch.float64), torch.zeros(10, 3, dtype=torch.float64)
    expected_counts, expected_sums = counts.clone(), sums.clone()
    for m in range(2):
        for n in range(30):
            drawn = codes[m, n].reshape(-1).tolist()
            for k in drawn:
                expected_counts[5 * m + k] += 1 / len(drawn)
                expected_sums[5 * m + k] += rows[m, n] / len(drawn)
    add_codes(counts, sums, rows, codes)
    torch.testing.assert_close(counts, expected_counts)
    torch.testing.assert_close(sums, expected_sums)
    add_codes(counts, None, rows, codes)
    torch.testing.assert_close(counts, 2 * expected_counts - 1)


def largest_allocation(function: Callable[[], object]) -> int:
    """Bytes of the largest single tensor that any operator inside `function` allocates on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    return max(event.self_cpu_memory_usage for event in profile.events())


SEARCHES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "nearest": nearest_code,
    "likeliest": lambda rows, vectors: likeliest_code(rows, vectors, torch.ones_like(rows)),
    "sample": lambda rows, vectors: sample_codes(rows, vectors, 1.0, torch.rand(*rows.shape[:2], 1)),
    "count": lambda rows, vectors: add_codes(
        torch.zeros(len(vectors[0])), torch.zeros_like(vectors[0]), rows, torch.zeros(rows.shape[:2], dtype=torch.int64)
    ),
}


@pytest.mark.uninitialised_memory
@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_memory_does_not_grow_with_rows_times_codes(search: Callable[[Tensor, Tensor], object]):
    rows, vectors = torch.randn(1, 2**14, 2), torch.randn(1, 2**12, 2)
    # What is allocated for each row or for each code is linear in either; a chunk of scores is as large as it ever is.
    allowed = 4 * code_search.CPU_CHUNK + 64 * (len(rows[0]) + len(vectors[0]))
    assert largest_allocation(lambda: search(rows, vectors)) <= allowed < rows.shape[1] * vectors.shape[1] / 8


@pytest.mark.uninitialised_memory
@pytest.mark.parametrize("kind", [VectorQuantizer, EMAVectorQuantizer, SoftEMVectorQuantizer])
def test_no_table_of_rows_by_codes_in_training(kind: type[VectorQuantizer]):
    quantizer, latents = kind(4096, 2).train(), torch.randn(4, 2, 64, 64, requires_grad=True)

    def train() -> None:
        output = quantizer(latents)
        (output.quantized.sum() + output.loss).backward()

    # Even as bytes a one-hot would take 2^26.
    assert largest_allocation(train) < 2**26 / 8


@pytest.mark.uninitialised_memory
@pytest.mark.parametrize("covariance", ["global", "diagonal"])
def test_the_search_of_a_stochastic_quantizer_has_no_table_of_rows_by_codes(covariance: str):
    quantizer = make_gaussian(covariance=covariance).eval().float()
    quantizer.codebook, quantizer.codebook_size = nn.Embedding(4096, 3), 4096
    latents = torch.randn(4, 3, 64, 64)
    assert largest_allocation(lambda: quantizer.search(latents, torch.zeros_like(latents))) < 2**26 / 8


@pytest.mark.parametrize("codes", [2, 1000, code_search.CPU_CHUNK + 1])
def test_a_chunk_of_scores_fits_its_budget(codes: int, monkeypatch: pytest.MonkeyPatch):
    sizes, addmm = [], torch.addmm

    def recording(*args: Tensor, **kwargs: float) -> Tensor:
        scores = addmm(*args, **kwargs)
        sizes.append(tuple(scores.shape))
        return scores

    monkeypatch.setattr(torch, "addmm", recording)
    rows, vectors = torch.randn(1, 3000 if codes == 1000 else 3, 2), torch.randn(1, codes, 2)
    assert_best(nearest_code(rows, vectors), squared_distances(rows, vectors), 1e-4)
    assert sum(rows for rows, _ in sizes) == rows.shape[1]
    assert all(rows == 1 or rows * width <= code_search.CPU_CHUNK for rows, width in sizes)


class Search(nn.Module):
    """A module of the kind that is exported: rows in, codes out."""

    def __init__(self, weighted: bool) -> None:
        super().__init__()
        self.weighted = weighted
        self.register_buffer("vectors", randn(2, 300, 3, seed=1).float())

    def forward(self, rows: Tensor) -> Tensor:
        if self.weighted:
            return likeliest_code(rows, self.vectors, rows.square() + 0.1)
        return nearest_code(rows, self.vectors)


@pytest.mark.uninitialised_memory
@pytest.mark.parametrize("weighted", [False, True], ids=["nearest", "likeliest"])
def test_export_sees_plain_operators(weighted: bool):
    module, rows = Search(weighted), randn(2, 40, 3).float()
    dynamic = {"rows": {1: torch.export.Dim("n", min=2)}}
    exported = torch.export.export(module, (rows,), dynamic_shapes=dynamic)
    namespaces = {node.target.namespace for node in exported.graph.nodes if hasattr(node.target, "namespace")}
    assert namespaces == {"aten"}
    for own in (rows, randn(2, 17, 3, seed=5).float()):
        assert torch.equal(exported.module()(own), module(own))


@pytest.mark.uninitialised_memory
@pytest.mark.filterwarnings("ignore")  # opcheck warns of its own parts
@pytest.mark.parametrize("name", ["lowest_score_in_chunks", "sample_codes", "add_codes"])
def test_the_operators_are_what_torch_expects_of_them(name: str):
    rows, vectors = randn(2, 11, 3), randn(2, 5, 3, seed=1)
    arguments = {
        "lowest_score_in_chunks": (rows, vectors, randn(2, 5)),
        "sample_codes": (rows, vectors, 0.7, rand(2, 11, 4)),
        "add_codes": (torch.zeros(10), torch.zeros(10, 3), rows.float(), torch.randint(0, 5, (2, 11, 1))),
    }[name]
    torch.library.opcheck(getattr(code_search, name), arguments)
