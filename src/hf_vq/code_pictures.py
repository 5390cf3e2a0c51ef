"""Pictures of the codes: how often each is used, at one evaluation and over the whole training."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hf_vq.code_counts import read_code_counts
from hf_vq.figures import INK, ORANGE, RED, SERIES, SOFT, new_figure, percent, save_figure
from hf_vq.metrics import perplexity, usage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

__all__ = ["save_code_history", "save_code_usage"]

LINES = ("-", "--", ":", "-.")
RARE, FREQUENT = 0.01, 100.0  # multiples of the uniform share: the ends of the colour scale, alike in all pictures
BLUES = ("#b5d3ec", "#4a90c9", "#1d5a9b", "#08244f")
NEVER = (0.98, 0.87, 0.86)  # a pale red
MAX_ROWS, MAX_COLUMNS, MAX_COLUMNS_OF_A_PAGE = 400, 700, 1200  # fewer than pixels, so that none is lost
LEAST_COLUMNS = 4  # of a kind of codes, however few: a single one is seen among 65,536
PANELS_IN_A_ROW = 4


def save_code_usage(path: str | os.PathLike[str], code_counts: Tensor) -> None:
    """The share of each code among all tokens, the most frequent first, against the uniform share.

    Args:
        path: the picture to write, its suffix tells the format.
        code_counts: (M, K) counts; with several codebooks, each has its curve.

    Raises: ValueError if a codebook counted nothing.
    """
    counts = code_counts.cpu()
    num_codebooks, codebook_size = counts.shape
    shares = (counts.double() / counts.sum(1, keepdim=True)).sort(dim=1, descending=True).values.numpy()
    title = f"perplexity {perplexity(counts):.1f} of {codebook_size}, {percent(usage(counts))} of the codes in use"
    figure, axes = new_figure(1, (8, 4.2))
    axis = axes[0]
    edges = np.arange(codebook_size + 1)
    for codebook, share in enumerate(shares):
        name = f"codebook {codebook}" if num_codebooks > 1 else "share of the tokens"
        turn, place = divmod(codebook, len(SERIES))
        colour, style = SERIES[place], LINES[turn % len(LINES)]
        axis.stairs(100 * share, edges, baseline=None, color=colour, linestyle=style, linewidth=1.4, label=name)
        if num_codebooks == 1:
            axis.stairs(100 * share, edges, color=colour, fill=True, alpha=0.22)
    axis.axhline(100 / codebook_size, color=INK, linewidth=1.1, dashes=(5, 3), label=f"uniform, 1 / {codebook_size}")
    _mark_unused(axis, counts)
    axis.set(xlim=(0, codebook_size), ylim=(0, 105 * max(shares.max(), 1.5 / codebook_size)))
    axis.set(xlabel="codes, the most frequent first", ylabel="share of the tokens (%)")
    axis.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper right", ncols=1 + (num_codebooks > 6))
    axis.set_title(title, loc="left", fontsize=12, color=INK, pad=12)
    save_figure(figure, path)


def _mark_unused(axis: "Axes", counts: Tensor) -> None:
    """Shades the codes that never occur, where there is one codebook to say it of."""
    used, codebook_size = int((counts[0] > 0).sum()), counts.shape[1]
    if len(counts) > 1 or used == codebook_size:
        return
    axis.axvspan(used, codebook_size, color=RED, alpha=0.08, linewidth=0)
    middle = (used + codebook_size) / 2
    where: dict[str, Any] = {
        "ha": "center",
        "va": "center",
        "transform": axis.get_xaxis_transform(),
        "color": RED,
        "fontsize": 9,
    }
    if codebook_size - used > 0.12 * codebook_size:
        axis.text(middle, 0.5, f"{codebook_size - used} never occur", **where)
    else:
        axis.text(middle, 0.5, f"{codebook_size - used} never occur", rotation=90, **where)


def save_code_history(path: str | os.PathLike[str], codes_safetensors: str | os.PathLike[str]) -> None:
    """How often each code occurred at each evaluation of a run: index collapse shows as columns that grow empty.

    A row is an evaluation, the first at the bottom. A column is a code (in a large codebook a few that end alike, their
    colours averaged): the most frequent of the last evaluation at the left, those that no evaluation ever saw at the
    right, where at least one column is theirs. The line counts the codes in use.

    Args:
        path: the picture to write, its suffix tells the format.
        codes_safetensors: the file of a run directory that `save_code_counts` writes.

    Raises: as `read_code_counts`; ValueError if a codebook counted nothing at some evaluation.
    """
    history = read_code_counts(codes_safetensors)
    empty = [step for step, code_counts in history.items() if bool((code_counts.sum(dim=1) == 0).any())]
    if empty:
        raise ValueError(f"{codes_safetensors} counted no tokens at step {empty[0]}, so there are no shares to draw")
    steps, counts = _rows(history)
    num_codebooks = counts.shape[1]
    columns = min(PANELS_IN_A_ROW, num_codebooks)
    height = 1.2 + min(max(0.3 * len(steps), 1.4), 4.2)
    size = (5.2 + 4.0 * min(columns, 2.5), 1.0 + height * math.ceil(num_codebooks / columns))
    figure, axes = new_figure(num_codebooks, size, columns)
    for codebook, axis in enumerate(axes):
        title = f"codebook {codebook}, step {steps[-1]:,}" if num_codebooks > 1 else f"step {steps[-1]:,}"
        axis.set_title(f"{title}: {_in_words(counts[:, codebook])}", loc="left", fontsize=10, color=INK)
        _draw_history(axis, counts[:, codebook], min(MAX_COLUMNS, MAX_COLUMNS_OF_A_PAGE // columns))
        _label_steps(axis, steps, with_label=codebook % columns == 0)
    figure.suptitle("How often each code occurs (each row is an evaluation)", fontsize=12, color=INK, x=0.02, ha="left")
    figure.supxlabel("codes, sorted: the most frequent of the last evaluation first", fontsize=10, color=INK)
    _explain_colours(figure, axes)
    save_figure(figure, path)


def _rows(history: Mapping[int, Tensor]) -> tuple[list[int], np.ndarray]:
    """Steps (T), and counts (T, M, K); more evaluations than a panel has pixels are added up in groups."""
    steps, counts = list(history), torch.stack(list(history.values())).numpy()
    groups = np.array_split(np.arange(len(steps)), min(len(steps), MAX_ROWS))
    return [steps[group[-1]] for group in groups], np.stack([counts[group].sum(axis=0) for group in groups])


def _in_words(counts: np.ndarray) -> str:
    """The last of the evaluations (T, K)."""
    codebook_size = counts.shape[1]
    in_use, never = int((counts[-1] > 0).sum()), int((counts.sum(axis=0) == 0).sum())
    words = f"perplexity {perplexity(torch.from_numpy(counts[-1:])):,.1f}\n{in_use:,} of {codebook_size:,} codes in use"
    return f"{words}, {never:,} never occurred" if never else words


def _draw_history(axis: "Axes", counts: np.ndarray, max_columns: int) -> None:
    """Draws counts (T, K), sorted, in about `max_columns` columns."""
    ever, final = counts.sum(axis=0), counts[-1]
    order = np.lexsort((np.where(final > 0, 0, -ever), -final))
    kinds = [int((final > 0).sum()), int(((final == 0) & (ever > 0)).sum()), int((ever == 0).sum())]
    first, last, code_edges, column_edges = _columns(kinds, max_columns)
    picture = np.empty((len(counts), len(first), 3))
    for row, drawn in zip(counts, picture, strict=True):
        sums = np.concatenate([np.zeros((1, 3)), _colours(row[order]).cumsum(axis=0)])
        drawn[:] = (sums[last] - sums[first]) / (last - first)[:, None]
    extent = (0, len(first), 0, len(counts))
    axis.imshow(picture.clip(0, 1), extent=extent, origin="lower", aspect="auto", interpolation="nearest")
    if len(counts) <= 40:
        axis.hlines(range(1, len(counts)), 0, len(first), color="white", linewidth=0.6)
    in_use = np.interp((counts > 0).sum(axis=1), code_edges, column_edges)
    edges = np.arange(len(counts) + 1)
    axis.stairs(in_use, edges, orientation="horizontal", baseline=None, color=ORANGE, linewidth=1.2)
    marks = np.unique(np.linspace(0, len(order), 5).round().astype(int))
    axis.set_xticks(np.interp(marks, code_edges, column_edges), [f"{mark:,}" for mark in marks])
    axis.grid(visible=False)
    axis.set_xlim(0, len(first))


def _columns(kinds: Sequence[int], max_columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Which of the sorted codes each column shows: from `first` to before `last`; and where the kinds begin and end,
    counted in codes and in columns. Codes of different kinds share no column, and none is too narrow to be seen."""
    sizes = np.array([size for size in kinds if size])
    widths = np.maximum(np.round(max_columns * sizes / sum(sizes)).astype(int), LEAST_COLUMNS)
    code_edges, column_edges = (np.concatenate([[0], values.cumsum()]) for values in (sizes, widths))
    bounds = [
        start + np.arange(width + 1) * size // width
        for start, size, width in zip(code_edges[:-1], sizes, widths, strict=True)
    ]
    first = np.concatenate([bound[:-1] for bound in bounds])
    last = np.maximum(first + 1, np.concatenate([bound[1:] for bound in bounds]))
    return first, last, code_edges, column_edges


