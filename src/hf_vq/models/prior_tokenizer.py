"""Where a prior finds the tokenizer of its tokens, and whether it is the one."""

import os
from typing import Any

from transformers import AutoImageProcessor, AutoModel


def load_tokenizer(config: Any, name: str | None = None, **kwargs: Any) -> tuple[Any, Any]:
    """The tokenizer's model, in evaluation, and its image processor.

    Args:
        config: the `PriorConfig` of a prior that was loaded or saved, so that it knows its own folder.
        name: of another tokenizer of the same tokens, with a decoder of its own; by default the one that config names.
        kwargs: for `from_pretrained`, `trust_remote_code` for instance.

    Raises: ValueError if the config names no tokenizer, or the tokenizer is another than the one it was made for.
    """
    if name is None:
        name = tokenizer_location(config)
        kwargs = {"revision": config.tokenizer_revision, **kwargs} if config.tokenizer_revision else kwargs
    model = AutoModel.from_pretrained(name, **kwargs)
    check_tokenizer(config, model)
    return model, AutoImageProcessor.from_pretrained(name, **kwargs)


def tokenizer_location(config: Any) -> str:
    """What `from_pretrained` finds the tokenizer by: a path that starts with a dot is relative to the prior's folder.

    Of a prior on the Hub, "../name" is the repository of that name of the same owner, so that folders which lie beside
    each other can be uploaded as they are.

    Raises: ValueError if the config names none.
    """
    name = config.tokenizer_name_or_path
    if name is None:
        raise ValueError("the prior's config has no tokenizer_name_or_path: name the tokenizer whose tokens it models")
    if not is_relative(name):
        return name
    folder = os.path.normpath(os.path.join(config.name_or_path, name))
    repository = sibling(config.name_or_path, name)
    if not os.path.isdir(config.name_or_path) and repository is not None:
        return repository
    if not os.path.isdir(folder):
        raise ValueError(
            f"the prior {config.name_or_path or 'at hand'} has tokenizer_name_or_path {name}, and there is no folder "
            f"{folder}: put the tokenizer there, or name another in the prior's config"
        )
    return folder


def is_relative(name: str) -> bool:
    """Whether a tokenizer is named as seen from the prior's folder."""
    return name.startswith(("./", "../"))


def sibling(repo_id: str, name: str) -> str | None:
    """The repository that "../name" means in the repository "owner/prior": "owner/name"; None where it means none."""
    owner, _, prior = repo_id.partition("/")
    up, _, beside = name.partition("/")
    is_repository = owner and prior and "/" not in prior and not repo_id.startswith((".", "~"))
    return f"{owner}/{beside}" if is_repository and up == ".." and beside and "/" not in beside else None


def seen_from(folder: str | os.PathLike[str], tokenizer: str | os.PathLike[str]) -> str:
    """The name that a prior in `folder` gives to a tokenizer in a folder."""
    relative = os.path.relpath(tokenizer, folder)
    return relative if is_relative(relative) else f"./{relative}"


def rebase_tokenizer(config: Any, folder: str | os.PathLike[str]) -> None:
    """Keeps a relative name right when a prior that was loaded from one folder is saved to another."""
    name = config.tokenizer_name_or_path
    if name is None or not is_relative(name) or not config.name_or_path:
        return
    tokenizer = os.path.join(config.name_or_path, name)
    if os.path.isdir(tokenizer):
        config.tokenizer_name_or_path = seen_from(folder, tokenizer)
        config.name_or_path = os.fspath(folder)


def is_prior(config: Any) -> bool:
    """Whether a config is that of a prior, and not a tokenizer's."""
    return hasattr(config, "tokenizer_fingerprint")


def check_tokenizer(config: Any, model: Any) -> None:
    """Raises a ValueError that names both unless `model` is the tokenizer that a prior's config was made for."""
    if differing := differences(config, model):
        raise ValueError(
            f"the prior {config.name_or_path or 'at hand'} was made for the tokenizer {config.tokenizer_name_or_path}, "
            f"and {model.config.name_or_path or 'this one'} is not it: {', '.join(differing)}"
        )


def differences(made_for: Any, model: Any) -> list[str]:
    """In what the tokenizer `model` differs from the one that a prior's config or a token data set was made for."""
    here = model.config
    facts = {
        "codebook_size": (made_for.codebook_size, here.codebook_size),
        "num_codebooks": (made_for.num_codebooks, here.num_codebooks),
        "grid_size": (list(made_for.grid_size), list(here.grid_size)),
    }
    if made_for.tokenizer_fingerprint is not None:
        facts["fingerprint"] = (made_for.tokenizer_fingerprint[:16], model.fingerprint()[:16])
    return [f"{name} {ours} there and {theirs} here" for name, (ours, theirs) in facts.items() if ours != theirs]


__all__ = [
    "check_tokenizer",
    "differences",
    "is_prior",
    "load_tokenizer",
    "rebase_tokenizer",
    "seen_from",
    "sibling",
    "tokenizer_location",
]
