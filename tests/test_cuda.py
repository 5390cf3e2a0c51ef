"""What must hold on a GPU as it does on a CPU. Every test here skips itself without one."""

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hf_vq import SQVAEConfig, SQVAEModel, VQVAEConfig, VQVAEModel
from hf_vq.canonical import canonical
from hf_vq.models import stochastic_quantizers, vector_quantizers
from hf_vq.models.code_search import add_codes, likeliest_code, nearest_code, sample_codes
from hf_vq.models.modeling_autoencoder import AutoencoderModel
from hf_vq.models.quantizers import Quantizer

DEVICE = "cuda"
pytestmark = pytest.mark.requires_cuda

CARE = {"codebook_init": "kmeans", "revive_below": 0.5}
MODELS = {
    "gradient": VQVAEConfig(quantizer="gradient"),
    "gradient-rotation-revival": VQVAEConfig(quantizer="gradient", gradient_estimator="rotation", revive_below=0.5),
    "linear": VQVAEConfig(quantizer="gradient", codebook_transform="linear"),
    "ema": VQVAEConfig(quantizer="ema"),
    "ema-kmeans-revival": VQVAEConfig(quantizer="ema", num_codebooks=2, **CARE),
    "soft_em": VQVAEConfig(quantizer="soft_em"),
    "soft_em-kmeans-revival": VQVAEConfig(quantizer="soft_em", normalize_codes=True, **CARE),
    "fsq": VQVAEConfig(quantizer="fsq", levels=[8, 5, 5, 5]),
    "gaussian": SQVAEConfig(),
    "gaussian-per_sample": SQVAEConfig(covariance="per_sample", dequantization_noise=True),
    "gaussian-diagonal": SQVAEConfig(covariance="diagonal", num_codebooks=2),
    "vmf": SQVAEConfig(quantizer="vmf", initial_variance=0.1),
}
every_model = pytest.mark.parametrize("name", MODELS)


def make(name: str) -> AutoencoderModel:
    config = copy.deepcopy(MODELS[name])
    torch.manual_seed(0)
    return (SQVAEModel if isinstance(config, SQVAEConfig) else VQVAEModel)(config).train()


def pixels(count: int, seed: int = 1) -> Tensor:
    return 2 * torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) - 1


