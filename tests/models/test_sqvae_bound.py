"""The SQ-VAE's probabilities, exactly: Bayes' rule, the bound on log p(x), and its two limits, by enumeration."""

import itertools
import math

import naive_quantizers as naive
import naive_stochastic_quantizers as loops
import pytest
import torch
from torch import Tensor, nn

from hf_vq import SQVAEConfig, SQVAEModel
from hf_vq.models.annealing import AnnealedTemperature, DequantizationVariance
from hf_vq.models.stochastic_quantizers import GaussianQuantizer

K, D = 4, 2
# Positions, pixels and draws of the toy.
POSITIONS, PIXELS, DRAWS = 2, 8, 8_000


def make_quantizer(codes: int, variance: float, temperature: float = 1.0) -> GaussianQuantizer:
    annealing = {
        "variance": DequantizationVariance("product", variance, 1.0),
        "temperature": AnnealedTemperature(temperature, temperature, 1),
    }
    quantizer = GaussianQuantizer(codes, D, **annealing)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        quantizer.double().codebook.weight.copy_(torch.randn(codes, D, generator=generator, dtype=torch.float64))
    return quantizer


def make_rows(count: int) -> tuple[Tensor, Tensor]:
    """Rows (count, D), and the same as latents (1, D, count)."""
    rows = torch.randn(count, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return rows, rows.T[None]


@pytest.mark.parametrize("variance", [0.05, 0.7, 30.0])
def test_the_posterior_is_bayes_rule(variance: float):
    quantizer, (rows, latents) = make_quantizer(5, variance), make_rows(12)
    found = quantizer.statistics(latents)
    expected = [loops.posterior(row, quantizer.codebook.weight, quantizer.variance()) for row in rows]
    entropy = torch.stack([loops.entropy(posterior) for posterior in expected]).mean()
    torch.testing.assert_close(found["posterior_entropy"], entropy, rtol=1e-10, atol=1e-14)
    likeliest = torch.stack([torch.stack(posterior).max() for posterior in expected]).mean()
    torch.testing.assert_close(found["argmax_probability"], likeliest, rtol=1e-10, atol=1e-14)


def test_a_wide_variance_gives_log_k_of_entropy_and_a_narrow_one_the_tokens_of_a_vqvae():
    rows, latents = make_rows(50)
    wide = make_quantizer(5, 1e6).statistics(latents)
    assert wide["posterior_entropy"].item() == pytest.approx(math.log(5), abs=1e-9)
    narrow = make_quantizer(5, 1e-8)
    nearest = [naive.nearest(row, narrow.codebook.weight) for row in rows]
    assert narrow.statistics(latents)["posterior_entropy"].item() < 1e-9
    assert narrow.sample(latents).flatten().tolist() == nearest == narrow.search(latents).flatten().tolist()
    output = narrow.train()(latents)
    vectors = torch.stack([narrow.codebook.weight[token] for token in nearest])
    torch.testing.assert_close(output.quantized[0].T, vectors)


class Toy(nn.Module):
    """Linear maps of an image (1, 2, 4) to latents (M * D, 1, 2) and to their log variance, if there is a head."""

    def __init__(self, channels: int, has_head: bool) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, channels, 2, stride=2)
        self.head = nn.Conv2d(1, channels, 2, stride=2) if has_head else None

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.convolution(images), None if self.head is None else self.head(images)


def make_toy(
    seed: int, variance: float, observation_variance: float, covariance: str = "global", num_codebooks: int = 1
) -> SQVAEModel:
    """K = 4, two positions, everything linear, float64; noisy Z, and a draw so cold that it is exact."""
    torch.manual_seed(seed)
    config = SQVAEConfig(
        num_channels=1, image_size=2, hidden_channels=(2,), codebook_size=K, codebook_dim=D, num_residual_blocks=1,
        residual_channels=1, initial_variance=variance, dequantization_noise=True, variance_update="learned",
        temperature_start=1e-9, temperature_end=1e-9, covariance=covariance, num_codebooks=num_codebooks,
    )  # fmt: skip
    model = SQVAEModel(config)
    model.encoder = Toy(num_codebooks * D, config.has_variance_head)
    model.decoder = nn.ConvTranspose2d(num_codebooks * D, 1, 2, stride=2)
    nn.init.normal_(model.quantizer.codebook.weight)
    nn.init.constant_(model.log_observation_variance, math.log(observation_variance))
    return model.double().train()


