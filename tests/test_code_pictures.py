"""The pictures of the codes: what they say, which code stands where, and that no dead code is lost on the way."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from hf_vq import code_pictures
from hf_vq.code_pictures import BLUES, NEVER, save_code_history, save_code_usage


@pytest.fixture(autouse=True)
def no_pyplot(monkeypatch: pytest.MonkeyPatch):
    """Whoever imports pyplot touches global state."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that would have been saved."""
    drawn: list[Any] = []
    monkeypatch.setattr(code_pictures, "save_figure", lambda figure, path: drawn.append(figure))
    return drawn


def words_of(path: Path) -> str:
    """An SVG of matplotlib keeps each text in a comment above its outlines."""
    return path.read_text(encoding="utf-8")


def test_code_usage_says_perplexity_usage_and_the_unused(tmp_path):
    counts = torch.zeros(1, 64, dtype=torch.int64)
    counts[0, ::4] = 25
    save_code_usage(tmp_path / "a.svg", counts)
    words = words_of(tmp_path / "a.svg")
    for expected in ("perplexity 16.0 of 64, 25 % of the codes in use", "uniform, 1 / 64", "48 never occur"):
        assert f"<!-- {expected} -->" in words
    save_code_usage(tmp_path / "b.svg", torch.full((1, 64), 3))
    assert "perplexity 64.0 of 64, 100 %" in words_of(tmp_path / "b.svg")
    assert "never occur" not in words_of(tmp_path / "b.svg")


def test_code_usage_draws_shares_from_the_most_frequent_down(figures, tmp_path):
    save_code_usage(tmp_path / "a.png", torch.tensor([[1, 6, 0, 3]]))
    (axis,) = figures[0].axes
    assert axis.patches[0].get_data().values.tolist() == pytest.approx([60, 30, 10, 0])
    (uniform,) = axis.lines
    assert set(uniform.get_ydata()) == {25}


def test_code_usage_of_several_codebooks(tmp_path):
    save_code_usage(tmp_path / "a.svg", torch.tensor([[1, 1, 2], [1, 0, 3]]))
    words = words_of(tmp_path / "a.svg")
    assert "<!-- codebook 0 -->" in words and "<!-- codebook 1 -->" in words
    with pytest.raises(ValueError, match="no tokens"):
        save_code_usage(tmp_path / "b.svg", torch.tensor([[1, 2], [0, 0]]))


def test_one_missing_code_is_not_rounded_away(tmp_path):
    counts = torch.ones(1, 8192, dtype=torch.int64)
    counts[0, 5] = 0
    save_code_usage(tmp_path / "a.svg", counts)
    assert "99.9 % of the codes" in words_of(tmp_path / "a.svg")


# The history.


def write_history(folder: Path, *rows: list[list[int]] | torch.Tensor, every: int = 500) -> Path:
    """codes.safetensors with counts (M, K) of evaluations at every so many steps."""
    path = folder / "codes.safetensors"
    save_file({f"step-{every * (i + 1):06d}": torch.as_tensor(row) for i, row in enumerate(rows)}, path)
    return path


def colours_of(axis: Any) -> np.ndarray:
    """What a panel shows, (evaluations, columns, 3), the first evaluation first."""
    (image,) = axis.images
    assert image.origin == "lower"
    return np.asarray(image.get_array())


def is_never(colours: np.ndarray) -> np.ndarray:
    return np.isclose(colours, NEVER, atol=1e-6).all(-1)


def test_each_code_is_a_column_and_each_evaluation_a_row(figures: list[Any], tmp_path: Path):
    # By their last counts: code 2, 0, 3; then 1, which died, and 4, which never lived.
    codes = write_history(tmp_path, [[5, 5, 5, 5, 0]], [[8, 0, 12, 4, 0]])
    save_code_history(tmp_path / "a.png", codes)
    (axis, *_) = figures[0].axes
    colours = colours_of(axis)
    columns = colours.shape[1] // 5
    assert columns > 100 and colours.shape[0] == 2
    middles = colours[:, columns // 2 :: columns]
    assert is_never(middles).tolist() == [[False] * 4 + [True], [False] * 3 + [True] * 2]
    brightness = middles.sum(-1)
    assert (np.diff(brightness[1, :3]) > 0).all(), "the more frequent, the darker"
    assert np.ptp(brightness[0, :4]) < 1e-6, "equal counts have equal colours"
    assert [tick.get_text() for tick in axis.get_yticklabels()][::-1] == ["500", "1,000"]
    assert axis.patches[0].get_data().values.tolist() == pytest.approx([4 * columns, 3 * columns])


def test_the_colour_tells_the_share_against_the_uniform_one(figures: list[Any], tmp_path: Path):
    ends = {1: [1] * 64, 100: [10**6, *[1] * 127], 0.01: [1, *[10**6] * 127]}
    for row in ends.values():
        save_code_history(tmp_path / "a.png", write_history(tmp_path, [row]))
    uniform, most, least = (colours_of(figure.axes[0])[0] for figure in figures)
    assert np.ptp(uniform, axis=0).max() < 1e-6

    def rgb(colour: str) -> list[float]:
        return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]

    assert most[0].tolist() == pytest.approx(rgb(BLUES[-1]), abs=0.01)
    assert least[-1].tolist() == pytest.approx(rgb(BLUES[0]), abs=0.01)
    assert uniform[0].sum() == pytest.approx((np.array(rgb(BLUES[1])) + rgb(BLUES[2])).sum() / 2, abs=0.02)
    assert not is_never(least).any(), "rare is not never"


