"""Quantizers of the nearest code against their naive twins, value and gradient."""

import naive_vector_quantizers as loops
import numpy as np
import pytest
import torch
from quantizer_checks import (
    BETA,
    GRIDS,
    SAMPLES,
    D,
    K,
    assert_same_as_loops,
    averaged,
    make_latents,
    patch_uniforms,
    rand,
    randn,
    with_codes,
)
from torch import Tensor

from hf_vq.models.vector_quantizers import (
    EMAVectorQuantizer,
    LinearCodebookQuantizer,
    SoftEMVectorQuantizer,
    VectorQuantizer,
    rotation,
    straight_through,
)

every_estimator = pytest.mark.parametrize("estimator", ["straight_through", "rotation"])
every_length = pytest.mark.parametrize("normalize", [False, True], ids=["free", "normalised"])
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
every_number = pytest.mark.parametrize("num_codebooks", [1, 3], ids=["M=1", "M=3"])


@every_estimator
@every_length
@every_grid
@every_number
@pytest.mark.parametrize("kind", [VectorQuantizer, EMAVectorQuantizer])
def test_nearest_codes_equal_the_loops(
    kind: type[VectorQuantizer], num_codebooks: int, grid: tuple[int, ...], normalize: bool, estimator: str
):
    own = {"commitment_weight": BETA, "gradient_estimator": estimator, "normalize_codes": normalize}
    latents, quantizer = make_latents(grid, num_codebooks), with_codes(kind(K, D, num_codebooks, **own))
    codebook, learns = quantizer.codebook.weight, kind is VectorQuantizer
    assert codebook.requires_grad == learns
    expected = loops.vector_quantizer(latents, codebook, BETA, learns, num_codebooks, estimator, normalize)
    assert_same_as_loops(quantizer(latents), expected, [latents, codebook] if learns else [latents])


@every_estimator
@every_length
@every_grid
@every_number
def test_soft_em_equals_the_loops(
    num_codebooks: int, grid: tuple[int, ...], normalize: bool, estimator: str, monkeypatch: pytest.MonkeyPatch
):
    own = {"num_samples": SAMPLES, "gradient_estimator": estimator, "normalize_codes": normalize}
    latents, quantizer = make_latents(grid, num_codebooks), averaged(SoftEMVectorQuantizer, num_codebooks, **own)
    uniforms = rand(num_codebooks, latents[:, 0].numel(), SAMPLES, seed=3)
    patch_uniforms(monkeypatch, uniforms)
    codebook = quantizer.codebook.weight
    expected, draws = loops.soft_em(latents, codebook, BETA, uniforms, estimator, normalize)
    assert (draws != draws[..., :1]).any(), "several different codes are drawn"
    assert_same_as_loops(quantizer(latents), expected, [latents])
    counts = [torch.bincount(own_draws.flatten(), minlength=K) / SAMPLES for own_draws in draws]
    torch.testing.assert_close(quantizer.pending_counts, torch.cat(counts).double())


@pytest.mark.uninitialised_memory
@every_length
@pytest.mark.parametrize("kind", [VectorQuantizer, EMAVectorQuantizer, LinearCodebookQuantizer])
def test_the_losses_have_the_gradient_of_finite_differences(kind: type[VectorQuantizer], normalize: bool):
    # A term by itself has no stop-gradient in it: without beta only codes move, without the codebook term only latents.
    latents, averages = make_latents((2,), 2), kind is EMAVectorQuantizer
    quantizer = with_codes(kind(K, D, 2, commitment_weight=0.7 if averages else 0.0, normalize_codes=normalize))
    name = "transform" if kind is LinearCodebookQuantizer else "codebook.weight"

    def loss(tensor: Tensor) -> Tensor:
        return torch.func.functional_call(
            quantizer, {} if averages else {name: tensor}, tensor if averages else latents
        ).loss

    start = latents if averages else quantizer.get_parameter(name).detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, start)


def test_soft_em_in_evaluation_takes_the_nearest_code():
    latents, quantizer = make_latents(), averaged(SoftEMVectorQuantizer).eval()
    expected = loops.vector_quantizer(latents, quantizer.codebook.weight, BETA, False)
    output = quantizer(latents)
    assert torch.equal(output.image_tokens, expected.image_tokens)
    torch.testing.assert_close(output.quantized, expected.quantized)
    torch.testing.assert_close(output.loss, expected.loss)
    assert not quantizer.pending_counts.any()


@every_estimator
@every_length
@every_grid
@every_number
def test_a_linear_codebook_equals_the_loops(num_codebooks: int, grid: tuple[int, ...], normalize: bool, estimator: str):
    own = {"commitment_weight": BETA, "gradient_estimator": estimator, "normalize_codes": normalize}
    quantizer = with_codes(LinearCodebookQuantizer(K, D, num_codebooks, **own))
    latents, transform = make_latents(grid, num_codebooks), quantizer.transform
    with torch.no_grad():
        transform.add_(0.4 * randn(num_codebooks, D, D, seed=5))
    codebook = loops.linear_codebook(quantizer.codebook.weight, transform)
    torch.testing.assert_close(quantizer.place_codes().flatten(0, 1), codebook)
    expected = loops.vector_quantizer(latents, codebook, BETA, True, num_codebooks, estimator, normalize)
    assert_same_as_loops(quantizer(latents), expected, [latents, transform])


