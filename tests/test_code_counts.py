"""The file of code counts: kept over evaluations, cut back after a resume, refused when it is something else."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_vq.code_counts import read_code_counts, save_code_counts


def test_code_counts_of_every_evaluation_are_kept(tmp_path: Path):
    path = tmp_path / "run" / "codes.safetensors"
    counts = {step: torch.randint(0, 99, (2, 8)) for step in (500, 1000, 1500)}
    for step, value in counts.items():
        save_code_counts(path, step, value)
    saved = load_file(path)
    assert sorted(saved) == ["step-000500", "step-001000", "step-001500"]
    assert torch.equal(saved["step-001000"], counts[1000]) and saved["step-001000"].dtype == torch.int64
    # Resumed from a checkpoint before step 1000:
    save_code_counts(path, 1000, counts[500].T.contiguous().T)
    saved = load_file(path)
    assert sorted(saved) == ["step-000500", "step-001000"]
    assert torch.equal(saved["step-001000"], counts[500])
    assert list(path.parent.iterdir()) == [path]


def test_counts_are_read_in_the_order_of_their_steps(tmp_path: Path):
    path = tmp_path / "codes.safetensors"
    # Seven digits sort before six as words.
    for step in (999_500, 1_000_000):
        save_code_counts(path, step, torch.full((1, 4), step))
    history = read_code_counts(path)
    assert list(history) == [999_500, 1_000_000] and torch.equal(history[1_000_000], torch.full((1, 4), 1_000_000))


def test_a_damaged_file_is_refused_by_name(tmp_path: Path):
    path = tmp_path / "codes.safetensors"
    path.write_bytes(b"\x00" * 20)
    for use in (lambda: save_code_counts(path, 1, torch.ones(1, 4, dtype=torch.int64)), lambda: read_code_counts(path)):
        with pytest.raises(ValueError, match=r"codes\.safetensors is damaged.*move it away"):
            use()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"encoder.weight": torch.ones(2, 2)}, "has entries encoder.weight"),
        ({"step-last": torch.ones(1, 4)}, "has entries step-last"),
        ({"step-000001": torch.ones(4)}, "has entries step-000001"),
        ({"step-000001": torch.ones(1, 4), "step-000002": torch.ones(1, 8)}, r"2 shapes: \[\(1, 4\), \(1, 8\)\]"),
        ({}, "0 shapes"),
    ],
    ids=["weights", "no-step", "no-codebooks", "two-sizes", "nothing"],
)
def test_other_files_are_refused(tmp_path: Path, entries: dict[str, torch.Tensor], message: str):
    path = tmp_path / "codes.safetensors"
    save_file(entries, path)
    with pytest.raises(ValueError, match=message):
        read_code_counts(path)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="there is no file .*nowhere.*codes.safetensors of a run"):
        read_code_counts(tmp_path / "nowhere")
