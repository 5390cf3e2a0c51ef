"""The k-means start and the revival of dead codes: what they find, when they happen, and that they are repeatable."""

from collections.abc import Callable

import naive_quantizers as naive
import pytest
import torch
from quantizer_checks import make_latents, randn, with_codes
from torch import Tensor

from hf_vq.models.codebook_care import CodebookCare
from hf_vq.models.vector_quantizers import EMAVectorQuantizer, SoftEMVectorQuantizer, VectorQuantizer

K, D = 8, 2
CENTRES = torch.tensor([[30.0, 0.0], [0.0, 30.0], [-30.0, 0.0], [0.0, -30.0]], dtype=torch.float64)

KINDS: dict[str, type[VectorQuantizer]] = {
    "gradient": VectorQuantizer,
    "ema": EMAVectorQuantizer,
    "soft_em": SoftEMVectorQuantizer,
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
every_number = pytest.mark.parametrize("num_codebooks", [1, 2], ids=["M=1", "M=2"])


def make(
    kind: type[VectorQuantizer], num_codebooks: int = 1, kmeans: bool = False, revive_below: float = 0.0, codes: int = K
) -> VectorQuantizer:
    care = CodebookCare(codes, D, num_codebooks, kmeans, revive_below)
    return with_codes(kind(codes, D, num_codebooks, care=care))


def clustered(num_codebooks: int = 1, count: int = 40, seed: int = 0, spread: float = 0.1) -> Tensor:
    """Latents (count, M * D, 4) around four centres; the codebooks' own are the same centres, scaled by 1, 2, ..."""
    noise = spread * randn(count, num_codebooks * D, 4, seed=seed)
    centres = torch.cat([(m + 1) * CENTRES.T for m in range(num_codebooks)])
    return centres + noise


def of_codebooks(quantizer: VectorQuantizer) -> Tensor:
    """The codebooks (M, K, D) as they are now."""
    return quantizer.codebook.weight.detach().clone().view(quantizer.num_codebooks, quantizer.codebook_size, D)


@every_kind
@every_number
def test_the_start_finds_clusters_that_are_far_apart(kind: type[VectorQuantizer], num_codebooks: int):
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


def watch_counts(care: CodebookCare, counts: list[int]) -> Tensor:
    """Lets code k be chosen counts[k] times, by rows of its own value; returns the rows."""
    codes = torch.tensor([k for k, count in enumerate(counts) for _ in range(count)])[None]
    rows = torch.stack([codes, 100 + torch.arange(codes.shape[1])[None]], dim=-1).float()
    care.watch(rows, codes)
    return rows[0]


@pytest.mark.parametrize(
    ("revive_below", "counts", "dead"),
    [
        (0.0, [40, 40, 20, 0], []),
        (0.01, [40, 40, 20, 0], [3]),
        (0.39, [41, 40, 9, 10], [2]),
        (0.41, [41, 40, 9, 10], [2, 3]),
        (0.99, [25, 25, 25, 25], []),
        (0.5, [97, 1, 1, 1], [1, 2, 3]),
    ],
)
def test_dead_is_a_share_of_uniform_usage(revive_below: float, counts: list[int], dead: list[int]):
    care, codebook = CodebookCare(4, 2, 1, False, revive_below), torch.full((4, 2), -1.0)
    rows = watch_counts(care, counts)
    assert sorted(care.step(codebook).tolist()) == dead
    for k in range(4):
        # A new code is one of the rows; the others stay.
        assert (codebook[k] == rows).all(1).any() if k in dead else (codebook[k] == -1).all()
    assert len(codebook[dead].unique(dim=0)) == len(dead), "no two codes revive at one row"


def test_usage_remembers_more_than_a_step():
    care, codebook = CodebookCare(2, 2, 1, False, 0.2), torch.zeros(2, 2)
    for _ in range(5):
        watch_counts(care, [10, 10])
        assert not len(care.step(codebook))
    for _ in range(5):
        watch_counts(care, [20, 0])
        assert not len(care.step(codebook)), "one batch without a code is not death"
    for _ in range(300):
        watch_counts(care, [20, 0])
        if len(moved := care.step(codebook)):
            break
    assert moved.tolist() == [1]


@every_kind
@every_number
def test_a_revived_code_survives_and_is_used(kind: type[VectorQuantizer], num_codebooks: int):
    quantizer, latents = make(kind, num_codebooks, revive_below=0.05), clustered(num_codebooks)
    with torch.no_grad():
        codebook = quantizer.codebook.weight.view(num_codebooks, K, D)
        for m in range(num_codebooks):
            codebook[m, :4] = (m + 1) * CENTRES
        codebook[:, 4:] = 1000 + torch.arange(4).view(1, 4, 1)
    quantizer(latents)
    quantizer.step()
    revived = of_codebooks(quantizer)
    for m in range(num_codebooks):
        rows = torch.stack([site.latent for site in naive.sites(latents, num_codebooks) if site.m == m])
        assert torch.cdist(revived[m, 4:], rows).amin(1).max() < 1e-5, "a revived code is a latent"
        assert (revived[m, :4] - (m + 1) * CENTRES).abs().max() < 0.2, "the others stay"
    for _ in range(3):
        output = quantizer(latents)
        used = output.image_tokens.reshape(-1, num_codebooks)
        assert all(set(range(4, K)) <= set(used[:, m].tolist()) for m in range(num_codebooks)), "it is used"
        quantizer.step()
        # Soft counts of a code that is one of several in its cluster move it about within it.
        assert (of_codebooks(quantizer) - revived).abs().max() < 0.5, "it survives, and is not revived again"


@every_kind
def test_nothing_is_revived_where_every_code_is_used(kind: type[VectorQuantizer]):
    quantizer = make(kind, revive_below=0.3, codes=4)
    with torch.no_grad():
        quantizer.codebook.weight.copy_(CENTRES)
    for step in range(3):
        quantizer(clustered(seed=step))
        quantizer.step()
        assert (of_codebooks(quantizer)[0] - CENTRES).abs().max() < 0.1
    if kind is VectorQuantizer:
        assert torch.equal(of_codebooks(quantizer)[0], CENTRES)


@every_kind
@every_number
def test_fewer_rows_than_dead_codes(kind: type[VectorQuantizer], num_codebooks: int):
    quantizer = make(kind, num_codebooks, revive_below=0.5)
    with torch.no_grad():
        quantizer.codebook.weight.view(num_codebooks, K, D)[:, 1:] = 1000.0
    before = of_codebooks(quantizer)
    quantizer(clustered(num_codebooks, count=1)[..., :3])
    quantizer.step()
    moved = (of_codebooks(quantizer) != before).any(-1).sum(1)
    # Three rows revive three codes; the code that was used may also move by averages.
    assert (moved == (3 if kind is VectorQuantizer else 4)).all()


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


def test_the_step_counter_seeds_the_choice():
    chosen = []
    for steps in range(6):
        care, codebook = CodebookCare(4, 2, 1, False, 0.5), torch.zeros(4, 2)
        care.steps.fill_(steps)
        watch_counts(care, [60, 0, 0, 0])
        care.step(codebook)
        chosen.append(tuple(codebook[:, 1].tolist()))
    assert len(set(chosen)) >= 5


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
