"""From the cell of a column of pictures to a picture."""

import io
from contextlib import AbstractContextManager
from typing import IO, Any

import fsspec  # type: ignore[import-untyped]  # it ships no type information
import PIL.Image
from tenacity import retry, retry_if_not_exception_type, stop_after_attempt, wait_exponential

ATTEMPTS = 4
"""How often a picture is asked for, over some ten seconds: what a server refuses for a moment is no bad example."""


class BadImageError(ValueError):
    """A picture that cannot be decoded: truncated, missing, or no picture at all."""


def decode_image(cell: Any) -> PIL.Image.Image:
    """Decode one cell of a column of pictures, whole.

    Args:
        cell: `{"bytes": ..., "path": ...}` as `datasets` stores pictures (a path, local or a URL, is read where there
            are no bytes), encoded bytes, or a PIL image.

    Raises:
        BadImageError: with the reason; of a picture at a URL, after it was asked for several times.
    """
    try:
        image = cell if isinstance(cell, PIL.Image.Image) else PIL.Image.open(io.BytesIO(_encoded(cell)))
        image.load()
    except PIL.UnidentifiedImageError as error:
        raise BadImageError("no picture that Pillow can read: an unknown format, or cut off at its head") from error
    # Pillow's decoders meet damage with all kinds of errors: SyntaxError, struct.error, zlib.error, IndexError, ...
    except Exception as error:
        raise BadImageError(str(error) or type(error).__name__) from error
    return image


def _encoded(cell: Any) -> bytes:
    if isinstance(cell, bytes):
        return cell
    if not cell or (cell["bytes"] is None and not cell["path"]):
        raise BadImageError("the cell is empty")
    if cell["bytes"] is not None:
        return cell["bytes"]
    return _fetched(cell["path"]) if "://" in cell["path"] else _read(cell["path"])


def _read(path: str) -> bytes:
    with open_file(path) as file:
        return file.read()


@retry(
    retry=retry_if_not_exception_type(FileNotFoundError),
    stop=stop_after_attempt(ATTEMPTS),
    wait=wait_exponential(multiplier=1.5),
    reraise=True,
)
def _fetched(url: str) -> bytes:
    return _read(url)


def open_file(path: str) -> AbstractContextManager[IO[bytes]]:
    """Open a local file or a URL (https://, hf://, also within an archive, zip://...::...) for reading bytes."""
    return fsspec.open(path, "rb")
