"""The card of a token data set."""

from huggingface_hub import DatasetCardData

from hf_vq.cards import is_on_hub, write_readme
from hf_vq.corpus.corpus import Corpus
from hf_vq.token_data import TOKEN_COLUMN

__all__ = ["write_corpus_card"]

BAD_EXAMPLES_NAMED = 20


def write_corpus_card(corpus: Corpus, name: str, license: str | None = None) -> None:
    """Writes README.md into the folder of a finished corpus.

    Args:
        corpus: all of its files are there.
        name: its repository on the Hub, or its folder.
        license: identifier of the tokens' licence; the card names none if it is None.
    """
    made, bad = corpus.description, list(corpus.bad_examples())
    split, schema = next(iter(corpus.schemas.items()))
    source, grid = corpus.job["dataset_name"], made.grid_size
    data = DatasetCardData(
        license=license,
        source_datasets=[source] if is_on_hub(source) else None,
        pretty_name=f"{source} as image tokens",
        tags=["image tokens", "hf-vq"],
        size_categories=size_category(corpus.num_rows()),
    )
    write_readme(
        corpus.folder,
        "tokens.md",
        data,
        name=name,
        on_hub=is_on_hub(name),
        job=corpus.job,
        made=made,
        split=split,
        rows=corpus.num_rows(),
        columns=[column for column in schema.names if column != TOKEN_COLUMN],
        grid="their own grids of" if grid is None else " x ".join(map(str, made.token_shape)),
        needs_grid=grid is None or grid[0] != grid[1],
        num_bad=len(bad),
        bad_examples=bad[:BAD_EXAMPLES_NAMED],
    )


def size_category(rows: int) -> str:
    """The Hub's word for so many rows."""
    bounds = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M")]
    return next((word for bound, word in bounds if rows < bound), "n>10M")
