"""Finding a data set: what reads it, which files it has, and which version of them this is."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

from datasets import DatasetBuilder, load_dataset_builder
from datasets.data_files import DataFilesList
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

__all__ = ["DataFiles", "commit_of", "find_builder", "lists_local_pictures", "version_of"]

DataFiles: TypeAlias = str | Sequence[str] | Mapping[str, str | Sequence[str]]


def find_builder(
    name: str,
    config: str | None,
    data_files: DataFiles | None,
    revision: str | None,
    cache_dir: str | None,
    token: str | None = None,
) -> DatasetBuilder:
    """What reads a data set.

    Args:
        name: on the Hub, a local folder, or "parquet" with `data_files`.
        config, data_files, revision, cache_dir, token: for `load_dataset_builder`.

    Raises:
        FileNotFoundError: no such folder, file or data set.
    """
    if name == "parquet" and not data_files:
        raise ValueError('"parquet" is a format, not a data set: name its files by data_files')
    folder = Path(name).expanduser()
    if folder.is_file():
        raise FileNotFoundError(f'{name} is a file: name its folder, or read it as "parquet" with data_files')
    if name.startswith((".", "/", "~")) and not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {name}{_neighbours(folder)}")
    path = str(folder) if folder.is_dir() else name
    try:
        given: dict[str, Any] = {"data_files": data_files, "revision": revision, "cache_dir": cache_dir, "token": token}
        return load_dataset_builder(path, config, **given)
    except (FileNotFoundError, ConnectionError) as error:
        hint = "" if folder.is_dir() or data_files else f". Nor is it a local folder{_neighbours(folder)}"
        raise FileNotFoundError(f"cannot open the data set {name!r}: {error}{hint}") from error


def lists_local_pictures(builder: DatasetBuilder) -> bool:
    """Whether it is a local folder of pictures."""
    files = chain.from_iterable(_files(builder))
    return isinstance(builder, ImageFolder) and not any("://" in file for file in files)


def commit_of(builder: DatasetBuilder) -> str | None:
    """The commit of a data set on the Hub, None of others."""
    origins = {origin for files in _files(builder) for origin in files.origin_metadata}
    commits = {origin[1] for origin in origins if len(origin) == 2 and origin[0] == builder.repo_id}
    return commits.pop() if len(commits) == 1 else None


def version_of(builder: DatasetBuilder) -> list[tuple[str, ...]]:
    """The names of all files, each with what tells that it changed: its commit, its ETag or its time."""
    return sorted(
        (str(name), *map(str, origin))
        for files in _files(builder)
        for name, origin in zip(files, files.origin_metadata, strict=True)
    )


def _files(builder: DatasetBuilder) -> Iterable[DataFilesList]:
    return (builder.config.data_files or {}).values()


def _neighbours(path: Path) -> str:
    parent = next(folder for folder in path.absolute().parents if folder.is_dir())
    names = sorted(entry.name for entry in parent.iterdir() if entry.is_dir())
    return f" ({parent} holds the folders: {', '.join(names[:10]) or 'none'})"
