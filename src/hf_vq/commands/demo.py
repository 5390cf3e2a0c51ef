"""`hf-vq demo`: a page to look at tokens, change them, and draw new ones."""

import argparse
from typing import Any

from hf_vq.commands.shared import add_command, where_from


def add_demo(commands: Any) -> None:
    """`hf-vq demo org/sqvae-cifar10 --prior org/sqvae-cifar10-prior`."""
    parser = add_command(commands, "demo", "Open a page on a tokenizer, and perhaps a prior.", open_page)
    parser.add_argument("--prior", help="a prior over its tokens: name on the Hub, or folder")
    parser.add_argument(
        "--server_name", default="127.0.0.1", help="0.0.0.0 to be seen by others (default: %(default)s)"
    )
    parser.add_argument("--server_port", type=int, help="(default: the first that is free from 7860 on)")
    parser.add_argument("--share", action="store_true", help="give the page a public address for a while")


def open_page(args: argparse.Namespace) -> None:
    """Serves the page until Ctrl-C."""
    try:
        from hf_vq import demo
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ImportError('the page needs gradio: pip install "hf-vq[demo]"') from error
    where = where_from(args)
    desk = demo.load_desk(args.model, args.prior, str(args.device), **where)
    page = demo.make_page(desk, args.model, demo.examples_of(args.model, revision=where["revision"]))
    page.launch(
        server_name=args.server_name,
        server_port=args.server_port,
        share=args.share,
        show_error=True,
        css=demo.CSS,
        max_file_size=demo.LARGEST_FILE,
    )
