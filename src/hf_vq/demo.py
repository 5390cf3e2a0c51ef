"""The page of `hf-vq demo`, on Gradio (extra `demo`): a picture's tokens to look at, change, mix, and draw anew."""

import functools
import json
import os
from collections.abc import Callable
from typing import Any

import gradio as gr
from PIL import Image
from safetensors.torch import load_file
from transformers import pipeline
from transformers.utils import cached_file

from hf_vq.reference_tokens import REFERENCE_FILE
from hf_vq.token_desk import PATTERNS, Seen, TokenDesk, Tokens, ink_on
from hf_vq.tokenizer import ImageTokenizer

__all__ = ["load_desk", "make_page"]

# The model is one, and switches of torch that belong to the process are set while it runs.
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
CSS = """
.gradio-container {width: 100%; max-width: min(1180px, 100vw) !important; min-width: 0 !important; margin: auto}
#drawn .grid-container {grid-template-columns: repeat(auto-fit, minmax(max(140px, 22%), 1fr)) !important}
#drawn .grid-wrap {max-height: none; overflow: visible}
.swatches {display: flex; flex-wrap: wrap; gap: 6px}
.swatch b {color: inherit}
.swatch {border-radius: 6px; padding: 6px 8px; min-width: 62px; text-align: center; font: 12px/1.3 ui-monospace}
.cells img, .pixelated img, .upload img {width: 100%; height: 100%; object-fit: contain}
.pixelated img, .upload img {image-rendering: pixelated}
.upload .upload-container {width: 100% !important}
.upload .image-frame {width: 100% !important; height: auto !important; aspect-ratio: 1}
"""
LARGEST_FILE = "20mb"
LARGEST_SEED = 2**32 - 1
PLACE = ("Row", "Column", "Code")
NO_PICTURE = "Put in a picture."
CHANGED = "These tokens are changed ones: there is no picture to compare with."


def load_desk(model: str, prior: str | None = None, device: str = "cpu", **kwargs: Any) -> TokenDesk:
    """A tokenizer by name or folder, and a prior over its tokens.

    Args:
        model, prior: names on the Hub, or folders.
        device: where both run.
        kwargs: for `from_pretrained` of the tokenizer: revision, trust_remote_code.
    """
    tokenizer = ImageTokenizer.from_pretrained(model, device=device, **kwargs)
    if prior is None:
        return TokenDesk(tokenizer)
    parts: dict[str, Any] = {"decoder": tokenizer.model, "image_processor": tokenizer.processor}
    return TokenDesk(tokenizer, pipeline("unconditional-image-generation", model=prior, device=device, **parts))  # type: ignore[call-overload]  # a registered task


def examples_of(model: str, **kwargs: Any) -> list[Image.Image]:
    """The pictures that lie beside a published tokenizer; [] where there are none."""
    file = cached_file(model, REFERENCE_FILE, _raise_exceptions_for_missing_entries=False, **kwargs)
    if file is None or not os.path.isfile(file):
        return []
    return [Image.fromarray(image.movedim(0, -1).squeeze(-1).numpy()) for image in load_file(file)["images"]]


def make_page(desk: TokenDesk, name: str, examples: list[Image.Image] | None = None) -> gr.Blocks:
    """The page of a tokenizer.

    Args:
        desk: what the page shows.
        name: of the model, for the headline.
        examples: pictures to begin with.
    """
    with gr.Blocks(title=f"hf_vq: {name}") as page:
        gr.Markdown(headline(desk, name))
        with gr.Tab("Look"):
            Look(desk).build(examples or [])
        with gr.Tab("Mix"):
            mix_two(desk, examples or [])
        if desk.prior is not None:
            with gr.Tab("Draw"):
                draw_new_ones(desk)
    return page


def headline(desk: TokenDesk, name: str) -> str:
    """What the tokenizer is."""
    config = desk.config
    several = f" x {config.num_codebooks}" if config.num_codebooks > 1 else ""
    grid = " x ".join(map(str, config.grid_size)) + several
    size = f"{config.image_size} x {config.image_size}"
    return f"## {name}\nA picture of {size} pixels is {grid} tokens of {config.codebook_size} codes."


def facts(seen: Seen) -> str:
    """Bits and PSNR in words."""
    return f"**{seen.bits:,.0f} bits** instead of {8 * seen.size:,} of the pixels, **{seen.psnr:.1f} dB** PSNR."


