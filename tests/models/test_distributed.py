"""What processes, micro-batches, bf16 and checkpointing may not change: the codebook and all that moves with it.

Three steps are taken on the same joint batches in every way there is, and compared with one float64 process that sees
each joint batch at once. Bodies have no BatchNorm, whose statistics are those of the local batch. Two gloo processes
are started once and take all their turns.

With a k-means start or revival, the rows a code may be given are those of the last micro-batch of all processes, by
design. So the number of processes changes nothing, as long as a micro-batch fits the rows that are kept; and to
micro-batches the reference is equal once it keeps the rows of the last of them alone.

Of FSQ nothing moves.
"""

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from tiny_models import make_images, make_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from hf_vq.models import stochastic_quantizers, vector_quantizers
from hf_vq.models.modeling_autoencoder import AutoencoderModel
from hf_vq.models.quantizers import Quantizer

STEPS, JOINT = 3, 8
Results = dict[str, Tensor]

CARE = {"codebook_init": "kmeans", "revive_below": 0.985}
QUANTIZERS: dict[str, tuple[str, dict[str, object]]] = {
    "ema": ("ema", {"ema_decay": 0.9}),
    "ema-codebooks": ("ema", {"ema_decay": 0.9, "num_codebooks": 2}),
    "ema-kmeans-revival": ("ema", {"ema_decay": 0.9, **CARE}),
    "ema-codebooks-kmeans-revival": ("ema", {"ema_decay": 0.9, "num_codebooks": 2, **CARE}),
    "soft_em": ("ema", {"quantizer": "soft_em", "ema_decay": 0.9}),
    "soft_em-revival": ("ema", {"quantizer": "soft_em", "ema_decay": 0.9, "revive_below": 0.999}),
    "gradient": ("gradient", {}),
    "gradient-revival": ("gradient", {"revive_below": 0.985}),
    "linear": ("gradient", {"codebook_transform": "linear"}),
    "gaussian-I": ("gaussian", {"variance_update": "lagged"}),
    "gaussian-IV": ("gaussian", {"variance_update": "lagged", "covariance": "diagonal", "dequantization_noise": True}),
    "vmf": ("gaussian", {"variance_update": "lagged", "quantizer": "vmf", "initial_variance": 0.1}),
}


class Plan(NamedTuple):
    """One way to take the steps."""

    world: int = 1
    micro_batches: int = 1
    bf16: bool = False
    checkpointing: bool = False
    no_sync: bool = True
    compiled: bool = False

    @property
    def parts(self) -> int:
        return self.world * self.micro_batches

    @property
    def dtype(self) -> torch.dtype:
        """Float64 shows what is equal and what is only near; bf16 autocast asks for float32."""
        return torch.float32 if self.bf16 else torch.float64


PLANS = [Plan(*axes) for axes in itertools.product((1, 2), (1, 4), (False, True), (False, True))]
# Image 3 of 8 begins the second process's share; the last joint batch goes to the first process alone.
UNEVEN = [(slice(0, 3), slice(3, 8)), (slice(0, 3), slice(3, 8)), (slice(0, 8), slice(8, 8))]


def make(name: str, **settings: object) -> AutoencoderModel:
    family, own = QUANTIZERS[name]
    return make_model(family, **{**own, **settings}).train()


@contextlib.contextmanager
def joint_noise(step: int, images: slice) -> Iterator[None]:
    """Noise of any kind is that of these images in one draw for the joint batch."""

    def sliced(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def drawn(like: Tensor, *args: object) -> Tensor:
            positions = like.shape[1] // (images.stop - images.start)
            joint = like.detach().new_zeros(len(like), JOINT * positions, *like.shape[2:], dtype=torch.float64)
            with torch.random.fork_rng():
                torch.manual_seed(step)
                noise = draw(joint, *args)
            return noise[:, images.start * positions : images.stop * positions].to(like.dtype)

        return drawn

    with contextlib.ExitStack() as stack:
        for module in (stochastic_quantizers, vector_quantizers):
            for name in ("gumbel_noise", "gaussian_noise", "uniform_noise"):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, sliced(getattr(module, name))))
        yield


def keep_the_last(quantizer: Quantizer, micro_batches: int) -> None:
    """Of the rows that a joint forward has kept, those of the last micro-batch."""
    care = getattr(quantizer, "care", None)
    if care is not None and micro_batches > 1:
        rows = int(care.kept_count)
        assert rows < care.kept_rows.shape[1], "the joint batch must fit"
        last = rows // micro_batches
        care.kept_rows[:, :last] = care.kept_rows[:, rows - last : rows].clone()
        care.kept_count.fill_(last)


