"""What must hold on a GPU as it does on a CPU. Every test here skips itself without one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hf_vq
from hf_vq.canonical import canonical
from hf_vq.models import quantizers
from hf_vq.models.quantizers import EMAVectorQuantizer, nearest_code

pytestmark = pytest.mark.requires_cuda

FAMILIES = [
    pytest.param(lambda: hf_vq.VQVAEModel(hf_vq.VQVAEConfig(quantizer="gradient")), id="vqvae-gradient"),
    pytest.param(lambda: hf_vq.VQVAEModel(hf_vq.VQVAEConfig(quantizer="ema")), id="vqvae-ema"),
    pytest.param(lambda: hf_vq.SQVAEModel(hf_vq.SQVAEConfig()), id="sqvae"),
]


def pixels(count: int) -> torch.Tensor:
    return 2 * torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)) - 1


def test_the_search_finds_the_nearest_code():
    rows, vectors = torch.randn(300_000, 8, device="cuda"), torch.randn(512, 8, device="cuda")
    chosen = nearest_code(rows, vectors)
    distance = (rows - vectors[chosen]).square().sum(1)
    for start in range(0, len(rows), 30_000):
        best = torch.cdist(rows[start : start + 30_000].double(), vectors.double()).square().amin(1)
        torch.testing.assert_close(distance[start : start + 30_000].double(), best, rtol=1e-4, atol=1e-5)


def test_moving_averages_equal_those_of_the_cpu():
    torch.manual_seed(0)
    here = EMAVectorQuantizer(16, 4, 0.25, 0.9).train()
    there = EMAVectorQuantizer(16, 4, 0.25, 0.9).train().cuda()
    there.load_state_dict(here.state_dict())
    for _ in range(3):
        latents = torch.randn(8, 4, 6, 6)
        here(latents), there(latents.cuda())
        here.step(), there.step()
    torch.testing.assert_close(there.codebook.weight.cpu(), here.codebook.weight)
    torch.testing.assert_close(there.cluster_size.cpu(), here.cluster_size)


@pytest.mark.parametrize("make", FAMILIES)
def test_loss_and_gradients_equal_those_of_the_cpu(make, monkeypatch):
    monkeypatch.setattr(quantizers, "gumbel_noise", torch.zeros_like)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    here, there = make().train(), make().train().cuda()
    there.load_state_dict(here.state_dict())
    loss, loss_there = here(pixels(8)).loss, there(pixels(8).cuda()).loss
    torch.testing.assert_close(loss_there.cpu(), loss, rtol=1e-4, atol=1e-4)
    loss.backward(), loss_there.backward()
    for (name, parameter), twin in zip(here.named_parameters(), there.parameters(), strict=True):
        if parameter.grad is not None:
            difference = (twin.grad.cpu() - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-6)
            assert difference < 1e-2, name


@pytest.mark.parametrize("make", FAMILIES)
def test_canonical_tokens_differ_from_the_cpus_in_near_ties_only(make):
    torch.manual_seed(0)
    model = make().eval()
    with canonical(model):
        here = model.encode(pixels(256))
        there = model.cuda().encode(pixels(256).cuda())
    differing = there.image_tokens.cpu() != here.image_tokens
    assert differing.float().mean() <= 1e-4
    rows = here.last_hidden_state.movedim(1, -1)[differing].double()
    distances = torch.cdist(rows, model.quantizer.vectors().detach().cpu().double()).square().topk(2, largest=False)
    best, second = distances.values.unbind(1)
    assert ((second - best) / second < 1e-4).all()


@pytest.mark.uninitialised_memory
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("make", FAMILIES)
def test_bf16_training_learns(make, compiled):
    torch.manual_seed(0)
    model = make().train().cuda()
    forward = torch.compile(model, fullgraph=True) if compiled else model
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    images = torch.nn.functional.interpolate(pixels(32)[:, :, :2, :2], size=32).cuda()
    errors = []
    for _ in range(60):
        with torch.autocast("cuda", torch.bfloat16):
            output = forward(images)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.step()
        errors.append((output.decoded_pixel_values.float() - images).square().mean().item())
    assert errors[-1] < 0.8 * errors[0]
    assert model.quantizer.codebook.weight.dtype == torch.float32


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
