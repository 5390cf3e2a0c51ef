"""What others build on: a name that goes, or comes, does so on purpose."""

import os
import subprocess
import sys

import pytest
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM

import hf_vq

PUBLIC = [
    "ImageGenerationPipeline",
    "ImageTokenizer",
    "PixelCNNPrior",
    "PixelCNNPriorConfig",
    "QuantizerCallback",
    "SQVAEConfig",
    "SQVAEModel",
    "TransformerPrior",
    "TransformerPriorConfig",
    "VQBridge",
    "VQImageProcessor",
    "VQVAEConfig",
    "VQVAEModel",
]

FAMILIES = [
    pytest.param("hf_vqvae", "VQVAEConfig", "VQVAEModel", id="vqvae"),
    pytest.param("hf_sqvae", "SQVAEConfig", "SQVAEModel", id="sqvae"),
]


def test_public_names_are_pinned():
    assert sorted(hf_vq.__all__) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_there_and_says_what_it_is(name: str):
    assert getattr(hf_vq, name).__doc__


@pytest.mark.parametrize(("model_type", "config", "model"), FAMILIES)
def test_importing_registers_the_auto_classes(model_type: str, config: str, model: str, tmp_path):
    config_class, model_class = getattr(hf_vq, config), getattr(hf_vq, model)
    assert type(AutoConfig.for_model(model_type)) is config_class
    saved = model_class(config_class(hidden_channels=[4], num_residual_blocks=1, residual_channels=4))
    saved.save_pretrained(tmp_path)
    hf_vq.VQImageProcessor.for_config(saved.config).save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is model_class
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is hf_vq.VQImageProcessor


@pytest.mark.parametrize(
    ("model_type", "name"), [("hf_vq_pixelcnn", "PixelCNNPrior"), ("hf_vq_transformer_prior", "TransformerPrior")]
)
def test_importing_registers_the_priors(model_type: str, name: str, tmp_path):
    config_class, model_class = getattr(hf_vq, f"{name}Config"), getattr(hf_vq, name)
    assert type(AutoConfig.for_model(model_type)) is config_class
    model_class(config_class(codebook_size=4, hidden_size=8, num_hidden_layers=1)).save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is model_class


def test_importing_is_light(repository):
    # Pictures and data sets are for those who train and evaluate; who only loads a model does not wait for them.
    heavy = "{'datasets', 'evaluate', 'gradio', 'matplotlib', 'pyarrow', 'ray'}"
    command = f"import sys, hf_vq; print(sorted({heavy} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": str(repository / "src")}
    ran = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "[]"


def test_the_version_is_that_of_the_distribution(repository):
    pyproject = (repository / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{hf_vq.__version__}"' in pyproject
    assert f"version: {hf_vq.__version__}" in (repository / "CITATION.cff").read_text(encoding="utf-8")
