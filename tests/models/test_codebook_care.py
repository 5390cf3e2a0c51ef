"""The k-means start: what it finds, when it happens, that it is repeatable; and what care keeps, counts and saves."""

from collections.abc import Callable

import naive_quantizers as naive
import pytest
import torch
from clusters import CENTRES, D, K, clustered, every_kind, every_number, make, of_codebooks
from quantizer_checks import make_latents

from hf_vq.models.codebook_care import CodebookCare
from hf_vq.models.vector_quantizers import EMAVectorQuantizer, VectorQuantizer


@every_kind
@every_number
def test_the_start_finds_clusters_that_are_far_apart(kind: type[VectorQuantizer], num_codebooks: int):
    torch.manual_seed(0)
    quantizer, latents = make(kind, num_codebooks, kmeans=True, codes=24), clustered(num_codebooks)
    quantizer(latents)
    quantizer.step()
    for m, codebook in enumerate(of_codebooks(quantizer)):
        distances = torch.cdist((m + 1) * CENTRES, codebook)
        assert distances.amin(1).max() < 1, "each cluster has a code"
        assert distances.amin(0).max() < 1, "each code has a cluster"


@every_kind
def test_the_start_is_no_worse_than_kmeans_from_many_points(kind: type[VectorQuantizer]):
    cluster = pytest.importorskip("sklearn.cluster")
    quantizer, latents = make(kind, kmeans=True), make_latents((8, 8), batch=2, dim=D).detach()
    quantizer(latents)
    quantizer.step()
    rows = torch.stack([site.latent for site in naive.sites(latents)])
    inertia = torch.cdist(rows, of_codebooks(quantizer)[0]).amin(1).square().sum().item()
    starts = [cluster.KMeans(K, init="random", n_init=1, random_state=seed).fit(rows).inertia_ for seed in range(20)]
    assert inertia < 1.1 * max(starts)


@every_kind
def test_the_start_is_in_the_first_step_only(kind: type[VectorQuantizer]):
    torch.manual_seed(0)
    quantizer = make(kind, kmeans=True)
    start = of_codebooks(quantizer)
    quantizer(clustered())
    assert torch.equal(of_codebooks(quantizer), start), "until the step the codebook is random"
    quantizer.step()
    placed = of_codebooks(quantizer)
    assert (placed - start).abs().amin() > 0, "every code is placed"
    if kind is VectorQuantizer:
        for seed in (1, 2):
            quantizer(clustered(seed=seed) + 100)
            quantizer.step()
            assert torch.equal(of_codebooks(quantizer), placed)
    else:
        quantizer(clustered(seed=1))
        quantizer.step()
        assert (of_codebooks(quantizer) - placed).abs().max() < 0.5, "moving averages go on from there"
        assert not torch.equal(of_codebooks(quantizer), placed)


@every_kind
@every_number
def test_a_repeated_run_is_the_same_whatever_else_draws_numbers(kind: type[VectorQuantizer], num_codebooks: int):
    results = []
    for seed in (0, 1):
        quantizer = make(kind, num_codebooks, kmeans=True, revive_below=0.5)
        for step in range(3):
            torch.manual_seed(step)
            quantizer(clustered(num_codebooks, seed=step))
            torch.manual_seed(seed)
            state = torch.get_rng_state()
            quantizer.step()
            assert torch.equal(torch.get_rng_state(), state), "step() takes nothing from the global generator"
        results.append(quantizer.state_dict())
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


def test_without_latents_there_is_nothing_to_start_from():
    quantizer = make(EMAVectorQuantizer, kmeans=True, revive_below=0.5)
    start = of_codebooks(quantizer)
    quantizer.step()
    assert torch.equal(of_codebooks(quantizer), start)
    quantizer(clustered())
    quantizer.step()
    assert (of_codebooks(quantizer) - start).abs().amin() > 0, "the start is still to come"


