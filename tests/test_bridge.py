"""Text and images in one sequence: built, mapped back, generated on the grid, saved and loaded."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, LogitsProcessor, PreTrainedTokenizerFast

import hf_vq
from hf_vq.bridge import VQBridge
from hf_vq.sequence_rows import IGNORED
from text_tokenizers import MODELS, TOKENIZERS, byte_level, language_model, sentence_pieces, with_start_and_end

TINY: dict[str, Any] = {"codebook_size": 16, "hidden_channels": [8], "residual_channels": 8, "num_residual_blocks": 1}
SIDE = 4


def image_tokenizer(seed: int = 0, **fields: Any) -> hf_vq.ImageTokenizer:
    """Tokens of 8x8 pictures: 4x4 of 16 codes."""
    torch.manual_seed(seed)
    config = hf_vq.SQVAEConfig(image_size=8, **TINY, **fields)
    return hf_vq.ImageTokenizer(hf_vq.SQVAEModel(config).eval(), hf_vq.VQImageProcessor.for_config(config))


def picture(seed: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(params=TOKENIZERS)
def text_tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


def make(tokenizer: Any = None, row_end: bool = False, **fields: Any) -> VQBridge:
    return VQBridge(tokenizer or byte_level(), image_tokenizer(**fields), row_end)


# Sequences.


@pytest.mark.parametrize("row_end", [False, True])
@pytest.mark.parametrize("codebooks", [1, 2])
def test_a_sequence_holds_text_and_tokens_and_maps_back(text_tokenizer: Any, row_end: bool, codebooks: int):
    bridge = make(text_tokenizer, row_end, num_codebooks=codebooks)
    images = [picture(0), picture(1)]
    batch = bridge(images=images, text="a photo<|vq_image|> of a seven <|vq_image|>")
    ids = batch["input_ids"][0]
    expected = bridge.image_tokenizer(images)["input_ids"]
    spans = bridge.layout.spans(ids)
    assert [span.image_tokens for span in spans] == expected
    assert all(span.stop - span.start == 2 + SIDE * SIDE * codebooks + SIDE * row_end for span in spans)

    parts = bridge.to_parts([ids])[0]
    assert [part["type"] for part in parts] == ["text", "image", "text", "image"]
    assert [part["text"].strip() for part in parts if "text" in part] == ["a photo", "of a seven"]
    decoded = bridge.image_tokenizer.batch_decode(expected, [(SIDE, SIDE)] * 2)
    assert [np.asarray(part["image"]).tolist() for part in parts if "image" in part] == [
        np.asarray(image).tolist() for image in decoded
    ]


def test_parts_and_placeholders_give_the_same(text_tokenizer: Any):
    bridge = make(text_tokenizer)
    tokens = bridge.image_tokenizer.encode(picture(3))
    of_text = bridge(images=[picture(2), picture(3)], text=["a <|vq_image|> photo<|vq_image|>", "seven"])
    parts: list[Any] = [
        [
            {"type": "text", "text": "a "},
            {"type": "image", "image": picture(2)},
            {"type": "text", "text": " photo"},
            {"type": "image", "image_tokens": torch.tensor(tokens).view(SIDE, SIDE)},
        ],
        [{"type": "text", "text": "seven"}],
    ]
    assert bridge(parts=parts)["input_ids"] == of_text["input_ids"]
    assert bridge(parts=parts[0])["input_ids"] == of_text["input_ids"][:1]
    assert bridge(images=[[picture(2), picture(3)], []], text=["a <|vq_image|> photo<|vq_image|>", "seven"]) == of_text


def test_batches_are_padded_on_either_side():
    bridge = make()
    texts = ["a photo of a seven <|vq_image|>", "<|vq_image|>"]
    for side in ("left", "right"):
        batch = bridge(
            images=[picture(0), picture(1)],
            text=texts,
            padding=True,
            padding_side=side,
            return_tensors="pt",
            labels="all",
        )
        assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape
        hidden = batch["attention_mask"] == 0
        assert bool(hidden[1].any()) and bool((batch["labels"][hidden] == IGNORED).all())
        assert torch.equal(batch["labels"][~hidden], batch["input_ids"][~hidden])


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_train_what_was_asked_for(side: str):
    bridge = make()
    texts = ["a photo of a seven <|vq_image|> one", "two <|vq_image|>"]
    options: dict[str, Any] = {"padding": True, "padding_side": side}
    images = [picture(0), picture(1)]
    ids = bridge(images=images, text=texts, **options)["input_ids"]
    of_images, of_text = (
        bridge(images=images, text=texts, labels=kind, **options)["labels"] for kind in ("image", "text")
    )
    marks = {*bridge.layout.code_ids, *bridge.layout.marker_ids}
    for row, image, text in zip(ids, of_images, of_text, strict=True):
        assert [i if i in marks else IGNORED for i in row] == image
        there = [i for i in text if i != IGNORED]
        assert there == [i for i in row if i not in marks and i != bridge.tokenizer.pad_token_id]


def test_parts_can_be_left_out_of_the_labels():
    bridge = make()
    question = [{"type": "image", "image": picture(0)}, {"type": "text", "text": "what is this? "}]
    parts = [*({**part, "train": False} for part in question), {"type": "text", "text": "a seven"}]
    batch = bridge(parts=iter(parts), labels="all")
    answer = bridge.tokenizer("a seven")["input_ids"]
    assert [token for token in batch["labels"][0] if token != IGNORED] == answer
    assert batch["input_ids"][0][-len(answer) :] == answer


def test_text_alone_is_what_the_text_tokenizer_makes_of_it(text_tokenizer: Any):
    plain = text_tokenizer(["a photo of a seven", "one"])["input_ids"]
    assert make(text_tokenizer)(text=["a photo of a seven", "one"])["input_ids"] == plain


def test_a_tokenizer_with_start_and_end_puts_them_around():
    bridge = make(with_start_and_end())
    start, end = bridge.tokenizer.bos_token_id, bridge.tokenizer.eos_token_id
    ids = bridge(images=picture(0), text="a <|vq_image|>")["input_ids"][0]
    assert ids[0] == start and ids[-1] == end and ids[-2] == bridge.layout.end_id
    begun = bridge(text="a", add_image_start=True)["input_ids"][0]
    assert begun[0] == start and begun[-1] == bridge.layout.start_id and end not in begun
    assert start not in bridge(text="a", add_special_tokens=False)["input_ids"][0]


def test_a_chat_template_takes_images():
    bridge = make()
    bridge.chat_template = (
        "{% for m in messages %}{{ m.role }}: {% for c in m.content %}"
        "{% if c.type == 'image' %}<|vq_image|>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endfor %}"
    )
    content = [{"type": "image", "image": picture(0)}, {"type": "text", "text": "seven"}]
    encoded = bridge.apply_chat_template([{"role": "user", "content": content}], tokenize=True, return_dict=True)
    assert bridge.to_parts(encoded["input_ids"])[0][1]["image_tokens"] == bridge.image_tokenizer.encode(picture(0))
    messages = [[{"role": "user", "content": content}], [{"role": "user", "content": content[1:]}]]
    batch = bridge.apply_chat_template(messages, tokenize=True, return_dict=True)
    assert [len(bridge.layout.spans(row)) for row in batch["input_ids"]] == [1, 0]


def test_the_text_tokenizers_chat_template_is_kept(tmp_path: Path):
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ messages }}"
    make(tokenizer).save_pretrained(tmp_path)
    assert make(tokenizer).chat_template == AutoProcessor.from_pretrained(tmp_path).chat_template == "{{ messages }}"


# The model's embeddings.


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("from_codebook", [True, False])
def test_old_rows_stay_to_the_bit_and_so_do_scores_of_text(family: str, from_codebook: bool, text_tokenizer: Any):
    model, old = language_model(family, text_tokenizer), len(text_tokenizer)
    ids = text_tokenizer("a photo of a seven", return_tensors="pt")["input_ids"]
    before = [model.get_input_embeddings().weight.clone(), model.get_output_embeddings().weight.clone()]
    scores = model(ids).logits
    bridge = make(text_tokenizer)
    bridge.resize_embeddings(model, from_codebook)
    after = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    assert all(
        torch.equal(now[:old], then) and len(now) == len(text_tokenizer)
        for now, then in zip(after, before, strict=True)
    )
    torch.testing.assert_close(model(ids).logits[..., :old], scores, atol=1e-5, rtol=0)
    assert model.config.vocab_size == len(text_tokenizer)


def test_embeddings_begin_alike_for_codes_that_are_close():
    bridge = make()
    model = language_model("llama", byte_level())
    bridge.resize_embeddings(model)
    vectors = bridge.image_tokenizer.model.quantizer.vectors()[0]
    rows = model.get_input_embeddings().weight[bridge.layout.code_ids.start : bridge.layout.code_ids.stop]
    near, alike = -torch.cdist(vectors, vectors).flatten(), torch.corrcoef(rows).flatten()
    assert torch.corrcoef(torch.stack([near, alike]))[0, 1] > 0.5


@pytest.mark.parametrize("family", MODELS)
def test_what_a_model_learned_stays_when_it_is_asked_again(family: str, tmp_path: Path):
    bridge = make()
    model = language_model(family, byte_level())
    bridge.resize_embeddings(model)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1.0)
    learned = model.get_input_embeddings().weight.clone()
    bridge.resize_embeddings(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    bridge.resize_embeddings(again)
    assert torch.equal(model.get_input_embeddings().weight, learned)
    assert torch.equal(again.get_input_embeddings().weight, learned)
    other = VQBridge(byte_level(), image_tokenizer(seed=1))
    with pytest.raises(ValueError, match="the language model knows the image tokenizer"):
        other.resize_embeddings(again)
    for at_other_ids in (make(row_end=True), make(sentence_pieces())):
        with pytest.raises(ValueError, match="knows images at the ids .* and this bridge has them at"):
            at_other_ids.resize_embeddings(again)


def test_a_model_in_half_precision_takes_them():
    bridge, model = make(), language_model("llama", byte_level()).bfloat16()
    bridge.resize_embeddings(model)
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight.isfinite().all()


@pytest.mark.parametrize("spare", [0, 100])
def test_a_bias_of_scores_begins_as_that_of_text(spare: int):
    tokenizer = byte_level()
    model = MODELS["llama"](len(tokenizer) + spare)
    known, width = len(tokenizer), model.config.hidden_size
    model.set_output_embeddings(torch.nn.Linear(width, len(tokenizer) + spare))
    model.lm_head.bias.data[known:] = -50
    before = model.lm_head.bias.detach().clone()
    bridge = make(tokenizer)
    bridge.resize_embeddings(model)
    after = model.get_output_embeddings().bias
    assert torch.equal(after[:known], before[:known])
    torch.testing.assert_close(after[known : len(tokenizer)], before[:known].mean().expand(len(tokenizer) - known))


@pytest.mark.parametrize("from_codebook", [True, False])
def test_a_vocabulary_with_room_is_not_cut(from_codebook: bool):
    tokenizer = byte_level()
    model = MODELS["llama"](len(tokenizer) + 100)
    spare = slice(len(tokenizer), None)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        table.weight.data[spare] = 0
    bridge = make(tokenizer)
    before = model.get_input_embeddings().weight.clone()
    bridge.resize_embeddings(model, from_codebook)
    after, images = model.get_input_embeddings().weight, slice(bridge.layout.start_id, len(tokenizer))
    assert len(after) == len(before) > len(tokenizer)
    assert torch.equal(after[: images.start], before[: images.start])
    assert torch.equal(after[images.stop :], before[images.stop :])
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        rows, known = table.weight[images], table.weight[: images.start]
        assert bool((rows.std(1) > known.std() / 2).all()) and bool((rows.std(1) < known.std() * 2).all())
    prompt = bridge(text="a", return_tensors="pt")
    sequences = model.generate(
        **prompt, do_sample=True, temperature=5.0, max_new_tokens=60, logits_processor=[bridge.logits_processor(61)]
    )
    assert sequences.max() < len(tokenizer)


# Generation.


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("row_end", [False, True])
@pytest.mark.parametrize(
    "how", [{"temperature": 2.0, "do_sample": True}, {"num_beams": 3}, {"cache_implementation": "static"}]
)
def test_what_is_generated_is_a_grid(family: str, row_end: bool, how: dict[str, Any], text_tokenizer: Any):
    model = language_model(family, text_tokenizer)
    bridge = make(text_tokenizer, row_end)
    bridge.resize_embeddings(model)
    texts = ["a photo of a seven", "one"]
    prompt = bridge(text=texts, padding=True, padding_side="left", return_tensors="pt", add_image_start=True)
    length = prompt["input_ids"].shape[1] + bridge.layout.length + 3
    sequences = model.generate(**prompt, **how, max_length=length, logits_processor=[bridge.logits_processor(length)])
    for parts, text in zip(bridge.to_parts(sequences), texts, strict=True):
        assert parts[0]["text"].strip() == text and parts[1]["image"].size == (8, 8)
        assert len([part for part in parts if part["type"] == "image"]) == 1


@pytest.mark.parametrize("row_end", [False, True])
def test_ten_thousand_sequences_at_temperature_two_are_grids(row_end: bool):
    """The model begins images by itself, several in a sequence; the prompts differ in length."""
    bridge, model = make(None, row_end), language_model("llama", byte_level())
    bridge.resize_embeddings(model, from_codebook=False)
    texts = [f"{'a photo of ' * (number % 4)}a seven" for number in range(1000)]
    prompt = bridge(text=texts, padding=True, padding_side="left", return_tensors="pt")
    length = prompt["input_ids"].shape[1] + 3 * bridge.layout.length

    class MoreImages(LogitsProcessor):
        """What a model that has learned to draw would do: begin images often."""

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores[:, bridge.layout.start_id] += 8.0
            return scores

    found = 0
    torch.manual_seed(0)
    for _ in range(5):
        sequences = model.generate(
            **prompt,
            do_sample=True,
            temperature=2.0,
            top_k=0,
            max_length=length,
            logits_processor=[MoreImages(), bridge.logits_processor(length)],
        )
        found += sum(len(bridge.layout.spans(row)) for row in sequences.tolist())
    assert found > 5000


def test_other_processors_cannot_leave_the_grid():
    bridge, model = make(None, row_end=True), language_model("llama", byte_level())
    bridge.resize_embeddings(model)
    prompt = bridge(text="a", return_tensors="pt", add_image_start=True)
    room = bridge.layout.length - 1
    for how in ({"no_repeat_ngram_size": 1}, {"suppress_tokens": [bridge.layout.end_id, bridge.layout.row_end_id]}):
        sequences = model.generate(
            **prompt, **how, do_sample=True, max_new_tokens=room, logits_processor=[bridge.logits_processor()]
        )
        assert len(bridge.layout.spans(sequences[0].tolist())) == 1


def test_an_image_begins_only_where_it_fits():
    bridge = make()
    layout = bridge.layout
    scores = torch.zeros(1, len(bridge.tokenizer))
    prompt = torch.zeros(1, 5, dtype=torch.int64)
    for room, fits in ((layout.length, True), (layout.length - 1, False)):
        after = bridge.logits_processor(5 + room)(prompt, scores)
        assert bool(after[0, layout.start_id].isfinite()) == fits
        assert bool(after[0, 0].isfinite()) and not bool(after[0, layout.code_ids.start].isfinite())
    assert not bool(bridge.logits_processor(allow_images=False)(prompt, scores)[0, layout.start_id].isfinite())


@pytest.mark.parametrize(("row_end", "codebooks"), [(False, 1), (True, 1), (True, 2)])
def test_rows_of_a_batch_stand_at_different_places(row_end: bool, codebooks: int):
    bridge = make(None, row_end, num_codebooks=codebooks)
    layout = bridge.layout
    generator = torch.Generator().manual_seed(0)
    image = layout.wrap(torch.randint(16, (SIDE * SIDE * codebooks,), generator=generator).tolist())
    rows = [[0] * (len(image) + 3 - cut) + image[:cut] for cut in range(len(image) + 1)]
    after = bridge.logits_processor()(torch.tensor(rows), torch.zeros(len(rows), len(bridge.tokenizer)))
    for cut, scores in enumerate(after):
        allowed = scores.isfinite().nonzero().flatten().tolist()
        if 0 < cut < len(image):
            assert allowed == list(layout.plan[cut - 1])
        else:
            outside = {*range(len(bridge.tokenizer))} - {*layout.code_ids, *layout.marker_ids} | {layout.start_id}
            assert set(allowed) == outside


# On disk.

FRESH = """
import sys, json, torch, hf_vq
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, LogitsProcessor
processor, model = AutoProcessor.from_pretrained(sys.argv[1]), AutoModelForCausalLM.from_pretrained(sys.argv[1])
prompt = processor(text=["a photo of a seven"], return_tensors="pt", add_image_start=True)
grid = processor.logits_processor()
sequences = model.generate(**prompt, max_new_tokens=30, do_sample=False, logits_processor=[grid])
print(json.dumps([type(processor).__name__, sequences.tolist()]))
"""


@pytest.mark.parametrize("family", MODELS)
def test_a_fresh_process_generates_the_same(family: str, tmp_path: Path, text_tokenizer: Any):
    model = language_model(family, text_tokenizer)
    bridge = make(text_tokenizer, row_end=True)
    bridge.resize_embeddings(model)
    model.save_pretrained(tmp_path)
    bridge.save_pretrained(tmp_path)
    prompt = bridge(text="a photo of a seven", return_tensors="pt", add_image_start=True)
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False}
    here = model.generate(**prompt, **options, logits_processor=[bridge.logits_processor()])
    there = subprocess.run([sys.executable, "-c", FRESH, str(tmp_path)], capture_output=True, text=True, check=True)
    assert json.loads(there.stdout.splitlines()[-1]) == ["VQBridge", here.tolist()]


def test_what_was_saved_is_loaded(tmp_path: Path, text_tokenizer: Any):
    bridge = make(text_tokenizer, row_end=True)
    bridge.chat_template = "{{ messages }}"
    bridge.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.layout == bridge.layout and again.chat_template == bridge.chat_template
    assert again(images=picture(0), text="<|vq_image|> one") == bridge(images=picture(0), text="<|vq_image|> one")


def test_another_image_tokenizer_is_refused(tmp_path: Path):
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="made for the image tokenizer"):
        VQBridge.from_pretrained(tmp_path, image_tokenizer=image_tokenizer(seed=1))
    same = VQBridge.from_pretrained(tmp_path, image_tokenizer=image_tokenizer())
    assert same.layout == make().layout
    same.save_pretrained(tmp_path / "again")


def test_it_goes_to_the_hub_and_comes_back(hub: Any, hub_api: Any, run_with_hub: Any, tmp_path: Path):
    make().save_pretrained(tmp_path)
    push = "AutoProcessor.from_pretrained(sys.argv[1]).push_to_hub('org/bridge')"
    run_with_hub(f"import sys, hf_vq\nfrom transformers import AutoProcessor\n{push}", tmp_path)
    load = "AutoProcessor.from_pretrained('org/bridge')"
    script = f"import hf_vq\nfrom transformers import AutoProcessor\nprint({load}.layout)"
    assert str(make().layout) in run_with_hub(script)


# What cannot be.


def test_bad_input_is_named(tmp_path: Path):
    bridge = make()
    with pytest.raises(ValueError, match=r"2 places for images, and there are 1 images"):
        bridge(images=[picture(0)], text="<|vq_image|> and <|vq_image|>")
    with pytest.raises(ValueError, match=r"have \[2, 0\] places for images, and the lists of images have \[1, 1\]"):
        bridge(images=[[picture(0)], [picture(1)]], text=["<|vq_image|><|vq_image|>", "no"])
    with pytest.raises(ValueError, match=r"the text 'b <\|vq_3\|>' holds <\|vq_3\|>, which only images may"):
        bridge(text=["a", "b <|vq_3|>"])
    with pytest.raises(ValueError, match="a part is a text without"):
        bridge(parts=[{"type": "text", "text": "<|vq_image|>"}])
    for text, labels in (("a", "some"), ([], "some"), ("a", [])):
        with pytest.raises(ValueError, match="labels must be one of all, image, text"):
            bridge(text=text, labels=labels)
    with pytest.raises(ValueError, match="give text, with its images, or parts"):
        bridge(text="a", parts=[])
    with pytest.raises(ValueError, match="truncation is not an option of VQBridge"):
        bridge(text="a", truncation=True)
    no_tokens = [{"type": "image", "image_tokens": tokens} for tokens in ([0.5] * 16, [[0], [0, 0]], [True] * 16)]
    for part in ({"text": "a"}, {"type": "image"}, *no_tokens, "a", None):
        with pytest.raises(ValueError, match="a part is a text without"):
            bridge(parts=[[part]])
    for part, what in (({"trian": False}, "has 'trian'"), ({"train": "no"}, "has 'no' for 'train'")):
        with pytest.raises(ValueError, match=f"'train' is True or False, and this one {what}"):
            bridge(parts=[{"type": "text", "text": "a", **part}])
    with pytest.raises(ValueError, match="parts is a list of parts, or of such lists, and holds None"):
        bridge(parts=[None])
    for odd in (-100, [1]):
        with pytest.raises(ValueError, match="to_parts takes sequences of ids, and one holds"):
            bridge.to_parts([[odd]])
    with pytest.raises(ValueError, match="parts is a list of parts, or of such lists, and is {'type': 'text'"):
        bridge(parts={"type": "text", "text": "a"})
    for text in (5, ["a", 5]):
        with pytest.raises(ValueError, match="text is one string or a list of them, and holds 5"):
            bridge(text=text)
    with pytest.raises(ValueError, match="image 1 is None: give a picture for each place"):
        bridge(images=[picture(0), None], text="<|vq_image|><|vq_image|>")
    with pytest.raises(ValueError, match=r"flat or so shaped, and these are of shape \(2, 8\)"):
        bridge(parts=[{"type": "image", "image_tokens": torch.zeros(2, 8, dtype=torch.int64)}])
    with pytest.raises(TypeError, match="image_tokenizer is 'org/sqvae', and must be an ImageTokenizer"):
        VQBridge(byte_level(), "org/sqvae")
    with pytest.raises(ValueError, match="to_parts takes many sequences, and this is one"):
        bridge.to_parts(torch.tensor([1, 2]))
    with pytest.raises(
        ValueError, match=r"an image of 4 x 4 has 16 tokens, flat or so shaped, and these are of shape \(9,\)"
    ):
        bridge(parts=[{"type": "image", "image_tokens": [0] * 9}])
    with pytest.raises(ValueError, match=r"image tokens lie in \[0, 16\)"):
        bridge(parts=[{"type": "image", "image_tokens": [16] * 16}])
    with pytest.raises(ValueError, match="a sequence has 18 ids, more than max_length 7: nothing is cut off"):
        bridge(images=[picture(0)], text="<|vq_image|>", max_length=7)
    with pytest.raises(ValueError, match="give it their embeddings by resize_embeddings"):
        bridge.logits_processor()(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 50))


def test_images_of_another_size_are_refused():
    bridge = make()
    bridge.image_tokenizer.processor.do_resize = bridge.image_tokenizer.processor.do_center_crop = False
    with pytest.raises(ValueError, match="image 1 has a grid of 6 x 4 tokens, and this bridge takes 4 x 4"):
        bridge(images=[picture(0), picture(1, (12, 8))], text="<|vq_image|><|vq_image|>")


def test_sequences_that_are_no_grid_are_refused():
    bridge = make()
    image = bridge.layout.wrap([0] * 16)
    with pytest.raises(ValueError, match="the image that begins at place 1 is cut off after 4 of 17 ids"):
        bridge.to_parts([[0, *image[:5]]])
    with pytest.raises(ValueError, match="is not a 4 x 4 grid: its id 3 is 0, and one of"):
        bridge.to_parts([[*image[:3], 0, *image[4:]]])
    with pytest.raises(ValueError, match="belongs in an image, and none has begun there"):
        bridge.to_parts([[0, *image[1:]]])


def test_a_text_tokenizer_with_tokens_of_another_is_refused(tmp_path: Path):
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="were made for the image tokenizer"):
        VQBridge(AutoTokenizer.from_pretrained(tmp_path), image_tokenizer(seed=1))
    taken = byte_level()
    taken.add_tokens(["<|vq_5|>"])
    before = len(taken)
    with pytest.raises(ValueError, match=r"knows <\|vq_5\|> already, but not <\|vq_start\|> ... <\|vq_15\|> one after"):
        make(taken)
    assert len(taken) == before
    with_row_end = make(row_end=True).tokenizer
    with pytest.raises(ValueError, match="with the row_end that it was extended for"):
        make(with_row_end)
    with pytest.raises(ValueError, match="with the row_end that it was extended for"):
        make(make().tokenizer, row_end=True)


def test_a_text_tokenizer_that_takes_markers_to_pieces_is_refused():
    tokenizer = byte_level()
    tokenizer.split_special_tokens, before = True, len(tokenizer)
    with pytest.raises(ValueError, match="has split_special_tokens, and would take markers of images to pieces"):
        make(tokenizer)
    assert len(tokenizer) == before


def test_a_text_tokenizer_whose_ids_have_holes_is_refused():
    words = {"a": 0, "z": 30, "<unk>": 1}
    holed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")))
    with pytest.raises(ValueError, match="has 3 tokens and the id 30: with holes among its ids"):
        make(holed)
