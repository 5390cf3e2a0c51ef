"""The table and the picture of fixed_net.py, from the numbers in its output folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fixed_net_rows import ROWS
from hf_vq.figures import BLUE, INK, ORANGE, SOFT, new_figure, save_figure
from hf_vq.models.modeling_sqvae import SQVAEModel
from result_rows import short_commit, with_range
from run_log import refuse_other_settings

# Metric -> decimals.
MEASURED = {"psnr": 2, "psnr_of_mse": 2, "ssim": 3, "perplexity": 0, "usage": 3}
OF_A_ROW = ("row", "seed", "model")
OF_A_RATE = ("batch_size", "mixed_precision", "device")

PANELS = (("psnr", "perplexity"), ("PSNR", "perplexity"), ("dB", "codes"))
FAMILIES = {False: ("VQ-VAE", BLUE), True: ("SQ-VAE", ORANGE)}

Record = dict[str, Any]


def report(output_dir: Path, times_file: str) -> str:
    """Writes table.md and figure.png beside the results; returns the text of the table.

    Raises:
        FileNotFoundError: if there are no results.
        ValueError: if they are of different plans.
    """
    found = read_results(output_dir)
    times_path = output_dir / times_file
    times = json.loads(times_path.read_text()) if times_path.exists() else {}
    for name in times.keys() & found.keys():
        there, here = times[name]["settings"], found[name][0]["settings"]
        refuse_other_settings(times_path, *({key: of[key] for key in OF_A_RATE} for of in (there, here)))
    text = "\n".join([*describe(found, times), "", *table(found, times), ""])
    (output_dir / "table.md").write_text(text, encoding="utf-8")
    draw(found, output_dir / "figure.png")
    return text


def read_results(output_dir: Path) -> dict[str, list[Record]]:
    """Row -> its results, one for each seed, in the order of `ROWS`."""
    found = {
        name: [json.loads(path.read_text()) for path in sorted(output_dir.glob(f"{name}-seed*.json"))] for name in ROWS
    }
    found = {name: records for name, records in found.items() if records}
    if not found:
        raise FileNotFoundError(f"{output_dir} has no results yet: start without --table")
    records = [record for records in found.values() for record in records]
    for record in records:
        refuse_other_settings(output_dir, _shared_settings(records[0]), _shared_settings(record))
    return found


def _shared_settings(record: Record) -> dict[str, Any]:
    return {name: value for name, value in record["settings"].items() if name not in OF_A_ROW}


def describe(found: Mapping[str, Sequence[Record]], times: Mapping[str, Any]) -> list[str]:
    """What the numbers were taken on, and with."""
    records = [record for of_row in found.values() for record in of_row]
    settings, versions = records[0]["settings"], records[0]["versions"]
    commits = sorted({short_commit(str(record["git_commit"])) for record in records})
    machines = sorted({times[name]["machine"] for name in found if name in times})
    seeds = sorted({record["settings"]["seed"] for record in records})
    plural = "" if len(seeds) == 1 else "s"
    lines = [
        f"{Path(settings['dataset_name']).name}: {settings['images']:,} training images x {settings['epochs']} epochs, "
        f"batches of {settings['batch_size']}, {'bf16' if settings['mixed_precision'] == 'bf16' else 'float32'}, "
        f"Adam {settings['learning_rate']:g} falling to 0 along a cosine; "
        f"{int(records[0]['metrics']['num_images']):,} test images, deterministic tokens. Mean ± half the range over "
        f"{len(seeds)} seed{plural}; torch {versions['torch']}, commit {', '.join(commits)}.",
    ]
    if machines:
        lines.append(f"images/s: training steps on one thread, each row alone and in turn ({', '.join(machines)}).")
    return lines


def table(found: Mapping[str, Sequence[Record]], times: Mapping[str, Any]) -> list[str]:
    """The Markdown table."""
    seeds = max(len(records) for records in found.values())
    heads = ["quantizer", "parameters", "bits per image", *MEASURED, "images/s"]
    lines = [f"| {' | '.join(heads)} |", f"|---{'|--:' * (len(heads) - 1)}|"]
    for name, records in found.items():
        label = ROWS[name].label + (f" ({len(records)} of {seeds} seeds)" if len(records) < seeds else "")
        cells = [label, f"{records[0]['parameters'] / 1000:.0f}k", f"{records[0]['bits_per_image']:.0f}"]
        cells += [with_range(_values(records, metric), digits) for metric, digits in MEASURED.items()]
        cells.append(f"{times[name]['images_per_second']:.0f}" if name in times else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _values(records: Sequence[Record], metric: str) -> list[float]:
    return [record["metrics"][metric] for record in records if record["metrics"][metric] is not None]


def draw(found: Mapping[str, Sequence[Record]], path: Path) -> None:
    """PSNR and perplexity of each row, a dot a seed."""
    figure, axes = new_figure(2, (10, 1.2 + 0.3 * len(found)), columns=2)
    places = range(len(found), 0, -1)
    for axis, metric, title, unit in zip(axes, *PANELS, strict=True):
        for place, (name, records) in zip(places, found.items(), strict=True):
            values = _values(records, metric)
            family, colour = FAMILIES[issubclass(ROWS[name].model_class, SQVAEModel)]
            axis.plot(values, [place] * len(values), "o-", color=colour, linewidth=1.6, markersize=5.5, label=family)
        axis.set(ylim=(0.4, len(found) + 0.6))
        axis.tick_params(axis="y", length=0)
        axis.set_yticks(list(places), [ROWS[name].label for name in found] if metric == "psnr" else [""] * len(found))
        axis.set_title(f"{title} of the test images", loc="left", fontsize=10.5, color=INK)
        axis.set_xlabel(unit)
    _mark_codes(axes[1], found)
    handles = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    save_figure(figure, path)


def _mark_codes(axis: Any, found: Mapping[str, Sequence[Record]]) -> None:
    """A line at the codebook size, where all rows have the same."""
    sizes = {records[0]["codebook_size"] for records in found.values()}
    if len(sizes) == 1:
        size = sizes.pop()
        axis.axvline(size, color=SOFT, linewidth=1.1, dashes=(5, 3))
        place = axis.get_xaxis_transform()
        axis.text(size, 1.01, f"K = {size}", transform=place, ha="right", va="bottom", color=SOFT, fontsize=9)
    axis.set_xlim(left=0)