@pytest.mark.parametrize("codebook_size", [128, 512, 8192, 65_536])
@pytest.mark.parametrize("alive", [False, True], ids=["never", "died"])
def test_a_single_dead_code_is_seen_among_many(figures: list[Any], tmp_path: Path, codebook_size: int, alive: bool):
    first, last = torch.full((2, 1, codebook_size), 3)
    last[0, 77], first[0, 77] = 0, 3 * alive
    save_code_history(tmp_path / "a.png", write_history(tmp_path, first, last))
    dead = is_never(colours_of(figures[0].axes[0]))
    assert dead[1].sum() >= 4 and dead[1, -1]
    assert dead[0].sum() == (0 if alive else dead[1].sum())
    assert dead.shape[1] <= 800, "fewer columns than pixels"
    words = figures[0].axes[0].get_title(loc="left")
    assert f"{codebook_size - 1:,} of {codebook_size:,} codes in use" in words and ("1 never" in words) != alive


def test_a_column_of_many_codes_has_their_mean_colour(figures: list[Any], tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    counts = [torch.randint(0, 2, (1, 65_536), generator=generator) * 5 for _ in range(2)]
    save_code_history(tmp_path / "a.png", write_history(tmp_path, *counts))
    colours = colours_of(figures[0].axes[0])
    kinds = [(counts[1] > 0), (counts[1] == 0) & (counts[0] > 0), (counts[0] + counts[1]) == 0]
    widths = [round(colours.shape[1] * kind.float().mean().item()) for kind in kinds]
    used, died, never = np.split(colours, np.cumsum(widths)[:2], axis=1)
    assert is_never(colours[1, widths[0] + 2 :]).all() and is_never(never[:, 3:]).all()
    assert not is_never(died[0, 3:-3]).any()
    half = (np.array(NEVER) + died[0, 10]) / 2  # each used code was used at first with probability one half
    assert np.abs(used[0].mean(0) - half).max() < 0.02


@pytest.mark.parametrize(("evaluations", "most"), [(1, 1), (3, 3), (399, 8), (2500, 8)])
def test_few_evaluations_and_many(tmp_path: Path, figures: list[Any], evaluations: int, most: int):
    rows = [[[1 + step, 2, 0, 0 if step else 1]] for step in range(evaluations)]
    save_code_history(tmp_path / "a.png", write_history(tmp_path, *rows, every=10))
    axis = figures[0].axes[0]
    colours = colours_of(axis)
    assert len(colours) == min(evaluations, 400)
    labels = [tick.get_text() for tick in axis.get_yticklabels()]
    assert len(labels) <= most and labels[0] == f"{10 * evaluations:,}", "the last step is named"
    assert is_never(colours[:, -1]).all()
    if evaluations > 1:
        assert not is_never(colours[0, -200]) and is_never(colours[1, -200])


def test_several_codebooks_stand_side_by_side(tmp_path: Path, figures: list[Any]):
    counts = torch.zeros(5, 16, dtype=torch.int64)
    for codebook in range(5):
        counts[codebook, : 3 * (codebook + 1)] = 4
    save_code_history(tmp_path / "a.png", write_history(tmp_path, counts, counts.clone()))
    panels = [axis for axis in figures[0].axes if axis.images]
    assert len(panels) == 5
    for codebook, axis in enumerate(panels):
        assert f"codebook {codebook}, step 1,000: perplexity {3 * (codebook + 1)}.0" in axis.get_title(loc="left")
        assert is_never(colours_of(axis)).mean() == pytest.approx(1 - 3 * (codebook + 1) / 16, abs=0.02)
    places = [axis.get_subplotspec().get_geometry()[2] for axis in panels]
    assert places == [0, 1, 2, 3, 4]


def test_the_picture_says_what_it_shows(tmp_path: Path):
    save_code_history(tmp_path / "pictures" / "a.svg", write_history(tmp_path, [[1, 1, 0, 2]]))
    words = words_of(tmp_path / "pictures" / "a.svg")
    for expected in ("does not occur", "number of codes in use", "training step", "uniform", "3 of 4 codes in use"):
        assert expected in words
    assert "the most frequent of the last evaluation first" in words
    save_code_history(tmp_path / "a.png", tmp_path / "codes.safetensors")
    with Image.open(tmp_path / "a.png") as page:
        pixels = np.asarray(page.convert("RGB")) / 255
    assert np.isclose(pixels, NEVER, atol=1 / 255).all(-1).mean() > 0.1


def test_an_evaluation_without_tokens_is_named(tmp_path: Path):
    codes = write_history(tmp_path, [[1, 2], [3, 4]], [[1, 2], [0, 0]])
    with pytest.raises(ValueError, match="no tokens at step 1000"):
        save_code_history(tmp_path / "a.png", codes)