def log_evidence(model: SQVAEModel, image: Tensor) -> float:
    """log p(x) = log sum over all tokens of K^-(positions * M) N(x; f(tokens), sigma^2 I)."""
    variance, books = model.log_observation_variance.exp(), model.config.num_codebooks
    terms = []
    for codes in itertools.product(range(K), repeat=POSITIONS * books):
        rows = [model.quantizer.codebook.weight[K * (i % books) + code] for i, code in enumerate(codes)]
        mean = model.decoder(torch.cat(rows).view(POSITIONS, books * D).T.reshape(1, books * D, 1, POSITIONS))
        log_density = -naive.squared_norm((image - mean).flatten()) / (2 * variance)
        terms.append(log_density - PIXELS / 2 * torch.log(2 * math.pi * variance) - len(codes) * math.log(K))
    return torch.logsumexp(torch.stack(terms), 0).item()


def bound(model: SQVAEModel, image: Tensor) -> tuple[float, float]:
    """-loss with the constants that Eq. 8 drops, and its standard error."""
    torch.manual_seed(0)
    losses = []
    with torch.no_grad():
        for _ in range(40):
            losses.append(model(image.expand(DRAWS // 40, 1, 2, 4)).loss)
    codes = POSITIONS * model.config.num_codebooks
    values = -torch.stack(losses) - PIXELS / 2 * math.log(2 * math.pi) - codes * math.log(K)
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


def some_image() -> Tensor:
    return torch.rand(1, 1, 2, 4, dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize("covariance", ["global", "per_sample", "per_latent", "diagonal"])
@pytest.mark.parametrize("num_codebooks", [1, 2], ids=["M=1", "M=2"])
@pytest.mark.parametrize("variance", [0.02, 0.3, 3.0])
def test_the_bound_stays_under_the_evidence(variance: float, num_codebooks: int, covariance: str):
    # Whatever Sigma_phi(x) is, p(Z | Z_q, x) is a density: the bound holds for every type.
    for seed in range(2):
        model = make_toy(seed, variance, 0.2, covariance, num_codebooks)
        image = some_image()
        value, error = bound(model, image)
        assert value < log_evidence(model, image) + 4 * error


@pytest.mark.parametrize("covariance", ["global", "diagonal"])
def test_the_bound_is_tight_where_the_tokens_say_nothing(covariance: str):
    model = make_toy(0, 1e6, 0.2, covariance)
    nn.init.zeros_(model.decoder.weight)
    image = some_image()
    value, error = bound(model, image)
    assert error < 0.02
    assert value == pytest.approx(log_evidence(model, image), abs=5 * error)


def test_the_bound_is_tight_where_the_tokens_are_certain():
    model = make_toy(0, 1e-3, observation_variance=1e-3)
    nn.init.zeros_(model.encoder.convolution.weight)
    codebook = torch.tensor([[3.0, 0.0], [0.0, 3.0], [-3.0, 0.0], [0.0, -3.0]])
    with torch.no_grad():
        model.quantizer.codebook.weight.copy_(codebook)
        # Every image is code 1, twice.
        model.encoder.convolution.bias.copy_(codebook[1])
        image = model.decoder(codebook[1].double().view(1, D, 1, 1).expand(1, D, 1, 2)) + 0.01
    value, error = bound(model, image)
    assert error < 0.02
    assert value == pytest.approx(log_evidence(model, image), abs=5 * error)


def test_a_cold_draw_is_a_draw_from_the_posterior():
    quantizer = make_quantizer(K, 0.7, temperature=1e-9).train()
    row = torch.tensor([0.3, -0.2], dtype=torch.float64)
    torch.manual_seed(0)
    quantized = quantizer(row.view(1, D, 1, 1).expand(1, D, 200, 100)).quantized
    drawn = torch.cdist(quantized[0].flatten(1).T, quantizer.codebook.weight).argmin(1)
    assert torch.allclose(quantizer.codebook.weight[drawn], quantized[0].flatten(1).T)
    frequency = torch.bincount(drawn, minlength=K).double() / len(drawn)
    expected = torch.stack(loops.posterior(row, quantizer.codebook.weight, quantizer.variance()))
    torch.testing.assert_close(frequency, expected.detach(), rtol=0, atol=0.015)
