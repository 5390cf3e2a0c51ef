"""Images out of a prior: the pipeline, the command, and the tokenizer that must be the prior's own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as DatasetImage
from PIL import Image
from transformers import AutoModelForCausalLM, pipeline

import hf_vq
from hf_vq.cli import main
from hf_vq.models.prior_tokenizer import load_tokenizer
from hf_vq.prior_evaluation import evaluate_prior

SIDE, CODES, CLASSES = 16, 11, 3
TASK = "unconditional-image-generation"


@pytest.fixture
def repositories(tmp_path: Path) -> Path:
    """A folder with a tokenizer, `tok`, and a prior over its tokens, `prior`."""
    torch.manual_seed(0)
    sizes = {"hidden_channels": [8, 8], "residual_channels": 8, "num_residual_blocks": 1}
    config = hf_vq.SQVAEConfig(image_size=SIDE, codebook_size=CODES, **sizes)
    model = hf_vq.SQVAEModel(config)
    hf_vq.ImageTokenizer(model, hf_vq.VQImageProcessor.for_config(config)).save_pretrained(tmp_path / "tok")
    make_prior(model).save_pretrained(tmp_path / "prior")
    return tmp_path


def make_prior(model: hf_vq.SQVAEModel, **fields: object) -> hf_vq.TransformerPrior:
    settings = {"codebook_size": CODES, "grid_size": SIDE // 4, "num_classes": CLASSES}
    named = {"tokenizer_name_or_path": "../tok", "tokenizer_fingerprint": model.fingerprint()}
    small = {"hidden_size": 16, "num_hidden_layers": 2}
    return hf_vq.TransformerPrior(hf_vq.TransformerPriorConfig(**{**settings, **named, **small, **fields}))


def test_one_name_gives_prior_tokenizer_and_processor(repositories: Path):
    pipe = pipeline(TASK, model=str(repositories / "prior"), device="cpu")
    assert [image.size for image in pipe(num_images=3)] == [(SIDE, SIDE)] * 3
    assert len(pipe()) == 1
    assert len(pipe(class_labels=2, num_images=2)) == 2
    images = pipe(class_labels=[0, 1, -1], guidance_scale=2.0, top_k=5, batch_size=2)
    assert len(images) == 3 and all(isinstance(image, Image.Image) for image in images)


def test_a_seed_repeats_the_images_whatever_comes_in_between(repositories: Path):
    pipe = pipeline(TASK, model=str(repositories / "prior"), device="cpu")
    pages = []
    for _ in range(2):
        torch.manual_seed(3)
        pages.append([image.tobytes() for image in pipe(class_labels=[0, 1])])
        pipe()
    assert pages[0] == pages[1] and pages[0][0] != pages[0][1]


def test_images_are_the_decoded_samples_of_the_prior(repositories: Path):
    pipe = pipeline(TASK, model=str(repositories / "prior"), device="cpu")
    torch.manual_seed(0)
    images = pipe(class_labels=[0, 1])
    prior = AutoModelForCausalLM.from_pretrained(repositories / "prior")
    tokenizer = hf_vq.ImageTokenizer.from_pretrained(repositories / "tok")
    torch.manual_seed(0)
    tokens = prior.image_tokens(prior.generate(class_labels=[0, 1]))
    expected = tokenizer.batch_decode(tokens.flatten(1))
    assert [image.tobytes() for image in images] == [image.tobytes() for image in expected]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": [0, 1], "num_images": 3}, "2 class_labels do not make 3 images"),
        ({"class_labels": []}, "0 class_labels"),
        ({"num_images": 0}, "0 class_labels do not make 0 images"),
        ({"class_labels": [0, CLASSES]}, r"class_labels must lie in \[0, 3\)"),
    ],
)
def test_images_that_cannot_be_made(repositories: Path, arguments: dict[str, object], message: str):
    pipe = pipeline(TASK, model=str(repositories / "prior"), device="cpu")
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"tokenizer_fingerprint": "0" * 64},
            "prior.*was made for the tokenizer ../tok.*tok is not it: fingerprint 00",
        ),
        ({"codebook_size": 12}, "codebook_size 12 there and 11 here"),
        ({"grid_size": 8}, r"grid_size \[8, 8\] there and \[4, 4\] here"),
        ({"num_codebooks": 2}, "num_codebooks 2 there and 1 here"),
        ({"tokenizer_name_or_path": None}, "no tokenizer_name_or_path"),
    ],
)
def test_a_prior_made_for_another_tokenizer_is_refused(repositories: Path, fields: dict[str, object], message: str):
    model, _ = load_tokenizer(hf_vq.TransformerPrior.from_pretrained(repositories / "prior").config)
    make_prior(model, **fields).save_pretrained(repositories / "other")
    with pytest.raises(ValueError, match=message):
        pipeline(TASK, model=str(repositories / "other"), device="cpu")


def test_a_new_decoder_is_still_the_priors_tokenizer(repositories: Path):
    model = hf_vq.SQVAEModel.from_pretrained(repositories / "tok")
    torch.nn.init.constant_(model.decoder.from_latents[0].bias, 0.5)
    model.save_pretrained(repositories / "tok")
    assert pipeline(TASK, model=str(repositories / "prior"), device="cpu")()


def test_the_command_draws_a_row_a_class(repositories: Path, capsys: pytest.CaptureFixture[str]):
    out = repositories / "grid.png"
    prior = str(repositories / "prior")
    flags = ["--num_images", "2", "--class_labels", "0", "2", "-1", "--guidance_scale", "2"]
    assert main(["sample", prior, *flags, "--output", str(out)]) == 0
    assert "Wrote 6 images" in capsys.readouterr().out
    with Image.open(out) as page:
        tall = page.height
    assert main(["sample", prior, "--num_images", "2", "--output", str(out)]) == 0
    with Image.open(out) as page:
        assert tall > 2.5 * page.height
    assert main(["sample", prior, "--class_labels", "7", "--output", str(out)]) == 2
    assert "class_labels must lie in [0, 3)" in capsys.readouterr().err


def evaluated(repositories: Path, *flags: str) -> dict[str, Any]:
    """What `hf-vq evaluate` writes of the prior on twelve pictures."""
    write_pictures(repositories / "data")
    data = ["--dataset_name", str(repositories / "data"), "--split", "train", "--streaming"]
    output = repositories / "evaluation.json"
    assert main(["evaluate", str(repositories / "prior"), *data, *flags, "--output", str(output)]) == 0
    return json.loads(output.read_text())


def write_pictures(folder: Path) -> None:
    features = Features({"image": DatasetImage(), "label": ClassLabel(num_classes=CLASSES)})
    pixels = np.random.default_rng(0).integers(256, size=(12, SIDE, SIDE, 3), dtype=np.uint8)
    pictures = [Image.fromarray(array) for array in pixels]
    folder.mkdir(exist_ok=True)
    rows = {"image": pictures, "label": [row % CLASSES for row in range(12)]}
    Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")


def test_the_command_is_refused_before_it_draws(repositories: Path, capsys: pytest.CaptureFixture[str]):
    for flags, message in (
        (["--output", str(repositories / "page.foo")], "is no kind of picture: take .png"),
        (["--batch_size", "0"], "--batch_size must be at least 1, got 0"),
        (["--num_images", "0"], "--num_images must be at least 1, got 0"),
        (["--class_labels", "horse"], "there is no class 'horse'"),
    ):
        assert main(["sample", str(repositories / "prior"), *flags]) == 2
        assert message in capsys.readouterr().err


def test_classes_go_by_their_names(repositories: Path):
    prior = hf_vq.TransformerPrior.from_pretrained(repositories / "prior")
    prior.config.id2label, prior.config.label2id = {0: "cat", 1: "dog", 2: "fish"}, {"cat": 0, "dog": 1, "fish": 2}
    prior.save_pretrained(repositories / "named")
    pipe = pipeline(TASK, model=str(repositories / "named"), device="cpu", batch_size=2)
    pages = []
    for labels in (["dog", "fish", None], [1, np.int64(2), -1]):
        torch.manual_seed(0)
        pages.append([image.tobytes() for image in pipe(class_labels=labels)])
    assert pages[0] == pages[1]
    with pytest.raises(ValueError, match="there is no class 'horse': the prior knows cat, dog, fish"):
        pipe(class_labels="horse")
    flags = ["--class_labels", "dog", "--num_images", "1", "--output", str(repositories / "a.png")]
    assert main(["sample", str(repositories / "named"), *flags]) == 0


def test_a_pipeline_is_saved_and_comes_back(repositories: Path):
    pipe = pipeline(TASK, model=str(repositories / "prior"), device="cpu")
    pipe.save_pretrained(repositories / "elsewhere" / "pipe")
    torch.manual_seed(0)
    expected = pipe(class_labels=[0, 1])
    again = pipeline(TASK, model=str(repositories / "elsewhere" / "pipe"), device="cpu")
    torch.manual_seed(0)
    assert [image.tobytes() for image in again(class_labels=[0, 1])] == [image.tobytes() for image in expected]


def test_a_prior_that_moves_alone_names_what_is_missing(repositories: Path):
    (repositories / "deep").mkdir()
    (repositories / "prior").rename(repositories / "deep" / "prior")
    with pytest.raises(ValueError, match=r"deep/prior has tokenizer_name_or_path ../tok, and there is no folder"):
        pipeline(TASK, model=str(repositories / "deep" / "prior"), device="cpu")


def test_measuring_leaves_modes_and_statistics_as_they_were(repositories: Path):
    config = hf_vq.SQVAEConfig(image_size=SIDE, codebook_size=CODES, norm="batch", hidden_channels=[8, 8])
    decoder = hf_vq.SQVAEModel(config).train()
    prior = make_prior(decoder).train()
    before = {name: buffer.clone() for name, buffer in decoder.named_buffers()}
    pixels = torch.rand(4, 3, SIDE, SIDE) * 2 - 1
    tokens = torch.randint(CODES, (4, SIDE // 4, SIDE // 4))
    evaluate_prior(prior, [{"pixel_values": pixels, "image_tokens": tokens}], decoder=decoder)
    assert prior.training and decoder.training and decoder.decoder.training
    assert all(torch.equal(buffer, before[name]) for name, buffer in decoder.named_buffers())


def test_the_command_measures_a_prior(repositories: Path, capsys: pytest.CaptureFixture[str]):
    measured = evaluated(repositories)
    assert "bits_per_token_of_class" in capsys.readouterr().out
    assert measured["num_images"] == 12 and 0 < measured["bits_per_token"] < 5
    # Tokens take a part of the bits; the image given them the rest.
    assert measured["bits_per_dim"] > measured["bits_per_token"] * 16 / (3 * SIDE * SIDE)
    assert measured["tokenizer_name_or_path"] == "../tok" and "null class" in measured["protocol"]
    assert measured["bits_per_token_of_class"] not in (None, measured["bits_per_token"])
    assert evaluated(repositories, "--label_column", "none")["bits_per_token_of_class"] is None


def test_another_decoder_of_the_same_tokens_changes_the_images_bits_only(repositories: Path):
    first = evaluated(repositories)
    model = hf_vq.SQVAEModel.from_pretrained(repositories / "tok")
    model.observation_variance.fill_(0.5)
    tok = hf_vq.ImageTokenizer(model, hf_vq.VQImageProcessor.for_config(model.config))
    tok.save_pretrained(repositories / "wide")
    second = evaluated(repositories, "--tokenizer_name_or_path", str(repositories / "wide"))
    assert second["bits_per_token"] == pytest.approx(first["bits_per_token"])
    assert abs(second["bits_per_dim"] - first["bits_per_dim"]) > 0.01


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        ("prior", ["--fd_model", "org/features"], "name a tokenizer, not a prior"),
        ("tok", ["--tokenizer_name_or_path", "org/tok"], "is for priors"),
        ("prior", ["--label_column", "image"], "holds no class labels; columns that do: label"),
    ],
)
def test_flags_that_do_not_fit_are_named(
    repositories: Path, model: str, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    write_pictures(repositories / "data")
    data = ["--dataset_name", str(repositories / "data"), "--split", "train", "--streaming"]
    assert main(["evaluate", str(repositories / model), *data, *flags, "--output", str(repositories / "e.json")]) == 2
    assert message in capsys.readouterr().err
