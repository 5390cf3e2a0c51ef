"""A language model that draws and reads images: text, image tokens, and transformers' own Trainer.

    accelerate launch training/train.py                              # the tokenizer of the embedded digits, minutes
    python training/examples/language_model.py                       # a small Llama on captions and digits
    hf-vq tokenize model_cards/sqvae-cifar10 --dataset_name uoft-cs/cifar10 --output cifar10-tokens
    python training/examples/language_model.py --image_tokenizer model_cards/sqvae-cifar10 \\
        --dataset_name cifar10-tokens --output_dir output/language-cifar10

A Llama from a config and a text tokenizer trained on the captions; `VQBridge` joins them with an image tokenizer. Half
of the sequences have the caption first, half the image; some hold two of each. Then, with plain `generate`: images
drawn from captions, captions of test images, and both in one sequence. Model and bridge are saved to --output_dir, from
where `AutoModelForCausalLM` and `AutoProcessor` load them.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from digits import features, fit_reader, load_digits_images
from engine import share_cores
from hf_vq import ImageTokenizer, VQBridge
from hf_vq.evaluation import to_uint8
from hf_vq.pictures import save_samples
from hf_vq.streams import decode_image, describe_tokens, load_images
from hf_vq.token_batches import find_classes

OF_DIGITS = "output/sqvae-digits"
END = "<|end|>"
PHRASES = ("a photo of a {}", "a {}", "this is a {}", "a picture that shows a {}", "one {}, please")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ASKED = PHRASES[0]
AT_ONCE, DRAWS = 100, 64
SAMPLING: dict[str, Any] = {"do_sample": True, "top_k": 0, "top_p": 0.9}


class Labelled(NamedTuple):
    """A split: image_tokens (N, h * w * M), labels (N,), and perhaps `drawn` (draws, N, h * w * M), the tokens that an
    SQ-VAE draws for the same images."""

    image_tokens: Tensor
    labels: Tensor
    drawn: Tensor | None = None


class Captioned(Dataset):
    """Sequences of an image and its caption, made anew each time: which phrase, and which of both comes first.

    Where the image comes first its tokens may be `drawn` ones: a few digits are read better through many of them.

    Args:
        data: tokens and labels.
        names: of the labels.
        pairs: share of sequences with two images and captions.
    """

    def __init__(self, data: Labelled, names: Sequence[str], pairs: float = 0.2) -> None:
        self.data, self.names, self.pairs = data, names, pairs

    def __len__(self) -> int:
        return len(self.data.labels)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        caption_first = random.random() < 0.5
        chosen = [index, random.randrange(len(self))] if random.random() < self.pairs else [index]
        parts: list[dict[str, Any]] = [part for one in chosen for part in self._pair(one, caption_first)]
        return [*parts, {"type": "text", "text": END}]

    def _pair(self, index: int, caption_first: bool) -> list[dict[str, Any]]:
        text = random.choice(PHRASES).format(self.names[int(self.data.labels[index])])
        caption: dict[str, Any] = {"type": "text", "text": text}
        image: dict[str, Any] = {"type": "image", "image_tokens": self.data.image_tokens[index]}
        if not caption_first and self.data.drawn is not None:
            image["image_tokens"] = random.choice(self.data.drawn)[index]
        return [caption, image] if caption_first else [image, caption]


def train_text_tokenizer(names: Sequence[str]) -> PreTrainedTokenizerBase:
    """Byte-level BPE of all captions."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([phrase.format(name) for phrase in PHRASES for name in names], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def load_data(name: str, tokenizer: ImageTokenizer) -> tuple[Labelled, Labelled, list[str]]:
    """Training and test data, and the names of the classes: the embedded digits, images, or tokens of images."""
    if name == "digits":
        splits = load_digits_images(validation_size=0)
        train = tokenized(splits.train, "label", tokenizer)._replace(drawn=draw_tokens(splits.train, tokenizer))
        return train, tokenized(splits.test, "label", tokenizer), list(NUMBERS)
    description = describe_tokens(name)
    train, test = (
        load_images(name, train_split=split, validation_size=0, take_tokens=description is not None).train
        for split in ("train", "test")
    )
    column, names = find_classes(train, None)
    if column is None:
        raise ValueError(f"{name} has no column of classes to make captions of")
    if description is None:
        return tokenized(train, column, tokenizer), tokenized(test, column, tokenizer), names
    description.check_made_by(tokenizer.model)
    return ready_made(train, column), ready_made(test, column), names


def ready_made(table: Any, column: str) -> Labelled:
    """The tokens that a table holds."""
    return Labelled(torch.tensor(table["image_tokens"]), torch.tensor(table[column]))


def tokenized(table: Any, column: str, tokenizer: ImageTokenizer) -> Labelled:
    """The tokens of a table's images."""
    ids = tokenizer((decode_image(cell) for cell in table["image"]), return_tensors="pt")["input_ids"]
    return Labelled(ids, torch.tensor(table[column]))


@torch.no_grad()
def draw_tokens(table: Any, tokenizer: ImageTokenizer) -> Tensor:
    """Tokens (draws, N, h * w * M) of a table's images, drawn from the tokenizer's posterior."""
    processor: Any = tokenizer.processor
    images = [decode_image(cell) for cell in table["image"]]
    pixel_values = processor(images, return_tensors="pt")["pixel_values"]
    draws = (tokenizer.model.encode(pixel_values, sample=True).image_tokens for _ in range(DRAWS))
    return torch.stack([tokens.flatten(1) for tokens in draws])


