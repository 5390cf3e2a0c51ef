"""Text tokenizers of two families, trained on a few words, and tiny language models of three."""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

CORPUS = [f"a photo of a {name}" for name in ("zero", "one", "two", "seven", "cat, or what looks like one")] * 4
LENGTH = 128


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2 and Qwen have it: byte-level BPE, without a start token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    ends = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)


def sentence_pieces() -> PreTrainedTokenizerFast:
    """As Llama 2 has it: pieces with a mark where a word begins, and a start token."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=80, special_tokens=special, unk_token="<unk>")
    )
    ends = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)


def with_start_and_end() -> PreTrainedTokenizerFast:
    """Pieces of sentences between a start and an end token, as some tokenizers put them of their own accord."""
    tokenizer = sentence_pieces()
    ends = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")]
    around = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    tokenizer.backend_tokenizer.post_processor = around
    return tokenizer


TOKENIZERS = {"byte level": byte_level, "sentence pieces": sentence_pieces}


def llama(vocab_size: int) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, max_position_embeddings=LENGTH, **sizes))


def gpt2(vocab_size: int) -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=LENGTH))


def qwen2(vocab_size: int) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "tie_word_embeddings": True}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=vocab_size, max_position_embeddings=LENGTH, **sizes, **more))


MODELS = {"llama": llama, "gpt2": gpt2, "qwen2": qwen2}


def language_model(family: str, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Any:
    """A tiny model of a text tokenizer's vocabulary."""
    torch.manual_seed(seed)
    model = MODELS[family](len(tokenizer)).eval()
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model
