"""What all drawn figures share: colours, and figures that belong to nobody."""

import io
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:  # matplotlib takes longer to import than all of hf_vq's own code
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["BLUE", "GRID", "INK", "ORANGE", "RED", "SERIES", "SOFT", "new_figure", "percent", "save_figure"]

INK, SOFT, GRID = "#1f2328", "#6e7781", "#e4e7eb"
BLUE, ORANGE, RED = "#2f6fb0", "#d9730d", "#c93c37"
SERIES = (BLUE, "#2a9d8f", ORANGE, "#8e63b5", "#b5546b", SOFT)

COLOURS = 256


def new_figure(
    panels: int, size: tuple[float, float], columns: int = 1, title: str = ""
) -> "tuple[Figure, list[Axes]]":
    """A figure of `size` inches and its panels, row by row: no pyplot, so no window, no global state, any thread."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=size, dpi=130, layout=ConstrainedLayoutEngine(h_pad=0.09, w_pad=0.09), facecolor="white")
    if title:
        figure.suptitle(title, x=0.012, ha="left", fontsize=11.5, color=INK)
    rows = math.ceil(panels / columns)
    axes = [figure.add_subplot(rows, columns, index + 1) for index in range(panels)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(SOFT)
        axis.tick_params(which="both", colors=SOFT, labelsize=9, length=3)
        axis.grid(color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
        axis.xaxis.label.set_color(INK)
        axis.yaxis.label.set_color(INK)
    return figure, axes


def percent(share: float) -> str:
    """A share of 1 in per cent, rounded down, so that 100 % means all."""
    return f"{math.floor(1000 * share) / 10:g} %"


def save_figure(figure: "Figure", path: str | os.PathLike[str]) -> None:
    """Writes the figure; the suffix tells the format. A PNG has a palette, and a third of the bytes."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if Path(path).suffix.lower() != ".png":
        figure.savefig(path)
        return
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    with Image.open(drawn) as picture:
        picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
