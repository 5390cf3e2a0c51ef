"""Canonical precision holds whatever was allowed before, and leaves it as it was."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from hf_vq.canonical import canonical, full_float32, unwrapped

# Each in a process of its own: torch refuses to mix its old switches with its new ones.
ALLOW = {
    "nothing": "",
    "old switches": "torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True",
    "new switch": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "new switch for all": "torch.backends.fp32_precision = 'tf32'",
}
PROBE = """
import torch
from hf_vq.canonical import full_float32
{allow}
def precisions(): return [part.fp32_precision for part in (torch.backends.cuda.matmul, torch.backends.cudnn.conv)]
before = precisions()
with full_float32():
    assert precisions() == ["ieee", "ieee"], precisions()
assert precisions() == before, (before, precisions())
"""


@pytest.mark.parametrize("allowed", ALLOW)
def test_float32_keeps_its_digits(allowed: str):
    subprocess.run([sys.executable, "-c", PROBE.format(allow=ALLOW[allowed])], check=True)


def test_an_error_inside_leaves_everything_as_it_was():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train()
    model[1].eval()
    with pytest.raises(KeyError), canonical(model), torch.autocast("cpu", torch.bfloat16):
        assert not model.training and not torch.is_grad_enabled()
        raise KeyError
    assert model.training and model[0].training and not model[1].training and torch.is_grad_enabled()
    with full_float32():
        pass


def test_wrappers_come_off_in_any_order():
    model = nn.Linear(2, 2)
    assert unwrapped(nn.DataParallel(torch.compile(model, backend="eager"))) is model
    assert unwrapped(torch.compile(nn.DataParallel(model), backend="eager")) is model
    assert unwrapped(model) is model