def image_slice(part: int, parts: int) -> slice:
    return slice(part * JOINT // parts, (part + 1) * JOINT // parts)


def state(module: nn.Module) -> Results:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def train(model: AutoencoderModel, plan: Plan, rank: int = 0, last_of: int = 1) -> Results:
    """The state after STEPS steps of SGD on joint batches, and the mean loss of each step on this rank."""
    model.to(plan.dtype)
    if plan.checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    forward: nn.Module = torch.compile(model, backend="eager") if plan.compiled else model
    if plan.world > 1:
        forward = DistributedDataParallel(forward)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    results = {}
    for step in range(STEPS):
        images, losses = make_images(JOINT, seed=step, dtype=plan.dtype), []
        for micro in range(plan.micro_batches):
            own = image_slice(micro * plan.world + rank, plan.parts)
            quiet = plan.no_sync and plan.world > 1 and micro < plan.micro_batches - 1
            with joint_noise(step, own), forward.no_sync() if quiet else contextlib.nullcontext():
                with torch.autocast("cpu", torch.bfloat16, enabled=plan.bf16):
                    output = forward(images[own])
                (output.loss / plan.micro_batches).backward()
            losses.append(torch.stack([output.loss, output.reconstruction_loss]).detach())
        keep_the_last(model.quantizer, last_of)
        optimizer.step()
        optimizer.zero_grad()
        model.step()
        results[f"losses.{step}"] = torch.stack(losses).mean(0)
    return results | state(model)


def make_latents(quantizer: Quantizer, step: int, plan: Plan) -> tuple[Tensor, Tensor]:
    """Latents of the joint batch and what a second head might say of them, of numbers that bf16 can hold."""
    channels = quantizer.num_codebooks * quantizer.codebook.embedding_dim
    generator = torch.Generator().manual_seed(step)
    drawn = torch.randn(2, JOINT, channels, 2, 2, generator=generator).bfloat16()
    latents, log_variance = drawn.unbind() if plan.bf16 else drawn.to(plan.dtype).unbind()
    return latents, log_variance / 4


def quantize(quantizer: Quantizer, latents: Tensor, log_variance: Tensor) -> Tensor:
    """A loss, summed over images, to which everything that a quantizer returns contributes."""
    output = quantizer(latents, log_variance)
    return len(latents) * output.loss + output.quantized.square().sum()


def train_bare(quantizer: Quantizer, plan: Plan, rank: int = 0, last_of: int = 1, uneven: bool = False) -> Results:
    """The state of the quantizer alone after STEPS steps."""
    parameters = [p for p in quantizer.to(plan.dtype).parameters() if p.requires_grad]
    for step in range(STEPS):
        latents, log_variance = make_latents(quantizer, step, plan)
        shares = [image_slice(micro * plan.world + rank, plan.parts) for micro in range(plan.micro_batches)]
        for own in [UNEVEN[step][rank]] if uneven else shares:
            if own.start == own.stop:
                continue
            arguments = (quantizer, latents[own].requires_grad_(), log_variance[own].requires_grad_())
            with joint_noise(step, own), torch.autocast("cpu", torch.bfloat16, enabled=plan.bf16):
                if plan.checkpointing:
                    loss = checkpoint(quantize, *arguments, use_reentrant=False)
                else:
                    loss = quantize(*arguments)
            # Within joint_noise: checkpointing draws again.
            with joint_noise(step, own):
                (loss / JOINT).backward()
        keep_the_last(quantizer, last_of)
        for parameter in parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if plan.world > 1:
                torch.distributed.all_reduce(gradient)
            parameter.data -= 1e-3 * gradient
            parameter.grad = None
        quantizer.step()
    return state(quantizer)


def evaluate_unevenly(rank: int) -> Results:
    """Ranks that evaluate different numbers of images: a collective would find no partner, and time out."""
    losses = {}
    for name in QUANTIZERS:
        model = make(name).eval()
        outputs = [model(make_images(2 + rank, seed=seed)) for seed in range(1 + 2 * rank)]
        losses[name] = outputs[0].loss.detach()
        torch.distributed.barrier()
    return losses


def train_crowded(quantizer: Quantizer, rank: int) -> Results:
    """Three codes keep 48 rows, and each process has 144 in a micro-batch."""
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(2 * step + rank)
        for _ in range(2):
            quantizer(torch.randn(4, 3, 6, 6, generator=generator))
        quantizer.step()
    return state(quantizer)


EXTRA: dict[str, tuple[str, dict[str, object], Plan]] = {
    "ema-synchronised": ("ema", {}, Plan(2, 2, no_sync=False)),
    "ema-compiled": ("ema", {}, Plan(2, 2, no_sync=False, compiled=True)),
    "gaussian-batch": ("gaussian-I", {"variance_update": "batch"}, Plan(2)),
    "gaussian-learned": ("gaussian-I", {"variance_update": "learned"}, Plan(2, 2)),
}


def turns() -> Iterator[tuple[str, Callable[[int], Results]]]:
    """What each of two processes runs, by name; the models are made here, and run when called with the rank."""
    for name, plan in itertools.product(QUANTIZERS, PLANS):
        if plan.world == 2:
            yield f"body {name} {plan}", functools.partial(train, make(name), plan)
            yield f"bare {name} {plan}", functools.partial(train_bare, make(name).quantizer, plan)
    for name in QUANTIZERS:
        yield f"uneven {name}", functools.partial(train_bare, make(name).quantizer, Plan(2), uneven=True)
    for extra, (name, settings, plan) in EXTRA.items():
        yield f"extra {extra}", functools.partial(train, make(name, **settings), plan)
    crowded = make("ema-kmeans-revival", codebook_size=3).quantizer
    yield "crowded", functools.partial(train_crowded, crowded)
    yield "evaluation", evaluate_unevenly


def worker(rank: int, folder: str) -> None:
    """Takes every turn on one of two processes; the models are older than the process group."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    all_turns = list(turns())
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    torch.save({name: turn(rank) for name, turn in all_turns}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module", autouse=True)
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Path]]:
    """Two processes that take their turns while the tests of one process run; waits for them, and says where."""
    folder = tmp_path_factory.mktemp("ranks")
    context = torch.multiprocessing.spawn(worker, (str(folder),), nprocs=2, join=False)

    def wait() -> Path:
        while not context.join():
            pass
        return folder

    yield wait
    wait()


@pytest.fixture(scope="module")
def two_ranks(running: Callable[[], Path]) -> list[dict[str, Results]]:
    """What each of two processes gives in every turn."""
    folder = running()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@functools.cache
def reference(kind: str, name: str, last_of: int) -> Results:
    """What one float64 process makes of the joint batches."""
    model = make(name)
    if kind == "body":
        return train(model, Plan(), last_of=last_of)
    return train_bare(model.quantizer, Plan(), last_of=last_of)


def outcome(turn: str, two_ranks: list[dict[str, Results]]) -> Results:
    """What both ranks hold after a turn, the same bit for bit; losses, which differ, are averaged."""
    first, second = (results[turn] for results in two_ranks)
    for key, tensor in first.items():
        assert key.startswith("losses.") or torch.equal(tensor, second[key]), f"{key} differs between the ranks"
    return {key: (tensor + second[key]) / 2 if key.startswith("losses.") else tensor for key, tensor in first.items()}


def has_care(name: str) -> bool:
    return "revive_below" in QUANTIZERS[name][1]


def assert_equal(results: Results, expected: Results, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    assert results.keys() == expected.keys()
    for key, tensor in results.items():
        torch.testing.assert_close(
            tensor.double(), expected[key], rtol=rtol, atol=atol, msg=lambda text, key=key: f"{key}: {text}"
        )


def describe(plan: Plan) -> str:
    """The name of a plan."""
    words = [f"{plan.world}x{plan.micro_batches}", "bf16" if plan.bf16 else "full"]
    return "-".join([*words, *(["checkpointing"] if plan.checkpointing else [])])


def check_quantizer(name: str, plan: Plan, results: Results) -> None:
    """In float64, and from bf16 latents under autocast to the rounding of float32."""
    expected = reference("bare", name, plan.micro_batches if has_care(name) else 1)
    start = state(make(name).quantizer)
    learns = "transform" if name == "linear" else "codebook.weight"
    assert not torch.equal(expected[learns], start[learns].double())
    assert_equal(results, expected, *((1e-4, 1e-5) if plan.bf16 else ()))


def check_model(name: str, plan: Plan, results: Results) -> None:
    """In float64. Under bf16 autocast latents are others, and those near a border change sides.

    There the codebook must go the same way: its distance from the float64 one stays under 0.4 of what that has moved,
    twice the most that was seen (0.2). A statistic that is lost or counted twice is off by about all of it.
    """
    expected = reference("body", name, plan.micro_batches if has_care(name) else 1)
    if not plan.bf16:
        return assert_equal(results, expected)
    learns = "quantizer.transform" if name == "linear" else "quantizer.codebook.weight"
    start = state(make(name))[learns].double()
    way = (expected[learns] - start).norm()
    off = (results[learns] - expected[learns]).norm()
    assert way > 0 and off < 0.4 * way


every_quantizer = pytest.mark.parametrize("name", QUANTIZERS)
one_process, two_processes = (
    pytest.mark.parametrize("plan", [plan for plan in PLANS if plan.world == world], ids=describe) for world in (1, 2)
)


@one_process
@every_quantizer
def test_one_process_takes_the_quantizer_to_one_place(name: str, plan: Plan):
    check_quantizer(name, plan, train_bare(make(name).quantizer, plan))


@one_process
@every_quantizer
def test_one_process_takes_the_model_to_one_place(name: str, plan: Plan):
    check_model(name, plan, train(make(name), plan))


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if has_care(name)])
def test_the_rows_that_a_code_may_be_given_matter(name: str):
    """Codes are moved in these steps, and the last micro-batch is another choice than the joint one."""
    joint, last = reference("bare", name, 1)["codebook.weight"], reference("bare", name, 4)["codebook.weight"]
    assert not torch.equal(joint, last)


@every_quantizer
def test_the_backward_pass_may_run_under_autocast(name: str):
    """In float32 as far as the quantizer goes: its gradients are those of a backward pass outside."""
    gradients = []
    for under in (False, True):
        quantizer = make(name).quantizer
        latents, log_variance = (tensor.float() for tensor in make_latents(quantizer, 0, Plan(bf16=True)))
        with joint_noise(0, slice(0, JOINT)):
            loss = quantize(quantizer, latents.requires_grad_(), log_variance)
            with torch.autocast("cpu", torch.bfloat16, enabled=under):
                loss.backward()
        gradients.append(latents.grad)
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-2)


@two_processes
@every_quantizer
def test_two_processes_take_the_quantizer_where_one_does(name: str, plan: Plan, two_ranks: list[dict[str, Results]]):
    check_quantizer(name, plan, outcome(f"bare {name} {plan}", two_ranks))


@two_processes
@every_quantizer
def test_two_processes_take_the_model_where_one_does(name: str, plan: Plan, two_ranks: list[dict[str, Results]]):
    check_model(name, plan, outcome(f"body {name} {plan}", two_ranks))


@every_quantizer
def test_processes_may_see_batches_of_different_sizes(name: str, two_ranks: list[dict[str, Results]]):
    """Even none at all: 3 and 5 images twice, then 8 and none, against 8 in one process."""
    assert_equal(outcome(f"uneven {name}", two_ranks), reference("bare", name, 1))


def test_processes_with_more_rows_than_they_keep_agree(two_ranks: list[dict[str, Results]]):
    results, start = outcome("crowded", two_ranks), state(make("ema-kmeans-revival", codebook_size=3).quantizer)
    assert not torch.equal(results["codebook.weight"], start["codebook.weight"])
    assert results["codebook.weight"].isfinite().all()


@pytest.mark.parametrize("extra", EXTRA)
def test_other_ways_to_run_two_processes(extra: str, two_ranks: list[dict[str, Results]]):
    name, settings, _ = EXTRA[extra]
    results, expected = outcome(f"extra {extra}", two_ranks), train(make(name, **settings), Plan())
    assert_equal(results, expected)
    if extra == "gaussian-batch":
        # log S is the joint one on either rank, not the mean of two logarithms.
        for results in two_ranks:
            loss = results[f"extra {extra}"]["losses.0"][1]
            torch.testing.assert_close(loss, expected["losses.0"][1], rtol=1e-12, atol=0)


def test_ranks_evaluate_without_each_other(two_ranks: list[dict[str, Results]]):
    for name in QUANTIZERS:
        for rank, results in enumerate(two_ranks):
            expected = make(name).eval()(make_images(2 + rank, seed=0)).loss
            torch.testing.assert_close(results["evaluation"][name], expected.detach())
