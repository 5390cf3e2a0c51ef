"""What the tests of all quantizers share: inputs with a known draw, one quantizer of every kind, comparisons."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import Phase, settings
from naive_quantizers import Naive
from torch import Tensor

from hf_vq.models import vector_quantizers
from hf_vq.models.annealing import AnnealedTemperature, DequantizationVariance, InverseConcentration
from hf_vq.models.codebook_care import CodebookCare
from hf_vq.models.finite_scalar_quantizer import FiniteScalarQuantizer
from hf_vq.models.quantizers import Quantizer, QuantizerOutput
from hf_vq.models.stochastic_quantizers import (
    DiagonalGaussianQuantizer,
    GaussianQuantizer,
    VonMisesFisherQuantizer,
)
from hf_vq.models.vector_quantizers import (
    EMAVectorQuantizer,
    LinearCodebookQuantizer,
    SoftEMVectorQuantizer,
    VectorQuantizer,
)

K, D, BETA, DECAY, SAMPLES = 7, 3, 0.3, 0.9, 4
TEMPERATURE, INITIAL, LR_SCALE = 0.7, 0.8, 5.0
LEVELS = [4, 3, 5]
# Two images of each give these numbers of positions.
GRIDS = {"sequence": (5,), "picture": (2, 3), "film": (2, 1, 3)}
COVARIANCES = ("global", "per_sample", "per_latent", "diagonal")

# The same examples in every run, small as they are; how long one takes is no matter.
PROPERTIES = settings(
    deadline=None, max_examples=40, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate]
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def standard_gumbel(*shape: int, seed: int = 0) -> Tensor:
    return -(-rand(*shape, seed=seed).log()).log()


def make_latents(grid: tuple[int, ...] = (2, 3), num_codebooks: int = 1, batch: int = 2, dim: int = D) -> Tensor:
    return randn(batch, num_codebooks * dim, *grid).requires_grad_()


def with_codes(quantizer: Quantizer) -> Quantizer:
    """`quantizer` in float64 and training mode, its codes among the latents; a grid stays what it is."""
    quantizer.double().train()
    with torch.no_grad():
        for name, start in quantizer.initial_state().items():
            quantizer.get_parameter(name).copy_(start)
        if not isinstance(quantizer, FiniteScalarQuantizer):
            quantizer.codebook.weight.copy_(randn(*quantizer.codebook.weight.shape, seed=1))
    return quantizer


def annealing(form: str = "product", initial: float = INITIAL) -> dict[str, torch.nn.Module]:
    return {
        "variance": DequantizationVariance(form, initial, LR_SCALE),
        "temperature": AnnealedTemperature(TEMPERATURE, TEMPERATURE, 1),
    }


def make_gaussian(
    form: str = "product",
    covariance: str = "global",
    noisy: bool = False,
    num_codebooks: int = 1,
    initial: float = INITIAL,
) -> GaussianQuantizer:
    kind = DiagonalGaussianQuantizer if covariance == "diagonal" else GaussianQuantizer
    own = {"dequantization_noise": noisy, **annealing(form, initial)}
    own |= {} if covariance == "diagonal" else {"covariance": covariance}
    return with_codes(kind(K, D, num_codebooks, **own))


def make_directional(
    form: str = "product", num_codebooks: int = 1, initial: float = INITIAL
) -> VonMisesFisherQuantizer:
    own = {**annealing(), "variance": InverseConcentration(form, initial, LR_SCALE)}
    return with_codes(VonMisesFisherQuantizer(K, D, num_codebooks, **own))


def make_care(num_codebooks: int) -> CodebookCare:
    return CodebookCare(K, D, num_codebooks, True, 0.2)


# One of every kind, by its number of codebooks.
QUANTIZERS: dict[str, Callable[[int], Quantizer]] = {
    "gradient": lambda m: with_codes(VectorQuantizer(K, D, m, commitment_weight=BETA)),
    "rotation": lambda m: with_codes(VectorQuantizer(K, D, m, gradient_estimator="rotation")),
    "normalised": lambda m: with_codes(VectorQuantizer(K, D, m, normalize_codes=True)),
    "linear": lambda m: with_codes(LinearCodebookQuantizer(K, D, m)),
    "ema": lambda m: with_codes(EMAVectorQuantizer(K, D, m, commitment_weight=BETA, decay=DECAY)),
    "ema-care": lambda m: with_codes(EMAVectorQuantizer(K, D, m, decay=DECAY, care=make_care(m))),
    "soft_em": lambda m: with_codes(SoftEMVectorQuantizer(K, D, m, decay=DECAY, num_samples=SAMPLES)),
    "fsq": lambda m: with_codes(FiniteScalarQuantizer(LEVELS, m)),
    "gaussian": lambda m: make_gaussian(num_codebooks=m),
    "gaussian-noisy": lambda m: make_gaussian("sum", noisy=True, num_codebooks=m),
    "gaussian-per_sample": lambda m: make_gaussian(covariance="per_sample", num_codebooks=m),
    "gaussian-per_latent": lambda m: make_gaussian("sum", "per_latent", num_codebooks=m),
    "gaussian-diagonal": lambda m: make_gaussian(covariance="diagonal", noisy=True, num_codebooks=m),
    "vmf": lambda m: make_directional(num_codebooks=m),
}


def make_log_variance(latents: Tensor, seed: int = 9) -> Tensor:
    """What a variance head might say of latents; quantizers without one ignore it."""
    return 0.7 * randn(*latents.shape, seed=seed).to(latents.dtype)


def gradients(quantized: Tensor, loss: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Of the loss and of what a decoder might ask of `quantized`."""
    decoder = (quantized * randn(*quantized.shape, seed=2)).sin().sum()
    return torch.autograd.grad(decoder + loss, inputs)


def assert_all_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def assert_same_as_loops(output: QuantizerOutput, expected: Naive, inputs: list[Tensor]) -> None:
    """Tokens, vectors and loss are equal, and so are their gradients, none of which vanishes."""
    assert torch.equal(output.image_tokens, expected.image_tokens)
    assert_all_close((output.quantized, output.loss), (expected.quantized, expected.loss))
    actual = gradients(output.quantized, output.loss, inputs)
    assert_all_close(actual, gradients(expected.quantized, expected.loss, inputs))
    assert all(gradient.abs().max() > 1e-3 for gradient in actual)


def averaged(
    kind: type[EMAVectorQuantizer] = EMAVectorQuantizer, num_codebooks: int = 1, **own: object
) -> EMAVectorQuantizer:
    return with_codes(kind(K, D, num_codebooks, commitment_weight=BETA, **{"decay": DECAY, **own}))


def patch_uniforms(monkeypatch: pytest.MonkeyPatch, uniforms: Tensor) -> None:
    def given(like: Tensor, samples: int, generator: torch.Generator | None = None) -> Tensor:
        assert like.shape[:-1] == uniforms.shape[:-1] and samples == uniforms.shape[-1]
        return uniforms

    monkeypatch.setattr(vector_quantizers, "uniform_noise", given)
