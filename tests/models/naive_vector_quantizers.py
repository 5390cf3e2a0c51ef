"""The vector quantizers as their papers print them: loops, nothing shared with the package.

VQ-VAE, arXiv 1711.00937; soft EM, arXiv 1805.11063; the rotation trick, arXiv 2410.06424; SimVQ, arXiv 2411.02038;
finite scalar quantization, arXiv 2309.15505.
"""

import math

import numpy as np
import torch
from naive_quantizers import Chosen, Naive, Site, codebook_of, inner, nearest, quantize, sites, squared_norm, unit
from torch import Tensor


def rotated(latent: Tensor, code: Tensor) -> Tensor:
    """q~ = (|q| / |e|) R e, R = I - 2 w w^T + 2 q^ e^^T, w = (e^ + q^) / |e^ + q^|; R and the ratio are constants.

    Here e is the latent, q the code, and a hat makes a vector of length one.
    """
    with torch.no_grad():
        e_hat, q_hat = unit(latent), unit(code)
        w = unit(e_hat + q_hat)
        dim = len(latent)
        matrix = torch.zeros(dim, dim, dtype=latent.dtype)
        for i in range(dim):
            for j in range(dim):
                matrix[i, j] = (1.0 if i == j else 0.0) - 2 * w[i] * w[j] + 2 * q_hat[i] * e_hat[j]
        ratio = torch.sqrt(squared_norm(code) / squared_norm(latent))
    return torch.stack([ratio * inner(matrix[i], latent) for i in range(dim)])


def copied(latent: Tensor, code: Tensor) -> Tensor:
    """z_e + sg(e - z_e)."""
    return latent + (code - latent).detach()


ESTIMATORS = {"straight_through": copied, "rotation": rotated}


def vector_quantizer(
    latents: Tensor,
    codebook: Tensor,
    commitment_weight: float,
    codebook_learns: bool,
    num_codebooks: int = 1,
    estimator: str = "straight_through",
    normalize: bool = False,
) -> Naive:
    """VQ-VAE, Eqs. 1-3: ||sg[z_e] - e||^2 + beta ||z_e - sg[e]||^2, means over elements; EMA has no first term."""

    def one(site: Site) -> Chosen:
        latent, codes = site.latent, codebook_of(codebook, site.m, num_codebooks)
        if normalize:
            latent, codes = unit(latent), torch.stack([unit(code) for code in codes])
        token = nearest(latent, codes)
        code = codes[token]
        loss = commitment_weight * squared_norm(latent - code.detach())
        if codebook_learns:
            loss = loss + squared_norm(latent.detach() - code)
        return ESTIMATORS[estimator](latent, code), token, loss

    output = quantize(latents, num_codebooks, one)
    return output._replace(loss=output.loss / latents.numel())


def linear_codebook(frozen: Tensor, transform: Tensor) -> Tensor:
    """SimVQ: every code is the frozen one times one linear map, e_k = W_m c_k; (M * K, D) and (M, D, D)."""
    size = len(frozen) // len(transform)
    vectors = []
    for row, code in enumerate(frozen):
        vectors.append(torch.stack([inner(weights, code) for weights in transform[row // size]]))
    return torch.stack(vectors)


def draw(latent: Tensor, codebook: Tensor, uniform: float) -> int:
    """A draw from softmax_k(-||e_k - z_e||^2), no temperature, no 1/2: the first k whose cumulative weight passes."""
    weights = [math.exp(-squared_norm(code - latent).item()) for code in codebook]
    total, passed = sum(weights), 0.0
    for k, weight in enumerate(weights):
        passed += weight / total
        if uniform < passed:
            return k
    return len(weights) - 1


def soft_em(
    latents: Tensor,
    codebook: Tensor,
    commitment_weight: float,
    uniforms: Tensor,
    estimator: str = "straight_through",
    normalize: bool = False,
) -> tuple[Naive, Tensor]:
    """Soft EM, E step: the decoder gets the mean of the m drawn codes. And the draws (M, N, m).

    Args:
        uniforms: (M, N, m) in [0, 1), the randomness.
    """
    num_codebooks = len(uniforms)
    draws = torch.zeros(uniforms.shape, dtype=torch.int64)

    def one(site: Site) -> Chosen:
        latent, codes = site.latent, codebook_of(codebook, site.m, num_codebooks)
        if normalize:
            latent, codes = unit(latent), torch.stack([unit(code) for code in codes])
        mean = torch.zeros_like(latent)
        for sample, uniform in enumerate(uniforms[site.m, site.n].tolist()):
            k = draw(latent, codes, uniform)
            draws[site.m, site.n, sample] = k
            mean = mean + codes[k] / uniforms.shape[2]
        loss = commitment_weight * squared_norm(latent - mean.detach())
        return ESTIMATORS[estimator](latent, mean), nearest(latent, codes), loss

    output = quantize(latents, num_codebooks, one)
    return output._replace(loss=output.loss / latents.numel()), draws


def moving_averages(
    codebook: Tensor, cluster_size: Tensor, latents: Tensor, codes: Tensor, decay: float, normalize: bool = False
) -> tuple[Tensor, Tensor]:
    """VQ-VAE, Appendix A.1: m_i and N_i as running sums, e_i = m_i / N_i; a code without latents keeps its vector.

    Args:
        codes: (M, N, S): each of its S codes has 1 / S of a latent.
    """
    num_codebooks, _, samples = codes.shape
    codebook, cluster_size = codebook.clone(), cluster_size.clone()
    size = len(codebook) // num_codebooks
    for row in range(len(codebook)):
        members = []
        for site in sites(latents, num_codebooks):
            latent = unit(site.latent) if normalize else site.latent
            for code in codes[site.m, site.n].tolist():
                if site.m * size + code == row:
                    members.append(latent)
        running_sum = decay * cluster_size[row] * codebook[row]
        cluster_size[row] = decay * cluster_size[row]
        for latent in members:
            running_sum = running_sum + (1 - decay) * latent / samples
            cluster_size[row] += (1 - decay) / samples
        if members:
            codebook[row] = running_sum / cluster_size[row]
    return codebook, cluster_size


def lloyd(codebook: Tensor, points: Tensor) -> Tensor:
    """One iteration of k-means on points (n, D): each centre becomes the mean of its points; without any it stays."""
    moved = codebook.clone()
    owners = [nearest(point, codebook) for point in points]
    for k in range(len(codebook)):
        members = [point for point, owner in zip(points, owners, strict=True) if owner == k]
        if members:
            moved[k] = sum(members[1:], members[0]) / len(members)
    return moved


def half_width(level: int) -> tuple[float, float]:
    """h = (L - 1)(1 + 1e-3) / 2 and the offset o, a half where L is even."""
    return (level - 1) * (1 + 1e-3) / 2, 0.5 if level % 2 == 0 else 0.0


def finite_scalar(latents: Tensor, levels: list[int], num_codebooks: int = 1) -> Naive:
    """FSQ: tanh(z + atanh(o / h)) h - o, rounded with a straight-through gradient, over floor(L / 2); no loss.

    The token counts the levels with the first dimension fastest.
    """

    def one(site: Site) -> Chosen:
        values, token, basis = [], 0, 1
        for z, level in zip(site.latent, levels, strict=True):
            h, o = half_width(level)
            bounded = torch.tanh(z + math.atanh(o / h)) * h - o
            rounded = round(bounded.item())
            values.append((bounded + (rounded - bounded).detach()) / (level // 2))
            token += (rounded + level // 2) * basis
            basis *= level
        return torch.stack(values), token, latents.new_zeros(())

    return quantize(latents, num_codebooks, one)


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
