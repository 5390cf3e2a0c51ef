"""Tokens of images in JSON files: what `hf-vq encode` writes and `hf-vq decode` reads."""

import json
from pathlib import Path
from typing import Any

from hf_vq.files import replace_file

__all__ = ["Record", "grids_of", "output_names", "read_records", "write_records"]

Record = dict[str, Any]


def write_records(path: Path, records: list[Record]) -> None:
    """Writes a JSON list (.json) or one JSON object per line (.jsonl), replacing the file as a whole."""
    lines = map(json.dumps, records)
    text = "[\n" + ",\n".join(lines) + "\n]\n" if path.suffix == ".json" else "".join(f"{line}\n" for line in lines)
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_records(path: Path) -> list[Record]:
    """Records with `input_ids`, from what `write_records` wrote, or from lists of ids in the same two formats.

    Raises:
        ValueError: a file that is not JSON, has no records, or one without ids.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}: pass a file that `hf-vq encode` wrote.")
    try:
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines() if path.suffix == ".jsonl" else [text]
        values = [json.loads(line) for line in lines if line.strip()]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): pass a file that `hf-vq encode` wrote.") from error
    if path.suffix != ".jsonl" and _holds_several(values):
        (values,) = values
    records = [value if isinstance(value, dict) else {"input_ids": value} for value in values]
    if not all(isinstance(record.get("image") or "", str) for record in records):
        raise ValueError(f"{path}: the image of a record is the name of its file.")
    if not records or any("input_ids" not in record for record in records):
        raise ValueError(f"{path} needs a list of ids, or an object with input_ids, for each image, and at least one.")
    return records


def output_names(records: list[Record]) -> list[str]:
    """File names: the stems of the records' images, all with their numbers where stems repeat or are missing."""
    stems = [Path(record.get("image") or "").stem for record in records]
    if all(stems) and len({stem.casefold() for stem in stems}) == len(stems):
        return [f"{stem}.png" for stem in stems]
    return [f"{stem or 'image'}_{index:06d}.png" for index, stem in enumerate(stems)]


def grids_of(records: list[Record]) -> list[list[int]] | None:
    """The image_grid_hw of the records; None if they give none.

    Raises:
        ValueError: if some give one and others do not.
    """
    given = [record["image_grid_hw"] for record in records if record.get("image_grid_hw") is not None]
    if given and len(given) < len(records):
        raise ValueError(f"{len(given)} of {len(records)} records have an image_grid_hw: give it to all, or to none.")
    return given or None


def _holds_several(values: list[Any]) -> bool:
    return bool(values) and isinstance(values[0], list) and not isinstance(next(iter(values[0]), None), int)
