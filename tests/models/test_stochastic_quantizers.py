"""The quantizers of SQ-VAE against their naive twins, value and gradient; their draws, statistics and annealing."""

import math
from collections.abc import Callable

import naive_quantizers as naive
import naive_stochastic_quantizers as loops
import pytest
import torch
from quantizer_checks import (
    COVARIANCES,
    GRIDS,
    INITIAL,
    LR_SCALE,
    TEMPERATURE,
    D,
    K,
    annealing,
    assert_all_close,
    assert_same_as_loops,
    make_directional,
    make_gaussian,
    make_latents,
    make_log_variance,
    randn,
    standard_gumbel,
)
from torch import Tensor

from hf_vq.models import stochastic_quantizers
from hf_vq.models.annealing import AnnealedTemperature, DequantizationVariance, InverseConcentration
from hf_vq.models.stochastic_quantizers import GaussianQuantizer, StochasticQuantizer

every_form = pytest.mark.parametrize("form", ["product", "sum"])
every_covariance = pytest.mark.parametrize("covariance", COVARIANCES)
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
every_number = pytest.mark.parametrize("num_codebooks", [1, 3], ids=["M=1", "M=3"])


def patch_noise(monkeypatch: pytest.MonkeyPatch, latents: Tensor, num_codebooks: int) -> tuple[Tensor, Tensor]:
    """Gumbel (M, N, K) and normal (M, N, D) noise that the next forward of these latents will draw."""
    positions = len(naive.positions(latents))
    gumbel = standard_gumbel(num_codebooks, positions, K, seed=3)
    normal = randn(num_codebooks, positions, D, seed=4)

    def given(noise: Tensor) -> Callable[[Tensor], Tensor]:
        def draw(like: Tensor) -> Tensor:
            assert like.shape == noise.shape
            return noise

        return draw

    monkeypatch.setattr(stochastic_quantizers, "gumbel_noise", given(gumbel))
    monkeypatch.setattr(stochastic_quantizers, "gaussian_noise", given(normal))
    return gumbel, normal


def moved_parameter(quantizer: StochasticQuantizer) -> tuple[Tensor, Tensor]:
    """The variance's parameter, away from zero, and s."""
    parameter = quantizer.variance.log_ratio
    torch.nn.init.constant_(parameter, 0.11)
    return parameter, loops.scale(INITIAL, LR_SCALE, parameter)


def make_head(covariance: str, latents: Tensor) -> Tensor | None:
    return None if covariance == "global" else make_log_variance(latents).requires_grad_()


@every_grid
@every_number
@pytest.mark.parametrize("noisy", [False, True], ids=["mean", "noisy"])
@every_covariance
@every_form
def test_the_gaussian_equals_the_loops(
    form: str, covariance: str, noisy: bool, num_codebooks: int, grid: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
):
    quantizer = make_gaussian(form, covariance, noisy, num_codebooks)
    latents, codebook = make_latents(grid, num_codebooks), quantizer.codebook.weight
    parameter, s = moved_parameter(quantizer)
    gumbel, normal = patch_noise(monkeypatch, latents, num_codebooks)
    head = make_head(covariance, latents)
    expected = loops.gaussian_quantizer(
        latents,
        codebook,
        s,
        gumbel,
        temperature=TEMPERATURE,
        form=form,
        covariance=covariance,
        log_variance=head,
        normal=normal if noisy else None,
        num_codebooks=num_codebooks,
    )
    inputs = [latents, codebook, parameter, *([] if head is None else [head])]
    assert_same_as_loops(quantizer(latents, head), expected, inputs)


@every_grid
@every_number
@every_form
def test_the_directional_equals_the_loops(
    form: str, num_codebooks: int, grid: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
):
    quantizer, latents = make_directional(form, num_codebooks), make_latents(grid, num_codebooks)
    parameter, s = moved_parameter(quantizer)
    gumbel, _ = patch_noise(monkeypatch, latents, num_codebooks)
    codebook, kappa = quantizer.codebook.weight, loops.concentration(form, s)
    expected = loops.directional_quantizer(latents, codebook, kappa, gumbel, TEMPERATURE, num_codebooks)
    assert_same_as_loops(quantizer(latents), expected, [latents, codebook, parameter])


