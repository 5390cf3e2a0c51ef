"""The bound in bits per dim is the length of a code: an arithmetic coder writes images and tokens in as many bytes."""

import math

import constriction
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

import hf_vq
from hf_vq.models.logistic_mixture import to_mixture
from hf_vq.models.modeling_prior import PriorPreTrainedModel
from hf_vq.models.observation import gaussian_level_log_probs

IMAGES, SIDE, CODES = 16, 8, 32
Coder = constriction.stream.queue.RangeEncoder | constriction.stream.queue.RangeDecoder
FAMILY = constriction.stream.model.Categorical(perfect=False)


class Writer:
    """Codes symbols under probabilities (n, K); what it has written is `words`."""

    def __init__(self) -> None:
        self.encoder = constriction.stream.queue.RangeEncoder()

    def __call__(self, log_probs: Tensor, symbols: Tensor) -> Tensor:
        self.encoder.encode(symbols.numpy().astype(np.int32), FAMILY, log_probs.double().exp().numpy())
        return symbols


class Reader:
    """Reads them back under the same probabilities; the symbols that it is given do not matter."""

    def __init__(self, words: np.ndarray) -> None:
        self.decoder = constriction.stream.queue.RangeDecoder(words)

    def __call__(self, log_probs: Tensor, symbols: Tensor) -> Tensor:
        return torch.from_numpy(self.decoder.decode(FAMILY, log_probs.double().exp().numpy()).astype(np.int64))


@torch.no_grad()
def code_tokens(coder: Writer | Reader, prior: PriorPreTrainedModel, tokens: Tensor) -> Tensor:
    """Token by token, each step from the cache of those before, alike for writing and for reading."""
    coded = torch.full((len(tokens), 1), prior.config.bos_token_id)
    cache = None
    for place in range(prior.config.num_tokens):
        output = prior(coded[:, -1:], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        log_probs = output.logits[:, -1, :-1].double().log_softmax(-1)
        coded = torch.cat([coded, coder(log_probs, tokens[:, place])[:, None]], dim=1)
    return coded[:, 1:]


@torch.no_grad()
def code_levels(coder: Writer | Reader, model: hf_vq.SQVAEModel, tokens: Tensor, levels: Tensor) -> Tensor:
    """Channel by channel, all pixels of each at once; unread channels are not looked at."""
    decoded, coded = model.decode(tokens), torch.zeros_like(levels)
    for channel in range(levels.shape[1]):
        if decoded.mixture_parameters is not None:
            mixture = to_mixture(decoded.mixture_parameters.double(), levels.shape[1])
            log_probs = mixture.level_log_probs(coded.double() / 127.5 - 1, channel)
        else:
            log_probs = gaussian_level_log_probs(decoded.pixel_values, model.observation_variance, channel)
        rows = log_probs.movedim(1, -1).flatten(0, -2)
        coded[:, channel] = coder(rows, levels[:, channel].flatten()).view_as(coded[:, channel])
    return coded


def make_images(channels: int) -> Tensor:
    """Real digits as levels (B, C, H, W); of colour, each channel is another digit."""
    pixels = torch.tensor(load_digits().images[: channels * IMAGES] * 255 / 16).round().long()
    return pixels.view(IMAGES, channels, SIDE, SIDE)


@pytest.mark.parametrize("observation", ["gaussian", "logistic_mixture"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("num_codebooks", [1, 2])
@pytest.mark.parametrize("family", ["pixelcnn", "transformer"])
def test_a_coder_needs_the_bytes_of_the_bound(observation: str, channels: int, num_codebooks: int, family: str):
    torch.manual_seed(0)
    sizes = {"image_size": SIDE, "num_channels": channels, "codebook_size": CODES, "num_codebooks": num_codebooks}
    body = {"hidden_channels": [8], "residual_channels": 8, "num_residual_blocks": 1}
    model = hf_vq.SQVAEModel(hf_vq.SQVAEConfig(**sizes, **body, observation=observation)).eval()
    config, prior_class = {
        "pixelcnn": (hf_vq.PixelCNNPriorConfig, hf_vq.PixelCNNPrior),
        "transformer": (hf_vq.TransformerPriorConfig, hf_vq.TransformerPrior),
    }[family]
    shape = {"codebook_size": CODES, "num_codebooks": num_codebooks, "grid_size": SIDE // 2}
    prior = prior_class(config(**shape, hidden_size=16, num_hidden_layers=2, initializer_range=0.3)).eval()

    levels = make_images(channels)
    pixel_values = levels.float() / 127.5 - 1
    image_tokens = model.encode(pixel_values).image_tokens
    writer = Writer()
    code_tokens(writer, prior, image_tokens.flatten(1))
    code_levels(writer, model, image_tokens, levels)
    words = writer.encoder.get_compressed()

    reader = Reader(words)
    tokens = code_tokens(reader, prior, torch.zeros(IMAGES, prior.config.num_tokens, dtype=torch.int64))
    assert torch.equal(tokens, image_tokens.flatten(1))
    assert torch.equal(code_levels(reader, model, tokens, torch.zeros_like(levels)), levels)

    nats = -model.log_prob(pixel_values, image_tokens).sum() - prior.log_prob(image_tokens).sum()
    bound, written = float(nats) / math.log(2) / 8, words.nbytes
    assert bound <= written + 1e-3 * bound, "fewer bytes than the probabilities allow"
    assert written <= 1.01 * bound + 64
