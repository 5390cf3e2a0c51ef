"""The command `hf-vq`: encode images, decode tokens, sample images, measure, draw, publish, convert or show a model."""

import argparse
import sys
from collections.abc import Sequence

from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HTTPError, StrictDataclassError
from safetensors import SafetensorError

from hf_vq.commands.convert import add_convert
from hf_vq.commands.demo import add_demo
from hf_vq.commands.evaluate import add_evaluate
from hf_vq.commands.plot import add_plot
from hf_vq.commands.publish import add_publish
from hf_vq.commands.sample import add_sample
from hf_vq.commands.tokenize import add_tokenize
from hf_vq.commands.tokens import add_decode, add_encode

__all__ = ["main"]

# Errors that come from what the user gave; their messages are enough.
USER_ERRORS = (ValueError, OSError, ImportError, HTTPError, SafetensorError, StrictDataclassError, DatasetsError)
EXIT_USER_ERROR, EXIT_STOPPED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `hf-vq` with these arguments (by default those of the process).

    Returns:
        The exit code: 0; 2 after an error in what was given, whose message went to stderr; 130 after Ctrl-C.
    """
    args = make_parser().parse_args(arguments)
    try:
        args.run(args)
    except USER_ERRORS as error:
        tell(f"hf-vq {args.command}: error: {str(error) or type(error).__name__}", error)
        return EXIT_USER_ERROR
    except KeyboardInterrupt as error:
        tell(f"hf-vq {args.command}: stopped", error)
        return EXIT_STOPPED
    return 0


def tell(message: str, error: BaseException) -> None:
    """Prints a message and what was noted on the error."""
    print("\n".join([message, *getattr(error, "__notes__", [])]), file=sys.stderr)


def make_parser() -> argparse.ArgumentParser:
    """The parser of `hf-vq`; no flag may be abbreviated."""
    parser = argparse.ArgumentParser(prog="hf-vq", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="{encode,decode,sample,evaluate,plot,tokenize,publish,convert,demo}"
    )
    add_encode(commands)
    add_decode(commands)
    add_sample(commands)
    add_evaluate(commands)
    add_plot(commands)
    add_tokenize(commands)
    add_publish(commands)
    add_convert(commands)
    add_demo(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