def picture(label: str, **kwargs: Any) -> gr.Image:
    """A place for a picture that the page makes, its name above it."""
    look: dict[str, Any] = {"elem_classes": "pixelated", "buttons": ["download"], "show_label": False}
    with gr.Column(min_width=200):
        gr.Markdown(f"**{label}**")
        return gr.Image(label=label, type="pil", format="png", interactive=False, **look | kwargs)


def cells(label: str, **kwargs: Any) -> gr.Image:
    """A place for a grid of tokens, its name above it."""
    return picture(label, elem_classes="cells", buttons=[], **kwargs)


def upload(label: str, **kwargs: Any) -> gr.Image:
    """A place for a picture that one puts in, its name above it."""
    kwargs |= {"type": "pil", "format": "png", "image_mode": None, "sources": ["upload", "clipboard"]}
    with gr.Column(min_width=200):
        gr.Markdown(f"**{label}**")
        return gr.Image(label=label, elem_classes="upload", show_label=False, **kwargs)


class Look:
    """The first tab: a picture, its tokens, what they keep. A click on a token shows its neighbours; other codes can be
    set. Its methods answer the page's events with what the components show next."""

    def __init__(self, desk: TokenDesk) -> None:
        self.desk = desk

    def build(self, examples: list[Image.Image]) -> None:
        """Puts the components on the page."""
        tokens = gr.State()
        with gr.Row():
            image = upload("Your picture", elem_id="picture")
            grid = cells("Its tokens: click one", elem_id="tokens")
            reconstruction = picture("What they keep of it", elem_id="reconstruction")
        if examples:
            gr.Examples(examples, image, label="Pictures", examples_per_page=8)
        words = gr.Markdown(NO_PICTURE, elem_id="facts")
        with gr.Row(equal_height=True):
            row, column, code = (gr.Number(0, label=name, precision=0, min_width=90) for name in PLACE)
            several = self.desk.config.num_codebooks > 1
            codebook = gr.Number(0, label="Codebook", precision=0, min_width=90, visible=several)
            change = gr.Button("Set this code", variant="primary", min_width=140, elem_id="change")
        swatches = gr.HTML(elem_id="neighbours")
        with gr.Accordion("All tokens as JSON", open=False):
            text = gr.Code(language="json", lines=4, max_lines=12, label="Tokens", elem_id="json")
            decode = gr.Button("Decode these", elem_id="decode")

        place, shown = [row, column, codebook], [tokens, grid, reconstruction, words, swatches, text]
        answer(image.change, self.see, [image, codebook], shown, "encode")
        answer(grid.select, self.click, [tokens, codebook], [row, column, grid, code, swatches])
        entered = [row.submit, column.submit, codebook.submit]
        answer(entered, self.look_up, [tokens, *place], [grid, code, swatches], "neighbours")
        answer(change.click, self.set_code, [tokens, *place, code], shown, "change")
        answer(decode.click, self.read, [text, codebook], shown[:4], "decode")

    def see(self, image: Image.Image | None, codebook: int) -> tuple[Any, ...]:
        """A picture was put in, or taken away."""
        if image is None:
            return None, None, None, NO_PICTURE, "", None
        require_filled(codebook)
        seen = self.desk.see(image)
        grid = self.desk.draw_grid(seen.tokens, codebook)
        return seen.tokens, grid, seen.reconstruction, facts(seen), "", as_text(seen.tokens)

    def look_up(self, tokens: Any, row: int, column: int, codebook: int) -> tuple[Any, ...]:
        """A place was typed."""
        require_tokens(tokens)
        require_filled(row, column, codebook)
        near = self.desk.neighbours(tokens, row, column, codebook)
        return self.desk.draw_grid(tokens, codebook, (row, column)), near[0]["code"], as_swatches(near)

    def click(self, tokens: Any, codebook: int, event: gr.SelectData) -> tuple[Any, ...]:
        """A token was clicked."""
        require_tokens(tokens)
        require_filled(codebook)
        row, column = self.desk.place_of(tokens, *map(int, event.index))
        return row, column, *self.look_up(tokens, row, column, codebook)

    def set_code(self, tokens: Any, row: int, column: int, codebook: int, code: int) -> tuple[Any, ...]:
        """Another code is to stand at a place."""
        require_tokens(tokens)
        require_filled(row, column, codebook, code)
        changed = self.desk.change(tokens, row, column, code, codebook)
        grid, _, swatches = self.look_up(changed, row, column, codebook)
        return changed, grid, self.desk.decode(changed), CHANGED, swatches, as_text(changed)

    def read(self, text: str, codebook: int) -> tuple[Any, ...]:
        """Tokens were typed."""
        tokens = from_text(text)
        require_filled(codebook)
        return tokens, self.desk.draw_grid(tokens, codebook), self.desk.decode(tokens), CHANGED


