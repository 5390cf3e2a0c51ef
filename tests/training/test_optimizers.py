"""Which parameters go to Muon and which to Adam, what decays, and how far a step goes."""

import pytest
import torch
from pytorch_optimizer import Muon

from engine import EngineArguments
from hf_vq import PixelCNNPrior, PixelCNNPriorConfig, VQVAEConfig, VQVAEModel
from optimizers import build_optimizer

SETTINGS = {"learning_rate": 3e-3, "weight_decay": 0.1, "adam_beta2": 0.98}


@pytest.fixture
def prior() -> PixelCNNPrior:
    torch.manual_seed(0)
    return PixelCNNPrior(PixelCNNPriorConfig(codebook_size=16, grid_size=4, hidden_size=8, num_hidden_layers=2))


def grouped(module: torch.nn.Module, **settings: object) -> dict[str, dict]:
    """For each parameter's name the group it is in."""
    optimizer = build_optimizer(module, EngineArguments(**SETTINGS, **settings))
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(groups) == sum(len(group["params"]) for group in optimizer.param_groups)
    return {name: groups[id(p)] for name, p in module.named_parameters() if p.requires_grad}


def test_muon_gets_hidden_matrices_and_adam_all_else(prior: PixelCNNPrior):
    groups = grouped(prior, optim="muon")
    assert groups.keys() == dict(prior.named_parameters()).keys()
    by_muon = {name for name, group in groups.items() if group["use_muon"]}
    expected = {name for name, p in prior.named_parameters() if name.startswith("trunk.") and p.ndim >= 2}
    assert by_muon == expected
    assert any("link.weight" in name for name in by_muon) and "head.scores.weight" not in by_muon
    for name, group in groups.items():
        assert group["lr"] == 3e-3
        assert group["weight_decay"] == (0.1 if dict(prior.named_parameters())[name].ndim >= 2 else 0.0)
        assert group["use_muon"] or group["betas"] == (0.9, 0.98)


def test_codebooks_are_no_matrices():
    tokenizer = VQVAEModel(VQVAEConfig(image_size=8, codebook_size=16, codebook_dim=4, hidden_channels=[8, 8]))
    groups = grouped(tokenizer, optim="muon")
    assert not any(groups[name]["use_muon"] for name in groups if name.startswith("quantizer."))
    assert sum(group["use_muon"] for group in groups.values()) > 4


def test_frozen_parameters_are_left_out(prior: PixelCNNPrior):
    prior.trunk.requires_grad_(False)
    assert not any(group["use_muon"] for group in grouped(prior, optim="muon").values())


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "muon"])
def test_biases_do_not_decay(prior: PixelCNNPrior, optim: str):
    for name, group in grouped(prior, optim=optim).items():
        assert (group["weight_decay"] == 0) == (dict(prior.named_parameters())[name].ndim < 2)


def test_a_step_of_muon_is_near_orthogonal_and_of_adams_size():
    torch.manual_seed(0)
    layer = torch.nn.Linear(32, 48, bias=False)
    before = layer.weight.detach().clone()
    optimizer = build_optimizer(layer, EngineArguments(learning_rate=1e-2, optim="muon"))
    assert isinstance(optimizer, Muon)
    (layer(torch.randn(256, 32)).square().sum()).backward()
    optimizer.step()
    moved = (layer.weight.detach() - before) / 1e-2
    singular = torch.linalg.svdvals(moved) / (0.2 * 48**0.5)
    assert singular.min() > 0.5 and singular.max() < 1.5
    assert moved.square().mean().sqrt() == pytest.approx(0.2, rel=0.2)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="optim must be one of adamw_torch_fused, muon, and is lion"):
        EngineArguments(optim="lion")