def test_a_linear_codebook_starts_frozen_and_at_the_identity():
    quantizer = LinearCodebookQuantizer(4096, 16, 2)
    start = quantizer.initial_state()
    assert start["codebook.weight"].std().item() == pytest.approx(1 / 4, rel=0.02)
    assert torch.equal(start["transform"], torch.eye(16).expand(2, 16, 16))
    assert [name for name, p in quantizer.named_parameters() if p.requires_grad] == ["transform"]


def test_every_code_of_a_linear_codebook_moves_by_one_gradient():
    quantizer = with_codes(LinearCodebookQuantizer(K, D))
    before = quantizer.vectors().detach().clone()
    quantizer(make_latents()).loss.backward()
    torch.optim.SGD([quantizer.transform], lr=0.1).step()
    assert (quantizer.vectors() - before).abs().amax(-1).min() > 1e-4


def test_the_estimators_have_the_vectors_as_value_even_where_nothing_can_be_rotated():
    vectors = randn(4, D, seed=1)
    for estimator in (straight_through, rotation):
        for rows in (randn(4, D), -vectors, vectors.clone(), torch.zeros(4, D, dtype=torch.float64)):
            rows.requires_grad_()
            out = estimator(rows, vectors)
            torch.testing.assert_close(out, vectors, rtol=1e-12, atol=1e-12)
            out.sum().backward()
            assert rows.grad.norm(dim=1).max() <= 10.001 * D**0.5


def test_the_stretch_of_a_gradient_has_an_end():
    vectors, upstream = randn(4, D, seed=1), randn(4, D, seed=2)
    for length, expected in ((0.5, 2.0), (0.1, 10.0), (1e-3, 10.0), (1e-6, 10.0)):
        rows = (length * vectors).requires_grad_()
        rotation(rows, vectors).backward(upstream)
        torch.testing.assert_close(rows.grad, expected * upstream)


@pytest.mark.parametrize("codes", [64, 8192])
def test_a_step_of_adam_turns_a_normalised_code_by_little(codes: int):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(codes, D, normalize_codes=True)
    quantizer.codebook.weight.data.copy_(quantizer.initial_state()["codebook.weight"])
    before = quantizer.vectors().detach().clone()
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=1e-3)
    quantizer(torch.randn(4, D, 8, 8)).loss.backward()
    optimizer.step()
    assert torch.cosine_similarity(quantizer.vectors(), before, dim=-1).min() > 0.999


def test_the_rotation_keeps_the_angle_between_gradient_and_vector():
    rows, vectors, upstream = randn(50, D).requires_grad_(), randn(50, D, seed=1), randn(50, D, seed=2)
    rotation(rows, vectors).backward(upstream)
    stretch = vectors.norm(dim=1) / rows.norm(dim=1)
    torch.testing.assert_close(rows.grad.norm(dim=1), stretch * upstream.norm(dim=1))
    angle = torch.cosine_similarity(rows.grad, rows.detach(), dim=1)
    torch.testing.assert_close(angle, torch.cosine_similarity(upstream, vectors, dim=1))


def test_the_six_steps():
    latents, quantizer = make_latents((2, 4), batch=3), with_codes(VectorQuantizer(K, D, commitment_weight=BETA))
    z_e = latents.detach().permute(0, 2, 3, 1).numpy()
    six = loops.SixSteps(quantizer.codebook.weight.detach().numpy())
    z_q, indices = six.forward(z_e)
    output = quantizer(latents)
    np.testing.assert_array_equal(output.image_tokens.numpy(), indices)
    np.testing.assert_allclose(output.quantized.detach().permute(0, 2, 3, 1).numpy(), z_q, rtol=1e-12)
    upstream = randn(*z_q.shape, seed=5)
    output.quantized.backward(upstream.permute(0, 3, 1, 2), retain_graph=True)
    copied = six.backward(upstream.numpy())
    np.testing.assert_allclose(latents.grad.permute(0, 2, 3, 1).numpy(), copied, rtol=1e-12)
    assert quantizer.codebook.weight.grad is None or not quantizer.codebook.weight.grad.any()
    latents.grad = None
    output.loss.backward()
    value, z_e_gradient, dictionary_gradient = six.loss_gradients(z_e, BETA)
    assert output.loss.item() == pytest.approx(value, rel=1e-12)
    np.testing.assert_allclose(latents.grad.permute(0, 2, 3, 1).numpy(), z_e_gradient, rtol=1e-9)
    np.testing.assert_allclose(quantizer.codebook.weight.grad.numpy(), dictionary_gradient, rtol=1e-9, atol=1e-15)


def test_the_commitment_weight_is_on_the_commitment_term_only():
    def pull(beta: float) -> tuple[Tensor, Tensor]:
        latents, quantizer = make_latents(), with_codes(VectorQuantizer(K, D, commitment_weight=beta))
        return torch.autograd.grad(quantizer(latents).loss, [latents, quantizer.codebook.weight])

    (no_latents, codes), (latents, same_codes), (doubled, _) = pull(0.0), pull(0.5), pull(1.0)
    assert torch.equal(codes, same_codes) and codes.any()
    assert not no_latents.any() and latents.any()
    torch.testing.assert_close(doubled, 2 * latents)
