"""What `import hf_vq` costs over the names of transformers that it builds on, each in processes of their own.

    python training/benchmarks/import_time.py

Prints both medians, and the time that hf_vq takes in a process which has imported transformers' names already.
"""

import argparse
import statistics
import subprocess
import sys

TRANSFORMERS = "from transformers import PreTrainedModel, AutoModel, AutoImageProcessor, AutoModelForCausalLM"
HF_VQ = "import hf_vq"


def seconds(statement: str, before: str = "pass") -> float:
    """Of one statement in a new interpreter, after another that does not count."""
    code = f"import time\n{before}\nbegan = time.perf_counter()\n{statement}\nprint(time.perf_counter() - began)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(ran.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=10, help="turns of each")
    options = parser.parse_args()
    seconds(HF_VQ)  # compiles the modules and fills the disk's cache
    rounds = [(seconds(TRANSFORMERS), seconds(HF_VQ), seconds(HF_VQ, TRANSFORMERS)) for _ in range(options.rounds)]
    theirs, ours, over = map(statistics.median, zip(*rounds, strict=True))
    print(f"transformers {theirs:.3f} s, hf_vq {ours:.3f} s; hf_vq after transformers {over:.3f} s")


if __name__ == "__main__":
    main()