@every_kind
@every_number
def test_fewer_rows_than_codes_at_the_start(kind: type[VectorQuantizer], num_codebooks: int):
    quantizer = make(kind, num_codebooks, kmeans=True)
    quantizer(clustered(num_codebooks, count=1)[..., :3])
    quantizer.step()
    assert quantizer.codebook.weight.isfinite().all()
    for m, codebook in enumerate(of_codebooks(quantizer)):
        assert torch.cdist((m + 1) * CENTRES[:3], codebook).amin(1).max() < 1


@every_kind
def test_a_start_from_few_rows_goes_on_until_all_codes_are_placed(kind: type[VectorQuantizer]):
    quantizer = make(kind, kmeans=True)
    placed = []
    for step in range(4):
        latents = clustered(count=1, seed=step)[..., :3]
        quantizer(latents)
        quantizer.step()
        placed.append(int(quantizer.care.placed))
        if step < 2:
            rows = latents.movedim(1, -1).reshape(-1, D)
            newest = of_codebooks(quantizer)[0, 3 * step : 3 * (step + 1)]
            assert torch.cdist(newest, rows).amin(1).max() < 1e-5
    assert placed == [3, 6, K, K]


@every_kind
def test_a_saved_state_goes_on_alike(kind: type[VectorQuantizer]):
    def steps(quantizer: VectorQuantizer, some: range) -> VectorQuantizer:
        for step in some:
            torch.manual_seed(step)
            quantizer(clustered(seed=step))
            quantizer.step()
        return quantizer

    options = {"kmeans": True, "revive_below": 0.9}
    whole, resumed = steps(make(kind, **options), range(5)), make(kind, **options)
    resumed.load_state_dict(steps(make(kind, **options), range(3)).state_dict())
    assert resumed.care.steps == 3
    steps(resumed, range(3, 5))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


@pytest.mark.parametrize("found", [1, 5, 63, 64, 65, 1000, 12_345])
def test_kept_rows_are_evenly_strided_and_at_most_sixteen_a_code(found: int):
    care = CodebookCare(4, 1, 2)
    rows = torch.stack([torch.arange(found), -torch.arange(found)]).unsqueeze(-1).float()
    # Of several micro-batches the last is kept.
    care.watch(torch.full((2, 100, 1), 0.5), torch.zeros(2, 100, dtype=torch.int64))
    care.watch(rows, torch.zeros(2, found, dtype=torch.int64))
    kept = care.kept_rows[:, : int(care.kept_count)]
    assert kept.shape == (2, min(found, 64), 1) and care.kept_rows.shape == (2, 64, 1)
    assert torch.equal(kept[0], -kept[1])
    strides = kept[0, :, 0].diff()
    assert not len(strides) or (strides.max() - strides.min() <= 1 and strides.min() >= 1)
    assert kept[0, 0, 0] < found / 64 + 1 and kept[0, -1, 0] >= found - 1 - found / 32


@every_kind
def test_evaluation_keeps_and_counts_nothing(kind: type[VectorQuantizer]):
    quantizer = make(kind, kmeans=True, revive_below=0.5).eval()
    before = {name: tensor.clone() for name, tensor in quantizer.named_buffers()}
    quantizer(clustered())
    for name, tensor in quantizer.named_buffers():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    "own", [lambda q: q.float(), lambda q: q.half(), lambda q: q.to(torch.bfloat16), lambda q: q.double()]
)
def test_care_in_any_precision(own: Callable[[VectorQuantizer], VectorQuantizer]):
    quantizer = own(make(EMAVectorQuantizer, 2, kmeans=True, revive_below=0.5).float())
    quantizer(clustered(2).to(torch.bfloat16))
    quantizer.step()
    assert quantizer.codebook.weight.isfinite().all()
    assert all(tensor.dtype in (torch.float32, torch.float64) for tensor in quantizer.buffers())


def test_what_a_process_counts_by_itself_is_neither_saved_nor_broadcast():
    quantizer = make(EMAVectorQuantizer, kmeans=True)
    local = {name for name, _ in quantizer.named_buffers()} - set(quantizer.state_dict())
    assert local == set(quantizer._ddp_params_and_buffers_to_ignore)
    assert {"care.kept_rows", "care.kept_count", "care.pending_counts"} <= local
    assert {"care.usage", "care.steps"} <= set(quantizer.state_dict())
