"""How a file comes to disk: whole, or not at all."""

import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["replace_file"]


def replace_file(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Writes a file under a temporary name and renames it: whoever reads `path` sees the old content or the new.

    Args:
        path: the file; its folder is made if need be.
        write: is called with the temporary path. If it fails, the old file stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
