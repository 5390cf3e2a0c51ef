"""Imports point one way, what travels to the Hub stays loadable there, and pieces stay small."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_imports

REPOSITORY = Path(__file__).resolve().parent.parent
SHIPPED = REPOSITORY / "src" / "hf_vq" / "models"
SHIPPED_THIRD_PARTIES = {"torch", "transformers", "huggingface_hub", "numpy", "PIL"}

MAX_FUNCTION_LINES = 60
MAX_FUNCTION_LINES_P90 = 30
MAX_FILE_LINES = 300
MAX_FILE_LINES_OF = {"quantizers.py": 450}


class Source(NamedTuple):
    """A Python file of ours: `name` is what others import, `tree` its parsed text."""

    name: str
    path: Path
    text: str
    tree: ast.Module

    def __repr__(self) -> str:
        return f"Source({self.name})"


def read_source(root: Path, path: Path) -> Source:
    parts = path.relative_to(root).with_suffix("").parts
    text = path.read_text(encoding="utf-8")
    return Source(".".join(part for part in parts if part != "__init__"), path, text, ast.parse(text))


def sources_of(folder: str, root: str) -> list[Source]:
    paths = sorted((REPOSITORY / folder).rglob("*.py"))
    return [read_source(REPOSITORY / root, path) for path in paths]


LIBRARY = sources_of("src/hf_vq", "src")
RECIPES = sources_of("training", "training")
OURS = [*LIBRARY, *RECIPES]
SHIPPED_SOURCES = [source for source in LIBRARY if source.path.parent == SHIPPED]
MODULES = {source.name for source in OURS}


def absolute(source: Source, node: ast.ImportFrom) -> str:
    """The dotted name of the module that a `from ... import` reads."""
    if node.level == 0:
        return node.module or ""
    package = source.name.split(".")
    if source.path.name != "__init__.py":
        package = package[:-1]
    package = package[: len(package) - (node.level - 1)]
    return ".".join([*package, *([node.module] if node.module else [])])


def imports_of(source: Source) -> Iterator[str]:
    """Every module that a file imports, also inside functions; `from package import module` counts as the module."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = absolute(source, node)
            members = {f"{module}.{alias.name}" for alias in node.names} & MODULES
            yield from members
            if len(members) < len(node.names):
                yield module


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def find(name: str) -> Source:
    found = [source for source in OURS if source.name == name]
    assert found, f"there is no module {name}"
    return found[0]


def by_name(sources: list[Source]) -> list[object]:
    return [pytest.param(source, id=source.name) for source in sources]


# Imports point one way.


@pytest.mark.parametrize("source", by_name(LIBRARY))
def test_the_library_never_imports_the_recipes(source: Source):
    recipes = {recipe.name.split(".")[0] for recipe in RECIPES} | {"training"}
    assert not {module for module in imports_of(source) if module.split(".")[0] in recipes}


@pytest.mark.parametrize(
    ("importer", "forbidden"),
    [
        ("engine", ["hf_vq", "tasks", "train"]),
        ("hf_vq.models.quantizers", [f"hf_vq.models.{path.stem}" for path in SHIPPED.glob("configuration_*.py")]),
        ("hf_vq.metrics", ["hf_vq.models"]),
        ("hf_vq.streams", ["hf_vq.models", "accelerate"]),
    ],
    ids=["engine", "quantizers", "metrics", "streams"],
)
def test_a_module_stays_ignorant_of(importer: str, forbidden: list[str]):
    found = {module for module in imports_of(find(importer)) for package in forbidden if inside(module, package)}
    assert not found, f"{importer} imports {found}"


@pytest.mark.parametrize("source", by_name(OURS))
def test_nobody_imports_an_entry_point(source: Source):
    assert not {module for module in imports_of(source) if inside(module, "hf_vq.cli") or inside(module, "train")}


def test_there_is_no_import_circle():
    # hf_vq itself stands for its __init__, which imports every room: whoever imports a room needs not wait for it.
    graph = {source.name: {module for module in imports_of(source) if module in MODULES} for source in OURS}
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> None:
        assert module not in trail, f"import circle: {' -> '.join([*trail[trail.index(module) :], module])}"
        if module not in done:
            for imported in sorted(graph[module]):
                visit(imported, [*trail, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])


# What travels to the Hub.


def test_the_shipped_folder_is_flat():
    assert SHIPPED_SOURCES
    assert not [path for path in SHIPPED.iterdir() if path.is_dir() and path.name != "__pycache__"]


