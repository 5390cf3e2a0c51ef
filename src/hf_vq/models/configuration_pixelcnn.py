"""Config of the PixelCNN prior."""

from huggingface_hub.dataclasses import strict

from .configuration_prior import PriorConfig


@strict
class PixelCNNPriorConfig(PriorConfig):
    """Config of `PixelCNNPrior`: the fields of `PriorConfig`, and

    Args:
        kernel_size: side of the window of codes that a layer sees, of which the codes to come are left out; odd.

    Example:
        >>> from hf_vq import PixelCNNPrior, PixelCNNPriorConfig
        >>> prior = PixelCNNPrior(PixelCNNPriorConfig(codebook_size=512, grid_size=8, num_classes=10))
    """

    model_type = "hf_vq_pixelcnn"

    kernel_size: int = 3

    def validate_kernel(self) -> None:
        """The window has a middle."""
        if self.kernel_size < 3 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and at least 3, got {self.kernel_size}")


PixelCNNPriorConfig.register_for_auto_class()

__all__ = ["PixelCNNPriorConfig"]
