"""Quantizers against their peers and their floors, in time and memory: one run prints every ratio, on the CPU.

    pip install vector-quantize-pytorch faiss-cpu && python training/benchmarks/quantizers.py

EMA training step   forward, backward, statistics and step()   against vector_quantize_pytorch.VectorQuantize
Evaluation          search and lookup                          against the same
Search              nearest code of each row                   against faiss.IndexFlatL2 and the floor
SQ-VAE step         forward and backward                       against the authors' formula in eager mode and its floor

The floor of a search is the loop it cannot do without: a matrix product in chunks of rows, the best of a few sizes, and
its row-wise minimum without the place of it. That of an SQ-VAE step is one softmax between two products. Peers have
what we do not do turned off (no rotation, no k-means, no dead codes), take latents in the layout of their own, and have
their index built beforehand. A peer that is not installed is named and left out. (faiss has a kernel of its own for few
dimensions, which never writes the scores it compares: with many rows it is faster than the floor.)

Contenders of a row take turns; times are medians over the rounds. Extra memory is how far a process of its own rises,
for one step, above what it held before (Linux alone tells). Only ratios mean anything elsewhere.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from quantizer_contenders import (
    AUTHORS,
    FAISS,
    FLOOR,
    LUCID,
    OURS,
    Problem,
    Size,
    Step,
    anneal_authors,
    anneal_floor,
    anneal_ours,
    evaluate_lucid,
    evaluate_ours,
    search_faiss,
    search_floor,
    search_ours,
    seconds,
    train_lucid,
    train_ours,
)

# Contender -> what it imports, and what pip calls that.
PACKAGES = {LUCID: ("vector_quantize_pytorch", "vector-quantize-pytorch"), FAISS: ("faiss", "faiss-cpu")}
# What is shorter is repeated within its turn.
SECONDS_OF_A_TURN = 0.05

SMALL, MEDIUM, LARGE, MANY = Size(8192, 512, 64), Size(8192, 8192, 32), Size(16384, 16384, 8), Size(65536, 16384, 8)
QUICK = Size(256, 128, 16)


class Race(NamedTuple):
    """Contenders, ours first, and the sizes at which they meet; floors have no memory to measure."""

    title: str
    contenders: dict[str, Callable[[Problem], Step]]
    sizes: tuple[Size, ...]
    with_memory: bool = True


RACES = {
    "training": Race(
        "EMA training step: forward, backward, statistics, step()",
        {OURS: train_ours, LUCID: train_lucid},
        (SMALL, MEDIUM, LARGE),
    ),
    "evaluation": Race(
        "Evaluation: search and lookup", {OURS: evaluate_ours, LUCID: evaluate_lucid}, (SMALL, MEDIUM, LARGE)
    ),
    "search": Race(
        "Search alone",
        {OURS: search_ours, FAISS: search_faiss, FLOOR: search_floor},
        (SMALL, MEDIUM, LARGE, MANY),
        with_memory=False,
    ),
    "sqvae": Race(
        "SQ-VAE training step: forward and backward",
        {OURS: anneal_ours, AUTHORS: anneal_authors, FLOOR: anneal_floor},
        (SMALL, MEDIUM),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender")
    parser.add_argument("--races", nargs="+", choices=RACES, default=list(RACES))
    parser.add_argument("--compile", action="store_true", help="torch.compile on our own training steps")
    parser.add_argument("--quick", action="store_true", help="a tiny size, one round: whether it runs")
    parser.add_argument("--memory", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        race, contender, *size = options.memory
        print(json.dumps(extra_memory(RACES[race].contenders[contender], Size(*map(int, size)))))
        return
    print(header(options))
    for name in options.races:
        print(f"\n## {RACES[name].title}\n")
        print(table(name, options), flush=True)


def header(options: argparse.Namespace) -> str:
    """The machine, the versions, and the peers that are missing."""
    versions = [f"torch {torch.__version__}"]
    missing = []
    for module, package in PACKAGES.values():
        if importlib.util.find_spec(module):
            versions.append(f"{package} {importlib.metadata.version(package)}")
        else:
            missing.append(f"{package} is not installed and left out; to have it: pip install {package}")
    cpu = f"{processor_name()}, {options.threads} threads, load {os.getloadavg()[0]:.1f} at the start"
    mode = ", our training steps compiled (their memory is of eager mode)" if options.compile else ""
    return "\n\n".join([f"# Quantizers against peers and floors\n\n{cpu}; {', '.join(versions)}{mode}.", *missing])


def processor_name() -> str:
    """The name of the CPU, and how many of its cores are here."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return f"{found[1] if found else platform.processor() or platform.machine()} with {os.cpu_count()} cores"


def table(name: str, options: argparse.Namespace) -> str:
    """A Markdown table of a race: a row for each size; times, then extra memory, each with its ratios."""
    race = RACES[name]
    contenders = [who for who in race.contenders if who not in PACKAGES or importlib.util.find_spec(PACKAGES[who][0])]
    weighed = [who for who in contenders if who != FLOOR and race.with_memory and sys.platform == "linux"]
    titles = ["N, K, D", *(f"{who}, ms" for who in contenders), *map(time_ratio_title, contenders[1:])]
    titles += [f"{who}, MiB" for who in weighed] + [f"memory over {who}'s" for who in weighed[1:]]
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)]]
    for size in [QUICK] if options.quick else race.sizes:
        times = race_times({who: race.contenders[who] for who in contenders}, Problem(size, options.compile), options)
        megabytes = {who: memory_of(name, who, size, options.threads) for who in weighed}
        cells = [str(size), *(f"{1e3 * times[who]:.2f}" for who in contenders)]
        cells += [f"{time_ratio(times, who):.2f}" for who in contenders[1:]]
        cells += [f"{megabytes[who]:.1f}" for who in weighed]
        lines.append(cells + [f"{megabytes[OURS] / max(megabytes[who], 0.1):.3f}" for who in weighed[1:]])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def time_ratio_title(who: str) -> str:
    return "times the floor" if who == FLOOR else f"times as fast as {who}"


def time_ratio(times: dict[str, float], who: str) -> float:
    """How much slower than the floor we are, or how much faster than a peer."""
    return times[OURS] / times[FLOOR] if who == FLOOR else times[who] / times[OURS]


def race_times(
    contenders: dict[str, Callable[[Problem], Step]], problem: Problem, options: argparse.Namespace
) -> dict[str, float]:
    """Seconds of a step of each contender, medians over rounds in which they take turns."""
    steps = {who: build(problem) for who, build in contenders.items()}
    repeats = {}
    for who, step in steps.items():
        step()
        repeats[who] = 1 if options.quick else max(1, round(SECONDS_OF_A_TURN / seconds(step)))
    rounds = 1 if options.quick else options.rounds
    turns = [{who: seconds(step, repeats[who]) for who, step in steps.items()} for _ in range(rounds)]
    return {who: statistics.median(turn[who] for turn in turns) for who in steps}


def memory_of(race: str, who: str, size: Size, threads: int) -> float:
    """MiB that one step of a contender takes, in a process of its own."""
    command = [sys.executable, __file__, "--threads", str(threads), "--memory", race, who, *map(str, size)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")
    return float(json.loads(result.stdout.splitlines()[-1]))


def extra_memory(build: Callable[[Problem], Step], size: Size) -> float:
    """MiB by which the first step of this size raises the resident memory of this process at its peak."""
    # What kernels and libraries set up at their first call is none of it.
    build(Problem(Size(256, 64, size.dim)))()
    step = build(Problem(size))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """MiB of resident memory: now (VmRSS) or at its peak (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


if __name__ == "__main__":
    main()