def mix_two(desk: TokenDesk, examples: list[Image.Image]) -> None:
    """Tokens of two pictures in one grid, decoded."""
    with gr.Row():
        first, second = upload("First", elem_id="first"), upload("Second", elem_id="second")
        grid = cells("Their tokens", elem_id="mixed-tokens")
        result = picture("Together", elem_id="mixed")
    with gr.Row():
        pattern = gr.Radio(list(PATTERNS), value=PATTERNS[0], label="Which tokens from where", min_width=240)
        share = gr.Slider(0, 1, 0.5, step=0.05, label="Of the second", min_width=240)
    if len(examples) > 1:
        pairs = [[one, other] for one, other in zip(examples[::2], examples[1::2], strict=False)]
        gr.Examples(pairs, [first, second], label="Pictures", examples_per_page=4)

    def mix(first: Image.Image | None, second: Image.Image | None, pattern: str, share: float) -> tuple[Any, ...]:
        if first is None or second is None:
            return None, None
        require_filled(share)
        tokens = desk.mix(desk.see(first).tokens, desk.see(second).tokens, pattern, share)
        return desk.draw_grid(tokens), desk.decode(tokens)

    inputs: list[Any] = [first, second, pattern, share]
    moved = [first.change, second.change, pattern.change, share.release]
    answer(moved, mix, inputs, [grid, result], "mix")


def draw_new_ones(desk: TokenDesk) -> None:
    """Samples of the prior, by class where it has classes."""
    classes = [("any", -1), *((name, label) for label, name in enumerate(desk.class_names))]
    with gr.Row():
        label = gr.Dropdown(classes, value=-1, label="Class", visible=len(classes) > 1, min_width=240, elem_id="class")
        guidance = gr.Slider(1, 5, 1, step=0.25, label="Guidance to the class", visible=len(classes) > 1, min_width=240)
        temperature = gr.Slider(0.5, 1.5, 1, step=0.05, label="Temperature", min_width=240)
        seed = gr.Number(0, precision=0, minimum=0, maximum=LARGEST_SEED, label="Seed", min_width=120)
    draw = gr.Button("Draw eight", variant="primary", elem_id="draw")
    shape: dict[str, Any] = {"columns": 4, "object_fit": "contain", "format": "png", "height": "auto"}
    gallery = gr.Gallery(label="Drawn", show_label=False, **shape, elem_id="drawn", elem_classes="pixelated")

    def sample(label: int, guidance: float, temperature: float, seed: int) -> list[Image.Image]:
        require_filled(label, guidance, temperature, seed)
        return desk.sample(label, guidance, temperature, seed)

    answer(draw.click, sample, [label, guidance, temperature, seed], gallery, "sample")


def answer(events: Any, function: Callable[..., Any], inputs: Any, outputs: Any, api_name: str | None = None) -> None:
    """Lets a function answer events; without `api_name` it is no endpoint for programs."""
    shown: dict[str, Any] = {"api_name": api_name} if api_name else {"api_visibility": "private"}
    gr.on(events, told(function), inputs, outputs, **shown, **ONE_AT_A_TIME)


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose ValueErrors the page shows to people."""

    @functools.wraps(function)
    def tell(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return tell


def require_tokens(tokens: Any) -> None:
    """Raises a ValueError unless there are some."""
    if tokens is None:
        raise ValueError(NO_PICTURE)


def require_filled(*fields: Any) -> None:
    """Raises a ValueError if a field is empty."""
    if any(field is None for field in fields):
        raise ValueError("Fill in every field.")


def as_text(tokens: Tokens) -> str:
    """A line a row."""
    return "[" + ",\n ".join(json.dumps(row) for row in tokens) + "]"


def from_text(text: str) -> Tokens:
    """Raises: ValueError for what is no JSON list."""
    try:
        tokens = json.loads(text or "")
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"the tokens are not JSON: {error}") from error
    if not isinstance(tokens, list):
        raise ValueError("the tokens are a list of rows")
    return tokens


def as_swatches(near: list[dict[str, Any]]) -> str:
    """A code's neighbours as coloured chips."""
    chips = "".join(
        f'<div class="swatch" style="background:{code["colour"]};color:{ink_on(bytes.fromhex(code["colour"][1:]))}">'
        f"<b>{code['code']}</b><br>{code['distance']:.2f}</div>"
        for code in near
    )
    return f"<p>The code, and those nearest to it, with their distances:</p><div class='swatches'>{chips}</div>"
