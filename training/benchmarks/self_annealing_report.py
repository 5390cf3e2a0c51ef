"""What the trainings of self_annealing.py say: four panels, and a verdict in words for each claim."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_vq.figures import BLUE, INK, ORANGE, RED, SOFT, new_figure, save_figure
from panels import plain_numbers, say

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Results = Mapping[str, Mapping[str, Any]]
Rows = Sequence[Mapping[str, float]]

# Fixed before the trainings: what counts as falling together, and as having become deterministic.
TOGETHER = 0.9
DETERMINISTIC = 0.9
# By this step the latents have left the point at which they begin.
SETTLED = 50

PHI = r"$\sigma_\varphi^2$"


def verdict(results: Results, codebook_size: int) -> str:
    """The four claims and what became of them, as Markdown."""
    rows = results["trained-seed-0"]["rows"]
    claims = (
        ("sigma_phi^2 falls with sigma^2 (a)", variances_fall(rows, results["trained-seed-0"]["initial_variance"])),
        ("Quantization becomes deterministic by itself (b)", becomes_deterministic(rows, codebook_size)),
        ("A trained sigma_phi^2 beats every fixed one (c)", trained_beats_fixed(results)),
        ("Proposition 1: the optimal sigma_phi^2 falls with sigma^2 (d)", optimum_falls(rungs_of(results))),
    )
    lines = [f"- **{claim}: {outcome}.** {words}" for claim, (outcome, words) in claims]
    return "\n".join([*lines, ""])


def variances_fall(rows: Rows, initial: float) -> tuple[str, str]:
    """Whether both variances end below their start, and fall together by rank."""
    sigma2, phi2 = column(rows, "observation_variance"), column(rows, "dequantization_variance")
    together = rank_correlation(sigma2, phi2)
    peak = max(range(len(phi2)), key=phi2.__getitem__)
    after = rank_correlation(sigma2[peak:], phi2[peak:])
    both = sigma2[-1] < sigma2[0] and phi2[-1] < initial
    outcome = "confirmed" if both and together > TOGETHER else "confirmed in part" if both else "refuted"
    share = [row["dequantization_variance"] / row["latent_variance"] for row in settled(rows)]
    return outcome, (
        f"sigma^2 goes from {sigma2[0]:.3g} to {sigma2[-1]:.3g} ({sigma2[-1] / sigma2[0]:.2g} of it), sigma_phi^2 "
        f"from {initial:.3g} over {phi2[peak]:.3g} (step {rows[peak]['step']:.0f}, its peak) to {phi2[-1]:.3g} "
        f"({phi2[-1] / initial:.2g}). Rank correlation of the two over the training {together:.2f}, from the peak on "
        f"{after:.2f}. As a share of the latents' own variance sigma_phi^2 goes from {share[0]:.3g} (step {SETTLED}) "
        f"to {share[-1]:.3g}."
    )


def settled(rows: Rows) -> Rows:
    """What was seen from step `SETTLED` on; of a shorter training, the last."""
    return [row for row in rows if row["step"] >= SETTLED] or rows[-1:]


def becomes_deterministic(rows: Rows, codebook_size: int) -> tuple[str, str]:
    """Whether entropy falls and draws come to equal the deterministic code."""
    entropy, share = column(rows, "posterior_entropy"), column(rows, "drawn_argmax")
    falls = entropy[-1] < entropy[0] and share[-1] > share[0]
    outcome = "refuted" if not falls else "confirmed" if share[-1] >= DETERMINISTIC else "confirmed in direction"
    return outcome, (
        f"The mean entropy falls from {entropy[0]:.2f} to {entropy[-1]:.2f} nats a token (log {codebook_size} = "
        f"{math.log(codebook_size):.2f}), and {100 * share[-1]:.0f} % of the drawn codes equal the deterministic one "
        f"at the end, {100 * share[0]:.1f} % at the start; {100 * DETERMINISTIC:.0f} % would count as deterministic."
    )


def trained_beats_fixed(results: Results) -> tuple[str, str]:
    """Whether the trained variance has the lowest test error, up to the spread of its seeds."""
    trained = [result["mse"] for name, result in results.items() if name.startswith("trained-")]
    steps = min(result["rows"][-1]["step"] for name, result in results.items() if name.startswith("trained-"))
    mean, spread = sum(trained) / len(trained), max(trained) - min(trained)
    fixed = {result["initial_variance"]: result["mse"] for name, result in results.items() if name.startswith("fixed-")}
    best = min(fixed, key=fixed.__getitem__)
    ahead = fixed[best] - mean
    outcome = "confirmed" if ahead > spread else "refuted" if ahead < -spread else "undecided"
    lost = sum(error < mean for error in fixed.values())
    return outcome, (
        f"After {steps:,.0f} steps: test MSE {1e3 * mean:.2f}e-3 (mean of {len(trained)} seeds, {1e3 * spread:.2f}e-3 "
        f"apart) against {1e3 * fixed[best]:.2f}e-3 of the best fixed value, {best:g}, and "
        f"{1e3 * max(fixed.values()):.2f}e-3 of the worst; {lost} of {len(fixed)} fixed values do better."
    )


def optimum_falls(rungs: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Whether the sigma_phi^2 of every rung lies below that of the next higher sigma^2."""
    sigma2 = [rung["observation_variance"] for rung in rungs]
    phi2 = [rung["round_ends"][-1] for rung in rungs]
    falls = all(low < high for low, high in pairwise(phi2))
    moving = [f"{rung['observation_variance']:g}" for rung in rungs if not rung["converged"]]
    outcome = ("confirmed" if falls else "refuted") if not moving else "confirmed in order" if falls else "refuted"
    steepness = math.log(phi2[-1] / phi2[0]) / math.log(sigma2[-1] / sigma2[0])
    pairs = ", ".join(f"{high:.3g} at {low:g}" for low, high in zip(sigma2, phi2, strict=True))
    return outcome, (
        f"The optimum {'rises' if falls else 'does not rise'} monotonically with sigma^2: sigma_phi^2 = {pairs}; over "
        f"the ladder like sigma^2 to the power {steepness:.2f}. "
        + (f"Still moving at the end: {', '.join(moving)}." if moving else "Every rung had come to rest.")
    )


