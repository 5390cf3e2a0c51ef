"""Every quantizer against its naive twin, value and gradient; and what moves, and when."""

import math
import warnings
from collections.abc import Callable

import naive_quantizers as naive
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_vq.models import quantizers
from hf_vq.models.quantizers import (
    AnnealedTemperature,
    DequantizationVariance,
    EMAVectorQuantizer,
    GaussianQuantizer,
    Quantizer,
    VectorQuantizer,
)

K, D, BETA, DECAY = 7, 3, 0.3, 0.9
TEMPERATURE, INITIAL, LR_SCALE = 0.7, 0.8, 5.0


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_latents(batch: int = 2, height: int = 2, width: int = 3, dim: int = D) -> Tensor:
    return randn(batch, dim, height, width).requires_grad_()


def with_codes(quantizer: Quantizer) -> Quantizer:
    """`quantizer` in float64 and training mode, its codes among the latents."""
    with torch.no_grad():
        quantizer.double().train().codebook.weight.copy_(randn(*quantizer.codebook.weight.shape, seed=1))
    return quantizer


def make_gaussian(form: str = "product", noisy: bool = False, initial: float = INITIAL) -> GaussianQuantizer:
    variance = DequantizationVariance(form, initial, LR_SCALE)
    temperature = AnnealedTemperature(TEMPERATURE, TEMPERATURE, 1)
    return with_codes(GaussianQuantizer(K, D, variance, temperature, noisy))


QUANTIZERS: dict[str, Callable[[], Quantizer]] = {
    "gradient": lambda: with_codes(VectorQuantizer(K, D, BETA)),
    "ema": lambda: with_codes(EMAVectorQuantizer(K, D, BETA, DECAY)),
    "gaussian": make_gaussian,
    "gaussian-noisy": lambda: make_gaussian("sum", noisy=True),
}
every_quantizer = pytest.mark.parametrize("make", QUANTIZERS.values(), ids=QUANTIZERS)