@pytest.fixture
def same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise is drawn on the CPU, the same for either device, and convolutions keep their digits."""

    def drawn_there(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def drawn(like: Tensor, *args: object) -> Tensor:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return draw(torch.zeros(like.shape, dtype=like.dtype), *args).to(like.device)

        return drawn

    for module in (stochastic_quantizers, vector_quantizers):
        for noise in ("gumbel_noise", "gaussian_noise", "uniform_noise"):
            if hasattr(module, noise):
                monkeypatch.setattr(module, noise, drawn_there(getattr(module, noise)))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def assert_near(there: nn.Module, here: nn.Module, tolerance: float) -> None:
    for (name, tensor), twin in zip(there.state_dict().items(), here.state_dict().values(), strict=True):
        torch.testing.assert_close(
            tensor.cpu(), twin, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("codes", [37, 512, 5000])
def test_the_searches_find_the_best_code(codes: int):
    generator = torch.Generator().manual_seed(0)
    rows, vectors = (torch.randn(2, count, 8, generator=generator).to(DEVICE) for count in (100_000, codes))
    variance = torch.rand(2, 100_000, 8, generator=generator).to(DEVICE) + 0.5
    for chosen, weights in ((nearest_code(rows, vectors), None), (likeliest_code(rows, vectors, variance), variance)):
        for book in range(2):
            for part in torch.arange(100_000, device=DEVICE).split(2_000):
                own = torch.ones_like(variance[book, part]) if weights is None else 1 / weights[book, part]
                difference = rows[book, part].double().unsqueeze(1) - vectors[book].double()
                distances = (difference.square() * own.double().unsqueeze(1)).sum(2)
                found = distances.gather(1, chosen[book, part].unsqueeze(1)).squeeze(1)
                torch.testing.assert_close(found, distances.amin(1), rtol=1e-4, atol=1e-4)


def test_draws_and_counts_equal_those_of_the_cpu():
    generator = torch.Generator().manual_seed(0)
    rows, vectors = (torch.randn(2, count, 4, generator=generator) for count in (5000, 64))
    uniforms = torch.rand(2, 5000, 3, generator=generator)
    here = sample_codes(rows, vectors, 1.0, uniforms)
    there = sample_codes(rows.to(DEVICE), vectors.to(DEVICE), 1.0, uniforms.to(DEVICE)).cpu()
    assert (here != there).float().mean() < 1e-3
    counted = []
    for device in ("cpu", DEVICE):
        counts, sums = torch.zeros(128, device=device), torch.zeros(128, 4, device=device)
        add_codes(counts, sums, rows.to(device), here.to(device))
        counted.append((counts.cpu(), sums.cpu()))
    for one, other in zip(*counted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def step_alone(quantizer: Quantizer, latents: Tensor) -> None:
    quantizer(latents, torch.zeros_like(latents))
    quantizer.step()


@pytest.mark.usefixtures("same_noise")
@pytest.mark.parametrize("name", ["ema", "ema-kmeans-revival", "soft_em", "soft_em-kmeans-revival", "gaussian"])
def test_what_moves_in_a_step_equals_that_of_the_cpu(name: str):
    here = make(name).quantizer
    there = copy.deepcopy(here).to(DEVICE)
    channels = here.num_codebooks * here.codebook.embedding_dim
    for seed in range(3):
        # Of few distinct rows, all far from each other: rounding moves none of them to another code.
        choices = torch.randn(40, channels, generator=torch.Generator().manual_seed(seed)) * 3
        picked = torch.randint(40, (8, 8, 8), generator=torch.Generator().manual_seed(seed))
        latents = choices[picked].movedim(-1, 1)
        step_alone(here, latents)
        step_alone(there, latents.to(DEVICE))
    assert_near(there, here, 1e-4)


@pytest.mark.usefixtures("same_noise")
@every_model
def test_loss_and_gradients_equal_those_of_the_cpu(name: str):
    here = make(name)
    there = copy.deepcopy(here).to(DEVICE)
    loss, loss_there = here(pixels(8)).loss, there(pixels(8).to(DEVICE)).loss
    torch.testing.assert_close(loss_there.cpu(), loss, rtol=1e-4, atol=1e-4)
    loss.backward(), loss_there.backward()
    for (parameter_name, parameter), twin in zip(here.named_parameters(), there.parameters(), strict=True):
        assert (parameter.grad is None) == (twin.grad is None), parameter_name
        if parameter.grad is not None:
            difference = (twin.grad.cpu() - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-6)
            assert difference < 1e-2, parameter_name


@every_model
def test_canonical_tokens_differ_from_the_cpus_in_near_ties_only(name: str):
    model = make(name).eval()
    with canonical(model):
        here = model.encode(pixels(256))
        there = model.to(DEVICE).encode(pixels(256).to(DEVICE))
    differing = there.image_tokens.cpu() != here.image_tokens
    assert differing.float().mean() <= 1e-4
    if name in ("fsq", "gaussian-diagonal"):
        # Their codes are not the nearest ones.
        return
    quantizer = model.quantizer.cpu()
    rows, vectors = quantizer.rows(here.last_hidden_state).double(), quantizer.vectors().detach().double()
    wrong = differing.reshape(-1, quantizer.num_codebooks).T
    for own_rows, own_vectors, own_wrong in zip(rows, vectors, wrong, strict=True):
        distances = torch.cdist(own_rows[own_wrong], own_vectors).square().topk(2, largest=False)
        best, second = distances.values.unbind(1)
        assert ((second - best) / second < 1e-4).all()


class Trainer:
    """A model, and how it trains: compiled or not, in bf16 or not."""

    def __init__(self, model: AutoencoderModel, compiled: bool, bf16: bool) -> None:
        self.model, self.bf16 = model, bf16
        self.forward = torch.compile(model, fullgraph=True) if compiled else model
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(parameters, lr=1e-3)

    def step(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """One whole training step: its loss, and the squared error per element."""
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.bf16):
            output = self.forward(images)
        output.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.step()
        return output.loss.detach(), (output.decoded_pixel_values.detach().float() - images).square().mean()


@pytest.mark.uninitialised_memory
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@every_model
def test_bf16_training_learns(name: str, compiled: bool):
    torch._dynamo.reset()
    trainer = Trainer(make(name).to(DEVICE), compiled, bf16=True)
    images = torch.nn.functional.interpolate(pixels(32)[:, :, :2, :2], size=32).to(DEVICE)
    errors = [trainer.step(images)[1].item() for _ in range(60)]
    assert errors[-1] < 0.8 * errors[0]
    assert trainer.model.quantizer.codebook.weight.dtype == torch.float32


@pytest.mark.uninitialised_memory
@pytest.mark.parametrize("name", ["ema-kmeans-revival", "soft_em", "gaussian-diagonal", "vmf"])
def test_compiled_training_steps_equal_eager_ones(name: str):
    torch._dynamo.reset()
    model = make(name).to(DEVICE)
    losses = []
    for compiled in (False, True):
        trainer = Trainer(copy.deepcopy(model), compiled, bf16=False)
        with torch._inductor.config.patch(fallback_random=True):
            for seed in range(3):
                torch.manual_seed(seed)
                losses.append(trainer.step(pixels(8, seed).to(DEVICE))[0])
    torch.testing.assert_close(losses[3:], losses[:3], rtol=1e-3, atol=1e-3)


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Whatever makes the CPU wait for the GPU is an error."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def warm(name: str) -> tuple[AutoencoderModel, Tensor]:
    """A model and images that have met: handles and workspaces exist, and kernels are chosen."""
    model, images = make(name).to(DEVICE), pixels(8).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        model(images).loss.backward()
    model.step()
    return model, images


@pytest.mark.uninitialised_memory
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # it warns of being a prototype
@every_model
def test_the_training_forward_does_not_wait_for_the_gpu(warm: tuple[AutoencoderModel, Tensor], no_waiting: None):
    model, images = warm
    for bf16 in (False, True):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
            model(images)


@pytest.mark.uninitialised_memory
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # it warns of being a prototype
@pytest.mark.parametrize("name", ["linear", "ema", "soft_em", "fsq", "gaussian-diagonal", "vmf"])
def test_a_step_does_not_wait_for_the_gpu(warm: tuple[AutoencoderModel, Tensor], no_waiting: None):
    """Unless codes may have to be placed, which cannot be known without a look at their usage."""
    warm[0].step()


def test_the_recipe_trains_and_resumes(tmp_path: Path, repository: Path):
    script = repository / "training" / "train.py"

    def train(*flags: str) -> None:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", str(script)]
        common = ["--mixed_precision", "bf16", "--checkpointing_steps", "10", "--logging_steps", "5"]
        subprocess.run([*command, *common, *flags], check=True, capture_output=True, timeout=300)

    train("--output_dir", str(tmp_path / "run"), "--max_train_steps", "20")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-20")
    train("--output_dir", str(tmp_path / "run"), "--max_train_steps", "20", "--resume_from_checkpoint", "latest")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [5, 10, 15, 20]
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["num_images"] == 360


@every_model
def test_refined_tokens_lower_the_error(name: str):
    model, images = make(name).to(DEVICE).eval(), pixels(4).to(DEVICE)
    tokens = [model.encode(images, refine=rounds).image_tokens for rounds in (0, 1)]
    with torch.no_grad():
        before, after = ((model.decode(t).pixel_values.clamp(-1, 1) - images).square().sum() for t in tokens)
    assert tokens[1].device.type == DEVICE and after < before
