"""Latents in clusters that are far apart, and quantizers with care for their codes."""

import pytest
import torch
from quantizer_checks import randn, with_codes
from torch import Tensor

from hf_vq.models.codebook_care import CodebookCare
from hf_vq.models.vector_quantizers import EMAVectorQuantizer, SoftEMVectorQuantizer, VectorQuantizer

K, D = 8, 2
CENTRES = torch.tensor([[30.0, 0.0], [0.0, 30.0], [-30.0, 0.0], [0.0, -30.0]], dtype=torch.float64)

KINDS: dict[str, type[VectorQuantizer]] = {
    "gradient": VectorQuantizer,
    "ema": EMAVectorQuantizer,
    "soft_em": SoftEMVectorQuantizer,
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
every_number = pytest.mark.parametrize("num_codebooks", [1, 2], ids=["M=1", "M=2"])


def make(
    kind: type[VectorQuantizer], num_codebooks: int = 1, kmeans: bool = False, revive_below: float = 0.0, codes: int = K
) -> VectorQuantizer:
    care = CodebookCare(codes, D, num_codebooks, kmeans, revive_below)
    return with_codes(kind(codes, D, num_codebooks, care=care))


def clustered(num_codebooks: int = 1, count: int = 40, seed: int = 0, spread: float = 0.1) -> Tensor:
    """Latents (count, M * D, 4) around four centres; the codebooks' own are the same centres, scaled by 1, 2, ..."""
    noise = spread * randn(count, num_codebooks * D, 4, seed=seed)
    centres = torch.cat([(m + 1) * CENTRES.T for m in range(num_codebooks)])
    return centres + noise


def of_codebooks(quantizer: VectorQuantizer) -> Tensor:
    """The codebooks (M, K, D) as they are now."""
    return quantizer.codebook.weight.detach().clone().view(quantizer.num_codebooks, quantizer.codebook_size, D)