def make_model(bridge: VQBridge, length: int) -> Any:
    """A small Llama of the text, which then learns to know images."""
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 384}
    sizes |= {"num_hidden_layers": 4, "num_attention_heads": 4}
    end = bridge.tokenizer.convert_tokens_to_ids(END)
    ends: dict[str, Any] = {"eos_token_id": end, "pad_token_id": end, "bos_token_id": None}
    config = LlamaConfig(vocab_size=min(bridge.layout.marker_ids), max_position_embeddings=length, **sizes, **ends)
    model = LlamaForCausalLM(config)
    bridge.resize_embeddings(model)
    return model


def train(model: Any, bridge: VQBridge, data: Captioned, options: argparse.Namespace) -> None:
    """transformers' Trainer; the bridge is the collator."""

    def collate(batch: list[Any]) -> dict[str, Tensor]:
        return dict(bridge(parts=batch, labels="all", padding=True, return_tensors="pt"))

    arguments = TrainingArguments(
        str(options.output_dir / "trainer"),
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        weight_decay=0.1,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=options.seed,
    )
    Trainer(model, arguments, train_dataset=data, data_collator=collate).train()


@torch.no_grad()
def draw(model: Any, bridge: VQBridge, captions: Sequence[str]) -> list[list[dict[str, Any]]]:
    """What the model goes on with after each caption and image-start, as parts; the image is the last."""
    found = []
    for start in range(0, len(captions), AT_ONCE):
        some = list(captions[start : start + AT_ONCE])
        prompt = bridge(text=some, padding=True, padding_side="left", return_tensors="pt", add_image_start=True)
        grid = bridge.logits_processor()
        new = bridge.layout.length - 1
        sequences = model.generate(**prompt, **SAMPLING, max_new_tokens=new, logits_processor=[grid])
        found += bridge.to_parts(sequences)
    return found


@torch.no_grad()
def name_images(model: Any, bridge: VQBridge, image_tokens: Tensor, names: Sequence[str]) -> list[int]:
    """The class whose name the model writes after each image, the likeliest words; -1 for another word."""
    asking = {"type": "text", "text": ASKED.format("").rstrip()}
    found = []
    for some in image_tokens.split(AT_ONCE):
        prompts = [[{"type": "image", "image_tokens": one}, asking] for one in some]
        prompt = bridge(parts=prompts, padding=True, padding_side="left", return_tensors="pt")
        grid = bridge.logits_processor(allow_images=False)
        sequences = model.generate(**prompt, do_sample=False, max_new_tokens=8, logits_processor=[grid])
        said = [parts[-1]["text"].strip().removeprefix(asking["text"]).strip() for parts in bridge.to_parts(sequences)]
        found += [names.index(word) if word in names else -1 for word in said]
    return found


def write_on(model: Any, bridge: VQBridge, caption: str, max_length: int) -> list[dict[str, Any]]:
    """A whole sequence, text and images as they come, from a caption on."""
    prompt = bridge(text=caption, return_tensors="pt")
    grid = bridge.logits_processor(max_length)
    sequences = model.generate(**prompt, **SAMPLING, max_length=max_length, logits_processor=[grid])
    return bridge.to_parts(sequences)[0]


def measure(
    model: Any, bridge: VQBridge, test: Labelled, names: list[str], options: argparse.Namespace
) -> dict[str, float]:
    """Shares of images that are what their caption says, and of captions that are what their image shows."""
    torch.manual_seed(options.seed)
    asked = [label for label in range(len(names)) for _ in range(options.samples)]
    drawn = [parts[-1]["image"] for parts in draw(model, bridge, [ASKED.format(names[label]) for label in asked])]
    processor: Any = bridge.image_tokenizer.processor
    pixels = to_uint8(processor(drawn, return_tensors="pt")["pixel_values"], processor)
    save_samples(options.output_dir / "drawn.png", pixels.unflatten(0, (len(names), -1))[:, :8], names)
    said = torch.tensor(name_images(model, bridge, test.image_tokens, names))
    found = {"test images named right": float((said == test.labels).float().mean())}
    if options.dataset_name == "digits":
        right = torch.from_numpy(fit_reader().predict(features(drawn))) == torch.tensor(asked)
        found[f"of {len(drawn)} drawn digits, what the caption says"] = float(right.float().mean())
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--image_tokenizer", default=OF_DIGITS, help="(default: %(default)s)")
    parser.add_argument("--dataset_name", default="digits", help="digits, images with classes, or their tokens")
    parser.add_argument("--output_dir", type=Path, default=Path("output/language-digits"))
    parser.add_argument("--max_steps", type=int, default=2000, help="(default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="(default: %(default)s)")
    parser.add_argument("--samples", type=int, default=50, help="images to draw of each class (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    share_cores()
    set_seed(options.seed)
    if options.image_tokenizer == OF_DIGITS and not Path(OF_DIGITS).is_dir():
        parser.error(f"there is no {OF_DIGITS} yet: accelerate launch training/train.py makes it, or --image_tokenizer")
    image_tokenizer = ImageTokenizer.from_pretrained(options.image_tokenizer)
    train_data, test_data, names = load_data(options.dataset_name, image_tokenizer)
    bridge = VQBridge(train_text_tokenizer(names), image_tokenizer)
    length = 2 * bridge.layout.length + 64
    model = make_model(bridge, length)
    train(model, bridge, Captioned(train_data, names), options)
    model.eval()
    model.save_pretrained(options.output_dir)
    bridge.save_pretrained(options.output_dir)
    found = measure(model, bridge, test_data, names, options)
    (options.output_dir / "measured.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    for what, share in found.items():
        print(f"{what}: {share:.1%}")
    parts = write_on(model, bridge, ASKED.format(names[-1]), length)
    print("A sequence:", " ".join(part.get("text", "<image>").strip() for part in parts))
    print(f"Model, bridge and drawn.png are in {options.output_dir}.")


if __name__ == "__main__":
    main()
