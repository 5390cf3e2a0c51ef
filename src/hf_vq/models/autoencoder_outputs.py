"""What encode, decode and forward of a tokenizer return.

Letters: B images, C channels, H x W pixels, M codebooks of K codes of dimension D, h x w token grid. With M > 1
image_tokens have the shape `(B, h, w, M)`.
"""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class AutoencoderEncoderOutput(ModelOutput):
    r"""What `encode` returns.

    Args:
        image_tokens (`torch.LongTensor` of shape `(B, h, w)`): codes in [0, K); the deterministic ones unless sampled.
        last_hidden_state (`torch.FloatTensor` of shape `(B, M * D, h, w)`): the latents, before quantization.
        quantized_last_hidden_state (`torch.FloatTensor` of shape `(B, M * D, h, w)`): what the decoder gets.
        embedding_loss (`torch.FloatTensor` of shape `()`): the quantizer's part of the loss, if asked for.
        perplexity (`torch.FloatTensor` of shape `()`): of this batch's image_tokens, if the loss is asked for.
    """

    image_tokens: Tensor | None = None
    last_hidden_state: Tensor | None = None
    quantized_last_hidden_state: Tensor | None = None
    embedding_loss: Tensor | None = None
    perplexity: Tensor | None = None


@dataclass
class AutoencoderDecoderOutput(ModelOutput):
    r"""What `decode` returns.

    Args:
        pixel_values (`torch.FloatTensor` of shape `(B, C, H, W)`): the reconstruction, in the range of pixel_values.
        mixture_parameters (`torch.FloatTensor` of shape `(B, P, H, W)`): of a `logistic_mixture`.
    """

    pixel_values: Tensor | None = None
    mixture_parameters: Tensor | None = None


@dataclass
class AutoencoderOutput(ModelOutput):
    r"""What `forward` returns.

    Args:
        loss (`torch.FloatTensor` of shape `()`): reconstruction_loss + embedding_loss.
        decoded_pixel_values (`torch.FloatTensor` of shape `(B, C, H, W)`): the reconstruction.
        image_tokens (`torch.LongTensor` of shape `(B, h, w)`): the deterministic codes, in training too.
        reconstruction_loss (`torch.FloatTensor` of shape `()`): the decoder's part of the loss.
        embedding_loss (`torch.FloatTensor` of shape `()`): the quantizer's part of the loss.
        perplexity (`torch.FloatTensor` of shape `()`): exp(entropy) of this batch's image_tokens; for the log only.
        hidden_states (`tuple(torch.FloatTensor)`): outputs of the residual blocks, if asked for.
    """

    loss: Tensor | None = None
    decoded_pixel_values: Tensor | None = None
    image_tokens: Tensor | None = None
    reconstruction_loss: Tensor | None = None
    embedding_loss: Tensor | None = None
    perplexity: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


__all__ = ["AutoencoderDecoderOutput", "AutoencoderEncoderOutput", "AutoencoderOutput"]
