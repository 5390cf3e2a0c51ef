"""What the trainings of vqvae_claims.py say: a picture for each claim, and a verdict in words.

A result's name is that of its variant and `-seed-N`; means are over seeds, and noise is their largest difference.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_vq.figures import BLUE, ORANGE, SERIES, SOFT, new_figure, save_figure
from panels import plain_numbers, say

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Results = Mapping[str, Mapping[str, Any]]

# Fixed before the trainings.
INSENSITIVE = 0.5  # dB
UNBOUNDED = 10.0  # times the norm that beta = 0.25 gives
SAME = 0.01

SOFT_EM = {"hard": "hard EMA", "soft-1": "soft EM, 1 draw", "soft-5": "5 draws", "soft-10": "10 draws"}
TAILS = {
    "beta-0.25": "two terms, β = 0.25",
    "beta-1": "two terms, β = 1",
    "no-stop-1": "one term, weight 1",
    "no-stop-1.25": "one term, weight 1.25",
}

NORM = r"mean norm of the encoder's output, $\|z_e\|$"
WEIGHT_TITLE = (
    "VQ-VAE: does the commitment weight matter?\n"
    "β weighs how strongly the encoder is pulled to the codes it uses; the paper found no difference from 0.1 to 2."
)
NORM_TITLE = (
    "VQ-VAE without commitment: does the encoder's output grow without bound?\n"
    "At β = 0 nothing pulls the encoder to its codes. Two seeds each; left, the scale is logarithmic."
)
TAILS_TITLE = (
    "VQ-VAE without stop-gradients: do latents and codes chase each other's tails?\n"
    "The paper's two terms, codes to latents and β times latents to codes, each stop the gradient of the other side.\n"
    "One plain term, weight times $\\|z_e - e\\|^2$, moves both sides alike."
)
SOFT_TITLE = (
    "Soft EM: do random draws keep more codes alive than the nearest code?\n"
    "Hard EMA moves the code nearest to a latent; soft EM draws m codes, near ones likelier, and moves each by 1/m."
)


def verdict(results: Results) -> str:
    """The claims and what became of them, as Markdown."""
    claims = (
        ("Results do not depend on beta from 0.1 to 2", insensitive(results)),
        ("At beta = 0 the encoder's output grows without bound", grows(results)),
        ("Without stop-gradients it does not converge", chases(results)),
        ("Soft EM keeps more codes alive than hard EMA", more_codes(results)),
        ("Soft EM reconstructs better than hard EMA", better_images(results)),
    )
    lines = [f"- **{claim}: {outcome}.** {words}" for claim, (outcome, words) in claims]
    return "\n".join([*lines, ""])


def insensitive(results: Results) -> tuple[str, str]:
    """Whether PSNR differs by less than half a decibel over the weights."""
    names = [f"beta-{weight:g}" for weight in weights_of(results) if weight > 0]
    quality = {name: mean(results, name, "psnr") for name in names}
    spread = max(quality.values()) - min(quality.values())
    noise = max(noise_of(results, name, "psnr") for name in names)
    codes = ", ".join(f"{mean(results, name, 'perplexity'):.0f}" for name in names)
    return "confirmed" if spread <= INSENSITIVE else "refuted", (
        f"Test PSNR {listed(quality)}: {spread:.2f} dB from worst to best, where two seeds are up to {noise:.2f} dB "
        f"apart and {INSENSITIVE:g} dB would count as a difference. Perplexity {codes} of 256."
    )


def listed(values: Mapping[str, float]) -> str:
    """Values with their names."""
    return ", ".join(f"{value:.2f} ({name})" for name, value in values.items())


def grows(results: Results) -> tuple[str, str]:
    """Whether the norm at beta = 0 is ten times that at 0.25, with and without normalisation in the body."""
    with_norm, bare = norm_ratio(results, "beta-0", "beta-0.25"), norm_ratio(results, "bare-beta-0", "bare-beta-0.25")
    averages = norm_ratio(results, "hard-beta-0", "hard")
    unbounded = [ratio > UNBOUNDED for ratio in (bare, with_norm)]
    outcome = (
        "confirmed" if all(unbounded) else "refuted" if not any(unbounded) else "confirmed for a body without norms"
    )
    if not unbounded[0] and unbounded[1]:
        outcome = "confirmed for a body with norms"
    return outcome, (
        f"The mean norm of the encoder's output ends at {bare:.3g} times that of beta = 0.25 in a body without "
        f"normalisation, at {with_norm:.3g} times with group norm, and with EMA codes (group norm) at {averages:.3g} "
        f"times. Test PSNR at beta = 0 against 0.25: {mean(results, 'bare-beta-0', 'psnr'):.2f} against "
        f"{mean(results, 'bare-beta-0.25', 'psnr'):.2f} dB without normalisation, "
        f"{mean(results, 'beta-0', 'psnr'):.2f} against {mean(results, 'beta-0.25', 'psnr'):.2f} dB with group norm."
    )


def chases(results: Results) -> tuple[str, str]:
    """Whether the plain term ends worse than the two stopped ones; and that at weight 1 it IS the two at beta = 1."""
    quality = {label: mean(results, name, "psnr") for name, label in TAILS.items()}
    worst = min(mean(results, f"no-stop-{weight}", "psnr") for weight in ("1", "1.25"))
    apart = start_difference(results, "no-stop-1", "beta-1")
    ends = [mean_of([rows_of(result)[-1]["distance"] for result in seeds(results, name)]) for name in TAILS]
    distances = ", ".join(f"{value:.2f}" for value in ends)
    same = "the same gradients as" if apart < SAME else "not the gradients of"
    return "confirmed" if mean(results, "beta-0.25", "psnr") - worst > INSENSITIVE else "refuted", (
        f"Test PSNR {listed(quality)}; in this order ||z_e - e||^2 ends at {distances}. Weight 1 without "
        f"stop-gradients has {same} beta = 1 with them: over the first 5 steps their distances differ by at most "
        f"{100 * apart:.2g} %. With stop-gradients the two move at once, too: what these add is two weights."
    )


def more_codes(results: Results) -> tuple[str, str]:
    """Whether every number of draws has a higher perplexity than hard EMA, beyond the noise."""
    return compared(results, "perplexity", "Perplexity over the test set, of 256")


def better_images(results: Results) -> tuple[str, str]:
    """Whether every number of draws has a higher PSNR than hard EMA, beyond the noise."""
    return compared(results, "psnr", "Test PSNR (each latent at its nearest code)")


def compared(results: Results, number: str, words: str) -> tuple[str, str]:
    """Soft EM against hard EMA by one number, the higher the better."""
    ahead = [mean(results, name, number) - mean(results, "hard", number) for name in SOFT_EM if name != "hard"]
    noise = max(noise_of(results, name, number) for name in SOFT_EM)
    better, worse = sum(lead > noise for lead in ahead), sum(lead < -noise for lead in ahead)
    outcome = "confirmed" if better == len(ahead) else "refuted" if worse else "undecided" if not better else "in part"
    values = listed({label: mean(results, name, number) for name, label in SOFT_EM.items()})
    return outcome, f"{words}: {values}; seeds are up to {noise:.2f} apart."


def seeds(results: Results, variant: str) -> list[Mapping[str, Any]]:
    """The results of a variant."""
    return [result for name, result in results.items() if name.rpartition("-seed-")[0] == variant]


def rows_of(result: Mapping[str, Any]) -> Sequence[Mapping[str, float]]:
    """What was seen of a training."""
    return result["rows"]


def mean_of(values: Sequence[float]) -> float:
    """Their mean."""
    return sum(values) / len(values)


def mean(results: Results, variant: str, number: str) -> float:
    """A number of a variant, over its seeds."""
    return mean_of([result[number] for result in seeds(results, variant)])


def noise_of(results: Results, variant: str, number: str) -> float:
    """How far apart the seeds of a variant are."""
    values = [result[number] for result in seeds(results, variant)]
    return max(values) - min(values)


def weights_of(results: Results) -> list[float]:
    """The commitment weights of the gradient codebook with group norm, ascending."""
    names = {name.rpartition("-seed-")[0] for name in results}
    return sorted(float(name.removeprefix("beta-")) for name in names if name.startswith("beta-"))


def norm_ratio(results: Results, variant: str, other: str) -> float:
    """The last norm of the encoder's output in one variant over that in another."""
    ends = [mean_of([rows_of(r)[-1]["latent_norm"] for r in seeds(results, name)]) for name in (variant, other)]
    return ends[0] / ends[1]


