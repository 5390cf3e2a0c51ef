"""The room in which every test runs: no Hub, a cache of its own, and uninitialised memory that shows."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# huggingface_hub, datasets and transformers read these when they are imported; subprocesses inherit them.
HF_HOME = tempfile.mkdtemp(prefix="hf_vq_tests_")
atexit.register(shutil.rmtree, HF_HOME, ignore_errors=True)
os.environ.update(HF_HOME=HF_HOME, HF_HUB_OFFLINE="1", HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1")
for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_MODULES_CACHE", "HF_ENDPOINT"):
    os.environ.pop(name, None)
os.environ.setdefault("MPLBACKEND", "agg")

import pytest  # noqa: E402  the environment comes first
import torch  # noqa: E402  the environment comes first
from huggingface_hub import HfApi  # noqa: E402  the environment comes first

from hub_server import HubServer  # noqa: E402  the environment comes first

REPOSITORY = Path(__file__).resolve().parent.parent
ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch, "empty_permuted"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


def pytest_configure(config: pytest.Config) -> None:
    # The tensors of the tests are small: a second thread costs more than it brings, and much on a busy machine.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("requires_cuda"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the real data sets; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("HF_VQ_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"the data sets are not there: set HF_VQ_DATA to their folder (tried {folder})")
    return folder


def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`allocate`, but floating point memory comes filled with NaN."""

    def allocate_poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.device.type != "meta" and (tensor.is_floating_point() or tensor.is_complex()):
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return allocate_poisoned


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`torch.empty` and its kin give NaN: from_pretrained leaves what nobody fills as uninitialised memory."""
    if request.node.get_closest_marker("uninitialised_memory") is None:
        for owner, name in ALLOCATORS:
            monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    yield


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A Hub on the loopback interface, empty."""
    with HubServer() as server:
        yield server
    assert not server.failures, server.failures[0]


@pytest.fixture
def hub_api(hub: HubServer, tmp_path: Path) -> Iterator[HfApi]:
    """The owner's client of `hub`; huggingface_hub, transformers and datasets speak to `hub` in this process, too."""
    from hub_client import in_process  # it imports datasets

    with in_process(hub, tmp_path / "hub_cache") as api:
        yield api


@pytest.fixture
def hub_environment(hub: HubServer, tmp_path: Path) -> dict[str, str]:
    """The environment of a process that speaks to `hub` as its owner."""
    from hub_client import environment  # it imports datasets

    return environment(hub, tmp_path / "hub_home")


@pytest.fixture
def run_with_hub(hub_environment: dict[str, str]) -> Callable[..., str]:
    """Runs a script with arguments in such a process, and returns what it prints."""

    def run(script: str, *arguments: object) -> str:
        command = [sys.executable, "-c", script, *map(str, arguments)]
        ran = subprocess.run(command, env=hub_environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    return run
