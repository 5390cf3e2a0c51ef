"""The quantizers as their papers print them: a loop per index, one number at a time, nothing shared with the package.

Rows are in raster order (image, row, column). Numbers are 0-dim tensors, so that autograd differentiates the loops.
Papers: VQ-VAE, arXiv 1711.00937; SQ-VAE, arXiv 2205.07547.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Naive(NamedTuple):
    """quantized (B, D, h, w), image_tokens (B, h, w), and the quantizer's loss."""

    quantized: Tensor
    image_tokens: Tensor
    loss: Tensor


def squared_norm(difference: Tensor) -> Tensor:
    """||v||^2, element by element."""
    total = difference.new_zeros(())
    for component in difference:
        total = total + component * component
    return total


def nearest(latent: Tensor, codebook: Tensor) -> int:
    """argmin_k ||z - e_k||, the first of equals."""
    best, least = 0, math.inf
    for k, code in enumerate(codebook):
        distance = squared_norm(latent - code).item()
        if distance < least:
            best, least = k, distance
    return best


def positions(latents: Tensor) -> list[tuple[int, int, int]]:
    """(image, row, column) in raster order."""
    batch, _, height, width = latents.shape
    return [(b, i, j) for b in range(batch) for i in range(height) for j in range(width)]


def assemble(vectors: list[Tensor], tokens: list[int], loss: Tensor, latents: Tensor) -> Naive:
    """Vectors and tokens of the positions, back on the grid."""
    batch, dim, height, width = latents.shape
    quantized = torch.stack(vectors).reshape(batch, height, width, dim).permute(0, 3, 1, 2)
    return Naive(quantized, torch.tensor(tokens).reshape(batch, height, width), loss)


def vector_quantizer(latents: Tensor, codebook: Tensor, commitment_weight: float, codebook_learns: bool) -> Naive:
    """VQ-VAE, Eqs. 1-3: ||sg[z_e] - e||^2 + beta ||z_e - sg[e]||^2, means over elements; EMA has no first term."""
    vectors, tokens, loss = [], [], latents.new_zeros(())
    for b, i, j in positions(latents):
        latent = latents[b, :, i, j]
        token = nearest(latent, codebook)
        code = codebook[token]
        if codebook_learns:
            loss = loss + squared_norm(latent.detach() - code)
        loss = loss + commitment_weight * squared_norm(latent - code.detach())
        vectors.append(latent + (code - latent).detach())
        tokens.append(token)
    return assemble(vectors, tokens, loss / latents.numel(), latents)


