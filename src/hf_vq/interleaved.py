"""Text and images in turn: what comes in as a text with places for images, or as a list of parts, as segments."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

__all__ = ["Part", "Segment", "from_parts", "from_text"]

KEYS = {"type", "text", "image", "image_tokens", "train"}
Part = dict[str, Any]
"""{"type": "text", "text": str}, {"type": "image", "image": picture} or {"type": "image", "image_tokens": ids}; with
"train": False, no labels come of it."""


class Segment(NamedTuple):
    """A stretch of text, a picture that is yet to be encoded, or the tokens of an image: one of the three.

    Attributes:
        text, picture, image_tokens: the content; the other two are None. Tokens are flat, or (h, w[, M]).
        train: whether labels come of it.
    """

    text: str | None = None
    picture: Any = None
    image_tokens: np.ndarray | None = None
    train: bool = True


def from_text(text: str | Sequence[str], images: Any, place: str) -> list[list[Segment]]:
    """Segments of texts that have `place` where an image stands.

    Args:
        text: one text or many.
        images: one picture; the pictures of all texts in order; or a list of pictures for each text; or None.

    Raises: ValueError unless there are as many pictures as places, and for a text or picture that is none.
    """
    texts = [text] if isinstance(text, str) or not isinstance(text, Iterable) else list(text)
    if odd := [each for each in texts if not isinstance(each, str)]:
        raise ValueError(f"text is one string or a list of them, and holds {odd[0]!r:.100}")
    places = [each.count(place) for each in texts]
    pictures = _one_list_each(images, places)
    found = []
    for each, own in zip(texts, pictures, strict=True):
        first, *rest = each.split(place)
        segments = [Segment(text=first)]
        for picture, words in zip(own, rest, strict=True):
            segments += [Segment(picture=picture), Segment(text=words)]
        found.append([segment for segment in segments if segment.text != ""])
    return found


def _one_list_each(images: Any, places: list[int]) -> list[list[Any]]:
    """The pictures of each text."""
    is_many = isinstance(images, list | tuple | Iterator) or getattr(images, "ndim", 0) == 4
    given = [] if images is None else list(images) if is_many else [images]
    flat = chain.from_iterable(group if isinstance(group, list | tuple) else [group] for group in given)
    if none := [number for number, image in enumerate(flat) if image is None]:
        raise ValueError(f"image {none[0]} is None: give a picture for each place")
    if given and all(isinstance(group, list | tuple) for group in given):
        counts = [len(group) for group in given]
        if counts != places:
            raise ValueError(f"the texts have {places} places for images, and the lists of images have {counts}")
        return [list(group) for group in given]
    if len(given) != sum(places):
        raise ValueError(f"the texts have {sum(places)} places for images, and there are {len(given)} images")
    pictures = iter(given)
    return [[next(pictures) for _ in range(count)] for count in places]


def from_parts(parts: Sequence[Part] | Sequence[Sequence[Part]], place: str) -> list[list[Segment]]:
    """Segments of the parts of one sequence, or of many; texts that follow each other are one.

    Raises: ValueError that names a part which is none, or has `place` in its text.
    """
    if isinstance(parts, dict | str):
        raise ValueError(f"parts is a list of parts, or of such lists, and is {parts!r:.200}")
    listed: list[Any] = list(parts)
    batch = [listed] if listed and isinstance(listed[0], dict) else listed
    if odd := [each for each in batch if not isinstance(each, list | tuple)]:
        raise ValueError(f"parts is a list of parts, or of such lists, and holds {odd[0]!r:.200}")
    return [_joined([_segment(part, place) for part in sequence]) for sequence in batch]


def _segment(part: Any, place: str) -> Segment:
    given: dict[str, Any] = part if isinstance(part, dict) else {}
    kind, train = given.get("type"), given.get("train", True)
    if (unknown := given.keys() - KEYS) or not isinstance(train, bool):
        what = f"has {sorted(unknown)[0]!r}" if unknown else f"has {train!r} for 'train'"
        raise ValueError(f"a part has some of {', '.join(sorted(KEYS))}, 'train' is True or False, and this one {what}")
    if kind == "text" and isinstance(given.get("text"), str) and place not in given["text"]:
        return Segment(text=given["text"], train=train)
    if kind == "image" and given.get("image_tokens") is not None:
        if (image_tokens := _as_integers(given["image_tokens"])) is not None:
            return Segment(image_tokens=image_tokens, train=train)
    elif kind == "image" and given.get("image") is not None:
        return Segment(picture=given["image"], train=train)
    raise ValueError(
        f"a part is a text without {place}, or an image with a picture or with integer image_tokens, and this is "
        f"{part!r:.200}"
    )


def _as_integers(tokens: Any) -> np.ndarray | None:
    """An array of integers; None for what is none."""
    try:
        array = np.asarray(tokens.tolist() if isinstance(tokens, Tensor) else tokens)
    except ValueError:  # rows of different lengths
        return None
    return array if array.dtype.kind in "iu" else None


def _joined(segments: list[Segment]) -> list[Segment]:
    joined: list[Segment] = []
    for segment in segments:
        last = joined[-1] if joined else None
        if last and last.text is not None and segment.text is not None and last.train == segment.train:
            joined[-1] = last._replace(text=last.text + segment.text)
        else:
            joined.append(segment)
    return joined
