"""What both priors share: raster order, start token, classes, likelihood, and generation.

The sequence of an image is one start token, then its tokens in raster order, codebook index fastest. With M codebooks a
trunk runs once a position, over the sum of the embeddings of its M codes, and a depth head gives the M tokens of the
next position one after the other.

Letters: B sequences, L tokens in each, h x w positions, M codebooks of K codes, W the width.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.output_capturing import capture_outputs

from .configuration_prior import NO_CLASS, PriorConfig
from .depth_head import DepthHead, ScoreHead
from .fourier_features import fourier_features
from .pipeline_image_generation import ImageGenerationPipeline  # noqa: F401  # its file travels with the model
from .prior_cache import own_cache, position_under_way, tokens_seen
from .prior_guidance import ClassGuidance
from .prior_inputs import as_class_labels, check_class_labels, check_sequences, check_tokens
from .prior_tokenizer import rebase_tokenizer


class Positions(NamedTuple):
    """What a call adds.

    Attributes:
        hidden: (B, P, W), the trunk's output on the way to P positions.
        codes: (B, P, M), their codes as far as they are known.
        first: which of their P * M tokens is the first that no earlier call has scored.
    """

    hidden: Tensor
    codes: Tensor
    first: int


class PriorPreTrainedModel(PreTrainedModel, GenerationMixin):
    """P(image_tokens | class) as a causal language model over K codes.

    A family adds its trunk, and GenerationMixin among its own bases, where transformers looks for it. A trunk turns
    (B, S, W), the start token's embedding and then those of positions, into (B, S, W): what it says of the position
    after each.

    Example:
        >>> sequences = prior.generate(class_labels=torch.tensor([3, 7]))
        >>> images = processor.postprocess(model.decode(prior.image_tokens(sequences)).pixel_values)
    """

    config: PriorConfig
    trunk: nn.Module
    base_model_prefix = "prior"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False

    def __init__(self, config: PriorConfig) -> None:
        super().__init__(config)
        config.validate()
        self.codes = nn.Embedding(config.num_codebooks * config.codebook_size, config.hidden_size)
        # The start token: an embedding for each class, the last one for none.
        self.classes = nn.Embedding(config.num_classes + 1, config.hidden_size)
        self.trunk = self.make_trunk()
        sizes = (config.hidden_size, config.codebook_size)
        self.head = ScoreHead(*sizes) if config.num_codebooks == 1 else DepthHead(*sizes, config.num_codebooks)
        # Without these transformers samples among the 50 likeliest codes only.
        sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0}
        self.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id, max_length=1 + config.num_tokens, use_cache=config.use_cache, **sampling
        )

    def make_trunk(self) -> nn.Module:
        """The family's trunk."""
        raise NotImplementedError

    def new_cache(self) -> Cache:
        """An empty cache for the trunk."""
        raise NotImplementedError

    @torch.no_grad()
    def start_from_codebook(self, vectors: Tensor) -> None:
        """Begins embeddings and scores alike for codes that are close, which training otherwise has to find out.

        Args:
            vectors: (M, K, D), the tokenizer's `quantizer.vectors()`.

        Raises: ValueError for another number of codes or codebooks.
        """
        if tuple(vectors.shape[:2]) != (self.config.num_codebooks, self.config.codebook_size):
            raise ValueError(
                f"vectors must be ({self.config.num_codebooks}, {self.config.codebook_size}, D) for this prior, got "
                f"shape {tuple(vectors.shape)}"
            )
        embeddings = self.codes.weight.split(self.config.codebook_size)
        for own, embedding, tables in zip(vectors, embeddings, self.head.tables(), strict=True):
            for table in (embedding, *tables):
                features = fourier_features(own.to(table), self.config.hidden_size)
                table.copy_(features * self.config.initializer_range)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As everywhere; a tokenizer that was named as seen from the old folder is named as seen from the new one."""
        rebase_tokenizer(self.config, save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.codes

    def set_input_embeddings(self, value: nn.Embedding) -> None:  # type: ignore[override]  # any module, upstream
        self.codes = value

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor,
        class_labels: Tensor | None = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Scores of the token after each.

        Args:
            input_ids: (B, L), the start token K and then image tokens; with a cache that has seen some, those after.
            class_labels: (B,) in [0, num_classes), or -1 for the null class; None is the null class for all.
            labels: (B, L), input_ids again for the loss: the mean of -log P(token) in nats over image tokens, those
                that are -100 left out.
            attention_mask: all ones, because all images have the same number of tokens.
            past_key_values: from an earlier call, or of `new_cache`.
            use_cache: whether to return one; by default as the config says, and not with labels.
            logits_to_keep: only the last so many; 0 for all.

        Returns: logits (B, L, K + 1), of which the last, the start token's, has probability zero.

        Raises:
            ValueError: for sequences that do not begin with the start token or do not fit the grid, codes outside
                [0, K), labels outside their range, and an attention_mask that hides something.
        """
        wanted = self.config.use_cache if use_cache is None else use_cache
        if past_key_values is None and wanted and labels is None:
            past_key_values = self.new_cache()
        # Looking at values would break a compiled graph, and in training wait for a GPU.
        waits = self.training and input_ids.device.type != "cpu"
        if not torch.compiler.is_compiling() and not waits:
            self.check(input_ids, class_labels, attention_mask, tokens_seen(past_key_values, self.config.num_codebooks))
        read = self.read_tokens if self.config.num_codebooks == 1 else self.read_positions
        hidden, codes, first = read(input_ids, class_labels, past_key_values)
        last = first + input_ids.shape[1]
        first = max(first, last - logits_to_keep) if logits_to_keep else first
        scores = self.head(hidden, codes, first)[:, : last - first]
        return CausalLMOutputWithPast(
            loss=None if labels is None else mean_loss(scores, labels),
            logits=with_start_token(scores),
            past_key_values=past_key_values,
        )

    def read_tokens(self, input_ids: Tensor, class_labels: Tensor | None, cache: Cache | None) -> Positions:
        """With one codebook every token is a position."""
        is_start = (input_ids == self.config.bos_token_id).unsqueeze(2)
        codes = self.codes(input_ids.clamp(max=self.config.codebook_size - 1))
        inputs = torch.where(is_start, self.start(class_labels, len(input_ids)), codes)
        return Positions(self.trunk(inputs, cache), input_ids.unsqueeze(2), first=0)

    def read_positions(self, input_ids: Tensor, class_labels: Tensor | None, cache: Cache | None) -> Positions:
        """With several codebooks the trunk runs once all codes of a position are there."""
        under_way = None if cache is None else position_under_way(cache)
        known = {} if under_way is None else under_way.states
        if known:
            first = 1 + known["codes"].shape[1]
            tokens = torch.cat([known["codes"], input_ids], dim=1)
        else:
            first, tokens = 0, input_ids[:, 1:]
        codebooks = self.config.num_codebooks
        complete, rest = divmod(tokens.shape[1], codebooks)
        codes = F.pad(tokens, (0, codebooks - rest)).unflatten(1, (complete + 1, codebooks))
        offsets = torch.arange(codebooks, device=codes.device) * self.config.codebook_size
        inputs = self.codes(codes[:, :complete] + offsets).sum(dim=2)
        if not known:
            inputs = torch.cat([self.start(class_labels, len(inputs)), inputs], dim=1)
        hidden = self.trunk(inputs, own_cache(cache)) if inputs.shape[1] else inputs
        hidden = torch.cat([known["hidden"], hidden], dim=1) if known else hidden
        if under_way is not None:
            under_way.states = {"hidden": hidden[:, -1:], "codes": tokens[:, complete * codebooks :]}
            under_way.length += input_ids.shape[1]
        return Positions(hidden, codes, first)

    def start(self, class_labels: Tensor | None, batch_size: int) -> Tensor:
        """The start token's embedding, (B, 1, W); in training some labels are dropped."""
        null = self.config.num_classes
        if class_labels is None:
            class_labels = torch.full((batch_size,), null, device=self.device)
        class_labels = torch.where(class_labels == NO_CLASS, null, class_labels)
        if self.training and self.config.label_dropout:
            dropped = torch.rand(class_labels.shape, device=class_labels.device) < self.config.label_dropout
            class_labels = torch.where(dropped, null, class_labels)
        return self.classes(class_labels).unsqueeze(1)

    def check(self, input_ids: Tensor, class_labels: Tensor | None, attention_mask: Tensor | None, seen: int) -> None:
        """Raises a ValueError for input that no image has; see `forward`."""
        check_sequences(input_ids, self.config, seen)
        # Later calls of a generation bring the same labels again, and looking at values waits for a GPU.
        if not seen:
            check_class_labels(class_labels, self.config, len(input_ids))
            if attention_mask is not None and attention_mask.ndim == 2 and not attention_mask.all():
                raise ValueError("attention_mask hides tokens: all images have the same number, so none is padding")

    @torch.no_grad()
    def log_prob(self, image_tokens: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """log P(image_tokens | class) in nats, (B,), in evaluation mode: in training dropout makes it random.

        Args:
            image_tokens: (B, h, w), with M > 1 codebooks (B, h, w, M); or flat.
            class_labels: (B,), a tensor or a list; None is the null class.
        """
        sequences = self.sequences(image_tokens)
        class_labels = None if class_labels is None else as_class_labels(class_labels, self.device)
        logits = self(sequences, class_labels=class_labels, use_cache=False).logits[:, :-1]
        # In float32 at least: the sum is over all tokens of an image.
        log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
        return log_probs.gather(2, sequences[:, 1:, None]).sum(dim=(1, 2))

    def sequences(self, image_tokens: Tensor) -> Tensor:
        """input_ids (B, 1 + h * w * M): the start token, then image_tokens (B, h, w[, M]), or flat, in raster order.

        Raises: ValueError for another grid, or codes outside [0, K).
        """
        check_tokens(image_tokens, self.config)
        return F.pad(image_tokens.long().flatten(1), (1, 0), value=self.config.bos_token_id)

    def image_tokens(self, sequences: Tensor) -> Tensor:
        """The inverse of `sequences`: what `generate` returns as image_tokens (B, h, w), or (B, h, w, M) for M > 1.

        Raises: ValueError unless every sequence is a start token and the tokens of a whole image.
        """
        check_sequences(sequences, self.config, seen=0)
        tokens = sequences[:, 1:]
        check_tokens(tokens, self.config)
        return tokens.unflatten(1, self.config.token_shape)

    def generate(  # type: ignore[override]  # upstream knows no classes
        self, inputs: Tensor | None = None, class_labels: Any = None, guidance_scale: float | None = None, **kwargs: Any
    ) -> Any:
        """transformers' `generate`, which samples here by default.

        Args:
            inputs: (B, L), the start token and the first tokens of images to complete; by default the start token
                alone, for each of `class_labels`.
            class_labels: (B,), a tensor or a list, or an int for one image; -1 for the null class.
            guidance_scale: over 1, closer to the class and further from the null class; see `ClassGuidance`.
            kwargs: as everywhere: `temperature`, `top_k`, `top_p`, `num_return_sequences` ...

        Returns: sequences (B, 1 + h * w * M), unless told otherwise; see `image_tokens`.
        """
        if class_labels is not None:
            class_labels = as_class_labels(class_labels, self.device)
            check_class_labels(class_labels, self.config, len(class_labels) if inputs is None else len(inputs))
            kwargs["class_labels"] = class_labels
        if guidance_scale is None:
            guidance_scale = (kwargs.get("generation_config") or self.generation_config).guidance_scale
        if guidance_scale not in (None, 1):
            # transformers' own would begin the null class with the last token of a prompt, and lose track of beams.
            kwargs["logits_processor"] = [ClassGuidance(self, guidance_scale), *kwargs.get("logits_processor", [])]
        return super().generate(inputs, guidance_scale=None, **kwargs)  # type: ignore[misc]  # a protocol for self upstream


def mean_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean of -log P(token) in nats over labels[:, 1:], given scores (B, L, K); -100 does not count."""
    wide = scores[:, :-1].to(torch.promote_types(scores.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, 1), labels[:, 1:].flatten())


def with_start_token(scores: Tensor) -> Tensor:
    """Scores (B, L, K) with a last column for the start token, which is never drawn: the lowest finite number."""
    return F.pad(scores, (0, 1), value=torch.finfo(scores.dtype).min)


__all__ = ["PriorPreTrainedModel"]
