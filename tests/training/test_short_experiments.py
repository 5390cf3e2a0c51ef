"""The experiments on self-annealing and on what is said of VQ-VAE: their pure parts, and what they hold still."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import self_annealing
import self_annealing_report as annealing
import vqvae_claims
import vqvae_claims_report as claims
from hf_vq import VQVAEConfig, VQVAEModel
from kept_jobs import Job, run_jobs

BENCHMARKS = Path(__file__).resolve().parents[2] / "training" / "benchmarks"

calls: list[int] = []


@pytest.fixture(autouse=True)
def one_thread():
    """Jobs of one process set torch to one thread."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    calls.clear()


def double(count: Callable[[int], object], number: int) -> dict[str, int]:
    if number < 0:
        raise ValueError("a job that fails")
    calls.append(number)
    count(number)
    return {"doubled": 2 * number}


def double_or_die(count: Callable[[int], object], number: int) -> dict[str, int]:
    if number < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return double(count, number)


# Jobs.


def jobs_of(function: Callable[..., dict[str, int]] = double, **numbers: int) -> dict[str, Job]:
    return {name: Job(function, {"number": number}, abs(number)) for name, number in numbers.items()}


def test_a_job_runs_once(tmp_path):
    first = run_jobs(tmp_path, jobs_of(one=1, two=2), 0)
    assert {name: numbers["doubled"] for name, numbers in first.items()} == {"one": 2, "two": 4}
    assert run_jobs(tmp_path, jobs_of(one=1, two=2), 0) == first
    assert calls == [1, 2]


def test_numbers_of_other_settings_are_not_replaced(tmp_path):
    first = run_jobs(tmp_path, jobs_of(one=1), 0)
    with pytest.raises(ValueError, match="number is 1 there and 3 here"):
        run_jobs(tmp_path, jobs_of(two=2, one=3), 0)
    assert run_jobs(tmp_path, jobs_of(one=1), 0) == first
    assert calls == [1]


def test_a_job_that_fails_keeps_no_other_from_its_turn(tmp_path):
    with pytest.raises(SystemExit, match=r"(?s)1 of 2 trainings failed.*bad: ValueError: a job that fails"):
        run_jobs(tmp_path, jobs_of(bad=-1, good=1), 0)
    assert calls == [1]
    assert [path.name for path in tmp_path.glob("*.json")] == ["good.json"]
    assert "a job that fails" in (tmp_path / "bad.error.txt").read_text()


def test_a_job_that_was_killed_is_told_by_its_exit_code(tmp_path):
    with pytest.raises(SystemExit, match="bad: ended with exit code -9 and without a word"):
        run_jobs(tmp_path, jobs_of(double_or_die, bad=-1, good=1), 2)
    assert json.loads((tmp_path / "good.json").read_text())["doubled"] == 2


def count_for_ever(count: Callable[[int], object], number: int) -> dict[str, int]:
    Path(str(number)).write_text(str(os.getpid()))
    while True:
        time.sleep(0.05)
        count(1)


KILLED = """
import sys
sys.path[:0] = sys.argv[1:]
from pathlib import Path
from test_short_experiments import count_for_ever, jobs_of
from kept_jobs import run_jobs

BENCHMARKS = Path(__file__).resolve().parents[2] / "training" / "benchmarks"
if __name__ == "__main__":
    run_jobs(Path("jobs"), jobs_of(count_for_ever, endless=1), 1)
"""