def start_difference(results: Results, variant: str, other: str) -> float:
    """The largest relative difference of ||z_e - e||^2 over the first five steps, seed by seed."""
    pairs = zip(seeds(results, variant), seeds(results, other), strict=True)
    steps = [(a, b) for one, two in pairs for a, b in zip(rows_of(one), rows_of(two), strict=True) if a["step"] <= 5]
    return max(abs(a["distance"] / b["distance"] - 1) for a, b in steps)


def draw(folder: Path, results: Results) -> None:
    """A picture for each claim."""
    pictures = {
        "commitment": (WEIGHT_TITLE, draw_weights, draw_weight_codes),
        "no_commitment": (NORM_TITLE, draw_bare_norms, draw_norms),
        "stop_gradient": (TAILS_TITLE, draw_distances, draw_tails),
        "soft_em": (SOFT_TITLE, draw_perplexities, draw_soft_psnr),
    }
    for name, (title, *drawers) in pictures.items():
        figure, axes = new_figure(2, (10.4, 4.8), columns=2, title=title)
        for drawer, axis in zip(drawers, axes, strict=True):
            drawer(axis, results)
        save_figure(figure, folder / f"{name}.png")


def over_steps(axis: "Axes", results: Results, number: str, variants: Mapping[str, str]) -> None:
    """One number over the training: a line for each seed, a colour for each variant."""
    for index, (variant, label) in enumerate(variants.items()):
        for seed, result in enumerate(seeds(results, variant)):
            steps, values = zip(*((row["step"], row[number]) for row in rows_of(result)), strict=True)
            colour = SERIES[index % len(SERIES)]
            axis.plot(steps, values, color=colour, linewidth=1.5, label=None if seed else label)