@pytest.mark.parametrize("source", by_name(SHIPPED_SOURCES))
def test_a_shipped_file_imports_siblings_by_name_and_few_third_parties(source: Source):
    siblings = {path.stem for path in SHIPPED.glob("*.py")}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module in siblings, f"{source.path}:{node.lineno}: only `from .sibling`"
            assert [alias.name for alias in node.names] != ["*"], f"{source.path}:{node.lineno}: import names"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            roots = {(name or "").split(".")[0] for name in names}
            assert roots <= SHIPPED_THIRD_PARTIES | sys.stdlib_module_names, f"{source.path}:{node.lineno}: {roots}"


@pytest.mark.parametrize("source", by_name(SHIPPED_SOURCES))
def test_transformers_reads_the_imports_as_python_does(source: Source):
    # transformers finds siblings by a regular expression, so that a line of a docstring may count as an import.
    siblings = {node.module for node in ast.walk(source.tree) if isinstance(node, ast.ImportFrom) and node.level}
    assert set(get_relative_imports(source.path)) == siblings
    assert set(get_imports(source.path)) <= SHIPPED_THIRD_PARTIES | sys.stdlib_module_names
    lines = {node.lineno for node in ast.walk(source.tree) if isinstance(node, ast.ImportFrom)}
    for number, line in enumerate(source.text.splitlines(), start=1):
        assert not re.match(r"\s*(from|import)\s+\.", line) or number in lines, f"{source.path}:{number}: {line}"


@pytest.mark.parametrize("source", by_name(SHIPPED_SOURCES))
def test_no_shipped_class_is_called_a_tokenizer(source: Source):
    # transformers takes such a class for a text tokenizer and writes a list into auto_map, which AutoModel cannot read.
    assert not [
        node.name for node in ast.walk(source.tree) if isinstance(node, ast.ClassDef) if "Tokenizer" in node.name
    ]


@pytest.mark.parametrize("source", by_name(OURS))
def test_nothing_is_pickled(source: Source):
    assert not {module for module in imports_of(source) if module.split(".")[0] in {"pickle", "dill", "joblib"}}
    attributes = [ast.unparse(node) for node in ast.walk(source.tree) if isinstance(node, ast.Attribute)]
    assert not {"torch.load", "torch.save"} & set(attributes)


# Pieces stay small, and the public ones explain themselves.

Function = ast.FunctionDef | ast.AsyncFunctionDef


def function_lines(sources: list[Source]) -> dict[str, int]:
    return {
        f"{source.path.name}:{node.lineno} {node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for source in sources
        for node in ast.walk(source.tree)
        if isinstance(node, Function)
    }


def test_functions_are_short():
    lines = function_lines(OURS)
    assert lines
    assert not {name: count for name, count in lines.items() if count > MAX_FUNCTION_LINES}
    counts = sorted(lines.values())
    assert counts[int(0.9 * (len(counts) - 1))] <= MAX_FUNCTION_LINES_P90


@pytest.mark.parametrize("source", by_name(OURS))
def test_files_are_short(source: Source):
    lines = source.text.count("\n")
    assert lines <= MAX_FILE_LINES_OF.get(source.path.name, MAX_FILE_LINES)


def public_definitions(body: list[ast.stmt], owner: str = "") -> Iterator[tuple[str, str | None]]:
    """Public classes, functions and methods as (dotted name, docstring)."""
    for node in body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield f"{owner}{node.name}", ast.get_docstring(node)
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body, f"{owner}{node.name}.")


def documented_methods() -> set[str]:
    definitions = [entry for source in LIBRARY for entry in public_definitions(source.tree.body)]
    return {name.split(".")[-1] for name, docstring in definitions if "." in name and docstring}


@pytest.mark.parametrize("source", by_name(LIBRARY))
def test_public_names_have_docstrings(source: Source):
    # What a method overrides, ours or torch's or transformers', explains it.
    inherited = {"forward", "extra_repr", "get_input_embeddings", "set_input_embeddings"} | documented_methods()
    silent = [name for name, docstring in public_definitions(source.tree.body) if docstring is None]
    assert not [name for name in silent if "." not in name or name.split(".")[-1] not in inherited]


@pytest.mark.parametrize("source", by_name(OURS))
def test_every_file_says_what_it_is(source: Source):
    assert not source.tree.body or ast.get_docstring(source.tree)
