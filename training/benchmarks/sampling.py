"""Speed of priors: cached sampling against the loop that runs everything again, and against transformers' GPT-2.

    python training/benchmarks/sampling.py

PixelCNN, 10 layers of 128, batches of 16: `generate` against the same loop without a cache, for each token the whole
grid; at 32 x 32 that loop runs 32 evenly spaced steps, scaled to 1024. Transformer, 6 layers of 256 on 8 x 8, float32:
`generate` against GPT-2's of the same width, depth and length, and against a bare loop over a static cache; and tokens
per second of a training step, again with GPT-2's. All contenders of a row take turns; medians of the rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, StaticCache

from hf_vq import PixelCNNPrior, PixelCNNPriorConfig, TransformerPrior, TransformerPriorConfig

CODES = 512
STEPS_OF_THE_LOOP = 32
Contenders = dict[str, Callable[[], float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"# Speed of priors\n\n{options.threads} threads, torch {torch.__version__}.")
    print("\n## PixelCNN, 10 layers of 128, batch 16\n\n| grid | generate, s | whole grid, s | times as fast |")
    print("|---|---:|---:|---:|")
    for side in (8, 32):
        ours, loop = race(pixelcnn(side, options.device), options.rounds if side == 8 else 1).values()
        print(f"| {side} x {side} | {ours:.3f} | {loop:.3f} | {loop / ours:.1f} |", flush=True)
    print("\n## Transformer, 6 layers of 256, 64 tokens\n")
    print("| batch | generate, s | GPT-2's, s | bare static loop, s | over the faster |\n|---:|---:|---:|---:|---:|")
    for batch in (1, 16, 64):
        ours, *others = race(transformer(batch, options.device), options.rounds).values()
        cells = " | ".join(f"{seconds:.3f}" for seconds in (ours, *others))
        print(f"| {batch} | {cells} | {ours / min(others):.2f} |", flush=True)
    print("\n## Training, batch 64, tokens per second\n\n| ours | GPT-2's | times as fast |\n|---:|---:|---:|")
    ours, gpt2 = race(training(64, options.device), options.rounds).values()
    print(f"| {64 * 64 / ours:,.0f} | {64 * 64 / gpt2:,.0f} | {gpt2 / ours:.2f} |")


def race(contenders: Contenders, rounds: int) -> dict[str, float]:
    """Seconds of each contender, medians over rounds in which they take turns, after one that does not count."""
    for contender in contenders.values():
        contender()
    turns = [{name: contender() for name, contender in contenders.items()} for _ in range(rounds)]
    return {name: statistics.median(turn[name] for turn in turns) for name in contenders}


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds of one call."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def pixelcnn(side: int, device: str) -> Contenders:
    """`generate`, and the whole grid for each token."""
    config = PixelCNNPriorConfig(codebook_size=CODES, grid_size=side, hidden_size=128, num_hidden_layers=10)
    with torch.device(device):
        prior = PixelCNNPrior(config).eval()
    tokens = torch.randint(CODES, (16, side, side), device=device)
    sequences = prior.sequences(tokens)
    places = torch.linspace(1, side * side, min(STEPS_OF_THE_LOOP, side * side)).round().int().tolist()

    @torch.no_grad()
    def loop() -> None:
        for _ in places:
            # Whatever the token, the loop of those who have no cache runs the whole grid.
            logits = prior(sequences, use_cache=False).logits[:, -1]
            torch.multinomial(logits.softmax(-1), 1)

    ours = lambda: timed(lambda: prior.generate(class_labels=torch.full((16,), -1)), device)  # noqa: E731  a name in place of a def
    return {"ours": ours, "loop": lambda: timed(loop, device) * side * side / len(places)}


def make_transformer(device: str) -> TransformerPrior:
    """6 layers of 256 on 8 x 8."""
    config = TransformerPriorConfig(codebook_size=CODES, grid_size=8, hidden_size=256, num_hidden_layers=6)
    with torch.device(device):
        return TransformerPrior(config)


def make_gpt2(device: str) -> GPT2LMHeadModel:
    """GPT-2 of the same width, depth and length."""
    config = GPT2Config(
        vocab_size=CODES + 1, n_positions=65, n_embd=256, n_layer=6, n_head=4, bos_token_id=CODES, eos_token_id=None
    )
    with torch.device(device):
        return GPT2LMHeadModel(config)


def transformer(batch: int, device: str) -> Contenders:
    """`generate` of ours and of GPT-2, and a loop that does nothing but step and draw."""
    prior, gpt2 = make_transformer(device).eval(), make_gpt2(device).eval()
    start = torch.full((batch, 1), CODES, device=device)
    sampling = {"do_sample": True, "top_k": 0, "max_new_tokens": 64}

    @torch.no_grad()
    def bare() -> Tensor:
        cache, token = StaticCache(config=prior.config, max_cache_len=64), start
        for _ in range(64):
            logits = prior(token, past_key_values=cache).logits[:, -1]
            token = torch.multinomial(logits.softmax(-1), 1)
        return token

    return {
        "ours": lambda: timed(lambda: prior.generate(start), device),
        "gpt2": lambda: timed(lambda: gpt2.generate(start, **sampling), device),
        "bare": lambda: timed(bare, device),
    }


def training(batch: int, device: str) -> Contenders:
    """A forward, a backward and an optimizer step on 64 tokens each."""
    contenders: Contenders = {}
    for name, model in (("ours", make_transformer(device)), ("gpt2", make_gpt2(device))):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        input_ids = torch.randint(CODES, (batch, 65), device=device)
        input_ids[:, 0] = CODES

        def step(model=model, optimizer=optimizer, input_ids=input_ids) -> None:  # type: ignore[no-untyped-def]  # defaults bind
            model(input_ids=input_ids, labels=input_ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        contenders[name] = lambda step=step: timed(step, device)  # type: ignore[misc]  # the same
    return contenders


if __name__ == "__main__":
    main()
