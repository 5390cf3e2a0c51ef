"""Figures of the experiments, in the look of `hf_vq.pictures`: several panels on white, quiet axes, no pyplot."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_vq.pictures import BLUE, GRID, INK, ORANGE, RED, SERIES, SOFT

if TYPE_CHECKING:  # matplotlib takes longer to import than all of hf_vq's own code
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

__all__ = [
    "BLUE",
    "GRID",
    "INK",
    "ORANGE",
    "RED",
    "SERIES",
    "SOFT",
    "new_figure",
    "plain_numbers",
    "save_figure",
    "say",
]


def new_figure(
    panels: int, size: tuple[float, float], columns: int = 2, title: str = ""
) -> "tuple[Figure, list[Axes]]":
    """A figure of `size` inches under a title of one line or more, and its panels, row by row."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    engine = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12)
    figure = Figure(figsize=size, dpi=130, layout=engine, facecolor="white")
    if title:
        figure.suptitle(title, x=0.012, ha="left", fontsize=11.5, color=INK)
    axes = [figure.add_subplot(math.ceil(panels / columns), columns, index + 1) for index in range(panels)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(SOFT)
        axis.tick_params(which="both", colors=SOFT, labelsize=9)
        axis.grid(color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
        axis.xaxis.label.set_color(INK)
        axis.yaxis.label.set_color(INK)
    return figure, axes


def plain_numbers(*axes: "Axis") -> None:
    """Ticks of a logarithmic axis as 0.03 and 100, not as powers; also between the decades where there are few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in axes:
        low, high = sorted(axis.get_view_interval())
        steps = (1.0, 3.0) if high / low < 1000 else (1.0,)
        axis.set_major_locator(LogLocator(subs=steps if high / low > 8 else (1.0, 2.0, 3.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def say(axis: "Axes", title: str, x: str, y: str, **legend: Any) -> None:
    """Title, axes and legend of a panel; `legend` goes to matplotlib, and nothing stands for no legend."""
    axis.set_title(title, loc="left", fontsize=10.5, color=INK, pad=8)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(**{"frameon": False, "fontsize": 9, "labelcolor": INK} | legend)


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes the picture; its suffix tells the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
