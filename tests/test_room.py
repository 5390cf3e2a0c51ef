"""The room itself (conftest.py): what the other tests lean on is really so."""

import os

import pytest
import torch
from huggingface_hub import constants


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(5),
        lambda: torch.empty(2, 3, dtype=torch.bfloat16),
        lambda: torch.empty(3, requires_grad=True),
        lambda: torch.empty_like(torch.zeros(4)),
        lambda: torch.empty_strided((2, 2), (2, 1)),
        lambda: torch.zeros(1).new_empty(3),
        lambda: torch.nn.Linear(2, 2, device="meta").to_empty(device="cpu").weight,
    ],
    ids=["empty", "bfloat16", "requires_grad", "like", "strided", "new", "module"],
)
def test_uninitialised_memory_is_nan(allocate):
    assert allocate().isnan().all()


def test_meta_and_integer_memory_is_left_alone():
    assert torch.empty(2, device="meta").is_meta
    assert torch.empty(2, dtype=torch.int64).dtype == torch.int64


@pytest.mark.uninitialised_memory
def test_a_marker_turns_the_poison_off():
    assert torch.empty.__name__ == "empty"


def test_the_hub_is_out_of_reach():
    assert constants.HF_HUB_OFFLINE
    assert os.environ["HF_HOME"] == constants.HF_HOME
    assert "hf_vq_tests_" in constants.HF_HOME