def rungs_of(results: Results) -> list[Mapping[str, Any]]:
    """The rungs of (d), the lowest sigma^2 first."""
    rungs = [result for name, result in results.items() if name.startswith("rung-")]
    return sorted(rungs, key=lambda rung: rung["observation_variance"])


def column(rows: Rows, name: str) -> list[float]:
    """One number over the training."""
    return [row[name] for row in rows]


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's: 1 if the two always rise and fall together; of fewer than three values, nan."""
    if len(first) < 3:
        return math.nan
    ranks = [
        {place: rank for rank, place in enumerate(sorted(range(len(values)), key=values.__getitem__))}
        for values in (first, second)
    ]
    squares = sum((ranks[0][place] - ranks[1][place]) ** 2 for place in range(len(first)))
    return 1 - 6 * squares / (len(first) * (len(first) ** 2 - 1))


TITLE = (
    "SQ-VAE on Fashion-MNIST: does quantization lose its randomness by itself?\n"
    "σ² is the decoder's variance, σ_φ² that of the quantizer, which draws codes at random as long as σ_φ² is large."
).replace("σ_φ²", PHI)


def draw(path: Path, results: Results, codebook_size: int) -> None:
    """The figure: (a) to (d) of self_annealing.py."""
    figure, axes = new_figure(4, (10.4, 9), columns=2, title=TITLE)
    rows = results["trained-seed-0"]["rows"]
    draw_variances(axes[0], rows, results["trained-seed-0"]["initial_variance"])
    draw_posterior(axes[1], rows, codebook_size)
    draw_ladder(axes[2], results)
    draw_rungs(axes[3], rungs_of(results), rows[-1])
    save_figure(figure, path)


