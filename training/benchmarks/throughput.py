"""What reading, decoding, logging and processes cost: images per second of train.py over a bare loop, in one run.

    python training/benchmarks/throughput.py --dataset_name uoft-cs/cifar10

For each precision, in turn and through `accelerate launch` both times: train.py on the data set streamed from Parquet,
and a loop of nothing but forward, backward, optimizer and `model.step()` on tensors in memory, with the same model,
batch and precision. Prints both rates and their ratio.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TRAINING = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TRAINING))

PRECISIONS = {
    "float32": [],
    "bf16": ["--mixed_precision", "bf16"],
    "bf16 + compile": ["--mixed_precision", "bf16", "--torch_compile", "True"],
}
WARM_UP_STEPS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=TRAINING / "configs" / "sqvae_cifar10.yaml")
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10")
    parser.add_argument("--steps", type=int, default=100, help="measured steps of each run")
    parser.add_argument("--rounds", type=int, default=1, help="how often the pair is repeated")
    parser.add_argument("--dataloader_num_workers", type=int, default=0)
    parser.add_argument("--bare", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare is not None:
        print(json.dumps(bare_loop(options.bare)))
        return
    print(f"{'precision':16}{'train.py':>12}{'bare loop':>12}{'ratio':>8}   images per second, ratio of medians")
    for name, flags in PRECISIONS.items():
        flags = ["--config", str(options.config), "--max_train_steps", str(options.steps + WARM_UP_STEPS), *flags]
        trained, bare = [], []
        for _ in range(options.rounds):
            trained.append(rate_of_training(flags, options.dataset_name, options.dataloader_num_workers))
            bare.append(json.loads(launch(Path(__file__), "--bare", *flags).splitlines()[-1]))
        rates = statistics.median(trained), statistics.median(bare)
        print(f"{name:16}{rates[0]:12.1f}{rates[1]:12.1f}{rates[0] / rates[1]:8.3f}", flush=True)


def launch(script: Path, *arguments: str) -> str:
    """Runs a script as users do; returns what it prints."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", str(script), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")
    return result.stdout


def rate_of_training(flags: list[str], dataset_name: str, workers: int) -> float:
    """Images per second of train.py after its warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        # A test or held-out pass would only take time: there is neither.
        extra = ["--dataset_name", dataset_name, "--streaming", "True", "--output_dir", str(run_dir)]
        extra += ["--dataloader_num_workers", str(workers), "--logging_steps", str(WARM_UP_STEPS)]
        launch(TRAINING / "train.py", *flags, *extra, "--validation_size", "0", "--test_split", "none")
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rates = [line["images_per_second"] for line in lines if "loss" in line and line["step"] > WARM_UP_STEPS]
    return statistics.harmonic_mean(rates)


def bare_loop(flags: list[str]) -> float:
    """Images per second of the same model and batch on tensors in memory."""
    import torch
    from transformers import AutoConfig, AutoModel

    from arguments import parse
    from engine import share_cores
    from optimizers import build_optimizer

    run = parse(flags)
    share_cores()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert run.model.model_type is not None
    config = AutoConfig.for_model(run.model.model_type, **run.model_fields)
    model = AutoModel.from_config(config).to(device).train()
    forward = torch.compile(model) if run.engine.torch_compile else model
    optimizer = build_optimizer(model, run.engine)
    size = run.engine.per_device_train_batch_size
    batches = 2 * torch.rand(8, size, config.num_channels, config.image_size, config.image_size, device=device) - 1
    began = time.perf_counter()
    assert run.engine.max_train_steps is not None
    for step in range(run.engine.max_train_steps):
        if step == WARM_UP_STEPS:
            began = synchronised_time(device)
        with torch.autocast(device, torch.bfloat16, enabled=run.engine.mixed_precision == "bf16"):
            loss = forward(batches[step % len(batches)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.step()
    return size * (run.engine.max_train_steps - WARM_UP_STEPS) / (synchronised_time(device) - began)


def synchronised_time(device: str) -> float:
    """The time when the device has done all it was given."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
