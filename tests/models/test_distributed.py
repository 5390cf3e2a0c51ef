"""Two processes, and micro-batches, give what one gives on the joint batch. Gloo, on bodies without BatchNorm."""

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
from tiny_models import make_images, make_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_vq.models import quantizers
from hf_vq.models.modeling_autoencoder import AutoencoderModel
from hf_vq.models.quantizers import EMAVectorQuantizer

STEPS, JOINT, POSITIONS, CODES = 3, 8, 4, 12
Results = dict[str, Tensor]


def joint_images(step: int) -> Tensor:
    return make_images(JOINT, seed=step, dtype=torch.float64)


@contextlib.contextmanager
def gumbel_slice(step: int, part: int, parts: int) -> Iterator[None]:
    """Gumbel noise that is the slice `part` of one draw for the joint batch."""
    uniform = torch.rand((JOINT * POSITIONS, CODES), generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    noise = -(-uniform.log()).log()
    with mock.patch.object(quantizers, "gumbel_noise", lambda like: noise.chunk(parts)[part]):
        yield


def train(
    model: AutoencoderModel, rank: int, world: int, micro_batches: int, no_sync: bool, compiled: bool = False
) -> Results:
    """The state after STEPS steps of SGD on joint batches, and the mean loss of each step on this rank."""
    forward: nn.Module = torch.compile(model, backend="eager") if compiled else model
    if world > 1:
        forward = DistributedDataParallel(forward)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    results, parts = {}, world * micro_batches
    for step in range(STEPS):
        losses = []
        for micro in range(micro_batches):
            part = micro * world + rank
            quiet = no_sync and world > 1 and micro < micro_batches - 1
            with gumbel_slice(step, part, parts), forward.no_sync() if quiet else contextlib.nullcontext():
                output = forward(joint_images(step).chunk(parts)[part])
                (output.loss / micro_batches).backward()
            losses.append(torch.stack([output.loss, output.reconstruction_loss]).detach())
        optimizer.step()
        optimizer.zero_grad()
        model.step()
        results[f"losses.{step}"] = torch.stack(losses).mean(0)
    return results | {name: tensor.clone() for name, tensor in model.state_dict().items()}


def train_bare(quantizer: EMAVectorQuantizer, rank: int, world: int, micro_batches: int, **_: object) -> Results:
    """Codebook and cluster sizes after STEPS steps of the quantizer alone."""
    for step in range(STEPS):
        latents = torch.randn(JOINT, 3, 2, 2, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        for micro in range(micro_batches):
            quantizer(latents.chunk(world * micro_batches)[micro * world + rank])
        quantizer.step()
    return {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}


def bare_quantizer() -> EMAVectorQuantizer:
    torch.manual_seed(0)
    return EMAVectorQuantizer(CODES, 3, 0.25, 0.9).double().train()


def double(family: str, **settings: object) -> Callable[[], AutoencoderModel]:
    return lambda: make_model(family, **settings).double().train()


SCENARIOS: dict[str, tuple[Callable[[], nn.Module], dict[str, object]]] = {
    "bare": (bare_quantizer, {"micro_batches": 1}),
    "bare-accumulated": (bare_quantizer, {"micro_batches": 2}),
    "ema": (double("ema"), {"micro_batches": 1, "no_sync": False}),
    "ema-accumulated": (double("ema"), {"micro_batches": 2, "no_sync": False}),
    "ema-no_sync": (double("ema"), {"micro_batches": 2, "no_sync": True}),
    "ema-compiled": (double("ema"), {"micro_batches": 2, "no_sync": False, "compiled": True}),
    "gradient-no_sync": (double("gradient"), {"micro_batches": 2, "no_sync": True}),
    "batch": (double("gaussian", variance_update="batch"), {"micro_batches": 1, "no_sync": False}),
    "lagged": (double("gaussian", variance_update="lagged"), {"micro_batches": 1, "no_sync": False}),
    "lagged-accumulated": (double("gaussian", variance_update="lagged"), {"micro_batches": 2, "no_sync": False}),
    "lagged-no_sync": (double("gaussian", variance_update="lagged"), {"micro_batches": 4, "no_sync": True}),
    "learned-no_sync": (double("gaussian", variance_update="learned"), {"micro_batches": 2, "no_sync": True}),
}


def run(model: nn.Module, rank: int, world: int, arguments: dict[str, object]) -> Results:
    """One scenario on this rank."""
    return (train_bare if isinstance(model, EMAVectorQuantizer) else train)(model, rank, world, **arguments)


def evaluate_unevenly(rank: int) -> Results:
    """Ranks that evaluate different numbers of images: a collective would find no partner, and time out."""
    losses = {}
    for family in ("ema", "gaussian"):
        model = make_model(family)
        outputs = [model(make_images(2 + rank, seed=seed)) for seed in range(1 + 2 * rank)]
        losses[f"evaluation.{family}"] = outputs[0].loss.detach()
        torch.distributed.barrier()
    return losses


def worker(rank: int, world: int, folder: str) -> None:
    """Runs every scenario on one of the processes; the models are older than the process group."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    models = {name: make() for name, (make, _) in SCENARIOS.items()}
    store = torch.distributed.FileStore(f"{folder}/store", world)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    results = {name: run(model, rank, world, SCENARIOS[name][1]) for name, model in models.items()}
    results["evaluation"] = evaluate_unevenly(rank)
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Results]]:
    """What each of two processes gives in every scenario."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, (2, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def states(results: Results) -> Results:
    return {name: tensor for name, tensor in results.items() if not name.startswith("losses.")}


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_equal_one_on_the_joint_batch(name: str, two_ranks: list[dict[str, Results]]):
    make, arguments = SCENARIOS[name]
    expected = run(make(), 0, 1, arguments | {"micro_batches": 1, "compiled": False})
    first, second = (results[name] for results in two_ranks)
    untouched = make().state_dict()
    assert not torch.equal(
        first[code := next(key for key in first if key.endswith("codebook.weight"))], untouched[code]
    )
    for key, tensor in states(first).items():
        assert torch.equal(tensor, second[key]), f"{key} differs between the ranks"
        torch.testing.assert_close(
            tensor, expected[key], rtol=1e-9, atol=1e-11, msg=lambda text, key=key: f"{key}: {text}"
        )
    for key in first.keys() - states(first).keys():
        torch.testing.assert_close((first[key] + second[key]) / 2, expected[key], rtol=1e-9, atol=1e-11)
        if name == "batch":
            # log S is the joint one on either rank, not the mean of two logarithms.
            torch.testing.assert_close(first[key][1], expected[key][1], rtol=1e-12, atol=0)


def test_ranks_evaluate_without_each_other(two_ranks: list[dict[str, Results]]):
    for family in ("ema", "gaussian"):
        for rank, results in enumerate(two_ranks):
            expected = make_model(family)(make_images(2 + rank, seed=0)).loss
            torch.testing.assert_close(results["evaluation"][f"evaluation.{family}"], expected.detach())


@pytest.mark.parametrize("family", ["ema", "gaussian"])
def test_four_micro_batches_equal_their_joint_batch(family: str):
    make = double(family, **({"variance_update": "lagged"} if family == "gaussian" else {}))
    joint, split = (train(make(), 0, 1, micro_batches, False) for micro_batches in (1, 4))
    for key, tensor in joint.items():
        torch.testing.assert_close(split[key], tensor, rtol=1e-9, atol=1e-11)
