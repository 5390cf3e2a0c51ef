"""Pictures of any kind (PIL images of every mode, arrays, tensors, paths) -> upright PIL images of one mode.

Letters: B pictures, C channels, H height, W width.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from transformers.image_utils import load_image

CHANNELS_OF_ARRAYS = (1, 2, 3, 4)  # grey, grey + alpha, RGB, RGBA


def flatten_images(images: Any) -> Sequence[Any]:
    """One picture, a list, nested lists or a batch (B, H, W, C) -> a flat sequence of pictures; never empty."""
    pictures: Any = [images]
    if isinstance(images, (list, tuple)):
        nested = any(isinstance(image, (list, tuple)) for image in images)
        pictures = [picture for image in images for picture in flatten_images(image)] if nested else images
    elif isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        pictures = images
    if len(pictures) == 0:
        raise ValueError("images is empty: pass at least one picture.")
    return pictures


def orientation(image: Image.Image) -> int:
    """The EXIF (or XMP) orientation: 1 is upright."""
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def load_pixels(image: Image.Image, index: int) -> None:
    """Decode a picture that was opened lazily; a damaged one is a ValueError with its number and file."""
    try:
        image.load()
    except Exception as error:  # Pillow's decoders meet damage with OSError, SyntaxError, struct.error, zlib.error, ...
        name = getattr(image, "filename", "") or "no file name"
        raise ValueError(f"image {index} ({name}) cannot be decoded: {error}. Repair it, or leave it out.") from error


def to_pil(picture: Any, index: int, data_format: str | None) -> Image.Image:
    """One picture of any kind as a loaded, upright PIL image that is not empty.

    Args:
        picture: a PIL image, an array or tensor (H, W) or (H, W, C), a tensor (C, H, W), a path or a URL.
        index: its number in the call, for the error messages.
        data_format: "channels_first" or "channels_last" of an array; None looks where 1 to 4 channels can be.
    """
    if isinstance(picture, (str, os.PathLike)):
        picture = _open(os.fspath(picture), index)
    if isinstance(picture, torch.Tensor):
        data_format = data_format or _torch_format(picture)
        picture = picture.detach().cpu().numpy()
    if isinstance(picture, np.ndarray):
        return _array_to_pil(picture, index, data_format)
    if not isinstance(picture, Image.Image):
        raise TypeError(f"image {index} is a {type(picture).__name__}: pass PIL images, uint8 arrays or paths.")
    if 0 in picture.size:
        raise ValueError(f"image {index} is empty: its size (width, height) is {picture.size}. Leave it out.")
    load_pixels(picture, index)
    return picture if orientation(picture) == 1 else ImageOps.exif_transpose(picture)


def _open(path: str, index: int) -> Image.Image:
    if path.startswith(("http://", "https://", "data:image/")):
        return load_image(path)
    try:
        with Image.open(path) as image:  # files of several frames would else stay open
            load_pixels(image, index)
            return image
    # Pillow meets damage and oversized pictures with all kinds of errors.
    except Exception as error:
        raise ValueError(f"image {index} ({path}) cannot be opened: {error}. Repair it, or leave it out.") from error


def _torch_format(picture: torch.Tensor) -> str | None:
    return "channels_first" if picture.ndim == 3 and picture.shape[0] in CHANNELS_OF_ARRAYS else None


def _array_to_pil(array: np.ndarray, index: int, data_format: str | None) -> Image.Image:
    if array.ndim not in (2, 3):
        raise ValueError(f"image {index} has shape {array.shape}: pass (H, W) or (H, W, C), a batch as (B, H, W, C).")
    if 0 in array.shape:
        raise ValueError(f"image {index} is empty: its shape is {array.shape}. Leave it out.")
    if array.ndim == 3:
        last, first = array.shape[2] in CHANNELS_OF_ARRAYS, array.shape[0] in CHANNELS_OF_ARRAYS
        if data_format == "channels_first" or (data_format is None and first and not last):
            array = array.transpose(1, 2, 0)
        if array.shape[2] not in CHANNELS_OF_ARRAYS:
            raise ValueError(
                f"image {index} has shape {array.shape}: the channels (1 to 4) come last. Pass a batch of grey "
                f"pictures as a list of (H, W) arrays or as (B, H, W, 1)."
            )
    array = _array_to_uint8(array, index)
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array))


def _array_to_uint8(array: np.ndarray, index: int) -> np.ndarray:
    """Booleans, 8- and 16-bit integers, other integers in 0 ... 255 and floats in 0 ... 1 -> uint8."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.uint16:
        return _scale(array, 1 / 257, 65535, f"image {index} (uint16)", "")
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if np.issubdtype(array.dtype, np.integer):
        return _scale(array, 1.0, 255, f"image {index} ({array.dtype})", "Pass uint8, or uint16 for 16 bits.")
    if np.issubdtype(array.dtype, np.floating):
        return _scale(array, 255.0, 1, f"image {index} ({array.dtype})", "Scale it to 0 ... 1, or pass uint8.")
    raise TypeError(f"image {index} has dtype {array.dtype}: pass uint8.")


def _scale(array: np.ndarray, factor: float, largest: int, name: str, way_out: str) -> np.ndarray:
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= largest):  # so that NaN is caught too
        raise ValueError(f"{name} has values from {low} to {high}, outside 0 ... {largest}. {way_out}")
    return np.rint(array.astype(np.float64) * factor).astype(np.uint8)


def convert_mode(image: Image.Image, mode: str, index: int) -> Image.Image:
    """Any PIL mode -> `mode` ("L" or "RGB"), transparency laid on white."""
    name = f"image {index} (mode {image.mode})"
    if image.mode.startswith("I"):
        way_out = "Mode I is read as 16-bit grey: scale it to 0 ... 65535, or convert it to L or RGB."
        image = Image.fromarray(_scale(np.asarray(image), 1 / 257, 65535, name, way_out))
    elif image.mode == "F":
        way_out = "Mode F counts from 0 to 255 here: scale it, or convert it to L or RGB."
        image = Image.fromarray(_scale(np.asarray(image), 1.0, 255, name, way_out))
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    if image.mode == "LAB":  # PIL leads it to RGB only
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)
