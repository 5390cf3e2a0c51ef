"""The table of what was trained, training/results.md, and whether its numbers are true.

    python training/results.py model_cards/* docs/measured/seeds/*                 writes the table
    python training/results.py --check model_cards/sqvae-cifar10 --data_files cifar10/test-*.parquet

The check measures the model again, on its whole test set, and fails if a number in the table is off by more than one in
its last digit.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from hf_vq.run_files import EVALUATION
from result_rows import (
    PRIOR_METRICS,
    TOKENIZER_METRICS,
    Run,
    in_rows,
    markdown,
    prior_row,
    tokenizer_row,
    with_range,
)

HERE = Path(__file__).parent
RESULTS, PUBLISHED = HERE / "results.md", HERE / "published.yaml"
COMMAND = "python training/results.py"
NUMBERS = {*TOKENIZER_METRICS, *PRIOR_METRICS, "parameters", "images seen", "wall time", "codebook_size"}

INTRODUCTION = f"""# Results

Written by `{COMMAND} FOLDER...` from run directories: do not edit. Measured again by
`{COMMAND} --check FOLDER --dataset_name NAME`.

Whole test sets, in float32, with deterministic tokens; `psnr` is the mean over images, after rounding to 8 bits (dB);
`mse` on [0, 1]; `perplexity` and `usage` of the histogram of all tokens. Models were chosen on held-out training
images; a test set was read once for a row. Several seeds: mean ± half the range. A row with `refine` is of the same
model's refined tokens, which are found by decoding (`model.encode(pixel_values, refine=N)`); numbers of others are of
their encoders' own tokens.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the table, or checks a row of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="run directories or model cards")
    parser.add_argument("--check", action="store_true", help="measure the models again, and compare with the table")
    parser.add_argument("--dataset_name", help="with --check: the data, if not those of evaluation.json")
    parser.add_argument("--data_files", nargs="+", help="with --check: Parquet files of the test split")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the table (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not options.check:
        options.output.write_text(results(options.folders), encoding="utf-8")
        print(f"Written to {options.output}.")
        return
    rows = in_rows(map(Run.read, options.folders))
    wrong = [problem for row in rows for problem in check(row, options)]
    if wrong:
        sys.exit("\n".join(wrong))
    print(f"The numbers of {', '.join(row[0].name for row in rows)} are those of {options.output}.")


def results(folders: Sequence[Path]) -> str:
    """The page."""
    rows = in_rows(map(Run.read, folders))
    published = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))
    tokenizers = [tokenizer_row(row) for row in rows if not row[0].is_prior]
    priors = [prior_row(row) for row in rows if row[0].is_prior]
    parts = [
        ["## Tokenizers", "", *table(tokenizers)],
        ["## Priors", "", *table(priors)],
        ["## Published by others", "", *table(published["tokenizers"]), "", *table(published["bits_per_dim"])],
        [f"- {name}: {source}" for name, source in published["sources"].items()],
    ]
    return "\n".join([INTRODUCTION, *("\n".join(part) + "\n" for part in parts)])


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Rows as Markdown."""
    return markdown(rows, NUMBERS.__contains__)


def check(row: Sequence[Run], options: argparse.Namespace) -> list[str]:
    """What is wrong with a row and with the numbers of its runs, in words."""
    told, measured = printed_row(options.output, row[0].name), [measure(run, options) for run in row]
    problems = []
    for name, digits in (TOKENIZER_METRICS | PRIOR_METRICS).items():
        recorded: list[Any] = [run.files.evaluation.get(name) for run in row]
        here: list[Any] = [numbers.get(name) for numbers in measured]
        if None in recorded or None in here:
            continue
        cells = [(options.output, told.get(name, ""), with_range(here, digits))]
        for run, then, now in zip(row, recorded, here, strict=True):
            cells.append((run.folder / run.evaluation_file, with_range([then], digits), with_range([now], digits)))
        for place, printed, expected in cells:
            if not is_close(printed, expected, digits):
                problems.append(f"{row[0].name}: {name} is {expected}, and {place} says {printed or 'nothing'}")
    return problems


def is_close(printed: str, expected: str, digits: int) -> bool:
    """Whether two cells differ by no more than one in the last digit."""
    ours, theirs = printed.split(" ± "), expected.split(" ± ")
    if "" in ours or len(ours) != len(theirs):
        return False
    return all(abs(float(a) - float(b)) < 1.5 * 10**-digits for a, b in zip(ours, theirs, strict=True))


def printed_row(page: Path, name: str) -> dict[str, str]:
    """The cells of a model in the table.

    Raises: ValueError if it has no row there.
    """
    heads: list[str] = []
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == "model":
            heads = cells
        elif cells[0] == name:
            return dict(zip(heads, cells, strict=True))
    raise ValueError(f"{page} has no row {name!r}: make it by {COMMAND} with all folders")


def measure(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """The numbers of `hf-vq evaluate` on the test split."""
    evaluation, settings = run.files.evaluation, run.files.run["settings"]
    name = options.dataset_name or ("parquet" if options.data_files else evaluation["dataset_name"])
    flags = ["--dataset_name", name, "--split", evaluation["split"], "--streaming"]
    flags += ["--data_files", *options.data_files] if options.data_files else []
    flags += ["--refine", str(evaluation["refine"])] if "refine" in evaluation else []
    if name == evaluation["dataset_name"]:
        recorded = {key: evaluation.get(key) for key in ("dataset_config_name", "dataset_revision")}
        flags += [word for key, value in recorded.items() if value for word in (f"--{key}", value)]
    columns = {key: settings.get(key) for key in ("image_column", "label_column")}
    flags += [word for key, value in columns.items() if value for word in (f"--{key}", value)]
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / EVALUATION
        command = [sys.executable, "-m", "hf_vq.cli", "evaluate", str(run.folder), *flags, "--output", str(output)]
        if subprocess.run(command).returncode != 0:
            sys.exit(f"{run.folder} could not be measured: {shlex.join(command)}")
        measured: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
        return measured


if __name__ == "__main__":
    main()
