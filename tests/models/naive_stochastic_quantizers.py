"""The quantizers of SQ-VAE (arXiv 2205.07547) as the paper prints them: loops, nothing shared with the package."""

import math

import torch
from naive_quantizers import Chosen, Naive, Site, codebook_of, inner, nearest, quantize, squared_norm, unit
from torch import Tensor

FLOOR = 1e-10


def scale(initial: float, lr_scale: float, parameter: Tensor) -> Tensor:
    """s = log(initial) + lr_scale * parameter."""
    return math.log(initial) + lr_scale * parameter


def combine(form: str, head: Tensor, s: Tensor) -> Tensor:
    """sigma_phi^2: exp(head + s), the paper's, or exp(head) + exp(s), the authors' vision code; at least 1e-10."""
    variance = torch.exp(head + s) if form == "product" else torch.exp(head) + torch.exp(s)
    return variance if variance.item() > FLOOR else torch.full_like(variance, FLOOR)


def head_at(covariance: str, log_variance: Tensor | None, site: Site) -> list[Tensor]:
    """Table 1: what the variance head says to each component of a latent (D,).

    (I) nothing; (II) its mean over the sample; (III) its mean over the channels of the position, whichever codebook
    they belong to; (IV) itself.
    """
    dim = len(site.latent)
    if covariance == "global":
        return [site.latent.new_zeros(())] * dim
    assert log_variance is not None
    if covariance == "diagonal":
        return [log_variance[(site.b, site.m * dim + d, *site.place)] for d in range(dim)]
    if covariance == "per_sample":
        numbers = list(log_variance[site.b].reshape(-1))
    else:
        numbers = [channel[site.place] for channel in log_variance[site.b]]
    return [sum(numbers[1:], numbers[0]) / len(numbers)] * dim


def posterior(latent: Tensor, codebook: Tensor, variance: Tensor) -> list[Tensor]:
    """P(z_q = b_k | Z = latent) by Bayes' rule: Gaussian densities times 1/K, over their sum; variance () or (D,)."""
    joint = []
    for code in codebook:
        density = latent.new_ones(())
        for z, mean, own in zip(latent, code, variance.expand(len(latent)), strict=True):
            density = density * torch.exp(-((z - mean) ** 2) / (2 * own)) / torch.sqrt(2 * math.pi * own)
        joint.append(density / len(codebook))
    evidence = sum(joint[1:], joint[0])
    return [probability / evidence for probability in joint]


def directional_posterior(latent: Tensor, codebook: Tensor, kappa: Tensor) -> list[Tensor]:
    """P(z_q = b_k | Z) = exp(kappa b_k^T z) over their sum, of unit vectors."""
    joint = [torch.exp(kappa * inner(code, latent)) for code in codebook]
    evidence = sum(joint[1:], joint[0])
    return [weight / evidence for weight in joint]


def entropy(probabilities: list[Tensor]) -> Tensor:
    """-sum_k p_k log p_k."""
    return -sum(p * torch.log(p) for p in probabilities)


def relaxed_draw(probabilities: list[Tensor], gumbel: Tensor, temperature: float) -> list[Tensor]:
    """Gumbel-softmax: exp((log p_k + g_k) / tau), normalised."""
    weights = [torch.exp((torch.log(p) + g) / temperature) for p, g in zip(probabilities, gumbel, strict=True)]
    total = sum(weights[1:], weights[0])
    return [weight / total for weight in weights]


def mixture(weights: list[Tensor], codebook: Tensor) -> Tensor:
    """sum_k w_k b_k."""
    total = torch.zeros_like(codebook[0])
    for weight, code in zip(weights, codebook, strict=True):
        total = total + weight * code
    return total


def likeliest(latent: Tensor, codebook: Tensor, variance: Tensor) -> int:
    """argmin_k of the squared distance in which component d counts 1 / sigma_d^2."""
    best, least = 0, math.inf
    for k, code in enumerate(codebook):
        distance = squared_norm((latent - code) / torch.sqrt(variance)).item()
        if distance < least:
            best, least = k, distance
    return best


def gaussian_quantizer(
    latents: Tensor,
    codebook: Tensor,
    s: Tensor,
    gumbel: Tensor | None,
    *,
    temperature: float = 1.0,
    form: str = "product",
    covariance: str = "global",
    log_variance: Tensor | None = None,
    normal: Tensor | None = None,
    num_codebooks: int = 1,
) -> Naive:
    """SQ-VAE, Eqs. 7 and 8: regulariser - entropy, summed over positions, per image. `normal` draws Z around latents.

    Args:
        s: (), the learned scalar.
        gumbel: (M, N, K) noise of the relaxed draw; None for evaluation, where the likeliest code is taken.
        log_variance: (B, M * D, *grid), the variance head.
        normal: (M, N, D) noise of the dequantization, or None where Z is its mean.
    """

    def one(site: Site) -> Chosen:
        mean, codes = site.latent, codebook_of(codebook, site.m, num_codebooks)
        variance = torch.stack([combine(form, head, s) for head in head_at(covariance, log_variance, site)])
        z = mean if normal is None else mean + torch.sqrt(variance) * normal[site.m, site.n]
        probabilities = posterior(z, codes, variance)
        token = likeliest(mean, codes, variance)
        if gumbel is None:
            z_q = codes[token]
        else:
            z_q = mixture(relaxed_draw(probabilities, gumbel[site.m, site.n], temperature), codes)
        regulariser = squared_norm((z - z_q) / torch.sqrt(variance)) / 2 - (0 if normal is None else len(mean) / 2)
        return z_q, token, regulariser - entropy(probabilities)

    output = quantize(latents, num_codebooks, one)
    return output._replace(loss=output.loss / len(latents))


def concentration(form: str, s: Tensor) -> Tensor:
    """kappa_phi with variance exp(s): 1 / exp(s), or the authors' 1 + 1 / exp(s)."""
    return torch.exp(-s) if form == "product" else 1 + torch.exp(-s)


def directional_quantizer(
    latents: Tensor,
    codebook: Tensor,
    kappa: Tensor,
    gumbel: Tensor | None,
    temperature: float = 1.0,
    num_codebooks: int = 1,
) -> Naive:
    """SQ-VAE, von Mises-Fisher: kappa (1 - z^T z_q) - entropy, z and codes of length one, z_q a mixture of codes."""

    def one(site: Site) -> Chosen:
        latent = unit(site.latent)
        codes = torch.stack([unit(code) for code in codebook_of(codebook, site.m, num_codebooks)])
        probabilities, token = directional_posterior(latent, codes, kappa), nearest(latent, codes)
        if gumbel is None:
            z_q = codes[token]
        else:
            z_q = mixture(relaxed_draw(probabilities, gumbel[site.m, site.n], temperature), codes)
        return z_q, token, kappa * (1 - inner(latent, z_q)) - entropy(probabilities)

    output = quantize(latents, num_codebooks, one)
    return output._replace(loss=output.loss / len(latents))
