"""What every tokenizer shares: encode, decode and forward around a quantizer, and the likelihood of an image.

Representations, in the order in which they arise (B images, C channels, M codebooks of K codes of dimension D, h x w
token grid): pixel_values (B, C, H, W) float in [-1, 1] -> latents (B, M * D, h, w) -> image_tokens (B, h, w), or
(B, h, w, M) for M > 1, in [0, K) -> quantized (B, M * D, h, w) -> reconstruction (B, C, H, W), the mean of
p(x | image_tokens).
"""

import warnings
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import capture_outputs

from .autoencoder_outputs import AutoencoderDecoderOutput, AutoencoderEncoderOutput, AutoencoderOutput
from .autoencoder_weights import INITIAL_OBSERVATION_VARIANCE, AutoencoderPreTrainedModel
from .configuration_autoencoder import AutoencoderConfig
from .convolutional_body import Decoder, Encoder
from .fingerprints import token_fingerprint
from .input_checks import check_pixel_values, check_refinement, tokens_on_grid
from .logistic_mixture import to_mixture
from .observation import gaussian_log_prob
from .quantizers import Quantizer, keep_float32, world_sum
from .token_refinement import TokenRefinement
from .unet_body import UNetDecoder, UNetEncoder

FORWARDS_BEFORE_WARNING = 100
BODIES: dict[str, Any] = {"convolutional": (Encoder, Decoder), "unet": (UNetEncoder, UNetDecoder)}


