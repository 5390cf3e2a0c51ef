"""The tokens of images in a text tokenizer: their names, and where they come to stand."""

from typing import Any

from hf_vq.image_layout import ImageLayout

__all__ = ["START", "add_image_tokens"]

START, END, ROW_END, CODE = "<|vq_start|>", "<|vq_end|>", "<|vq_row_end|>", "<|vq_{}|>"


def add_image_tokens(tokenizer: Any, config: Any, row_end: bool) -> ImageLayout:
    """Adds image-start, image-end, perhaps row-end, and a token for each code of each codebook, unless they are there.

    Args:
        tokenizer: of the text.
        config: of the image tokenizer's model.
        row_end: whether a token marks the end of each row.

    Raises: ValueError for a tokenizer that has some of them, has ids beyond its length, or splits special tokens; it
        stays as it was.
    """
    if getattr(tokenizer, "split_special_tokens", False):
        raise ValueError("the text tokenizer has split_special_tokens, and would take markers of images to pieces")
    markers = [START, END, *([ROW_END] if row_end else [])]
    codes = [CODE.format(number) for number in range(config.codebook_size * config.num_codebooks)]
    _check(tokenizer.get_vocab(), len(tokenizer), [*markers, *codes])
    tokenizer.add_tokens([*markers, *codes], special_tokens=True)
    start_id, end_id, *row_end_id = tokenizer.convert_tokens_to_ids(markers)
    first_id = tokenizer.convert_tokens_to_ids(codes[0])
    sizes = (config.codebook_size, config.num_codebooks, config.grid_size)
    return ImageLayout(start_id, end_id, row_end_id[0] if row_end else None, first_id, *sizes)


def _check(vocabulary: dict[str, int], size: int, new: list[str]) -> None:
    """Raises a ValueError unless a text tokenizer has all of the new tokens, one after the other, or none of them."""
    if (largest := max(vocabulary.values())) >= size:
        raise ValueError(
            f"the text tokenizer has {size} tokens and the id {largest}: with holes among its ids, new tokens would "
            f"take those of others"
        )
    known = [token for token in dict.fromkeys([*new, ROW_END]) if token in vocabulary]
    first = vocabulary[known[0]] if known else size
    if known and (known != new or [vocabulary[token] for token in new] != list(range(first, first + len(new)))):
        raise ValueError(
            f"the text tokenizer knows {known[0]} already, but not {new[0]} ... {new[-1]} one after the other: take it "
            f"as it was before, or with the row_end that it was extended for"
        )
