"""What the figures of the experiments add to `hf_vq.figures`: plain numbers on logarithmic axes, titles, legends."""

from typing import TYPE_CHECKING, Any

from hf_vq.figures import INK

if TYPE_CHECKING:  # matplotlib takes longer to import than all of hf_vq's own code
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

__all__ = ["plain_numbers", "say"]


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
