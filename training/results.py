"""The table of what was trained, training/results.md, and whether its numbers are true.

    python training/results.py model_cards/* docs/measured/seeds/*                 writes the table
    python training/results.py --check model_cards/sqvae-cifar10 --data_files cifar10/test-*.parquet

The check measures the model again, on its whole test set, and fails if a number in the table is off by more than one in
its last digit.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from hf_vq.run_files import RunFiles
from result_rows import PRIOR_METRICS, TOKENIZER_METRICS, Run, in_rows, markdown, prior_row, tokenizer_row

HERE = Path(__file__).parent
RESULTS, PUBLISHED = HERE / "results.md", HERE / "published.yaml"
COMMAND = "python training/results.py"
NUMBERS = {*TOKENIZER_METRICS, *PRIOR_METRICS, "parameters", "images seen", "wall time", "codebook_size"}

INTRODUCTION = f"""# Results

Written by `{COMMAND} FOLDER...` from run directories: do not edit. Measured again by
`{COMMAND} --check FOLDER --dataset_name NAME`.

Whole test sets, in float32, with deterministic tokens; `psnr` is the mean over images, after rounding to 8 bits (dB);
`mse` on [0, 1]; `perplexity` and `usage` of the histogram of all tokens. Models were chosen on held-out training
images; a test set was read once for a row. Several seeds: mean ± half the range.
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
    wrong = [problem for folder in options.folders for problem in check(folder, options)]
    if wrong:
        sys.exit("\n".join(wrong))
    print(f"The numbers of {', '.join(folder.name for folder in options.folders)} are those of {options.output}.")


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


def check(folder: Path, options: argparse.Namespace) -> list[str]:
    """What is wrong with the row of a folder, in words."""
    told, measured = printed_row(options.output, folder.resolve().name), measure(folder, options)
    recorded = RunFiles.read(folder).evaluation
    problems = []
    for name, digits in (TOKENIZER_METRICS | PRIOR_METRICS).items():
        here = measured.get(name)
        if here is None or recorded.get(name) is None:
            continue
        places = {str(options.output): told.get(name, ""), "evaluation.json": f"{recorded[name]:.{digits}f}"}
        for where, printed in places.items():
            if not (printed and abs(float(printed) - here) <= 1.01 * 10**-digits):
                problems.append(f"{folder}: {name} is {here:.{digits + 2}f}, and {where} says {printed or 'nothing'}")
    return problems


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


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The numbers of `hf-vq evaluate` on the test split."""
    evaluation = RunFiles.read(folder).evaluation
    data = ["--dataset_name", options.dataset_name or ("parquet" if options.data_files else evaluation["dataset_name"])]
    data += ["--data_files", *options.data_files] if options.data_files else []
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "evaluation.json"
        flags = ["--split", evaluation["split"], "--streaming", "--output", str(output)]
        subprocess.run([sys.executable, "-m", "hf_vq.cli", "evaluate", str(folder), *data, *flags], check=True)
        measured: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
        return measured


if __name__ == "__main__":
    main()
