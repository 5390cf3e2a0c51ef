"""What the configs of all priors share."""

import math
from copy import deepcopy
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

NO_CLASS = -1
PIPELINES = {
    "unconditional-image-generation": {
        "impl": "pipeline_image_generation.ImageGenerationPipeline",
        "pt": ["AutoModelForCausalLM"],
        "type": "image",
    }
}


@strict
class PriorConfig(PreTrainedConfig):
    """Fields of every prior over image tokens.

    Args:
        codebook_size: number of codes K of each codebook of the tokenizer.
        num_codebooks: number of codebooks M: tokens per position.
        grid_size: token grid (h, w); an int means square.
        num_classes: classes that a sample can be asked for; 0 for an unconditional prior.
        label_dropout: share of the labels that training replaces by the null class. At 0 nobody teaches it: guidance,
            and probabilities without a class, then mean nothing.
        hidden_size: width of the trunk.
        num_hidden_layers: its layers.
        dropout: probability with which training drops an activation.
        initializer_range: standard deviation of weights at the start.
        use_cache: whether generation keeps what it has computed.
        tokenizer_name_or_path: the tokenizer whose tokens these are: a name on the Hub, or a folder; one that starts
            with ./ or ../ is relative to the prior's own folder.
        tokenizer_revision: its commit, branch or tag on the Hub.
        tokenizer_fingerprint: `fingerprint()` of its model.
    """

    keys_to_ignore_at_inference = ["past_key_values"]

    codebook_size: int = 512
    num_codebooks: int = 1
    grid_size: int | list[int] | tuple[int, ...] = (8, 8)
    num_classes: int = 0
    label_dropout: float | int = 0.1
    hidden_size: int = 192
    num_hidden_layers: int = 6
    dropout: float | int = 0.0
    initializer_range: float | int = 0.02
    use_cache: bool = True
    tokenizer_name_or_path: str | None = None
    tokenizer_revision: str | None = None
    tokenizer_fingerprint: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        size = self.grid_size
        self.grid_size = [size, size] if isinstance(size, int) else list(size)
        super().__post_init__(**{**kwargs, "bos_token_id": self.codebook_size, "custom_pipelines": None})

    @property
    def custom_pipelines(self) -> dict[str, Any]:
        """Where transformers finds the pipeline in a copy of this code; hf_vq itself registers it by name."""
        # transformers writes classes into what it gets.
        return deepcopy(PIPELINES) if type(self).__module__.startswith("transformers_modules.") else {}

    @custom_pipelines.setter
    def custom_pipelines(self, value: object) -> None:
        """What transformers writes here when it saves a pipeline is there already."""

    def to_dict(self) -> dict[str, Any]:
        """All fields, and where those without hf_vq find the pipeline."""
        return {**super().to_dict(), "custom_pipelines": deepcopy(PIPELINES)}

    @property
    def vocab_size(self) -> int:
        """K codes and the start token, whose id is K."""
        return self.codebook_size + 1

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns, (h, w)."""
        height, width = self.grid_size  # type: ignore[misc]  # an int has become a list
        return height, width

    @property
    def token_shape(self) -> tuple[int, ...]:
        """Of the image_tokens of one image: (h, w), or (h, w, M) with several codebooks."""
        return (*self.grid, self.num_codebooks) if self.num_codebooks > 1 else self.grid

    @property
    def num_tokens(self) -> int:
        """Tokens of an image, h * w * M."""
        return math.prod(self.token_shape)

    def class_name(self, label: int) -> str:
        """What to call a class: its name where `id2label` has one, and -1 is no class."""
        if label == NO_CLASS:
            return "no class"
        # Without names transformers makes up two.
        names: Any = self.id2label
        return str((names if len(names) == self.num_classes else {}).get(label, f"class {label}"))

    def validate_prior(self) -> None:
        """Sizes are positive, shares lie in [0, 1)."""
        for name in ("codebook_size", "num_codebooks", "hidden_size", "num_hidden_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        sides: Any = self.grid_size
        if len(sides) != 2 or min(sides) < 1:
            raise ValueError(f"grid_size must be two positive numbers (h, w), or one, got {self.grid_size}")
        if self.num_classes < 0:
            raise ValueError(f"num_classes must be zero or above, got {self.num_classes}")
        for name in ("label_dropout", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")


__all__ = ["NO_CLASS", "PriorConfig"]