class AutoencoderModel(AutoencoderPreTrainedModel):
    """An image tokenizer. A family adds its quantizer and its reconstruction loss.

    Buffers:
        observation_variance (C,): sigma^2 of p(image | tokens) per element of each channel, in the units of
            pixel_values: the training squared error of the last optimizer step, until it is fitted.
        pending_error (2,): sum over images of the squared error per element, and their number, since the last `step`;
            not saved.
    """

    observation_variance: Tensor
    pending_error: Tensor

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__(config)
        config.validate()
        encoder, decoder = BODIES[config.body]
        self.encoder = encoder(config)
        self.quantizer = self.make_quantizer()
        self.decoder = decoder(config)
        variance = torch.full((config.num_channels,), INITIAL_OBSERVATION_VARIANCE, dtype=torch.float32)
        self.register_buffer("observation_variance", variance)
        self.register_buffer("pending_error", torch.zeros(2, dtype=torch.float32), persistent=False)
        ignored = getattr(self.quantizer, "_ddp_params_and_buffers_to_ignore", [])
        local = ["pending_error", *(f"quantizer.{name}" for name in ignored)]
        # torch.compile puts its own prefix before the names that DDP sees.
        self._ddp_params_and_buffers_to_ignore = [*local, *(f"_orig_mod.{name}" for name in local)]
        self._forwards_since_step = 0
        self._tokens_are_frozen = False

    def make_quantizer(self) -> Quantizer:
        """The family's quantizer."""
        raise NotImplementedError

    def reconstruction_loss(self, error: Tensor, elements: int) -> Tensor:
        """The decoder's part of the loss, a scalar.

        Args:
            error: squared error per element, (), the mean over the batch.
            elements: C * H * W.
        """
        raise NotImplementedError

    def likelihood_loss(self, nats: Tensor, elements: int) -> Tensor:
        """The decoder's part of the loss under a `logistic_mixture`, a scalar.

        Args:
            nats: -log P(image | tokens), (), the mean over the batch.
            elements: C * H * W.
        """
        raise NotImplementedError

    def get_input_embeddings(self) -> nn.Embedding:
        """The codebook."""
        return self.quantizer.codebook

    def set_input_embeddings(self, value: nn.Embedding) -> None:  # type: ignore[override]  # any module, upstream
        """Replaces the codebook."""
        self.quantizer.codebook = value

    def encode(
        self,
        pixel_values: Tensor,
        return_loss: bool = False,
        sample: bool = False,
        generator: torch.Generator | None = None,
        refine: int = 0,
    ) -> AutoencoderEncoderOutput:
        """Images to tokens.

        Args:
            pixel_values: (B, C, H, W) in [-1, 1], H and W divisible by the downsampling factor.
            return_loss: whether the quantizer's loss and perplexity are wanted too. In training mode this is also
                what makes the quantized latents differentiable and counts the codes.
            sample: draw the tokens from the posterior instead of taking the deterministic ones.
            generator: for the draw.
            refine: rounds in which tokens change where the reconstruction's squared error falls (`TokenRefinement`), in
                evaluation mode. Each costs about sixteen passes through the decoder, with the memory of training.

        Raises:
            ValueError: if shape or type do not fit the model, both return_loss and sample are set, or refine is no
                number of rounds, or not with return_loss, sample or training mode.
        """
        check_pixel_values(pixel_values, self.config)
        if refine:
            check_refinement(refine, self, plain=not return_loss and not sample)
        if return_loss and sample:
            raise ValueError("the loss belongs to the deterministic tokens: set return_loss or sample, not both")
        latents, log_variance = self.encoder(pixel_values.to(self._body_dtype))
        if return_loss:
            quantized, image_tokens, embedding_loss, perplexity = self.quantizer(latents, log_variance)
            return AutoencoderEncoderOutput(image_tokens, latents, quantized, embedding_loss, perplexity)
        if sample:
            image_tokens = self.quantizer.sample(latents, log_variance, generator)
        else:
            image_tokens = self.quantizer.search(latents, log_variance)
        if refine:
            with torch.no_grad():
                image_tokens = TokenRefinement(self, pixel_values)(image_tokens, refine)
        return AutoencoderEncoderOutput(image_tokens, latents, self.quantizer.lookup(image_tokens))

    def decode(
        self, image_tokens: Tensor | None = None, quantized_last_hidden_state: Tensor | None = None
    ) -> AutoencoderDecoderOutput:
        """Tokens, or quantized latents, to images.

        Args:
            image_tokens: (B, h, w[, M]), or flat (B, h * w * M), codebook fastest, for the model's own grid; int64 in
                [0, K).
            quantized_last_hidden_state: (B, M * D, h, w), instead of the tokens.

        Raises:
            ValueError: unless exactly one of the two is given, or if tokens have a wrong shape, type or value.
        """
        if (image_tokens is None) == (quantized_last_hidden_state is None):
            raise ValueError("decode takes either image_tokens or quantized_last_hidden_state, and just one of them")
        if image_tokens is not None:
            quantized_last_hidden_state = self.quantizer.lookup(tokens_on_grid(image_tokens, self.config))
        decoded = self.decoder(quantized_last_hidden_state.to(self._body_dtype))
        if self.config.observation == "gaussian":
            return AutoencoderDecoderOutput(decoded)
        mean = to_mixture(decoded, self.config.num_channels).mean()
        return AutoencoderDecoderOutput(mean.to(decoded.dtype), decoded)

    @capture_outputs
    def forward(self, pixel_values: Tensor, return_loss: bool = True, **kwargs: Any) -> AutoencoderOutput:
        """Encodes, decodes and compares.

        Args:
            pixel_values: (B, C, H, W) in [-1, 1], H and W divisible by the downsampling factor.
            return_loss: whether to compute the losses. True by default: transformers' Trainer looks for it.

        Example:
            >>> output = model(processor(images, return_tensors="pt").pixel_values)
            >>> output.loss.backward()
        """
        encoded = self.encode(pixel_values, return_loss=return_loss)
        decoded = self.decode(quantized_last_hidden_state=encoded.quantized_last_hidden_state)
        loss = reconstruction_loss = None
        if return_loss:
            reconstruction_loss = self._reconstruction_loss(pixel_values, decoded)
            loss = reconstruction_loss + encoded.embedding_loss
        return AutoencoderOutput(
            loss=loss,
            decoded_pixel_values=decoded.pixel_values,
            image_tokens=encoded.image_tokens,
            reconstruction_loss=reconstruction_loss,
            embedding_loss=encoded.embedding_loss,
            perplexity=encoded.perplexity,
        )

    @torch.no_grad()
    def log_prob(self, pixel_values: Tensor, image_tokens: Tensor) -> Tensor:
        """log P(8-bit image | image_tokens) in nats, (B,): `config.observation` integrated over each value's bin.

        A Gaussian has the reconstruction as its mean and `observation_variance` as its variance.

        Args:
            pixel_values: (B, C, H, W) float, multiples of 2/255 from -1 to 1.
            image_tokens: (B, h, w[, M]), or flat for the model's own grid.
        """
        check_pixel_values(pixel_values, self.config)
        decoded = self.decode(image_tokens)
        mean: Any = decoded.pixel_values
        if mean.shape != pixel_values.shape:
            raise ValueError(
                f"pixel_values of shape {tuple(pixel_values.shape)} do not go with image_tokens of shape "
                f"{tuple(image_tokens.shape)}, which decode to {tuple(mean.shape)}"
            )
        if decoded.mixture_parameters is not None:
            mixture = to_mixture(decoded.mixture_parameters.double(), self.config.num_channels)
            return mixture.log_prob(pixel_values.double())
        return gaussian_log_prob(pixel_values, mean, self.observation_variance)

    def freeze_tokens(self) -> None:
        """From now on only the decoder trains: tokens and fingerprint stay, and so do priors made for them."""
        for part in (self.encoder, self.quantizer):
            part.requires_grad_(False)
        self._tokens_are_frozen = True
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Training or evaluation mode; what is frozen stays in evaluation."""
        super().train(mode)
        if self._tokens_are_frozen:
            self.encoder.eval()
            self.quantizer.eval()
        return self

    @torch.no_grad()
    def step(self) -> None:
        """Once after each optimizer step: moves the quantizer's state and `observation_variance`."""
        if not self._tokens_are_frozen:
            self.quantizer.step()
        error, images = world_sum(self.pending_error)
        moved = (error / images).clamp(min=torch.finfo(error.dtype).tiny)
        self.observation_variance.copy_(torch.where(images > 0, moved, self.observation_variance))
        self.pending_error.zero_()
        self._forwards_since_step = 0

    def scalars(self) -> dict[str, Tensor]:
        """What moves beside the weights and belongs in a log, by name; each ()."""
        return {"observation_variance": self.observation_variance.mean(), **self.quantizer.scalars()}

    def fingerprint(self) -> str:
        """sha256 of what determines the tokens, 64 hexadecimal digits.

        A new decoder, bfloat16 or float64, and every count, counter or temperature leave it unchanged.
        """
        # What changes tokens, and no parameter's name or shape.
        names = ("activation", "norm_groups")
        chosen = {name: getattr(self.config, name) for name in names}
        of_body = {name: value for name, value in chosen.items() if value != getattr(type(self.config), name)}
        return token_fingerprint(self.encoder, self.quantizer, of_body | self.quantizer.token_options())

    @property
    def _body_dtype(self) -> torch.dtype:
        return next(self.decoder.parameters()).dtype

    def _reconstruction_loss(self, pixel_values: Tensor, decoded: AutoencoderDecoderOutput) -> Tensor:
        assert decoded.pixel_values is not None
        error, elements = self._squared_error(pixel_values, decoded.pixel_values), pixel_values[0].numel()
        if decoded.mixture_parameters is None:
            return self.reconstruction_loss(error, elements)
        mixture = to_mixture(decoded.mixture_parameters, self.config.num_channels)
        return self.likelihood_loss(-mixture.log_prob(pixel_values).mean(), elements)

    def _squared_error(self, pixel_values: Tensor, decoded: Tensor) -> Tensor:
        """Squared error per element, the mean over the batch; in training also kept for `step`."""
        wide = torch.promote_types(decoded.dtype, torch.float32)
        error = (decoded.to(wide) - pixel_values.to(wide)).square().mean()
        if self.training:
            self._keep_error(error.detach(), len(pixel_values))
        return error

    def _keep_error(self, error: Tensor, images: int) -> None:
        self.pending_error += torch.stack([error * images, torch.full_like(error, images)])
        # A Python counter in a compiled forward would recompile it at every call.
        if not torch.compiler.is_compiling():
            self._forwards_since_step += 1
            if self._forwards_since_step == FORWARDS_BEFORE_WARNING:
                warnings.warn(
                    f"{type(self).__name__} ran {FORWARDS_BEFORE_WARNING} training forwards without model.step(). Call "
                    "it once after each optimizer step (hf_vq.QuantizerCallback does so in transformers' Trainer): "
                    "until then moving averages, temperature and observation_variance stand still. If you accumulate "
                    "gradients over as many forwards, all is well.",
                    stacklevel=2,
                )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Moves the model; its own buffers, unlike the body, stay in float32 or wider."""
        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(keep_float32(fn), recurse=False)


__all__ = ["AutoencoderModel"]
