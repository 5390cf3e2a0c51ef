"""The templates of cards, filled."""

from pathlib import Path
from typing import Any

from huggingface_hub import CardData
from huggingface_hub.repocard import RepoCard
from jinja2 import Environment, PackageLoader, StrictUndefined

from hf_vq.files import replace_file

__all__ = ["is_on_hub", "write_readme"]


def write_readme(folder: Path, template: str, data: CardData, **facts: Any) -> None:
    """Writes README.md into a folder.

    Args:
        folder: as it will be published.
        template: name of a file in `card_templates`; a fact that it names and nobody gives is an error.
        data: what the Hub indexes.
    """
    loader = PackageLoader("hf_vq", "card_templates")
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    card = RepoCard(environment.get_template(template).render(card_data=data.to_yaml(), **facts))
    replace_file(folder / "README.md", lambda path: card.save(path))


def is_on_hub(name: str) -> bool:
    """Whether this names a repository, and not a folder or a format."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).is_dir()
