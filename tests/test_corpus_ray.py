"""Bulk tokenization on a local Ray cluster: the files of one process, whatever happens to the actors."""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from corpora import save_tokenizer, write_data_set
from hf_vq.cli import main

ray = pytest.importorskip("ray", reason="needs the extra ray")

from hf_vq.corpus import on_ray  # noqa: E402  it imports ray
from hf_vq.corpus.job import TokenizationJob  # noqa: E402  it comes with the line above

# Ray uses what it has itself deprecated.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:ray", "ignore::FutureWarning:ray", "ignore::ResourceWarning"
)

FILES = 12


@pytest.fixture(scope="module", autouse=True)
def cluster(repository: Path) -> Iterator[None]:
    """Four logical CPUs on this machine, whose workers do not give way to everybody else."""
    paths = os.pathsep.join([str(repository / "src"), str(repository / "tests")])
    environment = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0", "RAY_AUTH_MODE": "disabled"}
    with mock.patch.dict(os.environ, environment):
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_data_set(tmp_path_factory.mktemp("images"), files=FILES - 1, bad=[7, 40]))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, model: str, images: str) -> dict[str, bytes]:
    """What one process makes."""
    folder = tmp_path_factory.mktemp("alone") / "out"
    assert main(["tokenize", model, "--dataset_name", images, "--output", str(folder)]) == 0
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "data").glob("*.parquet"))}


def tokenize(folder: Path, model: str, images: str, *flags: str) -> int:
    given = ["--dataset_name", images, "--output", str(folder), "--dataloader_num_workers", "0"]
    return main(["tokenize", model, *given, "--engine", "ray", "--num_actors", "2", *flags])


def test_two_actors_make_the_files_of_one_process(tmp_path: Path, model: str, images: str, alone: dict[str, bytes]):
    assert tokenize(tmp_path / "out", model, images) == 0
    assert contents(tmp_path / "out") == alone and len(alone) == FILES


def test_only_unfinished_units_are_done_again(tmp_path: Path, model: str, images: str, alone: dict[str, bytes]):
    tokenize(tmp_path, model, images)
    files = sorted((tmp_path / "data").iterdir())
    for file in files[2:5]:
        file.unlink()
    times = {path: path.stat().st_mtime_ns for path in files if path.exists()}
    assert tokenize(tmp_path, model, images) == 0
    assert contents(tmp_path) == alone
    assert all(path.stat().st_mtime_ns == before for path, before in times.items())
    assert tokenize(tmp_path, model, images) == 0  # nothing is left to do


class Mortal(on_ray.UnitTokenizer):
    """An actor that takes its time, and dies once, in the middle of its third unit."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        time.sleep(0.1)
        grave = Path(self.folder).parent / "grave"
        self.units = getattr(self, "units", 0) + 1
        if self.units == 3 and not grave.exists():
            grave.write_text(str(batch["unit"]))
            write_half = Path(self.folder) / "data" / ".half.parquet.1.tmp"
            write_half.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)


def test_an_actor_that_is_killed_loses_nothing(
    tmp_path: Path, model: str, images: str, alone: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(on_ray, "UnitTokenizer", Mortal)
    assert tokenize(tmp_path / "out", model, images) == 0
    assert (tmp_path / "grave").exists()
    assert contents(tmp_path / "out") == alone


SLOWLY = """
import sys, time
from hf_vq.cli import main
from hf_vq.corpus import on_ray

class Slow(on_ray.UnitTokenizer):
    def __call__(self, batch):
        time.sleep(0.5)
        return super().__call__(batch)

on_ray.UnitTokenizer = Slow
main(sys.argv[1:])
"""


def test_a_job_that_is_killed_goes_on(tmp_path: Path, model: str, images: str, alone: dict[str, bytes]):
    """The whole command, in a process of its own."""
    address = ray.get_runtime_context().gcs_address
    given = ["--dataset_name", images, "--output", str(tmp_path), "--dataloader_num_workers", "0"]
    flags = [*given, "--engine", "ray", "--num_actors", "2", "--ray_address", address]
    driver = subprocess.Popen([sys.executable, "-c", SLOWLY, "tokenize", model, *flags], stderr=subprocess.DEVNULL)
    began = time.monotonic()
    while len(done := list(tmp_path.glob("data/[!.]*.parquet"))) < 3:
        assert driver.poll() is None and time.monotonic() - began < 120
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    times = {path: path.stat().st_mtime_ns for path in done}
    assert len(done) < FILES
    assert tokenize(tmp_path, model, images) == 0
    assert contents(tmp_path) == alone
    assert all(path.stat().st_mtime_ns == before for path, before in times.items())


def test_an_actor_refuses_what_the_driver_did_not_open(tmp_path: Path, model: str, images: str):
    job = TokenizationJob(model, images)
    with job.open(tmp_path / "out").claimed():
        other = TokenizationJob(model, images, splits=("test",))
        with pytest.raises(ValueError, match="belongs to another tokenization: splits is None there"):
            on_ray.UnitTokenizer(other, str(tmp_path / "out"), {}, 0)


def test_actors_that_would_hold_every_cpu_are_refused(
    tmp_path: Path, model: str, images: str, capsys: pytest.CaptureFixture[str]
):
    assert tokenize(tmp_path / "out", model, images, "--num_actors", "4") == 2
    assert "reading needs one more; the cluster has 4" in capsys.readouterr().err


def test_what_an_actor_cannot_do_is_told(tmp_path: Path, model: str, images: str, capsys: pytest.CaptureFixture[str]):
    assert tokenize(tmp_path / "out", model, images, "--max_bad_examples", "0") == 2
    assert "more than max_bad_examples=0" in capsys.readouterr().err
    assert tokenize(tmp_path / "out", model, images, "--max_bad_examples", "2") == 0


def test_the_job_goes_to_other_processes(model: str, images: str):
    job = TokenizationJob(model, images, splits=("test",))
    assert pickle.loads(pickle.dumps(job)) == job
