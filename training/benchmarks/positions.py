"""Learned positions of two dimensions against rotary ones, in the Transformer prior.

    python training/benchmarks/positions.py model_cards/sqvae-cifar10 --dataset_name uoft-cs/cifar10

Trains the same small prior on the same tokens three times: with learned embeddings of row and column added to the
input, as `TransformerPrior` has them; with queries and keys rotated by the place in the sequence (Su et al. 2021, arXiv
2104.09864); and with half of each head rotated by the row and half by the column. Measures bits per token on held-out
training images.

Writes table.md and a JSON file for each training to output/positions; a second start goes on with what is missing.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel

from hf_vq import TransformerPrior, TransformerPriorConfig
from hf_vq.files import replace_file
from hf_vq.models.modeling_transformer_prior import CausalAttention, TransformerTrunk
from hf_vq.prior_evaluation import evaluate_prior
from kept_jobs import Count, Job, Numbers, run_jobs
from short_priors import AT_ONCE, tokens_of, train_prior
from short_runs import load_pixels

HELD_OUT = 5000
BASE = 10_000
MODEL: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 4}
PLAN: dict[str, Any] = {"epochs": 2, "batch_size": 64, "learning_rate": 2e-3}
WAYS = ("learned rows and columns", "rotary by sequence", "rotary by row and column")


class RotaryAttention(CausalAttention):
    """Attention whose queries and keys are rotated; `angles` (S, W / heads / 2) say how far at each place."""

    angles: Tensor

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().project(hidden)
        angles = self.angles[: hidden.shape[1]]
        return rotated(query, angles), rotated(key, angles), value


class RotaryTrunk(TransformerTrunk):
    """The same blocks without learned positions."""

    def __init__(self, config: TransformerPriorConfig, by_axes: bool) -> None:
        super().__init__(config)
        for table in (self.row, self.column):
            nn.init.zeros_(table.weight).requires_grad_(False)
        size = config.hidden_size // config.num_attention_heads
        for layer in self.layers:
            attention: Any = layer.attention
            attention.__class__ = RotaryAttention
            attention.register_buffer("angles", rotations(config.grid, size, by_axes), persistent=False)


class RotaryPrior(TransformerPrior):
    """A Transformer prior with rotary positions; without a cache."""

    by_axes = False

    def make_trunk(self) -> nn.Module:
        return RotaryTrunk(self.config, self.by_axes)

    def _init_weights(self, module: nn.Module) -> None:
        """As everywhere, but for the positions that are not there."""
        frozen = isinstance(module, nn.Embedding) and not module.weight.requires_grad
        if not frozen:
            super()._init_weights(module)


class AxialRotaryPrior(RotaryPrior):
    """Half of each head rotated by the row, half by the column."""

    by_axes = True


CLASSES = dict(zip(WAYS, (TransformerPrior, RotaryPrior, AxialRotaryPrior), strict=True))


def rotations(grid: tuple[int, int], size: int, by_axes: bool) -> Tensor:
    """Angles (1 + h * w, size / 2): the start token stands at place 0, or on a row of its own above the first."""
    height, width = grid
    places = torch.arange(1 + height * width)
    if not by_axes:
        return places[:, None] * frequencies(size // 2)
    rows, columns = (places - 1).div(width, rounding_mode="floor"), (places - 1) % width
    parts = [axis[:, None] * frequencies(size // 4) for axis in (rows, columns)]
    return torch.cat(parts, dim=1)


def frequencies(count: int) -> Tensor:
    """`count` angles per place, from 1 down to nearly 1 / BASE."""
    return BASE ** -(torch.arange(count) / count)


def rotated(vectors: Tensor, angles: Tensor) -> Tensor:
    """Vectors (B, heads, S, size), each pair of components (i, i + size / 2) turned by its angle."""
    cosine, sine = angles.cos().to(vectors.dtype), angles.sin().to(vectors.dtype)
    first, second = vectors.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


def train(count: Count, tokens: str, way: str, model: Mapping[str, Any], plan: Mapping[str, Any], seed: int) -> Numbers:
    """One prior, and its bits per token on the held-out images."""
    image_tokens = load_file(tokens)["image_tokens"]
    torch.manual_seed(seed)
    prior = CLASSES[way](TransformerPriorConfig(**model))
    train_prior(prior, image_tokens[:-HELD_OUT], **plan, seed=seed, count=count)
    batches = ({"image_tokens": part} for part in image_tokens[-HELD_OUT:].split(AT_ONCE))
    return evaluate_prior(prior, batches).metrics


def keep_tokens(path: Path, tokenizer: str, dataset_name: str) -> dict[str, Any]:
    """Writes the tokens of the training split, unless they are there; returns the sizes that a prior needs."""
    model = AutoModel.from_pretrained(tokenizer).eval()
    if not path.exists():
        image_tokens = tokens_of(model, load_pixels(dataset_name, "train"))
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda temporary: save_file({"image_tokens": image_tokens}, temporary))
    return {"codebook_size": model.config.codebook_size, "grid_size": list(model.config.grid_size)}


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each training, as Markdown."""
    lines = ["| positions | seed | bits per token, held out |", "|---|--:|--:|"]
    for name, numbers in results.items():
        way, seed = name.rsplit("-seed-", 1)
        lines.append(f"| {way.replace('-', ' ')} | {seed} | {numbers['bits_per_token']:.4f} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("tokenizer", help="a tokenizer of one codebook")
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each kind")
    parser.add_argument("--output_dir", type=Path, default=Path("output/positions"))
    parser.add_argument("--num_processes", type=int, default=1, help="trainings at a time, each on one thread; 0: here")
    options = parser.parse_args()
    tokens = options.output_dir / "tokens.safetensors"
    model = {**MODEL, **keep_tokens(tokens, options.tokenizer, options.dataset_name)}
    images = PLAN["epochs"] * (len(load_file(tokens)["image_tokens"]) - HELD_OUT)
    jobs = {
        f"{way.replace(' ', '-')}-seed-{seed}": Job(
            train, {"tokens": str(tokens), "way": way, "model": model, "plan": PLAN, "seed": seed}, images
        )
        for seed in range(options.seeds)
        for way in WAYS
    }
    text = table(run_jobs(options.output_dir, jobs, options.num_processes))
    (options.output_dir / "table.md").write_text(text, encoding="utf-8")
    print(f"\n{text}")


if __name__ == "__main__":
    main()