@every_number
@every_covariance
@every_form
def test_the_gaussian_in_evaluation_takes_the_likeliest_code_and_the_mean(
    form: str, covariance: str, num_codebooks: int
):
    quantizer = make_gaussian(form, covariance, True, num_codebooks).eval()
    latents = make_latents((4, 5), num_codebooks)
    _, s = moved_parameter(quantizer)
    head = make_head(covariance, latents)
    shared = {"form": form, "covariance": covariance, "log_variance": head, "num_codebooks": num_codebooks}
    expected = loops.gaussian_quantizer(latents, quantizer.codebook.weight, s, None, **shared)
    output = quantizer(latents, head)
    assert torch.equal(output.image_tokens, expected.image_tokens)
    assert torch.equal(quantizer.search(latents, head), expected.image_tokens)
    assert torch.equal(quantizer.lookup(output.image_tokens), output.quantized)
    assert_all_close((output.quantized, output.loss), (expected.quantized, expected.loss))


@every_number
@every_form
def test_the_directional_in_evaluation_takes_the_likeliest_code(form: str, num_codebooks: int):
    quantizer, latents = make_directional(form, num_codebooks).eval(), make_latents((4, 5), num_codebooks)
    kappa = loops.concentration(form, moved_parameter(quantizer)[1])
    expected = loops.directional_quantizer(latents, quantizer.codebook.weight, kappa, None, 1.0, num_codebooks)
    output = quantizer(latents)
    assert torch.equal(output.image_tokens, expected.image_tokens)
    assert_all_close((output.quantized, output.loss), (expected.quantized, expected.loss))


def test_weights_of_type_iv_change_the_code():
    quantizer, latents = make_gaussian(covariance="diagonal").eval(), make_latents((8, 8), batch=8)
    strong = 5 * make_log_variance(latents)
    tokens, unweighted = quantizer.search(latents, strong), quantizer.search(latents, torch.zeros_like(latents))
    differ = (tokens != unweighted).double().mean()
    assert 0.1 < differ < 0.9
    assert torch.equal(quantizer.train()(latents, strong).image_tokens, tokens)


SMOOTH: dict[str, Callable[[], StochasticQuantizer]] = {
    **{f"{kind}-product": lambda kind=kind: make_gaussian("product", kind, False, 2) for kind in COVARIANCES},
    **{f"{kind}-sum-noisy": lambda kind=kind: make_gaussian("sum", kind, True, 2) for kind in COVARIANCES},
    "vmf-product": lambda: make_directional("product", 2),
    "vmf-sum": lambda: make_directional("sum", 2),
}


@pytest.mark.uninitialised_memory
@pytest.mark.parametrize("make", SMOOTH.values(), ids=SMOOTH)
def test_the_gradient_is_that_of_finite_differences(
    make: Callable[[], StochasticQuantizer], monkeypatch: pytest.MonkeyPatch
):
    quantizer, latents = make(), make_latents((2,), 2, batch=1)
    patch_noise(monkeypatch, latents, 2)
    head, parameter = make_log_variance(latents).requires_grad_(), torch.tensor(0.11, dtype=torch.float64)

    def run(latents: Tensor, head: Tensor, codebook: Tensor, parameter: Tensor) -> tuple[Tensor, Tensor]:
        moved = {"codebook.weight": codebook, "variance.log_ratio": parameter}
        output = torch.func.functional_call(quantizer, moved, (latents, head))
        return output.quantized, output.loss

    inputs = (latents, head, quantizer.codebook.weight.detach().clone(), parameter)
    assert torch.autograd.gradcheck(run, tuple(one.requires_grad_() for one in inputs))