def draw_variances(axis: "Axes", rows: Rows, initial: float) -> None:
    """(a): both variances, and that of the quantizer as a share of the latents' own."""
    steps, sigma2 = column(rows, "step"), column(rows, "observation_variance")
    phi2 = column(rows, "dequantization_variance")
    share = [row["dequantization_variance"] / row["latent_variance"] for row in settled(rows)]
    axis.plot(steps, [value / sigma2[0] for value in sigma2], color=RED, label="decoder: σ²")
    axis.plot(steps, [value / initial for value in phi2], color=BLUE, label=f"quantizer: {PHI}")
    relative = [value / share[0] for value in share]
    label = f"{PHI} / variance of the latents, from step {SETTLED}"
    axis.plot(column(settled(rows), "step"), relative, color=BLUE, linewidth=1.1, dashes=(4, 2), label=label)
    axis.set_yscale("log")
    axis.set_ylim(top=8 * axis.get_ylim()[1])  # room for the legend
    plain_numbers(axis.yaxis)
    say(axis, "(a) The variances over the training", "training step", "relative to the start", loc="upper right")


def draw_posterior(axis: "Axes", rows: Rows, codebook_size: int) -> None:
    """(b): entropy of the posterior as a share of the greatest, and draws that equal its argmax."""
    steps, most = column(rows, "step"), math.log(codebook_size)
    entropy, share = column(rows, "posterior_entropy"), column(rows, "drawn_argmax")
    label = f"entropy (100 %: all {codebook_size} codes alike)"
    axis.plot(steps, [100 * value / most for value in entropy], color=ORANGE, label=label)
    axis.plot(steps, [100 * value for value in share], color=BLUE, label="draws that give the likeliest code")
    ends = ((f"{entropy[-1]:.1f} nats", entropy[-1] / most, ORANGE), (f"{100 * share[-1]:.0f} %", share[-1], BLUE))
    for text, height, colour in ends:
        where: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "fontsize": 9, "color": colour}
        axis.annotate(text, (steps[-1], 100 * height), (0, 6), **where)
    axis.set_ylim(0, 105)
    say(axis, "(b) How random is the choice of codes? (held-out images)", "training step", "%", loc="best")


def draw_ladder(axis: "Axes", results: Results) -> None:
    """(c): test error over the fixed variances, and that of the trained one at the value it ends with."""
    fixed = sorted((r["initial_variance"], 1e3 * r["mse"]) for n, r in results.items() if n.startswith("fixed-"))
    trained = [result for name, result in results.items() if name.startswith("trained-")]
    axis.plot(*zip(*fixed, strict=True), color=SOFT, marker="o", markersize=5, label=f"{PHI} held fixed")
    for index, result in enumerate(trained):
        label = None if index else f"{PHI} trained, {len(trained)} seeds, where it ends"
        end = result["rows"][-1]["dequantization_variance"]
        axis.plot(end, 1e3 * result["mse"], color=BLUE, marker="*", markersize=13, linestyle="none", label=label)
    axis.axhline(1e3 * sum(result["mse"] for result in trained) / len(trained), color=BLUE, linewidth=1, dashes=(5, 3))
    axis.set_xscale("log")
    plain_numbers(axis.xaxis)
    steps = trained[0]["rows"][-1]["step"]
    say(
        axis,
        f"(c) Is training {PHI} better than fixing it? ({steps:,.0f} steps)",
        PHI,
        "test MSE × 1000 (less is better)",
    )


def draw_rungs(axis: "Axes", rungs: Sequence[Mapping[str, Any]], end: Mapping[str, float]) -> None:
    """(d): the optimum for each sigma^2 that was held still."""
    sigma2 = [rung["observation_variance"] for rung in rungs]
    phi2 = [rung["round_ends"][-1] for rung in rungs]
    axis.plot(sigma2, phi2, color=BLUE, marker="o", markersize=6, label=f"best {PHI} under a fixed σ²")
    moving = [place for place, rung in enumerate(rungs) if not rung["converged"]]
    if moving:
        places = [sigma2[place] for place in moving], [phi2[place] for place in moving]
        ring: dict[str, Any] = {"marker": "o", "markersize": 11, "markerfacecolor": "none", "linestyle": "none"}
        axis.plot(*places, color=RED, label="still moving", **ring)
    at = end["observation_variance"], end["dequantization_variance"]
    axis.plot(*at, color=INK, marker="*", markersize=11, linestyle="none", label="where the training of (a) ended")
    axis.set_xscale("log")
    axis.set_yscale("log")
    plain_numbers(axis.xaxis, axis.yaxis)
    say(axis, f"(d) Proposition 1: does the best {PHI} fall with σ²?", "σ², held fixed (decoder and codes frozen)", PHI)
