"""Pictures of a run: originals above reconstructions, and the curves of the log. (Of its codes: code_pictures.py.)"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from hf_vq.figures import BLUE, INK, ORANGE, SOFT, new_figure, save_figure
from hf_vq.metrics import psnr

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["save_curves", "save_reconstructions", "save_samples"]

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
    "posterior_entropy": "posterior entropy (nats per token)",
    "argmax_probability": "probability of the likeliest code",
    "observation_variance": r"observation variance $\sigma^2$",
    "dequantization_variance": r"dequantization variance $\sigma_\varphi^2$",
    "temperature": "temperature",
    "frechet_distance": "Fréchet distance",
    "bits_per_token": "bits per token",
    "bits_per_dim": "bits per dimension",
    "learning_rate": "learning rate",
    "images_per_second": "images per second",
}
LOGARITHMIC = ("observation_variance", "dequantization_variance")
LEAST_RATIO = 3  # of largest to smallest: a logarithmic scale of less has hardly a tick


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


def save_samples(path: str | os.PathLike[str], images: Tensor, labels: Sequence[str]) -> None:
    """Rows of images, each under the name of its class at its left.

    Args:
        path: the picture to write, its suffix tells the format.
        images: uint8, (rows, columns, C, H, W) with 1 or 3 channels.
        labels: one for each row.
    """
    rows = [[_tile(image) for image in row] for row in images.cpu()]
    width, height = (side + GAP for side in rows[0][0].size)
    size = (2 * MARGIN + LABELS + len(rows[0]) * width - GAP, 2 * MARGIN + len(rows) * height - GAP)
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for line, (label, row) in enumerate(zip(labels, rows, strict=True)):
        top = MARGIN + line * height
        draw.text((MARGIN + LABELS - 12, top + height / 2), label, INK, _font(14), anchor="rm")
        for column, tile in enumerate(row):
            page.paste(tile, (MARGIN + LABELS + column * width, top))
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


def save_curves(path: str | os.PathLike[str], metrics_jsonl: str | os.PathLike[str]) -> None:
    """Losses, PSNR, perplexity and what else the log holds, over the images seen.

    Args:
        path: the picture to write, its suffix tells the format.
        metrics_jsonl: the log of a run: one JSON object a line, with `images` (or `step`); names that begin with
            `eval_` are numbers of held-out images. A torn last line is passed over.

    Raises: ValueError if the log is no text or has none of the known numbers.
    """
    lines = _read_log(Path(metrics_jsonl))
    panels = [name for name in PANELS if any(line.get(key) is not None for line in lines for key in _keys(name))]
    if not panels:
        raise ValueError(f"{metrics_jsonl} has none of {', '.join(PANELS)}: is it the metrics.jsonl of a run?")
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = new_figure(len(panels), (4.2 * columns, 2.7 * rows), columns)
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
    save_figure(figure, path)


def _read_log(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not the metrics.jsonl of a run: it is no text ({error})") from error
    lines = []
    for line in text.splitlines():
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]


def _keys(name: str) -> tuple[str, ...]:
    """What a panel shows. The speed of evaluation has another scale, so it stays out."""
    return (name,) if name == "images_per_second" else (name, f"eval_{name}")


def _draw_panel(axis: "Axes", lines: Sequence[Mapping[str, Any]], name: str) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    series = [_series(lines, key) for key in _keys(name)]
    for (x, y), label, colour, width in zip(series, ("training", "held out"), (BLUE, ORANGE), (1.2, 1.6), strict=False):
        if x:
            marker = "o" if len(x) <= 30 else None
            axis.plot(x, y, color=colour, linewidth=width, marker=marker, markersize=3.5, label=label)
    axis.set_title(PANELS[name], loc="left", fontsize=10, color=INK)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    values = [value for _, y in series for value in y]
    if name in LOGARITHMIC and max(values) > LEAST_RATIO * min(values) > 0:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(NullLocator())
    else:
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
