"""The image processor of the VQ models: pictures of any mode and size in, `pixel_values` in [-1, 1] out, and back.

Letters: B pictures, C channels, H height, W width.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Unpack

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs

from .image_inputs import convert_mode, flatten_images, load_pixels, orientation, to_pil

PIL_MODES = {1: "L", 3: "RGB"}


class VQImageProcessorKwargs(ImagesKwargs, total=False):
    """What `VQImageProcessor` takes beyond transformers' own arguments.

    Attributes:
        num_channels (`int`): 3 (RGB, the default) or 1 (grey).
        downsampling_factor (`int`): without a centre crop, sizes are cut to multiples of this number.
    """

    num_channels: int | None
    downsampling_factor: int | None


class VQImageProcessor(PilBackend):
    """Turns pictures into `pixel_values` (B, C, H, W), float32 in [-1, 1], and `postprocess` turns those into pictures.

    By default the shortest edge is resized to `image_size` and the centre is cropped; with `do_resize=False,
    do_center_crop=False` a picture keeps its size, cut around its centre to multiples of `downsampling_factor`.

    Pictures are PIL images of any mode, uint8 arrays (H, W) or (H, W, C), their torch twins, or paths. EXIF rotation is
    applied, transparency is laid on white, 16-bit grey (`I;16`, `I`, uint16) is scaled by 1/257, mode `F` counts from 0
    to 255 and float arrays from 0 to 1. Pictures that already fit skip every step but the arithmetic.
    """

    valid_kwargs = VQImageProcessorKwargs
    model_input_names = ["pixel_values"]

    resample = PILImageResampling.BICUBIC
    size = {"shortest_edge": 32}
    default_to_square = False
    crop_size = {"height": 32, "width": 32}
    do_resize = True
    do_center_crop = True
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = 0.5
    image_std = 0.5
    num_channels = 3
    downsampling_factor = 4

    def __init__(self, **kwargs: Unpack[VQImageProcessorKwargs]) -> None:
        super().__init__(**kwargs)  # type: ignore[misc]  # transformers types no valid_kwargs of its own
        _check_settings(self.num_channels, self.downsampling_factor)

    @classmethod
    def for_config(cls, config: Any, **kwargs: Unpack[VQImageProcessorKwargs]) -> "VQImageProcessor":
        """The processor that fits a model config (its `image_size`, `num_channels` and `downsampling_factor`).

        Keyword arguments override what follows from the config.
        """
        side = config.image_size
        settings: dict[str, Any] = {
            "size": {"shortest_edge": side},
            "crop_size": {"height": side, "width": side},
            "num_channels": config.num_channels,
            "downsampling_factor": config.downsampling_factor,
        }
        return cls(**{**settings, **kwargs})

    def _preprocess_image_like_inputs(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:  # type: ignore[override]  # upstream names the keywords
        _check_settings(kwargs["num_channels"], kwargs["downsampling_factor"])
        pictures = flatten_images(images)
        pixels: np.ndarray | list[np.ndarray] | None = self._stack_fitting(pictures, kwargs)
        if pixels is None:
            pixels = [self._prepare(picture, index, kwargs) for index, picture in enumerate(pictures)]
            if len({array.shape for array in pixels}) == 1:
                pixels = np.stack(pixels)
        return self._batch(pixels, kwargs)

    def _stack_fitting(self, pictures: Sequence[Any], settings: dict[str, Any]) -> np.ndarray | None:
        """All pictures as one uint8 array (B, H, W, C), or None when one of them needs more than arithmetic."""
        if isinstance(pictures[0], Image.Image):
            stack = _stack_pil(pictures, settings["num_channels"], lambda h, w: self._fits(h, w, settings))
        else:
            stack = _stack_arrays(pictures, settings["num_channels"], settings["input_data_format"])
        return stack if stack is not None and self._fits(stack.shape[1], stack.shape[2], settings) else None

    def _fits(self, height: int, width: int, settings: dict[str, Any]) -> bool:
        """Whether a picture of this size is neither resized nor cropped."""
        size, crop, factor = settings["size"], settings["crop_size"], settings["downsampling_factor"]
        if settings["do_resize"] and dict(size) not in (
            {"shortest_edge": min(height, width)},
            {"height": height, "width": width},
        ):
            return False
        if settings["do_center_crop"]:
            return (height, width) == (crop.height, crop.width)
        return min(height, width) >= factor and height % factor == width % factor == 0

    def _prepare(self, picture: Any, index: int, settings: dict[str, Any]) -> np.ndarray:
        """One picture of any kind -> uint8 (H, W, C) of its final size."""
        image = to_pil(picture, index, settings["input_data_format"])
        pixels = np.array(convert_mode(image, PIL_MODES[settings["num_channels"]], index))
        pixels = pixels.reshape(image.height, image.width, -1).transpose(2, 0, 1)  # (C, H, W), as PilBackend wants it
        if settings["do_resize"]:
            pixels = self.resize(pixels, settings["size"], settings["resample"])
        if settings["do_center_crop"]:
            pixels = self.center_crop(pixels, settings["crop_size"])
        else:
            pixels = self._crop_to_multiple(pixels, settings["downsampling_factor"], index)
        return pixels.transpose(1, 2, 0)

    def _crop_to_multiple(self, pixels: np.ndarray, factor: int, index: int) -> np.ndarray:
        height, width = pixels.shape[1:]
        if min(height, width) < factor:
            raise ValueError(
                f"image {index} is {height}x{width} (height x width), smaller than the downsampling_factor {factor}: "
                f"enlarge it, or leave do_resize on."
            )
        return self.center_crop(pixels, SizeDict(height=height // factor * factor, width=width // factor * factor))

    def _batch(self, pixels: np.ndarray | list[np.ndarray], settings: dict[str, Any]) -> BatchFeature:
        """Uint8 pictures (B, H, W, C), or a list of (H, W, C) where sizes differ, as normalised `pixel_values`."""
        tensor_type = settings["return_tensors"]
        affine = self._affine(settings)
        if isinstance(pixels, np.ndarray):
            values: Any = _normalise(pixels, *affine)
        elif tensor_type is None:
            values = [_normalise(array[None], *affine)[0] for array in pixels]
        else:
            sizes = sorted({array.shape[:2] for array in pixels})
            raise ValueError(
                f"return_tensors={tensor_type!r} needs pictures of one size, but they come out as (height, width) "
                f"{', '.join(map(str, sizes[:8]))}{', ...' if len(sizes) > 8 else ''}: call the processor once per "
                f"size, leave return_tensors out to get a list, or keep do_resize and do_center_crop on."
            )
        if tensor_type is None:
            values = [value.numpy() for value in values]
        return BatchFeature({"pixel_values": values}, tensor_type=tensor_type)

    def _affine(self, settings: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Offset and scale, float32, scalar or (C,): pixel_values = (uint8 - offset) * scale.

        Subtracting first leaves one rounding only (uint8 - 127.5 is exact), so the range is exactly [-1, 1].
        """
        factor = settings["rescale_factor"] if settings["do_rescale"] else 1.0
        mean, std = (settings["image_mean"], settings["image_std"]) if settings["do_normalize"] else (0.0, 1.0)
        channels = settings["num_channels"]
        for name, value in (("image_mean", mean), ("image_std", std)):
            if np.size(value) not in (1, channels):
                raise ValueError(f"{name}={value} has {np.size(value)} values for num_channels={channels}.")
        return np.asarray(np.divide(mean, factor), np.float32), np.asarray(np.divide(factor, std), np.float32)

    def postprocess(
        self, pixel_values: torch.Tensor | Sequence[torch.Tensor], output_type: Literal["pil", "np"] = "pil"
    ) -> list[Any]:
        """`pixel_values` -> pictures: the inverse of the call, rounded and clipped to 8 bits (exact on 8-bit input).

        Args:
            pixel_values: (B, C, H, W) or (C, H, W), or a list of (C, H, W) of any sizes; float.
            output_type: "pil" for PIL images ("RGB", or "L" with one channel), "np" for uint8 arrays (H, W, C).

        Raises:
            ValueError: an unknown output_type, the wrong shape, or values that are not finite.
        """
        if output_type not in ("pil", "np"):
            raise ValueError(f"output_type={output_type!r}: choose 'pil' or 'np'.")
        offset, scale = self._affine(vars(self))
        batch = [pixel_values] if getattr(pixel_values, "ndim", None) == 3 else pixel_values
        arrays = [_denormalise(value, offset, scale, self.num_channels) for value in batch]
        if output_type == "np":
            return arrays
        return [Image.fromarray(array[..., 0] if array.shape[2] == 1 else array) for array in arrays]