class SixSteps:
    """The six numbered steps of "Understanding Vector Quantized Variational Autoencoders", in its letters, in NumPy."""

    def __init__(self, dictionary: np.ndarray) -> None:
        self.dictionary = dictionary

    def forward(self, z_e: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """z_q (n, h, w, d) and the indices (n, h, w) for z_e (n, h, w, d)."""
        n, h, w, d = z_e.shape
        # 1. Reshape: all dimensions except the last one are combined into one.
        flat = z_e.reshape(n * h * w, d)
        # 2. Calculating distances: a matrix of shape (n*h*w, k).
        distances = np.zeros((n * h * w, len(self.dictionary)))
        for row in range(n * h * w):
            for k in range(len(self.dictionary)):
                distances[row, k] = np.sqrt(np.sum((flat[row] - self.dictionary[k]) ** 2))
        # 3. Argmin: the index of the closest of the k vectors.
        indices = np.argmin(distances, axis=1)
        # 4. Index from dictionary.
        closest = np.stack([self.dictionary[index] for index in indices])
        # 5. Reshape: back to (n, h, w, d).
        return closest.reshape(n, h, w, d), indices.reshape(n, h, w)

    @staticmethod
    def backward(gradient_of_z_q: np.ndarray) -> np.ndarray:
        """6. Copying gradients from z_q back to z_e."""
        return gradient_of_z_q.copy()

    def loss_gradients(self, z_e: np.ndarray, beta: float) -> tuple[float, np.ndarray, np.ndarray]:
        """codebook_loss + commitment_loss, means over elements, and their gradients by hand for z_e and dictionary."""
        z_q, indices = self.forward(z_e)
        value = (1 + beta) * np.mean((z_e - z_q) ** 2)
        dictionary_gradient = np.zeros_like(self.dictionary)
        for place in np.ndindex(indices.shape):
            dictionary_gradient[indices[place]] += 2 * (z_q[place] - z_e[place]) / z_e.size
        return value, 2 * beta * (z_e - z_q) / z_e.size, dictionary_gradient


def moving_averages(
    codebook: Tensor, cluster_size: Tensor, latents: Tensor, tokens: Tensor, decay: float
) -> tuple[Tensor, Tensor]:
    """VQ-VAE, Appendix A.1: m_i and N_i as running sums, e_i = m_i / N_i; a code without latents keeps its vector."""
    codebook, cluster_size = codebook.clone(), cluster_size.clone()
    for k in range(len(codebook)):
        members = [latents[b, :, i, j] for b, i, j in positions(latents) if tokens[b, i, j] == k]
        running_sum = decay * cluster_size[k] * codebook[k]
        cluster_size[k] = decay * cluster_size[k]
        for latent in members:
            running_sum = running_sum + (1 - decay) * latent
            cluster_size[k] += 1 - decay
        if members:
            codebook[k] = running_sum / cluster_size[k]
    return codebook, cluster_size


def dequantization_variance(form: str, initial: float, lr_scale: float, parameter: Tensor) -> Tensor:
    """sigma_phi^2 of type I: exp(s), or exp(0) + exp(s), with s = log(initial) + lr_scale * parameter."""
    s = math.log(initial) + lr_scale * parameter
    return torch.exp(s) if form == "product" else torch.exp(torch.zeros_like(s)) + torch.exp(s)


def posterior(latent: Tensor, codebook: Tensor, variance: Tensor) -> list[Tensor]:
    """P(z_q = b_k | Z = latent) by Bayes' rule: Gaussian densities times 1/K, over their sum."""
    joint = []
    for code in codebook:
        density = latent.new_ones(())
        for z, mean in zip(latent, code, strict=True):
            density = density * torch.exp(-((z - mean) ** 2) / (2 * variance)) / torch.sqrt(2 * math.pi * variance)
        joint.append(density / len(codebook))
    evidence = sum(joint[1:], joint[0])
    return [probability / evidence for probability in joint]


def relaxed_draw(probabilities: list[Tensor], gumbel: Tensor, temperature: float) -> list[Tensor]:
    """Gumbel-softmax: exp((log p_k + g_k) / tau), normalised."""
    weights = [torch.exp((torch.log(p) + g) / temperature) for p, g in zip(probabilities, gumbel, strict=True)]
    total = sum(weights[1:], weights[0])
    return [weight / total for weight in weights]


def gaussian_quantizer(
    latents: Tensor, codebook: Tensor, variance: Tensor, temperature: float, gumbel: Tensor, normal: Tensor | None
) -> Naive:
    """SQ-VAE, Eqs. 7 and 8: regulariser - entropy, summed over positions, per image. `normal` draws Z around latents.

    Args:
        gumbel: (N, K) noise of the relaxed draw.
        normal: (N, D) noise of the dequantization, or None where Z is its mean.
    """
    vectors, tokens, loss = [], [], latents.new_zeros(())
    for n, (b, i, j) in enumerate(positions(latents)):
        mean = latents[b, :, i, j]
        z = mean if normal is None else mean + torch.sqrt(variance) * normal[n]
        probabilities = posterior(z, codebook, variance)
        z_q = torch.zeros_like(mean)
        for weight, code in zip(relaxed_draw(probabilities, gumbel[n], temperature), codebook, strict=True):
            z_q = z_q + weight * code
        entropy = -sum(p * torch.log(p) for p in probabilities)
        loss = loss + squared_norm(z - z_q) / (2 * variance) - entropy - (0 if normal is None else len(mean) / 2)
        vectors.append(z_q)
        tokens.append(nearest(mean, codebook))
    return assemble(vectors, tokens, loss / len(latents), latents)
