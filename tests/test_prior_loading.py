"""Priors saved and loaded: every tensor, in both precisions, and without the package by their own code."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, pipeline

import hf_vq
from without_package import run_without_package

CODES, CLASSES = 11, 3
PRIORS = {"transformer": hf_vq.TransformerPrior, "pixelcnn": hf_vq.PixelCNNPrior}
TASK = "unconditional-image-generation"
every_prior = pytest.mark.parametrize("family", PRIORS)

SAMPLES = """
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, pipeline

folder = pathlib.Path(sys.argv[1])
results = {}
for name in ("transformer", "pixelcnn"):
    prior = AutoModelForCausalLM.from_pretrained(folder / name, trust_remote_code=True)
    assert type(prior).__module__.startswith("transformers_modules."), type(prior)
    torch.manual_seed(0)
    results[name] = prior.generate(class_labels=torch.tensor([0, 2, -1]))
    pipe = pipeline("unconditional-image-generation", model=str(folder / name), trust_remote_code=True, device="cpu")
    torch.manual_seed(0)
    for number, image in enumerate(pipe(class_labels=[0, 2])):
        image.save(folder / f"{name}-{number}.png")
assert "hf_vq" not in sys.modules
save_file(results, folder / "results.safetensors")
"""


@pytest.fixture
def repositories(tmp_path: Path) -> Path:
    """A folder with a tokenizer and priors of both families over its tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_channels": [8, 8], "residual_channels": 8, "num_residual_blocks": 1}
    config = hf_vq.SQVAEConfig(image_size=16, codebook_size=CODES, **sizes)
    model = hf_vq.SQVAEModel(config)
    hf_vq.ImageTokenizer(model, hf_vq.VQImageProcessor.for_config(config)).save_pretrained(tmp_path / "tok")
    named = {"tokenizer_name_or_path": "../tok", "tokenizer_fingerprint": model.fingerprint()}
    small = {"hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.3}
    for name, prior_class in PRIORS.items():
        settings = {"codebook_size": CODES, "grid_size": 4, "num_classes": CLASSES, **named, **small}
        prior_class(prior_class.config_class(**settings)).save_pretrained(tmp_path / name)
    return tmp_path


def test_the_same_tokens_and_images_without_the_package(repositories: Path):
    run_without_package(SAMPLES, repositories)
    results = load_file(repositories / "results.safetensors")
    for name, prior_class in PRIORS.items():
        prior = AutoModelForCausalLM.from_pretrained(repositories / name)
        assert type(prior) is prior_class
        torch.manual_seed(0)
        assert torch.equal(prior.generate(class_labels=torch.tensor([0, 2, -1])), results[name])
        pipe = pipeline(TASK, model=str(repositories / name), device="cpu")
        torch.manual_seed(0)
        for number, image in enumerate(pipe(class_labels=[0, 2])):
            with Image.open(repositories / f"{name}-{number}.png") as other:
                assert image.tobytes() == other.tobytes()


@every_prior
def test_every_tensor_survives(family: str, repositories: Path):
    saved = PRIORS[family].from_pretrained(repositories / family)
    assert not any(PRIORS[family].from_pretrained(repositories / family, output_loading_info=True)[1].values())
    saved.save_pretrained(repositories / "again")
    loaded = PRIORS[family].from_pretrained(repositories / "again")
    assert loaded.config.to_dict().keys() == saved.config.to_dict().keys()
    for name, tensor in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.generation_config.max_length == 17 and loaded.generation_config.top_k == 0


@every_prior
def test_a_narrow_prior_samples_and_scores(family: str, repositories: Path):
    prior = PRIORS[family].from_pretrained(repositories / family, dtype=torch.bfloat16)
    sequences = prior.generate(class_labels=[0, 1, -1])
    assert sequences[:, 1:].max() < CODES
    narrow = prior.log_prob(sequences[:, 1:], torch.tensor([0, 1, -1]))
    wide = prior.float().log_prob(sequences[:, 1:], torch.tensor([0, 1, -1]))
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, wide, rtol=0.03, atol=0.3)


@every_prior
def test_training_compiles_without_a_break(family: str, repositories: Path):
    prior = PRIORS[family].from_pretrained(repositories / family).train()
    batch = torch.randint(CODES, (2, 4, 4))
    sequences = prior.sequences(batch)
    labels = torch.tensor([0, -1])
    torch.manual_seed(0)
    expected = prior(sequences, class_labels=labels, labels=sequences).loss
    torch._dynamo.reset()
    compiled = torch.compile(prior, backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    loss = compiled(sequences, class_labels=labels, labels=sequences).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(parameter.grad is not None for parameter in prior.parameters())
