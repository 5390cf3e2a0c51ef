"""What rounds of refinement bring and cost: psnr and perplexity of a tokenizer's refined tokens, images per second.

    python training/benchmarks/refinement.py model_cards/sqvae-cifar10 --dataset_name uoft-cs/cifar10

On the first --limit held-out images of the training split, in float32. Time: encoding, decoding and metrics together.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine import share_cores
from hf_vq import ImageTokenizer
from hf_vq.evaluation import evaluate
from hf_vq.streams import EvaluationBatches, ToPixelValues, load_images
from result_rows import markdown

BATCH_SIZE = 250
SHOWN = {"num_images": ",", "psnr": ".2f", "psnr_of_mse": ".2f", "perplexity": ".1f", "images_per_second": ".1f"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="a tokenizer: name on the Hub, or folder")
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10", help="(default: %(default)s)")
    parser.add_argument("--limit", type=int, default=1000, help="images (default: %(default)s)")
    parser.add_argument("--rounds", type=int, nargs="+", default=[0, 1, 2, 3, 6], help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    share_cores()
    tok = ImageTokenizer.from_pretrained(options.model)
    held_out: Any = load_images(options.dataset_name).validation
    stream = EvaluationBatches(held_out.select(range(options.limit)), ToPixelValues(tok.processor), BATCH_SIZE)
    batches = list(stream)
    evaluate(tok.model, tok.processor, batches[:1])  # the first call of anything is slow
    rows = []
    for rounds in options.rounds:
        metrics = evaluate(tok.model, tok.processor, batches, refine=rounds, progress=True).metrics
        numbers = {name: format(metrics[name], digits) for name, digits in SHOWN.items()}
        rows.append({"refine": str(rounds), **numbers})
    print("\n".join(markdown(rows, lambda head: True)))


if __name__ == "__main__":
    main()
