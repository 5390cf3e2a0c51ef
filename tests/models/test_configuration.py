"""Wrong config values: the error names the field and the value."""

import pytest
from huggingface_hub.errors import (
    StrictDataclassClassValidationError,
    StrictDataclassFieldValidationError,
)

from hf_vq import SQVAEConfig, VQVAEConfig
from hf_vq.models.configuration_autoencoder import AutoencoderConfig

INVALID = [
    (VQVAEConfig, "num_channels", 0, "got 0"),
    (VQVAEConfig, "image_size", -4, "got -4"),
    (VQVAEConfig, "image_size", 30, "30 is not divisible by the downsampling factor 4"),
    (VQVAEConfig, "codebook_size", 1, "got 1"),
    (SQVAEConfig, "codebook_size", 0, "got 0"),
    (VQVAEConfig, "codebook_dim", 0, "got 0"),
    (VQVAEConfig, "num_codebooks", 2, "got 2"),
    (VQVAEConfig, "num_residual_blocks", 0, "got 0"),
    (VQVAEConfig, "residual_channels", 0, "got 0"),
    (VQVAEConfig, "hidden_channels", [], r"got \[\]"),
    (VQVAEConfig, "hidden_channels", [8, 0], r"got \[8, 0\]"),
    (VQVAEConfig, "latent_projection", False, r"128.*codebook_dim = 4"),
    (VQVAEConfig, "commitment_weight", -0.1, "got -0.1"),
    (VQVAEConfig, "ema_decay", 1.0, "got 1.0"),
    (VQVAEConfig, "ema_decay", -0.1, "got -0.1"),
    (VQVAEConfig, "ema_decay", float("nan"), "got nan"),
    (VQVAEConfig, "data_variance", 0.0, "got 0.0"),
    (SQVAEConfig, "initial_variance", 0.0, "got 0.0"),
    (SQVAEConfig, "initial_variance", float("nan"), "got nan"),
    (SQVAEConfig, "variance_lr_scale", -1.0, "got -1.0"),
    (SQVAEConfig, "temperature_end", 0.0, "got 0.0"),
    (SQVAEConfig, "temperature_end", 1.5, r"1.5.*temperature_start \(1.0\)"),
    (SQVAEConfig, "temperature_decay_steps", 0, "got 0"),
]
WRONG_TYPE = [
    (VQVAEConfig, "codebook_size", 2.5, "2.5"),
    (VQVAEConfig, "codebook_size", "512", "512"),
    (VQVAEConfig, "hidden_channels", 64, "64"),
    (VQVAEConfig, "hidden_channels", [8.0], "hidden_channels"),
    (VQVAEConfig, "norm", "layer", "layer"),
    (VQVAEConfig, "activation", "gelu", "gelu"),
    (VQVAEConfig, "output_activation", "tanh", "tanh"),
    (VQVAEConfig, "latent_projection", "no", "no"),
    (VQVAEConfig, "observation", "bernoulli", "bernoulli"),
    (VQVAEConfig, "quantizer", "gaussian", "gaussian"),
    (VQVAEConfig, "ema_decay", "0.99", "0.99"),
    (SQVAEConfig, "quantizer", "ema", "ema"),
    (SQVAEConfig, "covariance", "diagonal", "diagonal"),
    (SQVAEConfig, "variance_form", "ratio", "ratio"),
    (SQVAEConfig, "variance_update", "never", "never"),
    (SQVAEConfig, "dequantization_noise", "yes", "yes"),
    (SQVAEConfig, "temperature_decay_steps", 1e4, "10000.0"),
]


@pytest.mark.parametrize(("config", "field", "value", "message"), INVALID)
def test_a_value_out_of_range(config: type[AutoencoderConfig], field: str, value: object, message: str):
    with pytest.raises(StrictDataclassClassValidationError, match=message) as raised:
        config(**{field: value})
    assert field in str(raised.value)


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (VQVAEConfig, "commitment_weight", float("nan")),
        (VQVAEConfig, "data_variance", float("inf")),
        (SQVAEConfig, "initial_variance", float("inf")),
        (SQVAEConfig, "variance_lr_scale", float("nan")),
        (SQVAEConfig, "temperature_start", float("nan")),
        (SQVAEConfig, "temperature_start", float("inf")),
        (SQVAEConfig, "initializer_range", -0.02),
    ],
)
def test_a_value_that_is_no_finite_number(config: type[AutoencoderConfig], field: str, value: float):
    with pytest.raises(StrictDataclassClassValidationError, match=f"{field}.*{value}"):
        config(**{field: value})


@pytest.mark.parametrize(("config", "field", "value", "message"), WRONG_TYPE)
def test_a_value_of_a_wrong_kind(config: type[AutoencoderConfig], field: str, value: object, message: str):
    with pytest.raises(StrictDataclassFieldValidationError, match=message) as raised:
        config(**{field: value})
    assert field in str(raised.value)


@pytest.mark.parametrize("config", [VQVAEConfig, SQVAEConfig])
def test_derived_values_and_saving(config: type[AutoencoderConfig], tmp_path):
    made = config(image_size=64, hidden_channels=(8, 16, 32), codebook_dim=7, codebook_size=100)
    assert (made.downsampling_factor, made.grid_size, made.latent_channels) == (8, (8, 8), 7)
    made.save_pretrained(tmp_path)
    assert config.from_pretrained(tmp_path).to_dict() == made.to_dict()
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"codebook_size": 100', '"codebook_size": 1'))
    with pytest.raises(StrictDataclassClassValidationError, match="codebook_size must be at least 2, got 1"):
        config.from_pretrained(tmp_path)