@every_covariance
def test_an_image_does_not_feel_its_batch_mates(covariance: str):
    quantizer, latents = make_gaussian(covariance=covariance).eval(), make_latents((3, 4), batch=3)
    head = make_log_variance(latents)
    together = quantizer(latents, head)
    alone = [quantizer(latents[i : i + 1], head[i : i + 1]) for i in range(3)]
    assert torch.equal(together.image_tokens, torch.cat([output.image_tokens for output in alone]))
    torch.testing.assert_close(together.loss, torch.stack([output.loss for output in alone]).mean())


def posteriors(quantizer: StochasticQuantizer, latents: Tensor, head: Tensor) -> list[list[float]]:
    """P(k | Z) at every site, by the loops."""
    s = loops.scale(INITIAL, LR_SCALE, quantizer.variance.log_ratio)
    found = []
    for site in naive.sites(latents, quantizer.num_codebooks):
        codes = naive.codebook_of(quantizer.codebook.weight, site.m, quantizer.num_codebooks)
        if isinstance(quantizer.variance, InverseConcentration):
            codes = torch.stack([naive.unit(code) for code in codes])
            kappa = loops.concentration(quantizer.variance.form, s)
            posterior = loops.directional_posterior(naive.unit(site.latent), codes, kappa)
        else:
            heads = loops.head_at(quantizer.covariance, head, site)
            variance = torch.stack([loops.combine(quantizer.variance.form, own, s) for own in heads])
            posterior = loops.posterior(site.latent, codes, variance)
        found.append([p.item() for p in posterior])
    return found


@pytest.mark.parametrize("make", SMOOTH.values(), ids=SMOOTH)
def test_samples_have_the_posterior_and_a_generator_repeats_them(make: Callable[[], StochasticQuantizer]):
    quantizer, latents = make().eval(), make_latents((1, 1), 2, batch=1).detach()
    head = make_log_variance(latents)
    many = [one.expand(-1, -1, 200, 150) for one in (latents, head)]
    tokens = quantizer.sample(*many, torch.Generator().manual_seed(0))
    assert tokens.shape == (1, 200, 150, 2) and tokens.dtype == torch.int64
    for m, expected in enumerate(posteriors(quantizer, latents, head)):
        frequency = torch.bincount(tokens[..., m].flatten(), minlength=K).double() / tokens[..., m].numel()
        torch.testing.assert_close(frequency, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=0.013)
    assert torch.equal(quantizer.sample(*many, torch.Generator().manual_seed(0)), tokens)
    assert not torch.equal(quantizer.sample(*many, torch.Generator().manual_seed(1)), tokens)
    torch.manual_seed(5)
    assert not torch.equal(quantizer.sample(*many), quantizer.sample(*many))


@pytest.mark.parametrize("make", SMOOTH.values(), ids=SMOOTH)
def test_statistics_equal_the_loops(make: Callable[[], StochasticQuantizer]):
    quantizer, latents = make().eval(), make_latents((2, 3), 2)
    head = make_log_variance(latents)
    found = {name: value.item() for name, value in quantizer.statistics(latents, head).items()}
    every = posteriors(quantizer, latents, head)
    entropies = [-sum(p * math.log(p) for p in posterior) for posterior in every]
    s = loops.scale(INITIAL, LR_SCALE, quantizer.variance.log_ratio)
    if isinstance(quantizer.variance, InverseConcentration):
        variance = 1 / loops.concentration(quantizer.variance.form, s).item()
    else:
        heads = [loops.head_at(quantizer.covariance, head, site) for site in naive.sites(latents, 2)]
        numbers = [loops.combine(quantizer.variance.form, own, s).item() for site in heads for own in site]
        variance = sum(numbers) / len(numbers)
    assert found == pytest.approx(
        {
            "posterior_entropy": sum(entropies) / len(entropies),
            "argmax_probability": sum(map(max, every)) / len(every),
            "dequantization_variance": variance,
        }
    )


