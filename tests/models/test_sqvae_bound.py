"""The SQ-VAE's probabilities, exactly: Bayes' rule, the bound on log p(x), and its two limits, by enumeration."""

import itertools
import math

import naive_quantizers as naive
import pytest
import torch
from torch import Tensor, nn

from hf_vq import SQVAEConfig, SQVAEModel
from hf_vq.models import quantizers
from hf_vq.models.quantizers import AnnealedTemperature, DequantizationVariance, GaussianQuantizer

K, D = 4, 2
# Positions, pixels and draws of the toy.
POSITIONS, PIXELS, DRAWS = 2, 8, 8_000


def make_quantizer(codes: int, variance: float) -> GaussianQuantizer:
    made = DequantizationVariance("product", variance, 1.0)
    quantizer = GaussianQuantizer(codes, D, made, AnnealedTemperature(1, 1, 1))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        quantizer.double().codebook.weight.copy_(torch.randn(codes, D, generator=generator, dtype=torch.float64))
    return quantizer


@pytest.mark.parametrize("variance", [0.05, 0.7, 30.0])
def test_the_posterior_is_bayes_rule(variance: float):
    quantizer = make_quantizer(5, variance)
    rows = torch.randn(12, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    actual = quantizer.log_posterior(rows).exp()
    codebook = quantizer.codebook.weight
    expected = torch.stack([torch.stack(naive.posterior(row, codebook, quantizer.variance())) for row in rows])
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-14)
    assert torch.allclose(actual.sum(1), torch.ones(12, dtype=torch.float64))


def test_samples_have_the_posterior_and_a_generator_repeats_them():
    quantizer = make_quantizer(5, 0.7)
    row = torch.tensor([0.3, -0.2], dtype=torch.float64)
    latents = row.view(1, D, 1, 1).expand(1, D, 200, 100)
    tokens = quantizer.sample(latents, torch.Generator().manual_seed(0))
    frequency = torch.bincount(tokens.flatten(), minlength=5).double() / tokens.numel()
    expected = torch.stack(naive.posterior(row, quantizer.codebook.weight, quantizer.variance()))
    torch.testing.assert_close(frequency, expected.detach(), rtol=0, atol=0.015)
    assert torch.equal(quantizer.sample(latents, torch.Generator().manual_seed(0)), tokens)
    assert not torch.equal(quantizer.sample(latents, torch.Generator().manual_seed(1)), tokens)


def test_a_wide_variance_gives_log_k_of_entropy_and_a_narrow_one_the_tokens_of_a_vqvae():
    rows = torch.randn(50, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    log_posterior = make_quantizer(5, 1e6).log_posterior(rows)
    entropy = -(log_posterior.exp() * log_posterior).sum(1)
    torch.testing.assert_close(entropy, torch.full_like(entropy, math.log(5)), rtol=0, atol=1e-9)
    narrow = make_quantizer(5, 1e-8)
    nearest = [naive.nearest(row, narrow.codebook.weight) for row in rows]
    assert narrow.log_posterior(rows).argmax(1).tolist() == nearest
    latents = rows.T[None, :, :, None]
    assert narrow.sample(latents).flatten().tolist() == nearest == narrow.search(latents).flatten().tolist()
    output = narrow.train()(latents)
    vectors = torch.stack([narrow.codebook.weight[token] for token in nearest])
    torch.testing.assert_close(output.quantized[0, :, :, 0].T, vectors)


class Toy(nn.Module):
    """Linear maps between an image (1, 2, 4) and latents (D, 1, 2)."""

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, images: Tensor) -> Tensor:
        return self.convolution(images)


def make_toy(seed: int, variance: float, observation_variance: float) -> SQVAEModel:
    """K = 4, two positions, everything linear, float64; noisy Z, and a draw so cold that it is exact."""
    torch.manual_seed(seed)
    config = SQVAEConfig(
        num_channels=1, image_size=2, hidden_channels=(2,), codebook_size=K, codebook_dim=D, num_residual_blocks=1,
        residual_channels=1, initial_variance=variance, dequantization_noise=True, variance_update="learned",
        temperature_start=1e-9, temperature_end=1e-9,
    )  # fmt: skip
    model = SQVAEModel(config)
    model.encoder, model.decoder = Toy(nn.Conv2d(1, D, 2, stride=2)), Toy(nn.ConvTranspose2d(D, 1, 2, stride=2))
    nn.init.normal_(model.quantizer.codebook.weight)
    nn.init.constant_(model.log_observation_variance, math.log(observation_variance))
    return model.double().train()


def log_evidence(model: SQVAEModel, image: Tensor) -> float:
    """log p(x) = log sum over all tokens of K^-positions N(x; f(tokens), sigma^2 I)."""
    variance = model.log_observation_variance.exp()
    terms = []
    for codes in itertools.product(range(K), repeat=POSITIONS):
        vectors = torch.stack([model.quantizer.codebook.weight[code] for code in codes])
        mean = model.decoder(vectors.T.reshape(1, D, 1, POSITIONS))
        log_density = -naive.squared_norm((image - mean).flatten()) / (2 * variance)
        terms.append(log_density - PIXELS / 2 * torch.log(2 * math.pi * variance) - POSITIONS * math.log(K))
    return torch.logsumexp(torch.stack(terms), 0).item()


def bound(model: SQVAEModel, image: Tensor) -> tuple[float, float]:
    """-loss with the constants that Eq. 8 drops, and its standard error."""
    torch.manual_seed(0)
    losses = []
    with torch.no_grad():
        for _ in range(40):
            losses.append(model(image.expand(DRAWS // 40, 1, 2, 4)).loss)
    values = -torch.stack(losses) - PIXELS / 2 * math.log(2 * math.pi) - POSITIONS * math.log(K)
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


@pytest.mark.parametrize("variance", [0.02, 0.3, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_bound_stays_under_the_evidence(seed: int, variance: float):
    model = make_toy(seed, variance, observation_variance=0.2)
    image = torch.rand(1, 1, 2, 4, dtype=torch.float64) * 2 - 1
    value, error = bound(model, image)
    assert value < log_evidence(model, image) + 4 * error


def test_the_bound_is_tight_where_the_tokens_say_nothing():
    model = make_toy(0, 1e6, observation_variance=0.2)
    nn.init.zeros_(model.decoder.convolution.weight)
    image = torch.rand(1, 1, 2, 4, dtype=torch.float64) * 2 - 1
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
    quantizer = make_quantizer(K, 0.7).train()
    quantizer.temperature = AnnealedTemperature(1e-9, 1e-9, 1)
    row = torch.tensor([0.3, -0.2], dtype=torch.float64)
    torch.manual_seed(0)
    quantized = quantizer(row.view(1, D, 1, 1).expand(1, D, 200, 100)).quantized
    drawn = quantizers.nearest_code(quantized[0].flatten(1).T, quantizer.codebook.weight)
    assert torch.allclose(quantizer.codebook.weight[drawn], quantized[0].flatten(1).T)
    frequency = torch.bincount(drawn, minlength=K).double() / len(drawn)
    expected = torch.stack(naive.posterior(row, quantizer.codebook.weight, quantizer.variance()))
    torch.testing.assert_close(frequency, expected.detach(), rtol=0, atol=0.015)
