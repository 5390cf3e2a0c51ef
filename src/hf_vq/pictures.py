"""Pictures of a run: originals above reconstructions, how often each code is used, and the curves of the log."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from hf_vq.metrics import perplexity, psnr, usage

if TYPE_CHECKING:  # matplotlib takes longer to import than all of hf_vq's own code
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["save_code_usage", "save_curves", "save_reconstructions"]

INK, SOFT, GRID = "#1f2328", "#6e7781", "#e4e7eb"
BLUE, ORANGE, RED = "#2f6fb0", "#d9730d", "#c93c37"
SERIES = (BLUE, "#2a9d8f", ORANGE, "#8e63b5", "#b5546b", SOFT)

TILE, LARGEST_TILE, PAGE_WIDTH = 96, 256, 1400  # pixels
MARGIN, GAP, CAPTION, LABELS = 16, 4, 26, 116

PANELS = {
    "loss": "loss",
    "reconstruction_loss": "reconstruction loss",
    "embedding_loss": "embedding loss",
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "perplexity": "perplexity",
    "usage": "share of codes in use",
    "frechet_distance": "Fréchet distance",
    "bits_per_token": "bits per token",
    "bits_per_dim": "bits per dimension",
    "learning_rate": "learning rate",
    "images_per_second": "images per second",
}


def save_reconstructions(
    path: str | os.PathLike[str], originals: Tensor, reconstructions: Tensor, max_images: int = 32
) -> None:
    """Originals above their reconstructions, with the PSNR of each pair; small images are enlarged pixel by pixel.

    Args:
        path: the picture to write, its suffix tells the format.
        originals, reconstructions: uint8, (B, C, H, W) with 1 or 3 channels.
        max_images: how many of the batch to show at most.

    Raises: TypeError or ValueError if these are not two batches of 8-bit images alike.
    """
    originals, reconstructions = originals[:max_images].cpu(), reconstructions[:max_images].cpu()
    ratios = psnr(originals, reconstructions).tolist()
    if not ratios or originals.shape[1] not in (1, 3):
        raise ValueError(f"there must be images of 1 or 3 channels to show, got the shape {tuple(originals.shape)}")
    tiles = [(_tile(x), _tile(y)) for x, y in zip(originals, reconstructions, strict=True)]
    width, height = tiles[0][0].size
    columns = _columns(len(tiles), width)
    block = 2 * (height + GAP) + CAPTION
    page = Image.new(
        "RGB",
        (2 * MARGIN + LABELS + columns * (width + GAP) - GAP, MARGIN + math.ceil(len(tiles) / columns) * block),
        "white",
    )
    draw = ImageDraw.Draw(page)
    for index, (pair, ratio) in enumerate(zip(tiles, ratios, strict=True)):
        row, column = divmod(index, columns)
        x, y = MARGIN + LABELS + column * (width + GAP), MARGIN + row * block
        for line, tile in enumerate(pair):
            page.paste(tile, (x, y + line * (height + GAP)))
        draw.text((x + width / 2, y + block - CAPTION), f"{ratio:.1f} dB", SOFT, _font(12), anchor="ma")
        for line, label in enumerate(("original", "reconstruction") if column == 0 else ()):
            middle = y + line * (height + GAP) + height / 2
            draw.text((MARGIN + LABELS - 12, middle), label, INK, _font(14), anchor="rm")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    page.save(path)


def _columns(count: int, width: int) -> int:
    """As few rows as the page allows, and those about equally long."""
    most = max(1, (PAGE_WIDTH - 2 * MARGIN - LABELS) // (width + GAP))
    return math.ceil(count / math.ceil(count / most))


def _tile(image: Tensor) -> Image.Image:
    """(C, H, W) -> RGB, enlarged by a whole factor to about `TILE`, or reduced to `LARGEST_TILE`."""
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    tile = Image.fromarray(pixels[..., 0] if len(image) == 1 else pixels)
    if max(tile.size) > LARGEST_TILE:
        tile.thumbnail((LARGEST_TILE, LARGEST_TILE), Image.Resampling.LANCZOS)
    factor = max(1, round(TILE / max(tile.size)))
    return tile.convert("RGB").resize((tile.width * factor, tile.height * factor), Image.Resampling.NEAREST)


def _font(size: int) -> "ImageFont.FreeTypeFont | ImageFont.ImageFont":
    return ImageFont.load_default(size)


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
    title = f"perplexity {perplexity(counts):.1f} of {codebook_size}, {_percent(usage(counts))} of the codes in use"
    figure, axes = _figure(1, (8, 4.2))
    axis = axes[0]
    edges = np.arange(codebook_size + 1)
    for codebook, share in enumerate(shares):
        name = f"codebook {codebook}" if num_codebooks > 1 else "share of the tokens"
        colour = SERIES[codebook % len(SERIES)]
        axis.stairs(100 * share, edges, baseline=None, color=colour, linewidth=1.4, label=name)
        if num_codebooks == 1:
            axis.stairs(100 * share, edges, color=colour, fill=True, alpha=0.22)
    axis.axhline(100 / codebook_size, color=INK, linewidth=1.1, dashes=(5, 3), label=f"uniform, 1 / {codebook_size}")
    _mark_unused(axis, counts)
    axis.set(xlim=(0, codebook_size), ylim=(0, 105 * max(shares.max(), 1.5 / codebook_size)))
    axis.set(xlabel="codes, the most frequent first", ylabel="share of the tokens (%)")
    axis.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper right", ncols=1 + (num_codebooks > 6))
    axis.set_title(title, loc="left", fontsize=12, color=INK, pad=12)
    _save(figure, path)


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


def save_curves(path: str | os.PathLike[str], metrics_jsonl: str | os.PathLike[str]) -> None:
    """Losses, PSNR, perplexity and what else the log holds, over the images seen.

    Args:
        path: the picture to write, its suffix tells the format.
        metrics_jsonl: the log of a run: one JSON object a line, with `images` (or `step`); names that begin with
            `eval_` are numbers of held-out images. A torn last line is passed over.

    Raises: ValueError if the log has none of the known numbers.
    """
    lines = _read_log(Path(metrics_jsonl))
    panels = [name for name in PANELS if any(line.get(key) is not None for line in lines for key in _keys(name))]
    if not panels:
        raise ValueError(f"{metrics_jsonl} has none of {', '.join(PANELS)}: is it the metrics.jsonl of a run?")
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = _figure(len(panels), (4.2 * columns, 2.7 * rows), columns)
    for axis, name in zip(axes, panels, strict=True):
        _draw_panel(axis, lines, name)
    unit = "images seen" if any("images" in line for line in lines) else "steps"
    for axis in axes[-columns:]:
        axis.set_xlabel(unit)
    for axis in axes:
        axis.set_xlim(0, 1.02 * max(_place(line) for line in lines) or 1)
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper right", ncols=2, frameon=False, fontsize=9, labelcolor=INK
    )
    _save(figure, path)


def _read_log(path: Path) -> list[dict[str, Any]]:
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def _keys(name: str) -> tuple[str, ...]:
    """What a panel shows. The speed of evaluation has another scale, so it stays out."""
    return (name,) if name == "images_per_second" else (name, f"eval_{name}")


def _draw_panel(axis: "Axes", lines: Sequence[Mapping[str, Any]], name: str) -> None:
    from matplotlib.ticker import EngFormatter

    series = [_series(lines, key) for key in _keys(name)]
    for (x, y), label, colour, width in zip(series, ("training", "held out"), (BLUE, ORANGE), (1.2, 1.6), strict=False):
        if x:
            marker = "o" if len(x) <= 30 else None
            axis.plot(x, y, color=colour, linewidth=width, marker=marker, markersize=3.5, label=label)
    axis.set_title(PANELS[name], loc="left", fontsize=10, color=INK)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    _leave_out_the_start(axis, series)


def _place(line: Mapping[str, Any]) -> float:
    return line.get("images", line.get("step", 0))


def _series(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    known = [line for line in lines if line.get(name) is not None]
    return [_place(line) for line in known], [line[name] for line in known]


def _leave_out_the_start(axis: "Axes", series: Sequence[tuple[list[float], list[float]]]) -> None:
    """Fits the vertical range to what follows the first twentieth: losses begin orders of magnitude off."""
    start = max((x[-1] for x, _ in series if x), default=0) / 20
    later = [value for x, y in series for place, value in zip(x, y, strict=True) if place > start]
    if len(later) >= 10 and max(later) > min(later):
        margin = 0.08 * (max(later) - min(later))
        axis.set_ylim(min(later) - margin, max(later) + margin)


def _figure(panels: int, size: tuple[float, float], columns: int = 1) -> "tuple[Figure, list[Axes]]":
    """A figure that belongs to nobody: no pyplot, so no window, no global state, any thread."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=size, dpi=130, layout=ConstrainedLayoutEngine(h_pad=0.09, w_pad=0.09), facecolor="white")
    rows = math.ceil(panels / columns)
    axes = [figure.add_subplot(rows, columns, index + 1) for index in range(panels)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(SOFT)
        axis.tick_params(colors=SOFT, labelsize=9, length=3)
        axis.grid(color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
        axis.xaxis.label.set_color(INK)
        axis.yaxis.label.set_color(INK)
    return figure, axes


def _percent(share: float) -> str:
    """Rounded down, so that 100 % means all."""
    return f"{math.floor(1000 * share) / 10:g} %"


def _save(figure: "Figure", path: str | os.PathLike[str]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
