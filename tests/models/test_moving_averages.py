"""Codebooks of moving averages, of nearest and of drawn codes: what moves in step(), and what is counted once."""

from collections.abc import Callable

import naive_quantizers as naive
import naive_vector_quantizers as loops
import pytest
import torch
from quantizer_checks import BETA, DECAY, SAMPLES, D, K, averaged, make_latents, patch_uniforms, rand, randn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_vq.models.codebook_care import CodebookCare
from hf_vq.models.vector_quantizers import EMAVectorQuantizer, SoftEMVectorQuantizer


@pytest.mark.parametrize("normalize", [False, True], ids=["free", "normalised"])
@pytest.mark.parametrize("num_codebooks", [1, 3], ids=["M=1", "M=3"])
@pytest.mark.parametrize("soft", [False, True], ids=["ema", "soft_em"])
def test_moving_averages_equal_the_loops_over_two_steps(
    soft: bool, num_codebooks: int, normalize: bool, monkeypatch: pytest.MonkeyPatch
):
    own = {"num_samples": SAMPLES} if soft else {}
    quantizer = averaged(
        SoftEMVectorQuantizer if soft else EMAVectorQuantizer, num_codebooks, normalize_codes=normalize, **own
    )
    with torch.no_grad():
        # Opposite to the other codes it is not used even on the sphere; latents stay away from it.
        quantizer.codebook.weight[-1] = -100.0
    codebook, cluster_size = quantizer.codebook.weight.clone(), quantizer.cluster_size.clone()
    for seed in (6, 7):
        latents = randn(2, num_codebooks * D, 2, 3, seed=seed).abs()
        uniforms = rand(num_codebooks, 12, SAMPLES, seed=seed)
        patch_uniforms(monkeypatch, uniforms)
        codes = quantizer(latents).image_tokens.reshape(12, num_codebooks, 1).transpose(0, 1)
        if soft:
            _, codes = loops.soft_em(latents, codebook, BETA, uniforms, normalize=normalize)
        assert torch.equal(quantizer.codebook.weight, codebook), "the codebook moves in step() only"
        quantizer.step()
        codebook, cluster_size = loops.moving_averages(codebook, cluster_size, latents, codes, DECAY, normalize)
        torch.testing.assert_close(quantizer.codebook.weight, codebook, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(quantizer.cluster_size, cluster_size, rtol=1e-12, atol=1e-12)
        codebook, cluster_size = quantizer.codebook.weight.clone(), quantizer.cluster_size.clone()
    if not (soft and normalize):
        assert quantizer.cluster_size[-1] == 0 and (quantizer.codebook.weight[-1] == -100).all()
    assert not quantizer.pending_counts.any() and not quantizer.pending_sums.any()


@pytest.mark.parametrize("num_codebooks", [1, 2], ids=["M=1", "M=2"])
def test_a_step_of_no_memory_over_the_whole_data_is_one_of_lloyds(num_codebooks: int):
    quantizer, latents = averaged(num_codebooks=num_codebooks, decay=0.0), make_latents((4, 5), num_codebooks)
    with torch.no_grad():
        quantizer.codebook.weight[2] = 50.0
    for _ in range(3):
        expected = []
        for m in range(num_codebooks):
            points = torch.stack([site.latent for site in naive.sites(latents.detach(), num_codebooks) if site.m == m])
            expected.append(loops.lloyd(naive.codebook_of(quantizer.codebook.weight, m, num_codebooks), points))
        for part in latents.detach().split(1):
            quantizer(part)
        quantizer.step()
        torch.testing.assert_close(quantizer.codebook.weight, torch.cat(expected), rtol=1e-12, atol=1e-12)
    assert (quantizer.codebook.weight[2] == 50).all(), "a code without members stays"


def test_moving_averages_stand_still_in_evaluation():
    quantizer = averaged()
    quantizer(make_latents())
    quantizer.step()
    before = {name: tensor.clone() for name, tensor in quantizer.named_buffers()}
    codebook = quantizer.codebook.weight.clone()
    quantizer.eval()(make_latents())
    for name, tensor in quantizer.named_buffers():
        assert torch.equal(tensor, before[name]), name
    quantizer.step()
    assert torch.equal(quantizer.codebook.weight, codebook)


@pytest.mark.parametrize("kind", [EMAVectorQuantizer, SoftEMVectorQuantizer])
def test_four_micro_batches_move_the_codebook_as_their_joint_batch(
    kind: type[EMAVectorQuantizer], monkeypatch: pytest.MonkeyPatch
):
    joint, split = averaged(kind), averaged(kind)
    for seed in (8, 9):
        latents, uniforms = randn(8, D, 2, 3, seed=seed), rand(1, 48, 5, seed=seed)
        patch_uniforms(monkeypatch, uniforms)
        joint(latents)
        for micro_batch, own in zip(latents.chunk(4), uniforms.chunk(4, dim=1), strict=True):
            patch_uniforms(monkeypatch, own)
            split(micro_batch)
        joint.step()
        split.step()
    torch.testing.assert_close(split.codebook.weight, joint.codebook.weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(split.cluster_size, joint.cluster_size, rtol=1e-12, atol=1e-12)
    assert (joint.cluster_size > 0).sum() > 2


COUNTING: dict[str, Callable[[], EMAVectorQuantizer]] = {
    "ema": averaged,
    "soft_em": lambda: averaged(SoftEMVectorQuantizer),
    "ema-care": lambda: averaged(care=CodebookCare(K, D, 1, False, 0.1)),
}


@pytest.mark.uninitialised_memory
@pytest.mark.filterwarnings("ignore")  # the compiler and reentrant checkpointing warn about themselves
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["not-reentrant", "reentrant"])
@pytest.mark.parametrize("make", COUNTING.values(), ids=COUNTING)
def test_checkpointing_counts_a_micro_batch_once(
    make: Callable[[], EMAVectorQuantizer], reentrant: bool, compiled: bool
):
    quantizer, latents = make(), make_latents()
    runs = []

    def quantize(latents: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            runs.append(1)
        output = quantizer(latents)
        return output.quantized.square().sum() + output.loss

    def forward(latents: Tensor) -> Tensor:
        return checkpoint(quantize, latents, use_reentrant=reentrant)

    (torch.compile(forward, backend="aot_eager") if compiled else forward)(latents).backward()
    torch._dynamo.reset()
    assert compiled or len(runs) == 2, "the forward was not repeated"
    assert quantizer.pending_counts.sum().item() == pytest.approx(12)
    torch.testing.assert_close(quantizer.pending_sums.sum(0), latents.detach().sum((0, 2, 3)))
    counted = torch.bincount(quantizer.search(latents).flatten(), minlength=K).double()
    if not isinstance(quantizer, SoftEMVectorQuantizer):
        assert torch.equal(quantizer.pending_counts, counted)
    if quantizer.care is not None:
        assert torch.equal(quantizer.care.pending_counts, counted)
