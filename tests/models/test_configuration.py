"""Wrong config values: the error names the field and the value."""

import copy

import pytest
from huggingface_hub.errors import (
    StrictDataclassClassValidationError,
    StrictDataclassFieldValidationError,
)
from tiny_models import FAMILIES, make_model

from hf_vq import SQVAEConfig, VQVAEConfig, VQVAEModel
from hf_vq.models.configuration_autoencoder import AutoencoderConfig

INVALID = [
    (VQVAEConfig, "num_channels", 0, "got 0"),
    (VQVAEConfig, "image_size", -4, "got -4"),
    (VQVAEConfig, "image_size", 30, "30 is not divisible by the downsampling factor 4"),
    (VQVAEConfig, "codebook_size", 1, "got 1"),
    (SQVAEConfig, "codebook_size", 0, "got 0"),
    (VQVAEConfig, "codebook_dim", 0, "got 0"),
    (VQVAEConfig, "num_codebooks", 0, "got 0"),
    (SQVAEConfig, "num_codebooks", -1, "got -1"),
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
    (VQVAEConfig, "num_samples", 0, "got 0"),
    (VQVAEConfig, "revive_below", 1.0, "got 1.0"),
    (VQVAEConfig, "revive_below", -0.1, "got -0.1"),
    (VQVAEConfig, "revive_below", float("nan"), "got nan"),
    (VQVAEConfig, "levels", [8, 5], r"levels \[8, 5\].*fsq.*ema"),
    (VQVAEConfig, "codebook_transform", "linear", "linear.*gradient.*ema"),
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
    (VQVAEConfig, "levels", [8.0, 5], "8.0"),
    (VQVAEConfig, "levels", "8,5", "8,5"),
    (VQVAEConfig, "num_samples", 2.5, "2.5"),
    (VQVAEConfig, "num_codebooks", 1.5, "1.5"),
    (VQVAEConfig, "codebook_init", "kmeans++", r"kmeans\+\+"),
    (VQVAEConfig, "gradient_estimator", "reinforce", "reinforce"),
    (VQVAEConfig, "codebook_transform", "mlp", "mlp"),
    (VQVAEConfig, "normalize_codes", "yes", "yes"),
    (SQVAEConfig, "quantizer", "ema", "ema"),
    (SQVAEConfig, "covariance", "full", "full"),
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


FSQ = {"quantizer": "fsq", "levels": [8, 5]}
LINEAR = {"quantizer": "gradient", "codebook_transform": "linear"}
CONFLICTS = [
    (VQVAEConfig, {"quantizer": "fsq", "levels": [8, 2]}, r"levels.*at least 3.*\[8, 2\]"),
    (VQVAEConfig, {"quantizer": "fsq", "levels": [4000, 5]}, r"levels.*4000"),
    (VQVAEConfig, {**FSQ, "codebook_init": "kmeans"}, "codebook_init.*kmeans.*fsq"),
    (VQVAEConfig, {**FSQ, "revive_below": 0.1}, "revive_below.*0.1.*fsq"),
    (VQVAEConfig, {**FSQ, "gradient_estimator": "rotation"}, "gradient_estimator.*rotation.*fsq"),
    (VQVAEConfig, {**FSQ, "normalize_codes": True}, "normalize_codes.*True.*fsq"),
    (VQVAEConfig, {**FSQ, "codebook_transform": "linear"}, "codebook_transform.*linear.*fsq"),
    (VQVAEConfig, {"quantizer": "soft_em", "codebook_transform": "linear"}, "codebook_transform.*linear.*soft_em"),
    (VQVAEConfig, {**LINEAR, "revive_below": 0.1}, "revive_below.*0.1.*linear"),
    (VQVAEConfig, {**LINEAR, "codebook_init": "kmeans"}, "codebook_init.*kmeans.*linear"),
    (SQVAEConfig, {"quantizer": "vmf", "covariance": "per_latent"}, "vmf.*per_latent"),
    (SQVAEConfig, {"quantizer": "vmf", "dequantization_noise": True}, "vmf.*dequantization_noise.*True"),
    (SQVAEConfig, {"quantizer": "vmf", "codebook_dim": 1}, "vmf.*codebook_dim 1"),
    (VQVAEConfig, {"normalize_codes": True, "codebook_dim": 1}, "normalize_codes.*codebook_dim 1"),
    (VQVAEConfig, {"quantizer": "fsq", "levels": [1000] * 5}, "codes, and their grid is kept whole"),
    (VQVAEConfig, {"quantizer": "gradient", "num_samples": 9}, "num_samples.*9.*soft_em"),
    (VQVAEConfig, {"quantizer": "gradient", "ema_decay": 0.5}, "ema_decay.*0.5.*ema or soft_em"),
    (VQVAEConfig, {**FSQ, "commitment_weight": 3.0}, "commitment_weight.*3.0.*fsq"),
]


@pytest.mark.parametrize(("config", "settings", "message"), CONFLICTS, ids=[str(i) for _, i, _ in CONFLICTS])
def test_options_that_do_not_go_together(config: type[AutoencoderConfig], settings: dict[str, object], message: str):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        config(**settings)


@pytest.mark.parametrize("levels", [None, [], ()])
def test_finite_scalars_need_levels(levels: object):
    with pytest.raises(ValueError, match="fsq needs levels"):
        VQVAEConfig(quantizer="fsq", levels=levels)


# 512 and 4 are the defaults of the class: given by hand, they count like any other value.
@pytest.mark.parametrize(
    "own", [{"codebook_size": 512}, {"codebook_size": 64}, {"codebook_dim": 4}, {"codebook_dim": 1}]
)
def test_sizes_given_beside_levels_must_agree(own: dict[str, int]):
    ((name, value),) = own.items()
    implied = {"codebook_size": 200, "codebook_dim": 3}
    with pytest.raises(ValueError, match=rf"levels \[8, 5, 5\] make {name} {implied[name]}.*it is {value}: set it to"):
        VQVAEConfig(quantizer="fsq", levels=[8, 5, 5], **own)
    for agreeing in ({}, implied, {name: implied[name]}):
        made = VQVAEConfig(quantizer="fsq", levels=[8, 5, 5], num_codebooks=2, **agreeing)
        assert (made.codebook_size, made.codebook_dim, made.latent_channels) == (200, 3, 6)


def test_levels_that_change_later_must_agree_too(tmp_path):
    VQVAEConfig(**FSQ).save_pretrained(tmp_path)
    with pytest.raises((ValueError, StrictDataclassClassValidationError), match="levels"):
        VQVAEModel(VQVAEConfig.from_pretrained(tmp_path, levels=[4, 4, 4]))
    config = VQVAEConfig()
    config.quantizer = "fsq"
    with pytest.raises((ValueError, StrictDataclassClassValidationError), match="levels"):
        VQVAEModel(config)


def test_sizes_are_plain_integers():
    for config in (VQVAEConfig(), SQVAEConfig(), VQVAEConfig(**FSQ)):
        assert type(config.codebook_size) is type(config.codebook_dim) is int


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_survives_saving(family: str, tmp_path):
    config = make_model(family).config
    config.save_pretrained(tmp_path)
    loaded = type(config).from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict() and loaded.to_diff_dict() == config.to_diff_dict()
    assert type(config)(**config.to_dict()).to_dict() == copy.deepcopy(config).to_dict() == config.to_dict()
    assert loaded.has_variance_head == (getattr(config, "covariance", "global") != "global")


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