VQImageProcessor.register_for_auto_class("AutoImageProcessor")


def _check_settings(num_channels: int, downsampling_factor: int) -> None:
    if num_channels not in PIL_MODES:
        raise ValueError(f"num_channels={num_channels}: pictures have 1 (grey) or 3 (RGB) channels.")
    if downsampling_factor < 1:
        raise ValueError(f"downsampling_factor={downsampling_factor} must be at least 1.")


def _normalise(pixels: np.ndarray, offset: np.ndarray, scale: np.ndarray) -> torch.Tensor:
    """uint8 (B, H, W, C) -> float32 (B, C, H, W)."""
    count, height, width, channels = pixels.shape
    values = np.empty((count, channels, height, width), np.float32)
    np.subtract(pixels.transpose(0, 3, 1, 2), offset.reshape(-1, 1, 1), out=values)
    values *= scale.reshape(-1, 1, 1)
    return torch.from_numpy(values)


def _denormalise(value: Any, offset: np.ndarray, scale: np.ndarray, channels: int) -> np.ndarray:
    """Float (C, H, W) -> uint8 (H, W, C)."""
    pixels = torch.as_tensor(value).detach().to("cpu", torch.float32).numpy()
    if pixels.ndim != 3 or pixels.shape[0] != channels:
        raise ValueError(
            f"pixel_values must be (B, {channels}, H, W) or a list of ({channels}, H, W) for num_channels={channels}, "
            f"got a picture of shape {pixels.shape}."
        )
    if not np.isfinite(pixels).all():
        raise ValueError("pixel_values has NaN or infinite values: the model that made them has diverged.")
    pixels = pixels / scale.reshape(-1, 1, 1) + offset.reshape(-1, 1, 1)
    return np.ascontiguousarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8).transpose(1, 2, 0))


