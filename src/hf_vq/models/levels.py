"""The 256 levels of an 8-bit image, in the units of pixel_values."""

from torch import Tensor

LEVELS = 256
HALF_BIN = 1 / 255


def to_levels(pixel_values: Tensor) -> Tensor:
    """pixel_values in [-1, 1] to the nearest levels 0 to 255, as floats."""
    return ((pixel_values + 1) * 127.5).round()


__all__ = ["HALF_BIN", "LEVELS", "to_levels"]
