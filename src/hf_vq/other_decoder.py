"""A tokenizer with another decoder: the tokens stay, and what was made for them."""

from typing import Any

from transformers import AutoModel

__all__ = ["with_other_decoder"]


def with_other_decoder(model: Any, **fields: Any) -> Any:
    """A new model that gives the same tokens, whose decoder alone learns.

    Args:
        model: a tokenizer's model.
        fields: of its config, for the decoder. What has another shape there starts anew, the rest as it is in `model`.

    Raises: ValueError if the fields change the tokens.
    """
    other: Any = AutoModel.from_config(type(model.config).from_dict(model.config.to_dict() | fields))
    shapes = {name: tensor.shape for name, tensor in other.state_dict().items()}
    kept = {name: tensor for name, tensor in model.state_dict().items() if tensor.shape == shapes.get(name)}
    other.load_state_dict(kept, strict=False)
    if other.fingerprint() != model.fingerprint():
        raise ValueError(f"train_only decoder leaves the tokens as they are, and {fields} change them")
    other.freeze_tokens()
    return other
