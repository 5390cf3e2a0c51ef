"""transformers' own test classes, out of the sdist of the installed version.

The wheel leaves them out. The sdist (10 MB) comes from the package index that pip is configured for, once per version,
and what we need of it is kept in the user's cache. Without an index the tests built on it skip; where CI is set
they fail instead, so that a silent skip cannot pass for a success.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import types
from collections.abc import Sequence
from pathlib import Path

import pytest
import transformers

PACKAGE = "transformers_tests"
DOWNLOAD_SECONDS = 300

# The tests read these from a file that the sdist lacks; any arguments of PreTrainedConfig but its defaults do.
CONFIG_ARGUMENTS = {"return_dict": False, "output_hidden_states": True, "dtype": "float16", "architectures": ["Body"]}


def cache_folder() -> Path:
    """Where unpacked test folders are kept between runs."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "hf_vq_tests"


def load(module: str) -> types.ModuleType:
    """A module of transformers' tests, say `test_modeling_common`; skips the calling module where there is no sdist."""
    if PACKAGE not in sys.modules:
        try:
            folder = tests_folder()
        except (OSError, subprocess.SubprocessError) as error:
            reason = f"transformers' own tests could not be fetched from a package index: {describe(error)}"
            if os.environ.get("CI"):
                pytest.fail(reason, pytrace=False)
            pytest.skip(reason, allow_module_level=True)
        import_package(folder)
    return importlib.import_module(f"{PACKAGE}.{module}")


def describe(error: Exception) -> str:
    """The last line of what pip said, or the error itself."""
    lines = (getattr(error, "stderr", None) or "").strip().splitlines()
    return lines[-1] if lines else str(error)


def tests_folder() -> Path:
    """transformers' tests folder, unpacked under an unused name and then renamed, so that it is complete or absent."""
    folder = cache_folder() / f"transformers-{transformers.__version__}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        unpacked = Path(scratch) / "tests"
        unpacked.mkdir()
        unpack_tests(download_sdist(Path(scratch)), unpacked)
        try:
            unpacked.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    return folder


def download_sdist(folder: Path) -> Path:
    """The sdist of the installed transformers."""
    requirement = f"transformers=={transformers.__version__}"
    options = ["--quiet", "--no-input", "--no-deps", "--no-binary", ":all:", "--dest", str(folder)]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, requirement],
        check=True,
        capture_output=True,
        text=True,
        timeout=DOWNLOAD_SECONDS,
        stdin=subprocess.DEVNULL,
    )
    return next(folder.glob("transformers-*.tar.gz"))


def unpack_tests(sdist: Path, folder: Path) -> None:
    """Copies the Python files of tests/ in an sdist, which are flat, into `folder`."""
    with tarfile.open(sdist) as archive:
        for member in archive:
            path = Path(member.name)
            if member.isfile() and path.suffix == ".py" and path.parts[1:-1] == ("tests",):
                with archive.extractfile(member) as source, (folder / path.name).open("wb") as copy:
                    shutil.copyfileobj(source, copy)
    (folder / "__init__.py").touch()


class StubModule(types.ModuleType):
    """A module that the sdist lacks: its classes are empty, everything else in it is an empty dict."""

    config_common_kwargs = CONFIG_ARGUMENTS

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return {} if name[0].islower() else type(name, (), {})


class StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands last in the row of finders and so is asked only for what is not there."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.startswith(f"{PACKAGE}.") or fullname == "fetch_hub_objects_for_ci":
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return StubModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def import_package(folder: Path) -> None:
    """Makes the folder importable as PACKAGE."""
    sys.meta_path.append(StubFinder())
    spec = importlib.util.spec_from_file_location(
        PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = package
    spec.loader.exec_module(package)