def as_dots(axis: "Axes", results: Results, number: str, variants: Mapping[str, str]) -> None:
    """A number of each variant: a dot for each seed, and a bar at the mean, variants below each other."""
    for index, variant in enumerate(variants):
        values = [result[number] for result in seeds(results, variant)]
        axis.plot(values, [index] * len(values), color=SERIES[index % len(SERIES)], marker="o", linestyle="none")
        axis.text(mean_of(values), index - 0.18, f"{mean_of(values):.2f}", ha="center", fontsize=9, color=SOFT)
    axis.set_yticks(range(len(variants)), list(variants.values()))
    axis.set_ylim(len(variants) - 0.5, -0.6)
    low, high = axis.get_xlim()
    # No less than 2 dB, so that noise looks like noise.
    axis.set_xlim(min(low, (low + high) / 2 - 1), max(high, (low + high) / 2 + 1))


def draw_weights(axis: "Axes", results: Results) -> None:
    """Claim 1, left: PSNR."""
    against_weight(axis, results, "psnr", BLUE)
    low, high = axis.get_ylim()
    # No less than 3 dB, so that noise looks like noise.
    axis.set_ylim(min(low, (low + high) / 2 - 1.5), max(high, (low + high) / 2 + 1.5))
    say(axis, "Image quality", "commitment weight β", "test PSNR (dB)")


def draw_weight_codes(axis: "Axes", results: Results) -> None:
    """Claim 1, right: perplexity."""
    against_weight(axis, results, "perplexity", ORANGE)
    axis.set_ylim(0, 1.15 * axis.get_ylim()[1])
    say(axis, "Codes in use", "commitment weight β", "perplexity over the test set, of 256")


def against_weight(axis: "Axes", results: Results, number: str, colour: str) -> None:
    """A number over the commitment weights: a dot for each seed, a line through the means."""
    weights = [weight for weight in weights_of(results) if weight > 0]
    axis.plot(weights, [mean(results, f"beta-{w:g}", number) for w in weights], color=colour, label="mean of the seeds")
    for index, weight in enumerate(weights):
        values = [result[number] for result in seeds(results, f"beta-{weight:g}")]
        label = None if index else "each seed"
        axis.plot([weight] * len(values), values, color=colour, marker="o", linestyle="none", label=label)
    axis.set_xscale("log")
    axis.set_xticks(weights, [f"{weight:g}" for weight in weights])
    axis.minorticks_off()


def draw_bare_norms(axis: "Axes", results: Results) -> None:
    """Claim 2, left: the paper's body."""
    over_steps(axis, results, "latent_norm", {"bare-beta-0": "β = 0", "bare-beta-0.25": "β = 0.25"})
    axis.set_yscale("log")
    say(axis, "No normalisation in the body (the paper's)", "training step", NORM)


def draw_norms(axis: "Axes", results: Results) -> None:
    """Claim 2, right: a body with group norm."""
    averages = {"hard-beta-0": "codes by EMA, β = 0", "hard": "codes by EMA, β = 0.25"}
    over_steps(axis, results, "latent_norm", {"beta-0": "β = 0", "beta-0.25": "β = 0.25"} | averages)
    axis.set_ylim(bottom=0)
    say(axis, "Group norm in the residual blocks", "training step", NORM)


def draw_distances(axis: "Axes", results: Results) -> None:
    """Claim 3, left: how far latents and codes are apart."""
    over_steps(axis, results, "distance", TAILS)
    # The third lies on the second: both must be seen.
    for line in axis.lines[2:4]:
        line.set(linewidth=5, alpha=0.45)
    axis.set_yscale("log")
    plain_numbers(axis.yaxis)
    say(axis, "Distance of latents to their codes, two seeds each", "training step", r"mean $\|z_e - e\|^2$")


def draw_tails(axis: "Axes", results: Results) -> None:
    """Claim 3, right: PSNR."""
    as_dots(axis, results, "psnr", TAILS)
    say(axis, "Image quality", "test PSNR (dB), a dot for each seed", "")


def draw_perplexities(axis: "Axes", results: Results) -> None:
    """Claim 4, left: perplexity over the training."""
    over_steps(axis, results, "perplexity", SOFT_EM)
    axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
    say(axis, "Codes in use, two seeds each", "training step", "perplexity on held-out images, of 256")


def draw_soft_psnr(axis: "Axes", results: Results) -> None:
    """Claim 4, right: PSNR."""
    as_dots(axis, results, "psnr", SOFT_EM)
    say(axis, "Image quality, each latent at its nearest code", "test PSNR (dB), a dot for each seed", "")
