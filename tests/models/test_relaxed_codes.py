"""The relaxed draw in chunks against the same in a few lines of plain tensors, in value and in gradient."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantizer_checks import PROPERTIES, QUANTIZERS, gradients, make_latents, make_log_variance, randn, standard_gumbel
from torch import Tensor

from hf_vq.models import code_search, relaxed_codes, stochastic_quantizers


def plain(left: Tensor, right: Tensor, vectors: Tensor, noise: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
    """softmax((scores + noise) / tau) @ vectors; -sum_k p_k log p_k; argmax."""
    scores = left @ right.mT
    posterior = scores.softmax(-1)
    entropy = torch.special.entr(posterior).sum(-1)
    return ((scores + noise) / temperature).softmax(-1) @ vectors, entropy, scores.argmax(-1)


@PROPERTIES
@given(
    num_codebooks=st.integers(1, 3),
    num_rows=st.integers(1, 40),
    codes=st.one_of(st.integers(1, 12), st.sampled_from([255, 256, 300, 320, 1000])),
    dim=st.integers(1, 5),
    temperature=st.floats(0.05, 2),
    seed=st.integers(0, 1000),
)
def test_value_and_gradient(num_codebooks: int, num_rows: int, codes: int, dim: int, temperature: float, seed: int):
    left, right = (
        randn(num_codebooks, num_rows, dim + 1, seed=seed),
        randn(num_codebooks, codes, dim + 1, seed=seed + 1),
    )
    vectors, noise = randn(num_codebooks, codes, dim, seed=seed + 2), standard_gumbel(num_codebooks, num_rows, codes)
    inputs = [one.requires_grad_() for one in (left, right, vectors)]
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code_search, "CPU_CHUNK", 1024)
        for run in (relaxed_codes.relaxed_codes, plain):
            quantized, entropy, best = run(*inputs, noise, torch.tensor(temperature, dtype=torch.float64))
            weight = randn(*entropy.shape, seed=5)
            results.append((quantized, entropy, *gradients(quantized, (entropy * weight).sum(), inputs)))
            assert torch.equal(best, (left @ right.mT).argmax(-1))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", [name for name in QUANTIZERS if name.startswith(("gaussian", "vmf"))])
def test_chunks_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch):
    quantizer, latents = QUANTIZERS[kind](2), make_latents((4, 5), 2, batch=3)
    head = make_log_variance(latents).requires_grad_()
    results = []
    for chunk in (2**20, 50, 1):
        monkeypatch.setattr(code_search, "CPU_CHUNK", chunk)
        torch.manual_seed(0)
        output = quantizer(latents, head)
        inputs = [latents, quantizer.codebook.weight, quantizer.variance.log_ratio]
        results.append((*output, *gradients(output.quantized, output.loss, inputs)))
    for other in results[1:]:
        for one, same in zip(other, results[0], strict=True):
            torch.testing.assert_close(one, same, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3, 1e9])
@pytest.mark.parametrize("temperature", [1e-9, 1.0])
def test_scores_of_any_size_stay_numbers(scale: float, temperature: float):
    left, right, vectors = randn(1, 20, 3).float() * scale, randn(1, 300, 3, seed=1).float(), randn(1, 300, 3).float()
    noise = standard_gumbel(1, 20, 300).float()
    inputs = [one.requires_grad_() for one in (left, right, vectors)]
    quantized, entropy, _ = relaxed_codes.relaxed_codes(*inputs, noise, torch.tensor(temperature))
    assert quantized.isfinite().all() and entropy.isfinite().all() and (entropy >= -1e-5).all()
    for gradient in gradients(quantized, entropy.sum(), inputs):
        assert gradient.isfinite().all()


@pytest.mark.uninitialised_memory
@pytest.mark.filterwarnings("ignore")  # opcheck warns of its own parts
@pytest.mark.parametrize("codes", [5, 256])
def test_the_operator_is_what_torch_expects_of_it(codes: int):
    left, right, vectors = (randn(2, n, 3, seed=n).requires_grad_() for n in (11, codes, codes))
    noise, temperature = standard_gumbel(2, 11, codes), torch.tensor(0.7, dtype=torch.float64)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        relaxed_codes.relaxed_codes_in_chunks, (left, right, vectors, noise, temperature), test_utils=tests
    )


def test_training_keeps_two_tables_of_rows_by_codes_and_no_more(monkeypatch: pytest.MonkeyPatch):
    quantizer, latents = QUANTIZERS["gaussian"](1), make_latents((16, 16), batch=4)
    positions, kept = latents[:, 0].numel(), []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.numel() >= positions * quantizer.codebook_size:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = quantizer(latents)
    output.loss.backward()
    assert len(kept) <= 2, kept


def test_noise_is_drawn_once_for_each_score(monkeypatch: pytest.MonkeyPatch):
    drawn, original = [], stochastic_quantizers.gumbel_noise

    def recording(like: Tensor) -> Tensor:
        drawn.append(tuple(like.shape))
        return original(like)

    monkeypatch.setattr(stochastic_quantizers, "gumbel_noise", recording)
    quantizer, latents = QUANTIZERS["gaussian"](2), make_latents((4, 5), 2)
    quantizer(latents)
    assert drawn == [(2, 40, quantizer.codebook_size)]
