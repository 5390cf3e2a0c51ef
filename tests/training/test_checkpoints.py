import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from pytorch_optimizer import Muon

from checkpoints import (
    Checkpoints,
    find_damage,
    join_optimizer_state,
    named_state,
    read_part,
    restore_,
    split_optimizer_state,
)


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def save(checkpoints: Checkpoints, step: int, accelerator: Accelerator) -> None:
    shared = {"model.safetensors": {"weight": torch.full((2, 3), float(step))}, "state.json": {"step": step}}
    checkpoints.save(step, shared, {"rank-0.json": {"drawn": 7}, "rank-0.safetensors": {}}, accelerator)


def test_what_is_saved_is_read_back(tmp_path: Path, accelerator: Accelerator):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 3, accelerator)
    path = checkpoints.latest()
    assert path == tmp_path / "step-3" and find_damage(path) is None
    assert torch.equal(read_part(path, "model.safetensors")["weight"], torch.full((2, 3), 3.0))
    assert read_part(path, "state.json") == {"step": 3} and read_part(path, "rank-0.json") == {"drawn": 7}
    assert read_part(path, "rank-0.safetensors") == {}
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}


def test_the_newest_is_found_by_number_and_the_oldest_go(tmp_path: Path, accelerator: Accelerator):
    checkpoints = Checkpoints(tmp_path, limit=2)
    for step in (8, 9, 10, 100):
        save(checkpoints, step, accelerator)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-100"]
    assert checkpoints.latest() == tmp_path / "step-100"


def test_what_a_kill_left_half_written_is_no_checkpoint(tmp_path: Path, accelerator: Accelerator):
    checkpoints = Checkpoints(tmp_path)
    (tmp_path / ".step-5.tmp").mkdir()
    (tmp_path / ".step-5.tmp" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "step-notes").mkdir()
    assert checkpoints.latest() is None
    save(checkpoints, 6, accelerator)
    assert find_damage(tmp_path / "step-6") is None and not (tmp_path / ".step-5.tmp").exists()


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "file"),
    [
        pytest.param(flip_a_bit, "model.safetensors", id="flipped_bit"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-1]), "model.safetensors", id="truncated"),
        pytest.param(Path.unlink, "rank-0.json", id="missing_part"),
        pytest.param(Path.unlink, "manifest.json", id="missing_manifest"),
        pytest.param(lambda path: path.write_text("[1"), "manifest.json", id="torn_manifest"),
        pytest.param(lambda path: path.write_text("[]"), "manifest.json", id="foreign_manifest"),
    ],
)
def test_a_damaged_one_is_passed_over_with_a_warning(tmp_path, accelerator, caplog, damage, file):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, accelerator)
    save(checkpoints, 2, accelerator)
    damage(tmp_path / "step-2" / file)
    assert checkpoints.latest() == tmp_path / "step-1"
    assert "checkpoint of step 2 is damaged" in caplog.text and "step-2" in caplog.text


def test_nothing_but_damaged_ones_stops_the_run(tmp_path: Path, accelerator: Accelerator):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() is None
    for step in (1, 2):
        save(checkpoints, step, accelerator)
        (tmp_path / f"step-{step}" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="every checkpoint .* is damaged .*remove them all to begin anew"):
        checkpoints.latest()
    assert len(list(tmp_path.iterdir())) == 2


def test_later_ones_are_discarded(tmp_path: Path, accelerator: Accelerator):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        save(checkpoints, step, accelerator)
    checkpoints.discard_after(1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_views_of_one_tensor_are_saved_apart(tmp_path: Path, accelerator: Accelerator):
    whole = torch.arange(6.0)
    Checkpoints(tmp_path).save(1, {"m.safetensors": {"a": whole[:4], "b": whole[2:], "c": whole[::2]}}, {}, accelerator)
    read = read_part(tmp_path / "step-1", "m.safetensors")
    assert read["a"].tolist() == [0, 1, 2, 3] and read["b"].tolist() == [2, 3, 4, 5] and read["c"].tolist() == [0, 2, 4]


def muon(groups: list[dict], lr: float) -> torch.optim.Optimizer:
    """The first group's matrices by Muon, the rest by Adam."""
    marked = [group | {"lr": lr, "use_muon": index == 0} for index, group in enumerate(groups)]
    return Muon(marked, use_adjusted_lr=True)


@pytest.mark.parametrize(
    "kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop, muon], ids=lambda kind: kind.__name__
)
def test_an_optimizer_goes_through_tensors_and_json_unchanged(kind: Callable[..., torch.optim.Optimizer]):
    weights = [torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(4))]
    optimizer = kind([{"params": weights[:1], "weight_decay": 0.1}, {"params": weights[1:]}], lr=0.1)
    sum(weight.square().sum() for weight in weights).backward()
    optimizer.step()
    tensors, rest = split_optimizer_state(optimizer.state_dict())
    fresh = kind([{"params": weights[:1]}, {"params": weights[1:]}], lr=0.5)
    groups = fresh.state_dict()["param_groups"]
    state = join_optimizer_state(tensors, json.loads(json.dumps(rest)), groups)
    assert str(state) == str(optimizer.state_dict())
    fresh.load_state_dict(state)
    fresh.step()


def test_a_module_of_other_names_or_shapes_is_refused():
    module = torch.nn.BatchNorm1d(3)
    saved = {name: tensor.clone() for name, tensor in named_state(module).items()}
    restore_(named_state(module), saved)
    with pytest.raises(ValueError, match=r"weight is \(2,\) there and \(3,\) here"):
        restore_(named_state(module), saved | {"weight": torch.ones(2)})
    with pytest.raises(ValueError, match="another model: extra"):
        restore_(named_state(module), saved | {"extra": torch.ones(2)})
