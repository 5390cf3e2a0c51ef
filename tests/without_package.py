"""A process in which hf_vq cannot be imported, as where only the Hub's copy of the code is at hand."""

import subprocess
import sys

BLOCKED = """
import importlib.abc, pathlib, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_vq":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

blocker = Blocker()
sys.meta_path.insert(0, blocker)
try:
    import hf_vq
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("hf_vq can be imported")
"""


def run_without_package(script: str, *arguments: object) -> None:
    """Runs `script` with `arguments`; what it may find are `pathlib`, `sys` and `blocker`."""
    command = [sys.executable, "-I", "-c", BLOCKED + script, *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert ran.returncode == 0, ran.stderr
