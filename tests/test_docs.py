"""The pages in docs/: their code runs, their configs train, their links lead somewhere, and their counts are right."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import hf_vq
from test_token_desk import make_desk, picture
from text_tokenizers import byte_level, language_model

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = sorted((REPOSITORY / "docs").glob("*.md"))
QUANTIZERS = REPOSITORY / "docs" / "quantizers.md"
MODELS = {hf_vq.VQVAEConfig: hf_vq.VQVAEModel, hf_vq.SQVAEConfig: hf_vq.SQVAEModel}


class Block(NamedTuple):
    """Python code of a page: where it begins, and the heading above it."""

    page: Path
    line: int
    heading: str
    code: str

    def run(self, earlier: dict[str, Any]) -> dict[str, Any]:
        """The names that it defines, given those of the page before it; an error shows the line of the page."""
        namespace: dict[str, Any] = {"hf_vq": hf_vq, **earlier}
        exec(compile("\n" * self.line + self.code, str(self.page), "exec"), namespace)
        return {name: value for name, value in namespace.items() if value is not earlier.get(name)}


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        heading = re.findall(r"^#+ (.*)$", text[: match.start()], re.MULTILINE)[-1]
        yield Block(page, text[: match.start(1)].count("\n"), heading, match[1])


BLOCKS = [block for page in PAGES for block in blocks(page)]


class Row(NamedTuple):
    """A row of the table of all quantizers."""

    name: str
    config: Any
    trained: str
    kept: int


def table_rows() -> list[Row]:
    text = QUANTIZERS.read_text(encoding="utf-8").split("\n## All of them\n")[1].split("\n## ")[0]
    rows = []
    for line in re.findall(r"^\| \[.*\|$", text, re.MULTILINE):
        name, config, trained, kept, *_ = (cell.strip() for cell in line.strip("|").split("|"))
        made = eval(config.strip("`"), {config_class.__name__: config_class for config_class in MODELS})
        rows.append(Row(re.match(r"\[(.*?)\]", name)[1], made, trained.strip("`"), int(kept)))
    return rows


ROWS = table_rows()


def make(config: Any) -> Any:
    torch.manual_seed(0)
    return MODELS[type(config)](config)


def check_that_it_trains_and_decodes(config: Any) -> None:
    model, pixel_values = make(config).train(), torch.rand(2, 3, 16, 16) * 2 - 1
    output = model(pixel_values)
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    evaluated = model.eval()(pixel_values)
    if config.model_type == "hf_vqvae" and config.quantizer != "soft_em" and config.norm != "batch":
        # Straight through, a small code is known to the last bit of its latent only.
        torch.testing.assert_close(evaluated.decoded_pixel_values, output.decoded_pixel_values, rtol=0, atol=0.02)
    model.step()
    with torch.no_grad():
        tokens, decoded = model.encode(pixel_values).image_tokens, model(pixel_values).decoded_pixel_values
        torch.testing.assert_close(model.decode(tokens).pixel_values, decoded, rtol=0, atol=1e-4)


def leave_models_and_pictures(folder: Path) -> None:
    """What the page on language models loads, by the names that it has there."""
    make_desk().tokenizer.save_pretrained(folder / "org" / "sqvae-cifar10")
    tokenizer = byte_level()
    tokenizer.save_pretrained(folder / "org" / "llm")
    language_model("llama", tokenizer).save_pretrained(folder / "org" / "llm")
    for name in ("cat", "dog"):
        picture().save(folder / f"{name}.png")


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page.stem}:{block.line}")
def test_code_runs_and_its_configs_train(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    if block.page.stem == "language_models":
        leave_models_and_pictures(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for earlier in (other for other in BLOCKS if other.page == block.page and other.line < block.line):
        names |= earlier.run(names)
    for value in block.run(names).values():
        if type(value) in MODELS:
            check_that_it_trains_and_decodes(value)


def test_every_section_of_a_quantizer_says_how_to_ask_for_it():
    text = QUANTIZERS.read_text(encoding="utf-8")
    named = set(re.findall(r"\]\(#([\w-]+)\)", text.split("\n## All of them\n")[1].split("\n## ")[0]))
    with_code = {anchor(block.heading) for block in blocks(QUANTIZERS)}
    assert len(ROWS) > 12 and named <= with_code


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_configs_of_the_table_train(row: Row):
    check_that_it_trains_and_decodes(row.config)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_trained_numbers_are_as_the_table_counts_them(row: Row):
    config, model = row.config, make(row.config)
    parts = [model.quantizer, *([model.encoder.to_log_variance] if config.has_variance_head else [])]
    found = sum(p.numel() for part in parts for p in part.parameters() if p.requires_grad)
    letters = {"K": config.codebook_size, "D": config.codebook_dim, "M": config.num_codebooks}
    assert found == eval(row.trained, letters | {"w": config.hidden_channels[-1]})


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_kept_numbers_are_as_the_table_counts_them(row: Row):
    config, quantizer = row.config, make(row.config).quantizer.train()
    # Many more codes than dimensions, so that nothing of size N x D can be taken for N x K.
    assert config.codebook_size >= 100 * config.codebook_dim
    latents = torch.randn(16, config.latent_channels, 8, 8, requires_grad=True)
    log_variance = torch.randn_like(latents).requires_grad_() if config.has_variance_head else None
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = quantizer(latents, log_variance)
        total = output.loss + output.quantized.square().sum()
    pairs = config.num_codebooks * 16 * 8 * 8 * config.codebook_size
    assert sum(size // pairs for size in kept.values()) == row.kept
    total.backward()


# Links.


def anchor(heading: str) -> str:
    """The name that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path):
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    anchors = {anchor(heading) for heading in re.findall(r"^#+ (.*)$", prose, re.MULTILINE)}
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif "://" not in target:
            assert (page.parent / target.split("#")[0]).exists(), target
    for path in re.findall(r"(?:training|tests|src)/[\w/]+\.(?:py|yaml)", text):
        assert (REPOSITORY / path).is_file(), path