def test_jobs_end_with_those_who_started_them(tmp_path):
    (tmp_path / "start.py").write_text(KILLED)
    paths = [str(Path(__file__).parent), *map(str, (BENCHMARKS, BENCHMARKS.parent, BENCHMARKS.parents[1] / "src"))]
    starter = subprocess.Popen([sys.executable, "start.py", *paths], cwd=tmp_path, stderr=subprocess.DEVNULL)
    pid_file = tmp_path / "1"
    wait_until(lambda: pid_file.exists() and pid_file.read_text())
    starter.kill()
    starter.wait()
    wait_until(lambda: not is_running(int(pid_file.read_text())))


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Whether the process is there, and not only its exit code that nobody asked for."""
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


# Self-annealing: what is held still, and what is watched.


@pytest.mark.parametrize("steps", [1, 20, 1718, 5154])
def test_the_first_and_the_last_step_are_watched(steps):
    points = self_annealing.points_to_watch(steps)
    assert min(points) == 1 and max(points) == steps and len(points) <= 85


def test_under_a_fixed_decoder_only_encoder_and_variance_learn(tmp_path):
    self_annealing.make_model(10, 0, {**self_annealing.MODEL, "codebook_size": 8}).save_pretrained(tmp_path)
    model = self_annealing.with_fixed_decoder(str(tmp_path), 0.01)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pixels = torch.randint(0, 256, (64, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    self_annealing.train_short(model, pixels, epochs=1, batch_size=32, learning_rate=1e-3, seed=0)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[0] for name in moved} == {"encoder", "quantizer"}
    assert {name for name in moved if name.startswith("quantizer")} == {
        "quantizer.variance.log_ratio",
        "quantizer.temperature.steps",
    }
    assert model.observation_variance.tolist() == pytest.approx([0.01])
    assert float(model.quantizer.scalars()["temperature"]) == pytest.approx(model.config.temperature_end)


@pytest.mark.parametrize(
    ("ends", "last_fifth", "still"),
    [([10.0, 1.0, 1.04], 0.01, True), ([10.0, 1.0, 1.06], 0.01, False), ([10.0, 1.0, 1.0], 0.06, False)],
    ids=["at rest", "the round moved", "its end moved"],
)
def test_a_rung_is_at_rest_when_neither_round_nor_its_end_moves(ends, last_fifth, still):
    assert self_annealing.is_still(ends, last_fifth) is still


def test_the_posterior_is_that_of_the_model_in_evaluation():
    model = self_annealing.make_model(10, 0, {**self_annealing.MODEL, "codebook_size": 8}).train()
    numbers = self_annealing.posterior(model, torch.zeros(4, 1, 28, 28))
    assert model.training
    assert 0 <= numbers["posterior_entropy"] <= math.log(8) + 1e-5
    assert 0 <= numbers["drawn_argmax"] <= 1
    assert numbers == self_annealing.posterior(model, torch.zeros(4, 1, 28, 28))


# Self-annealing: what the numbers say.


def training(sigma2: list[float], phi2: list[float], entropy: list[float], drawn: list[float]) -> list[dict]:
    rows = zip(sigma2, phi2, entropy, drawn, strict=True)
    names = ("observation_variance", "dequantization_variance", "posterior_entropy", "drawn_argmax")
    steps = (1, 100, 200, 300, 400)
    return [
        {"step": step, "latent_variance": 1.0, **dict(zip(names, row, strict=True))}
        for step, row in zip(steps, rows, strict=False)
    ]


def annealing_results(mse_of_trained: float = 1e-3, optima: tuple[float, ...] = (1.0, 2.0, 3.0)) -> dict:
    rows = training([0.5, 0.4, 0.3, 0.2], [9.0, 6.0, 3.0, 1.0], [5.0, 3.0, 1.0, 0.1], [0.01, 0.3, 0.8, 0.95])
    ladder = {f"fixed-{value}": {"initial_variance": value, "mse": 2e-3 + 1e-4 * value} for value in (1.0, 10.0)}
    trained = {
        f"trained-seed-{seed}": {"mse": mse_of_trained + 1e-5 * seed, "rows": rows, "initial_variance": 10.0}
        for seed in range(2)
    }
    rungs = {
        f"rung-{sigma2}": {"observation_variance": sigma2, "round_ends": [10.0, optimum], "converged": True}
        for sigma2, optimum in zip((0.01, 0.1, 1.0), optima, strict=True)
    }
    return {**ladder, **trained, **rungs}


@pytest.mark.parametrize(
    ("phi2", "outcome"),
    [([9.0, 6.0, 3.0, 1.0], "confirmed"), ([9.0, 1.0, 3.0, 6.0], "confirmed in part"), ([9.0, 9, 9, 20.0], "refuted")],
    ids=["together", "only at the end", "rises"],
)
def test_variances_fall_together_or_not(phi2, outcome):
    rows = training([0.5, 0.4, 0.3, 0.2], phi2, [1.0] * 4, [0.5] * 4)
    assert annealing.variances_fall(rows, 10.0)[0] == outcome


@pytest.mark.parametrize(
    ("entropy", "drawn", "outcome"),
    [
        ((5.0, 0.1), (0.1, 0.95), "confirmed"),
        ((5.0, 3), (0.1, 0.3), "confirmed in direction"),
        ((3, 5.0), (0.3, 0.1), "refuted"),
    ],
    ids=["deterministic", "on the way", "more random"],
)
def test_quantization_becomes_deterministic_or_not(entropy, drawn, outcome):
    rows = training([1.0, 1.0], [1.0, 1.0], list(entropy), list(drawn))
    assert annealing.becomes_deterministic(rows, 256)[0] == outcome


@pytest.mark.parametrize(
    ("mse", "outcome"),
    [(1e-3, "confirmed"), (2.092e-3, "undecided"), (4e-3, "refuted")],
    ids=["better", "within the seeds", "worse"],
)
def test_a_trained_variance_beats_the_fixed_ones_or_not(mse, outcome):
    assert annealing.trained_beats_fixed(annealing_results(mse_of_trained=mse))[0] == outcome


@pytest.mark.parametrize(
    ("optima", "moving", "outcome"),
    [
        ((1.0, 2.0, 3.0), None, "confirmed"),
        ((1.0, 3.0, 2.0), None, "refuted"),
        ((1.0, 2.0, 3.0), 1, "confirmed in order"),
    ],
    ids=["monotone", "not monotone", "one rung not at rest"],
)
def test_the_optimum_falls_with_the_decoders_variance_or_not(optima, moving, outcome):
    rungs = annealing.rungs_of(annealing_results(optima=optima))
    if moving is not None:
        rungs[moving] = {**rungs[moving], "converged": False}
    assert annealing.optimum_falls(rungs)[0] == outcome


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [([1, 2, 3, 4], [10, 20, 30, 40], 1.0), ([1, 2, 3, 4], [4, 3, 2, 1], -1.0), ([1, 2, 3, 4], [2, 1, 4, 3], 0.6)],
    ids=["same order", "reversed", "two swaps"],
)
def test_rank_correlation(first, second, expected):
    assert annealing.rank_correlation(first, second) == pytest.approx(expected)


def test_the_picture_and_the_verdict_of_self_annealing(tmp_path):
    results = annealing_results()
    annealing.draw(tmp_path / "figure.png", results, 256)
    with Image.open(tmp_path / "figure.png") as picture:
        assert picture.width > 1000
    text = annealing.verdict(results, 256)
    assert text.count("confirmed.**") == 4


# VQ-VAE: one term without stop-gradients is two at beta = 1.


def gradients(model: VQVAEModel, pixel_values: torch.Tensor) -> torch.Tensor:
    model.train()(pixel_values).loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


@pytest.mark.parametrize(("beta", "same"), [(1.0, True), (0.25, False)], ids=["beta 1", "beta 0.25"])
def test_without_stop_gradients_at_weight_one_is_the_paper_at_beta_one(beta, same):
    net = vqvae_claims.NET | {"hidden_channels": [8, 8], "residual_channels": 8, "codebook_size": 16, "codebook_dim": 4}
    pixel_values = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.manual_seed(0)
    plain = vqvae_claims.WithoutStopGradientModel(VQVAEConfig(**net, quantizer="gradient", commitment_weight=1.0))
    torch.manual_seed(0)
    stopped = VQVAEModel(VQVAEConfig(**net, quantizer="gradient", commitment_weight=beta))
    ours, theirs = gradients(plain, pixel_values), gradients(stopped, pixel_values)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-7) is same


def claim_results(**changed: dict) -> dict:
    results = {}
    for name in vqvae_claims.variants():
        for seed in (0, 1):
            rows = [
                {"step": step, "latent_norm": 4.0, "code_norm": 3.0, "distance": 2.0, "perplexity": 30.0}
                for step in (1, 5, 100)
            ]
            numbers = {"psnr": 20.0 + 0.1 * seed, "perplexity": 40.0 + seed, "rows": rows}
            results[f"{name}-seed-{seed}"] = numbers | changed.get(name.replace("-", "_").replace(".", "_"), {})
    return results


LONG = [
    {"step": step, "latent_norm": 4e3, "code_norm": 3.0, "distance": 9.0, "perplexity": 30.0} for step in (1, 5, 100)
]


@pytest.mark.parametrize(
    ("claim", "changed", "outcome"),
    [
        (claims.insensitive, {}, "confirmed"),
        (claims.insensitive, {"beta_2": {"psnr": 19.0}}, "refuted"),
        (claims.grows, {}, "refuted"),
        (claims.grows, {"bare_beta_0": {"rows": LONG}}, "confirmed for a body without norms"),
        (claims.grows, {"bare_beta_0": {"rows": LONG}, "beta_0": {"rows": LONG}}, "confirmed"),
        (claims.chases, {}, "refuted"),
        (claims.chases, {"no_stop_1_25": {"psnr": 15.0}}, "confirmed"),
        (claims.more_codes, {}, "undecided"),
        (claims.more_codes, {"soft_1": {"perplexity": 90.0}}, "in part"),
        (claims.more_codes, {f"soft_{m}": {"perplexity": 90.0} for m in (1, 5, 10)}, "confirmed"),
        (claims.better_images, {"soft_5": {"psnr": 15.0}}, "refuted"),
    ],
)
def test_verdicts_follow_the_numbers(claim, changed, outcome):
    assert claim(claim_results(**changed))[0] == outcome


def test_different_gradients_are_not_called_the_same():
    assert "not the gradients of" in claims.chases(claim_results(no_stop_1={"rows": LONG}))[1]
    assert "the same gradients as" in claims.chases(claim_results())[1]


def test_every_claim_has_a_picture(tmp_path):
    claims.draw(tmp_path, claim_results())
    assert {path.name for path in tmp_path.iterdir()} == {
        "commitment.png",
        "no_commitment.png",
        "stop_gradient.png",
        "soft_em.png",
    }
    assert claims.verdict(claim_results()).count("\n- **") == 4