def _stack_pil(pictures: Sequence[Any], channels: int, fits: Callable[[int, int], bool]) -> np.ndarray | None:
    mode, (width, height) = PIL_MODES[channels], pictures[0].size
    if not fits(height, width):
        return None
    for index, picture in enumerate(pictures):
        if not isinstance(picture, Image.Image) or picture.mode != mode or picture.size != (width, height):
            return None
        # Loading comes first: rotation and transparency may stand behind the pixels of a file.
        load_pixels(picture, index)
        if "transparency" in picture.info or orientation(picture) != 1:
            return None
    joined = b"".join([picture.tobytes() for picture in pictures])
    return np.frombuffer(joined, np.uint8).reshape(len(pictures), height, width, channels)


def _stack_arrays(pictures: Any, channels: int, data_format: str | None) -> np.ndarray | None:
    """Uint8 arrays of one shape (H, W, C), or (H, W) with one channel, as one array; None for anything else."""
    first = pictures[0]
    shape: tuple[int, ...] = getattr(first, "shape", ())
    if data_format is not None or not isinstance(first, np.ndarray) or 0 in shape:
        return None
    if not ((len(shape) == 3 and shape[2] == channels) or (len(shape) == 2 and channels == 1)):
        return None
    if not isinstance(pictures, np.ndarray):
        if any(getattr(picture, "shape", None) != shape for picture in pictures):
            return None
        if any(not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 for picture in pictures):
            return None
        pictures = np.stack(pictures)
    return pictures.reshape(len(pictures), *shape[:2], channels) if pictures.dtype == np.uint8 else None