def gradients(quantized: Tensor, loss: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Of the loss and of what a decoder might ask of `quantized`."""
    decoder = (quantized * randn(*quantized.shape, seed=2)).sin().sum()
    return torch.autograd.grad(decoder + loss, inputs)


def assert_all_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("learns", [True, False], ids=["gradient", "ema"])
def test_nearest_codes_equal_the_loops(learns: bool):
    latents, quantizer = make_latents(), QUANTIZERS["gradient" if learns else "ema"]()
    codebook = quantizer.codebook.weight
    inputs = [latents, codebook] if learns else [latents]
    output = quantizer(latents)
    expected = naive.vector_quantizer(latents, codebook, BETA, learns)
    assert torch.equal(output.image_tokens, expected.image_tokens)
    assert_all_close((output.quantized, output.loss), (expected.quantized, expected.loss))
    actual = gradients(output.quantized, output.loss, inputs)
    assert_all_close(actual, gradients(expected.quantized, expected.loss, inputs))
    assert all(gradient.abs().max() > 1e-3 for gradient in actual)


@pytest.mark.parametrize("noisy", [False, True], ids=["mean", "noisy"])
@pytest.mark.parametrize("form", ["product", "sum"])
def test_the_gaussian_equals_the_loops(form: str, noisy: bool, monkeypatch: pytest.MonkeyPatch):
    latents, quantizer = make_latents(), make_gaussian(form, noisy)
    codebook, parameter = quantizer.codebook.weight, quantizer.variance.log_ratio
    with torch.no_grad():
        parameter.fill_(0.11)
    inputs = [latents, codebook, parameter]
    gumbel, normal = -randn(12, K, seed=3).exp().log1p().log(), randn(12, D, seed=4)
    monkeypatch.setattr(quantizers, "gumbel_noise", lambda like: gumbel)
    monkeypatch.setattr(quantizers, "gaussian_noise", lambda like: normal)
    output = quantizer(latents)
    variance = naive.dequantization_variance(form, INITIAL, LR_SCALE, parameter)
    expected = naive.gaussian_quantizer(latents, codebook, variance, TEMPERATURE, gumbel, normal if noisy else None)
    assert torch.equal(output.image_tokens, expected.image_tokens)
    assert_all_close((output.quantized, output.loss), (expected.quantized, expected.loss))
    actual = gradients(output.quantized, output.loss, inputs)
    assert_all_close(actual, gradients(expected.quantized, expected.loss, inputs))
    assert all(gradient.abs().max() > 1e-3 for gradient in actual)


@pytest.mark.parametrize("form", ["product", "sum"])
def test_the_gaussian_in_evaluation_takes_the_nearest_code_and_the_mean(form: str):
    latents, quantizer = make_latents(), make_gaussian(form, noisy=True).eval()
    output = quantizer(latents)
    codebook, variance = quantizer.codebook.weight, quantizer.variance()
    loss = 0.0
    for b, i, j in naive.positions(latents):
        mean = latents[b, :, i, j]
        assert output.image_tokens[b, i, j] == naive.nearest(mean, codebook)
        code = codebook[output.image_tokens[b, i, j]]
        assert torch.equal(output.quantized[b, :, i, j], code)
        entropy = -sum(p * p.log() for p in naive.posterior(mean, codebook, variance))
        loss = loss + naive.squared_norm(mean - code) / (2 * variance) - entropy
    torch.testing.assert_close(output.loss, loss / len(latents), rtol=1e-9, atol=1e-12)


def test_the_six_steps():
    latents, quantizer = make_latents(3, 2, 4), QUANTIZERS["gradient"]()
    z_e = latents.detach().permute(0, 2, 3, 1).numpy()
    six = naive.SixSteps(quantizer.codebook.weight.detach().numpy())
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
        latents, quantizer = make_latents(), with_codes(VectorQuantizer(K, D, beta))
        return torch.autograd.grad(quantizer(latents).loss, [latents, quantizer.codebook.weight])

    (no_latents, codes), (latents, same_codes), (doubled, _) = pull(0.0), pull(0.5), pull(1.0)
    assert torch.equal(codes, same_codes) and codes.any()
    assert not no_latents.any() and latents.any()
    torch.testing.assert_close(doubled, 2 * latents)


@every_quantizer
def test_any_number_of_grid_axes(make: Callable[[], Quantizer]):
    quantizer = make().eval()
    grid = make_latents(2, 2, 6)
    expected = quantizer(grid)
    for shape in ((12,), (2, 3, 2)):
        output = quantizer(grid.reshape(2, D, *shape))
        assert torch.equal(output.image_tokens, expected.image_tokens.reshape(2, *shape))
        assert torch.equal(output.quantized, expected.quantized.reshape(2, D, *shape))
        assert torch.equal(quantizer.lookup(output.image_tokens), output.quantized)
        assert torch.equal(quantizer.search(grid.reshape(2, D, *shape)), output.image_tokens)


@every_quantizer
def test_perplexity_is_that_of_the_deterministic_tokens(make: Callable[[], Quantizer]):
    output = make()(make_latents())
    counts = torch.bincount(output.image_tokens.flatten(), minlength=K).double() / 12
    expected = math.exp(-sum(p * math.log(p) for p in counts.tolist() if p))
    assert output.perplexity.item() == pytest.approx(expected, rel=1e-6)
    assert 1 < expected < K


def test_moving_averages_equal_the_loops_over_two_steps():
    quantizer = with_codes(EMAVectorQuantizer(K, D, BETA, DECAY))
    with torch.no_grad():
        quantizer.codebook.weight[-1] = 100.0
    codebook, cluster_size = quantizer.codebook.weight.clone(), quantizer.cluster_size.clone()
    for seed in (6, 7):
        latents = randn(2, D, 2, 3, seed=seed)
        tokens = quantizer(latents).image_tokens
        assert torch.equal(quantizer.codebook.weight, codebook), "the codebook moves in step() only"
        quantizer.step()
        codebook, cluster_size = naive.moving_averages(codebook, cluster_size, latents, tokens, DECAY)
        torch.testing.assert_close(quantizer.codebook.weight, codebook, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(quantizer.cluster_size, cluster_size, rtol=1e-12, atol=1e-12)
        codebook, cluster_size = quantizer.codebook.weight.clone(), quantizer.cluster_size.clone()
    unused = quantizer.cluster_size == 0
    assert unused[-1] and (quantizer.codebook.weight[-1] == 100).all()
    assert not quantizer.pending_counts.any() and not quantizer.pending_sums.any()


def test_moving_averages_stand_still_in_evaluation():
    quantizer = with_codes(EMAVectorQuantizer(K, D, BETA, DECAY))
    quantizer(make_latents())
    quantizer.step()
    before = {name: tensor.clone() for name, tensor in quantizer.named_buffers()}
    codebook = quantizer.codebook.weight.clone()
    quantizer.eval()(make_latents())
    for name, tensor in quantizer.named_buffers():
        assert torch.equal(tensor, before[name]), name
    quantizer.step()
    assert torch.equal(quantizer.codebook.weight, codebook)


def test_four_micro_batches_move_the_codebook_as_their_joint_batch():
    joint, split = (with_codes(EMAVectorQuantizer(K, D, BETA, DECAY)) for _ in range(2))
    for seed in (8, 9):
        latents = randn(8, D, 2, 3, seed=seed)
        joint(latents)
        for micro_batch in latents.chunk(4):
            split(micro_batch)
        joint.step()
        split.step()
    torch.testing.assert_close(split.codebook.weight, joint.codebook.weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(split.cluster_size, joint.cluster_size, rtol=1e-12, atol=1e-12)
    assert (joint.cluster_size > 0).sum() > 2


@pytest.mark.uninitialised_memory
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["not-reentrant", "reentrant"])
def test_checkpointing_counts_a_micro_batch_once(reentrant: bool, compiled: bool):
    quantizer, latents = with_codes(EMAVectorQuantizer(K, D, BETA, DECAY)), make_latents()
    runs = []

    def quantize(latents: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            runs.append(1)
        output = quantizer(latents)
        return output.quantized.square().sum() + output.loss

    def forward(latents: Tensor) -> Tensor:
        return checkpoint(quantize, latents, use_reentrant=reentrant)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (torch.compile(forward, backend="aot_eager") if compiled else forward)(latents).backward()
    torch._dynamo.reset()
    tokens = quantizer.search(latents)
    assert compiled or len(runs) == 2, "the forward was not repeated"
    assert torch.equal(quantizer.pending_counts, torch.bincount(tokens.flatten(), minlength=K).double())
    torch.testing.assert_close(quantizer.pending_sums.sum(0), latents.detach().sum((0, 2, 3)))


def test_temperature_decays_exponentially_and_then_stays():
    temperature = AnnealedTemperature(2.0, 0.5, 4)
    seen = []
    for _ in range(6):
        seen.append(temperature().item())
        temperature.step()
    assert seen == pytest.approx([2.0, 2**0.5, 1.0, 0.5**0.5, 0.5, 0.5], rel=1e-6)


def test_a_scale_of_zero_holds_the_variance():
    variance = DequantizationVariance("product", 0.3, 0.0)
    variance().backward()
    assert variance().item() == pytest.approx(0.3) and variance.log_ratio.grad == 0


def test_the_noise_has_its_distribution():
    torch.manual_seed(0)
    like = torch.empty(200_000, dtype=torch.float64)
    gumbel, normal = quantizers.gumbel_noise(like), quantizers.gaussian_noise(like)
    assert gumbel.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert gumbel.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)
    assert normal.mean().item() == pytest.approx(0, abs=0.01) and normal.var().item() == pytest.approx(1, rel=0.02)
    codes = quantizers.draw_codes(torch.tensor([[0.2, 0.0, 0.8]]).expand(20_000, 3))
    assert torch.bincount(codes).tolist() == pytest.approx([4_000, 0, 16_000], abs=300)


@pytest.mark.parametrize("codes", [2, 1000, 2**18 + 1])
def test_the_search_works_in_chunks(codes: int, monkeypatch: pytest.MonkeyPatch):
    sizes, addmm = [], torch.addmm

    def recording(*args: Tensor, **kwargs: float) -> Tensor:
        scores = addmm(*args, **kwargs)
        sizes.append(tuple(scores.shape))
        return scores

    monkeypatch.setattr(torch, "addmm", recording)
    rows, vectors = torch.randn(900 if codes == 1000 else 3, 2), torch.randn(codes, 2)
    nearest = quantizers.nearest_code(rows, vectors)
    assert torch.equal(nearest, torch.cdist(rows.double(), vectors.double()).argmin(1))
    assert sum(rows for rows, _ in sizes) == len(rows)
    assert all(rows == 1 or rows * width <= 2**18 for rows, width in sizes)


def largest_allocation(function: Callable[[], object]) -> int:
    """Bytes of the largest single tensor that any operator inside `function` allocates on the CPU."""
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    return max(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize("quantizer", [VectorQuantizer(1024, 4, 0.25), EMAVectorQuantizer(1024, 4, 0.25, 0.99)])
def test_no_table_of_rows_by_codes(quantizer: Quantizer):
    latents = torch.randn(16, 4, 32, 32, requires_grad=True)
    rows_by_codes = 16 * 32 * 32 * 1024

    def train() -> None:
        output = quantizer.train()(latents)
        (output.quantized.sum() + output.loss).backward()

    # Even as bytes a one-hot would take rows_by_codes.
    assert largest_allocation(train) < rows_by_codes / 8


def test_the_gaussian_search_has_no_table_of_rows_by_codes():
    variance, temperature = DequantizationVariance("product", 1.0, 1.0), AnnealedTemperature(1.0, 0.5, 10)
    quantizer = GaussianQuantizer(1024, 4, variance, temperature).eval()
    latents = torch.randn(16, 4, 32, 32)
    assert largest_allocation(lambda: quantizer.search(latents)) < 16 * 32 * 32 * 1024 / 8
