"""What reading and writing cost bulk tokenization: images per second of `hf-vq tokenize` over its parts, in one run.

    python training/benchmarks/bulk_tokenization.py model_cards/sqvae-cifar10 --dataset_name uoft-cs/cifar10
    python training/benchmarks/bulk_tokenization.py MODEL --dataset_name PHOTOS --dataloader_num_workers 2

E is the bare encoder on tensors in memory, P decoding and processing alone; 1 / (1 / E + 1 / P) is what one after the
other comes to. All in float32, with the same batches. Prints the three rates, the ratios, the bytes of a token in the
Parquet files beside the 8 of an int64 array, and with --memory the peak memory of the command on one file
of a local data set and on ten of it.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
import torch

from hf_vq.corpus.corpus import Corpus
from hf_vq.corpus.job import TokenizationJob
from hf_vq.decoding import decode_image

IMAGES_IN_MEMORY = 2048
COMMAND = """
import resource, sys, time
from hf_vq.cli import main
from hf_vq.commands import tokenize
began = time.perf_counter()
status = main(sys.argv[1:])
print("seconds", time.perf_counter() - began)
print("peak", max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
sys.exit(status)
"""


class Rates(NamedTuple):
    """Images per second: the encoder alone, decoding and processing alone, and the command; and bytes per token."""

    encoder: float
    decoder: float
    command: float
    bytes_per_token: float


def main() -> None:
    """Measures in turn, and prints medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10")
    parser.add_argument("--splits", nargs="+")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--dataloader_num_workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1, help="how often all three are measured")
    parser.add_argument("--memory", action="store_true", help="measure peak memory, too")
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, {options.dataloader_num_workers} loader workers")
    rounds = [measure(options) for _ in range(options.rounds)]
    rates = Rates(*(statistics.median(values) for values in zip(*rounds, strict=True)))
    in_turn = 1 / (1 / rates.encoder + 1 / rates.decoder)
    print(f"E, the encoder alone              {rates.encoder:10.1f} images per second")
    print(f"P, decoding and processing alone  {rates.decoder:10.1f}")
    print(f"hf-vq tokenize                    {rates.command:10.1f}")
    print(f"  over 1 / (1 / E + 1 / P)        {rates.command / in_turn:10.3f}")
    print(f"  over E                          {rates.command / rates.encoder:10.3f}")
    print(f"bytes per token, int64 has 8      {rates.bytes_per_token:10.2f}")
    if options.memory:
        print("peak memory on one file, on ten of it (MiB):", *(f"{peak_memory(options, n):.0f}" for n in (1, 10)))


def measure(options: argparse.Namespace) -> Rates:
    """Each once."""
    with tempfile.TemporaryDirectory() as folder:
        job = TokenizationJob(options.model, options.dataset_name, splits=options.splits and tuple(options.splits))
        corpus = job.open(Path(folder) / "tokens", batch_size=options.batch_size)
        encoder, decoder = rates_of_parts(corpus)
        seconds, _ = run_command(options, corpus.folder, options.dataset_name, options.splits)
        return Rates(encoder, decoder, corpus.num_rows() / seconds, bytes_per_token(corpus.folder))


def bytes_per_token(folder: Path) -> float:
    """Of the column of tokens as it lies on disk."""
    size = tokens = 0
    for path in folder.glob("data/*.parquet"):
        footer = pq.read_metadata(path)
        for group in map(footer.row_group, range(footer.num_row_groups)):
            chunks = [group.column(index) for index in range(group.num_columns)]
            (chunk,) = [chunk for chunk in chunks if chunk.path_in_schema.startswith("image_tokens")]
            size, tokens = size + chunk.total_compressed_size, tokens + chunk.num_values
    return size / tokens


def rates_of_parts(corpus: Corpus) -> tuple[float, float]:
    """Images per second of the encoder, and of decoding and processing, on the first images."""
    rows = (row for unit in corpus.units.units for _, row in corpus.units.rows(unit))
    cells = [row["image"] for row in islice(rows, IMAGES_IN_MEMORY)]
    parts = [cells[start : start + corpus.batch_size] for start in range(0, len(cells), corpus.batch_size)]
    began = time.perf_counter()
    batches = [corpus.tokenize.process([decode_image(cell) for cell in part]) for part in parts]
    decoded = time.perf_counter()
    corpus.tokenize.encode(batches[0])
    warm = time.perf_counter()
    for batch in batches:
        corpus.tokenize.encode(batch)
    return len(cells) / (time.perf_counter() - warm), len(cells) / (decoded - began)


def run_command(
    options: argparse.Namespace, output: Path, dataset_name: str, splits: list[str] | None
) -> tuple[float, float]:
    """`hf-vq tokenize` in a process of its own: seconds of work, without the imports, and peak memory in MiB."""
    flags = ["--dataset_name", dataset_name, "--output", str(output), "--batch_size", str(options.batch_size)]
    flags += ["--dataloader_num_workers", str(options.dataloader_num_workers)]
    flags += ["--splits", *splits] if splits else []
    command = [sys.executable, "-c", COMMAND, "tokenize", options.model, *flags]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    told = dict(line.split() for line in ran.stdout.splitlines() if line.startswith(("seconds", "peak")))
    return float(told["seconds"]), float(told["peak"]) / 1024


def peak_memory(options: argparse.Namespace, copies: int) -> float:
    """MiB that the command takes for one file of the data set, so many times over."""
    file = min(Path(options.dataset_name).resolve().glob("**/*.parquet"), key=lambda path: path.stat().st_size)
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        images.mkdir()
        for number in range(copies):
            (images / f"train-{number:05}-of-{copies:05}.parquet").symlink_to(file)
        return run_command(options, Path(folder) / "tokens", str(images), None)[1]


if __name__ == "__main__":
    main()