def test_argmax_probability_is_the_share_of_draws_that_equal_the_tokens():
    quantizer, latents = make_gaussian().eval(), make_latents((4, 4)).detach()
    tokens = quantizer.search(latents)
    torch.manual_seed(0)
    shares = [(quantizer.sample(latents) == tokens).double().mean() for _ in range(300)]
    assert quantizer.statistics(latents)["argmax_probability"].item() == pytest.approx(
        torch.stack(shares).mean().item(), abs=0.015
    )


def test_the_variance_never_falls_below_its_floor():
    for form, head in (("product", None), ("product", torch.full((2, 3), -80.0)), ("sum", torch.full((2, 3), -80.0))):
        variance = DequantizationVariance(form, 1e-3, 20.0)
        torch.nn.init.constant_(variance.log_ratio, -2.0)
        assert (variance(head) == 1e-10).all()
    assert DequantizationVariance("sum", 1e-30, 1.0)().item() == 1.0


@pytest.mark.parametrize("form", ["product", "sum"])
def test_no_variance_is_infinite(form: str):
    variance, head = DequantizationVariance(form, 1.0, 20.0), torch.full((2, 3), 200.0, requires_grad=True)
    torch.nn.init.constant_(variance.log_ratio, 50.0)
    variance(head).log().sum().backward()
    assert variance(head).isfinite().all() and head.grad.isfinite().all() and variance.log_ratio.grad.isfinite()


@pytest.mark.parametrize("covariance", ["per_latnet", "diagonal"])
def test_a_covariance_of_another_class_is_refused(covariance: str):
    with pytest.raises(ValueError, match=f"global, per_sample, per_latent, got {covariance}"):
        GaussianQuantizer(K, D, covariance=covariance, **annealing("product", 1.0))


@every_covariance
def test_latents_of_double_precision_meet_codes_of_single(covariance: str):
    quantizer, latents = make_gaussian(covariance=covariance), make_latents()
    expected = quantizer.eval()(latents, make_head(covariance, latents))
    narrow = quantizer.float()
    for training in (False, True):
        output = narrow.train(training)(latents, make_head(covariance, latents))
        assert output.image_tokens.shape == expected.image_tokens.shape and output.loss.isfinite()


@every_covariance
def test_the_log_shows_only_a_variance_that_there_is(covariance: str):
    assert ("dequantization_variance" in make_gaussian(covariance=covariance).scalars()) == (covariance == "global")


@pytest.mark.parametrize("initial", [20.0, 1e-2, 1e-5, 1e-8])
def test_a_concentration_keeps_its_digits_in_single_precision(initial: float):
    for form, kappa in (("product", 1 / initial), ("sum", 1 + 1 / initial)):
        assert (1 / InverseConcentration(form, initial, 1.0)()).item() == pytest.approx(kappa, rel=1e-5)


def test_a_scale_of_zero_holds_the_variance():
    variance = DequantizationVariance("product", 0.3, 0.0)
    variance().backward()
    assert variance().item() == pytest.approx(0.3) and variance.log_ratio.grad == 0


def test_temperature_decays_exponentially_and_then_stays():
    temperature = AnnealedTemperature(2.0, 0.5, 4)
    seen = []
    for _ in range(6):
        seen.append(temperature().item())
        temperature.step()
    assert seen == pytest.approx([2.0, 2**0.5, 1.0, 0.5**0.5, 0.5, 0.5], rel=1e-6)


def test_step_moves_the_temperature_and_the_scalars_show_it():
    quantizer = make_gaussian("sum")
    quantizer.temperature = AnnealedTemperature(1.0, 0.25, 2)
    seen = []
    for _ in range(3):
        scalars = {name: value.item() for name, value in quantizer.scalars().items()}
        assert scalars["dequantization_variance"] == pytest.approx(1 + INITIAL)
        seen.append(scalars["temperature"])
        quantizer(make_latents())
        quantizer.step()
    assert seen == pytest.approx([1.0, 0.5, 0.25])
