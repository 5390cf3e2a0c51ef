"""Revival of dead codes: which are dead, where they revive, and that they live on."""

import naive_quantizers as naive
import pytest
import torch
from clusters import CENTRES, D, K, clustered, every_kind, every_number, make, of_codebooks
from torch import Tensor

from hf_vq.models import codebook_care
from hf_vq.models.codebook_care import CodebookCare
from hf_vq.models.vector_quantizers import EMAVectorQuantizer, SoftEMVectorQuantizer, VectorQuantizer


@pytest.fixture
def short_memory(monkeypatch: pytest.MonkeyPatch):
    """Usage is that of the last step, so that one step without a code is its death."""
    monkeypatch.setattr(codebook_care, "USAGE_DECAY", 0.0)


only_the_last_step_counts = pytest.mark.usefixtures("short_memory")


def watch_counts(care: CodebookCare, counts: list[int]) -> Tensor:
    """Lets code k be chosen counts[k] times, by rows of its own value; returns the rows."""
    codes = torch.tensor([k for k, count in enumerate(counts) for _ in range(count)])[None]
    rows = torch.stack([codes, 100 + torch.arange(codes.shape[1])[None]], dim=-1).float()
    care.watch(rows, codes)
    return rows[0]


@only_the_last_step_counts
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


@pytest.mark.parametrize("history", [0.0, 50.0], ids=["new", "loaded without care"])
def test_the_first_steps_kill_nobody(history: float):
    """Neither of a new codebook nor of a trained one of which no usage is known: one batch misses most codes."""
    quantizer = make(EMAVectorQuantizer, revive_below=0.5)
    quantizer.cluster_size.fill_(history)
    with torch.no_grad():
        quantizer.codebook.weight[1:] = 1000.0
    before = of_codebooks(quantizer)
    for _ in range(20):
        quantizer(clustered())
        quantizer.step()
    assert torch.equal(of_codebooks(quantizer)[:, 1:], before[:, 1:])


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


@only_the_last_step_counts
@every_kind
@every_number
def test_a_revived_code_survives_and_is_used(kind: type[VectorQuantizer], num_codebooks: int):
    quantizer, latents = make(kind, num_codebooks, revive_below=0.05), clustered(num_codebooks)
    with torch.no_grad():
        codebook = quantizer.codebook.weight.view(num_codebooks, K, D)
        for m in range(num_codebooks):
            codebook[m, :4] = (m + 1) * CENTRES
        codebook[:, 4:] = 1000 + torch.arange(4).view(1, 4, 1)
    torch.manual_seed(0)
    quantizer(latents)
    quantizer.step()
    revived = of_codebooks(quantizer)
    for m in range(num_codebooks):
        rows = torch.stack([site.latent for site in naive.sites(latents, num_codebooks) if site.m == m])
        assert torch.cdist(revived[m, 4:], rows).amin(1).max() < 1e-5, "a revived code is a latent"
        assert (revived[m, :4] - (m + 1) * CENTRES).abs().max() < 0.2, "the others stay"
    for _ in range(3):
        quantizer(latents)
        assert quantizer.care.pending_counts.view(num_codebooks, K)[:, 4:].min() > 0, "it is used"
        quantizer.step()
        # Averages of several codes in one cluster move about within it.
        assert (of_codebooks(quantizer) - revived).abs().max() < 0.5, "it survives, and is not revived again"


@only_the_last_step_counts
@pytest.mark.parametrize("kind", [EMAVectorQuantizer, SoftEMVectorQuantizer])
def test_a_revived_code_has_the_weight_of_an_average_one(kind: type[EMAVectorQuantizer]):
    quantizer = make(kind, revive_below=0.05)
    with torch.no_grad():
        quantizer.codebook.weight.copy_(torch.cat([CENTRES, 1000 + torch.arange(4.0).view(4, 1).expand(4, D)]))
    torch.manual_seed(0)
    quantizer(clustered())
    quantizer.step()
    quantizer.care.revive_below = 0.0
    sizes, placed = quantizer.cluster_size.clone(), of_codebooks(quantizer)[0]
    assert torch.equal(sizes[4:], sizes[4:5].expand(4)) and 0 < sizes[4] < sizes[:4].max()
    # The next latents pull at it, and do not carry it away.
    quantizer(clustered() + 5)
    quantizer.step()
    moved = (of_codebooks(quantizer)[0] - placed)[4:].norm(dim=1)
    assert 0 < moved.max() < 0.75 * 5 * 2**0.5


@every_kind
def test_nothing_is_revived_where_every_code_is_used(kind: type[VectorQuantizer]):
    torch.manual_seed(0)
    quantizer = make(kind, revive_below=0.3, codes=4)
    with torch.no_grad():
        quantizer.codebook.weight.copy_(CENTRES)
    for step in range(3):
        quantizer(clustered(seed=step))
        quantizer.step()
        assert (of_codebooks(quantizer)[0] - CENTRES).abs().max() < 0.1
    if kind is VectorQuantizer:
        assert torch.equal(of_codebooks(quantizer)[0], CENTRES)


@only_the_last_step_counts
@every_kind
@every_number
def test_fewer_rows_than_dead_codes(kind: type[VectorQuantizer], num_codebooks: int):
    torch.manual_seed(0)
    quantizer = make(kind, num_codebooks, revive_below=0.5)
    with torch.no_grad():
        quantizer.codebook.weight.view(num_codebooks, K, D)[:, 1:] = 1000.0
    before = of_codebooks(quantizer)
    quantizer(clustered(num_codebooks, count=1)[..., :3])
    quantizer.step()
    moved = (of_codebooks(quantizer) != before).any(-1).sum(1)
    # Three rows revive three codes; the code that was used may also move by averages.
    assert (moved == (3 if kind is VectorQuantizer else 4)).all()


@only_the_last_step_counts
def test_the_step_counter_seeds_the_choice():
    chosen = []
    for steps in range(6):
        care, codebook = CodebookCare(4, 2, 1, False, 0.5), torch.zeros(4, 2)
        care.steps.fill_(steps)
        watch_counts(care, [60, 0, 0, 0])
        care.step(codebook)
        chosen.append(tuple(codebook[:, 1].tolist()))
    assert len(set(chosen)) >= 5