def _colours(counts: np.ndarray) -> np.ndarray:
    """Red, green and blue (K, 3) of counts (K): `NEVER`, or what the scale says of the share in multiples of 1/K."""
    ratio = counts * (len(counts) / counts.sum())
    place = np.log(np.maximum(ratio, RARE) / RARE) / math.log(FREQUENT / RARE)
    return np.where(counts[:, None] > 0, _scale()(place)[:, :3], NEVER)


def _scale() -> "Colormap":
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("frequency", BLUES)


def _label_steps(axis: "Axes", steps: Sequence[int], with_label: bool) -> None:
    labelled = range(len(steps) - 1, -1, -math.ceil(len(steps) / 8))
    axis.set_yticks([row + 0.5 for row in labelled], [f"{steps[row]:,}" if with_label else "" for row in labelled])
    axis.set_ylim(0, len(steps))
    if with_label:
        axis.set_ylabel("training step")


def _explain_colours(figure: "Figure", axes: "Sequence[Axes]") -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    mappable = ScalarMappable(LogNorm(RARE, FREQUENT), _scale())
    bar = figure.colorbar(mappable, ax=list(axes), extend="both", aspect=30, pad=0.02, fraction=0.05)
    bar.set_ticks([0.01, 0.1, 1, 10, 100], labels=["1/100", "1/10", "uniform", "10 times", "100 times"], fontsize=9)
    bar.ax.minorticks_off()
    bar.ax.tick_params(colors=SOFT)
    bar.set_label("share of the tokens (uniform: 1/K)", fontsize=9, color=INK)
    bar.outline.set_visible(False)
    line = Line2D([], [], color=ORANGE, linewidth=1.2, label="number of codes in use")
    handles = [
        Patch(facecolor=NEVER, edgecolor=SOFT, linewidth=0.5, label="does not occur"),
        line,
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False, fontsize=9, labelcolor=INK)
