"""The pictures hold what they should, where it should be."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_vq import pictures
from hf_vq.pictures import save_curves, save_reconstructions


@pytest.fixture(autouse=True)
def no_pyplot(monkeypatch):
    """Whoever imports pyplot touches global state."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)


def random_images(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def enlarged(image: torch.Tensor, factor: int) -> np.ndarray:
    rgb = image.expand(3, -1, -1).permute(1, 2, 0).numpy()
    return rgb.repeat(factor, 0).repeat(factor, 1)


def read_page(path: Path) -> np.ndarray:
    with Image.open(path) as page:
        return np.asarray(page)


def find(page: np.ndarray, tile: np.ndarray) -> list[tuple[int, int]]:
    """(top, left) of every place in `page` that shows `tile`."""
    height, width = tile.shape[:2]
    corners = np.argwhere((page[: 1 - height or None, : 1 - width or None] == tile[0, 0]).all(-1))
    return [(y, x) for y, x in corners.tolist() if np.array_equal(page[y : y + height, x : x + width], tile)]


@pytest.mark.parametrize(("channels", "size", "factor"), [(1, 8, 12), (3, 32, 3), (3, 64, 2), (3, 200, 1)])
def test_each_reconstruction_stands_right_below_its_original(tmp_path, channels, size, factor):
    originals = random_images(20, channels, size, size)
    reconstructions = 255 - originals
    path = tmp_path / "pictures" / "step-10.png"
    save_reconstructions(path, originals, reconstructions, max_images=18)
    page = read_page(path)
    assert page.shape[1] <= 1400 and page.shape[2] == 3
    corners = []
    for original, reconstruction in zip(originals[:18], reconstructions[:18], strict=True):
        ((top, left),) = find(page, enlarged(original, factor))
        ((below, under),) = find(page, enlarged(reconstruction, factor))
        assert under == left and 0 < below - top - size * factor < 10
        corners.append((top, left))
    assert corners == sorted(corners) and len({left for _, left in corners}) > 1
    assert not find(page, enlarged(originals[18], factor))
    labels = page[:, : corners[0][1]]
    assert (labels < 128).any(), "the rows have labels"


def test_large_images_are_reduced(tmp_path):
    save_reconstructions(tmp_path / "a.png", random_images(2, 3, 400, 800), random_images(2, 3, 400, 800))
    height, width, _ = read_page(tmp_path / "a.png").shape
    assert 2 * 256 < width < 2 * 256 + 200 and 2 * 128 < height < 2 * 128 + 60


def test_pictures_need_images(tmp_path):
    with pytest.raises(ValueError, match=r"\(0, 3, 8, 8\)"):
        save_reconstructions(tmp_path / "a.png", random_images(0, 3, 8, 8), random_images(0, 3, 8, 8))
    with pytest.raises(ValueError, match=r"\(1, 2, 8, 8\)"):
        save_reconstructions(tmp_path / "a.png", random_images(1, 2, 8, 8), random_images(1, 2, 8, 8))
    with pytest.raises(TypeError, match="uint8"):
        save_reconstructions(tmp_path / "a.png", random_images(1, 3, 8, 8) / 255, random_images(1, 3, 8, 8))
    assert not list(tmp_path.iterdir())


def words_of(path: Path) -> str:
    """An SVG of matplotlib keeps each text in a comment above its outlines."""
    return path.read_text(encoding="utf-8")


def write_log(path: Path, lines: list[dict[str, float | None]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9', encoding="utf-8")
    return path


def test_curves_show_what_the_log_holds(tmp_path):
    lines: list[dict[str, float | None]] = [
        {"step": step, "images": 64 * step, "loss": 100 / step, "perplexity": None, "seconds": step}
        for step in range(1, 40)
    ]
    lines += [{"step": step, "images": 64 * step, "eval_psnr": 20 + step / 10, "eval_ssim": None} for step in (20, 39)]
    save_curves(tmp_path / "curves.svg", write_log(tmp_path / "metrics.jsonl", lines))
    words = words_of(tmp_path / "curves.svg")
    for expected in ("loss", "PSNR (dB)", "training", "held out", "images seen"):
        assert f"<!-- {expected} -->" in words
    for absent in ("SSIM", "perplexity", "seconds", "learning rate"):
        assert f"<!-- {absent} -->" not in words


def test_curves_draw_every_point_of_training_and_evaluation(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: figures.append(figure))
    lines = [{"step": step, "images": 8 * step, "loss": 1e6 if step == 1 else 1 / step} for step in range(1, 41)]
    lines.append({"step": 40, "images": 320, "eval_loss": 0.5})
    save_curves(tmp_path / "curves.png", write_log(tmp_path / "metrics.jsonl", lines))
    (axis,) = figures[0].axes
    trained, held_out = axis.lines
    assert trained.get_xydata().tolist() == [[line["images"], line["loss"]] for line in lines[:-1]]
    assert held_out.get_xydata().tolist() == [[320, 0.5]]
    assert axis.get_ylim()[1] < 10, "the first steps do not hide the rest"


def test_variances_have_a_logarithmic_scale_and_evaluations_their_own_numbers(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: figures.append(figure))
    names = ("observation_variance", "dequantization_variance", "temperature", "argmax_probability")
    lines = [{"step": step, **dict.fromkeys(names[:3], 0.5**step)} for step in range(1, 21)]
    lines += [{"step": 20, "eval_argmax_probability": 0.75, "eval_posterior_entropy": None}]
    save_curves(tmp_path / "curves.png", write_log(tmp_path / "metrics.jsonl", lines))
    titles = [pictures.PANELS[name] for name in ("argmax_probability", *names[:3])]
    assert [axis.get_title(loc="left") for axis in figures[0].axes] == titles
    assert [axis.get_yscale() for axis in figures[0].axes] == ["linear", "log", "log", "linear"]
    assert figures[0].axes[0].lines[0].get_xydata().tolist() == [[20, 0.75]]
    assert figures[0].axes[1].get_ylim()[0] < 0.5**20 and figures[0].axes[1].get_ylim()[1] > 0.5


@pytest.mark.parametrize("last", [0.3, 0.25, 0.0], ids=["constant", "narrow", "zero"])
def test_variances_that_hardly_move_have_a_linear_scale(monkeypatch, tmp_path, last: float):
    figures = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: figures.append(figure))
    lines = [{"step": step, "observation_variance": value} for step, value in ((1, 0.3), (2, last))]
    save_curves(tmp_path / "curves.png", write_log(tmp_path / "metrics.jsonl", lines))
    assert figures[0].axes[0].get_yscale() == "linear"


def test_lines_that_are_no_objects_are_passed_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('3\n{"step": 1, "loss": 2.0}\n[1]\n')
    save_curves(tmp_path / "curves.png", tmp_path / "metrics.jsonl")


def test_a_log_without_numbers_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.jsonl has none of loss"):
        save_curves(tmp_path / "curves.png", write_log(tmp_path / "metrics.jsonl", [{"step": 1}]))


def test_matplotlib_is_imported_only_to_draw(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    importlib.reload(pictures)
