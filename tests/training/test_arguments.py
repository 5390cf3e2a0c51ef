"""Settings of a run: a YAML file, and flags on top of it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError

import train
from arguments import DEFAULT_CONFIG, parse
from run_log import plain

CONFIGS = sorted(DEFAULT_CONFIG.parent.glob("*.yaml"))

WithFile = Callable[[str], list[str]]


@pytest.fixture
def with_file(tmp_path: Path) -> WithFile:
    """Makes a YAML file; returns the flags that name it."""

    def write(text: str) -> list[str]:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return ["--config", str(path)]

    return write


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message, of argparse or of ours, with which a command line is refused."""
    with pytest.raises((ValueError, StrictDataclassError, SystemExit)) as caught:
        parse(arguments)
    return capsys.readouterr().err if isinstance(caught.value, SystemExit) else str(caught.value)


# The embedded default.


def test_no_arguments_mean_the_digits():
    run = parse([])
    assert run == parse(["--config", str(DEFAULT_CONFIG)])
    assert (run.data.dataset_name, run.model.model_type) == ("digits", "hf_sqvae")
    assert (run.model_fields["codebook_size"], run.model_fields["image_size"]) == (128, 8)


def test_a_flag_alone_changes_the_default_and_nothing_else():
    run, default = parse(["--seed", "3", "--config_overrides", "{codebook_size: 16}"]), parse([])
    assert run.engine.seed == 3 and run.data == default.data
    assert run.model_fields == default.model_fields | {"codebook_size": 16}


@pytest.mark.parametrize("name", ["dataset_name", "model_name_or_path"])
@pytest.mark.parametrize("spell", ["--{} x", "--{}=x"], ids=["space", "equals"])
@pytest.mark.parametrize("letters", ["{}", "hyphens"], ids=["underscores", "hyphens"])
def test_other_data_and_saved_models_do_without_the_digits_settings(name: str, spell: str, letters: str):
    flag = spell.format(name.replace("_", "-") if letters == "hyphens" else name)
    run = parse(["--dataset_name", "pictures", *flag.split()])
    assert run.model_fields == {}
    assert run.engine.output_dir != parse([]).engine.output_dir


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_every_config_in_the_repository_is_accepted(path: Path):
    run = parse(["--config", str(path), "--dataset_name", "pictures"])
    assert (run.model_fields or run.model.train_only) and run.engine.output_dir.endswith(path.stem.replace("_", "-"))


def test_a_saved_model_alone_names_no_data():
    with pytest.raises(ValueError, match="name the data: --dataset_name"):
        train.open_data(parse(["--model_name_or_path", "saved"]).data)


@pytest.mark.parametrize("flag", ["--streaming=True", "--image_column=zz", "--validation_split=nope"])
def test_choices_that_the_digits_do_not_have_are_refused(flag: str):
    with pytest.raises(ValueError, match=flag[2:].partition("=")[0]):
        parse([flag])


def test_a_field_of_the_model_among_the_flags_is_sent_to_its_place(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("dataset_name: digits\ntemperature_end: 0.3\n")
    with pytest.raises(ValueError, match="temperature_end in .* put it under `model`"):
        parse(["--config", str(tmp_path / "run.yaml")])


# File and flags.


def test_flags_lie_on_top_of_the_file(with_file: WithFile):
    file = with_file("{seed: 5, warmup_steps: 7, model: {codebook_size: 32, codebook_dim: 8}}")
    run = parse([*file, "--seed", "6", "--config_overrides", "{codebook_size: 64}"])
    assert (run.engine.seed, run.engine.warmup_steps) == (6, 7)
    assert run.model_fields == {"codebook_size": 64, "codebook_dim": 8}


def test_numbers_that_yaml_reads_as_words_are_numbers(with_file: WithFile):
    run = parse(with_file("{learning_rate: 1e-4, num_train_epochs: 2e1, model: {initial_variance: 3e-1}}"))
    assert run.engine.learning_rate == 1e-4 and run.engine.num_train_epochs == 20
    assert run.model_fields == {"initial_variance": 0.3}


def test_such_numbers_are_numbers_in_the_overrides_too():
    run = parse(["--dataset_name", "x", "--config_overrides", "{temperature_end: 1e-1, variance_lr_scale: 2e1}"])
    assert run.model_fields == {"temperature_end": 0.1, "variance_lr_scale": 20.0}


@pytest.mark.parametrize(
    ("field", "text", "value"), [("initializer_range", "2e-2", 0.02), ("temperature_decay_steps", "1e4", 10_000)]
)
def test_such_numbers_are_numbers_in_every_field(with_file: WithFile, field: str, text: str, value: float):
    (found,) = parse(with_file(f"model: {{{field}: {text}}}")).model_fields.values()
    assert found == value and type(found) is type(value)


def test_null_leaves_the_default(with_file: WithFile):
    text = "{seed: null, learning_rate: null, output_dir: null, model_type: null, data_files: null, model: null}"
    assert parse(with_file(text)) == parse(with_file("{}"))


@pytest.mark.parametrize("text", ["no", "'no'", "bf16"])
def test_the_precision_stands_in_the_file_as_on_the_command_line(with_file: WithFile, text: str):
    assert parse(with_file(f"mixed_precision: {text}")).engine.mixed_precision == text.strip("'")


@pytest.mark.parametrize(("text", "value"), [("true", True), ("yes", True), ("false", False)])
def test_switches(with_file: WithFile, text: str, value: bool):
    assert parse(with_file(f"{{torch_compile: {text}}}")).engine.torch_compile is value
    assert parse(["--torch_compile", text]).engine.torch_compile is value
    assert parse(["--torch_compile"]).engine.torch_compile is True


def test_lists_of_a_model_field(with_file: WithFile):
    assert parse(with_file("model: {hidden_channels: [8, 16]}")).model_fields == {"hidden_channels": [8, 16]}


@pytest.mark.parametrize(
    ("text", "files"),
    [
        ("some/*.parquet", "some/*.parquet"),
        ("'*.parquet'", "*.parquet"),
        ("'[ab].parquet'", "[ab].parquet"),
        ("[a.parquet, it's.parquet]", ["a.parquet", "it's.parquet"]),
        ("{train: [a, b], test: c-*}", {"train": ["a", "b"], "test": "c-*"}),
    ],
    ids="pattern bare_pattern brackets list splits".split(),
)
def test_data_files_reach_the_loader(with_file: WithFile, monkeypatch: pytest.MonkeyPatch, text: str, files: Any):
    opened: list[Any] = []
    monkeypatch.setattr(train, "load_images", lambda name, **options: opened.append(options["data_files"]))
    train.open_data(parse(with_file(f"dataset_name: parquet\ndata_files: {text}")).data)
    train.open_data(parse(["--dataset_name", "parquet", "--data_files", text.strip("'")]).data)
    assert opened == [files, files]


def test_the_record_holds_every_setting():
    run = parse(["--seed", "4"])
    recorded = plain(run.settings)
    assert recorded["seed"] == 4 and recorded["dataset_name"] == "digits" and recorded["streaming"] is False
    assert recorded["model"] == run.model_fields


# Refusals.


@pytest.mark.parametrize("flag", ["--learn", "--conf", "--max_train", "--model_name", "--dataset"])
def test_abbreviated_flags_are_refused(flag: str, capsys: pytest.CaptureFixture[str]):
    assert re.search(rf"{flag}(?!\w)", refusal([flag, "1"], capsys))


@pytest.mark.parametrize(
    ("text", "named", "nearest"),
    [
        ("lerning_rate: 1", "lerning_rate", "learning_rate"),
        ("dataset: x", "dataset", "dataset_name"),
        ("model: {codebok_size: 3}", "codebok_size", "codebook_size"),
        ("model: {hiden_channels: [3]}", "hiden_channels", "hidden_channels"),
        ("{model_type: hf_vqvae, model: {comitment_weight: 1}}", "comitment_weight", "commitment_weight"),
        ("config_overrides: {codebok_dim: 3}", "codebok_dim", "codebook_dim"),
    ],
)
def test_an_unknown_key_is_told_the_nearest_known_one(
    with_file: WithFile, capsys: pytest.CaptureFixture[str], text: str, named: str, nearest: str
):
    message = refusal(with_file(text), capsys)
    assert f"{named}; did you mean {nearest}?" in message


def test_an_unknown_override_is_told_the_nearest_known_one(capsys: pytest.CaptureFixture[str]):
    message = refusal(["--config_overrides", "{codebok_size: 3}"], capsys)
    assert "codebok_size; did you mean codebook_size?" in message


@pytest.mark.parametrize("flag", ["--learning_rat", "--learning_rat=1", "--learning-rat"])
def test_an_unknown_flag_is_told_the_nearest_known_one(capsys: pytest.CaptureFixture[str], flag: str):
    assert "did you mean --learning_rate?" in refusal([flag, "1"], capsys)


def test_where_nothing_is_near_all_names_are_listed(with_file: WithFile, capsys: pytest.CaptureFixture[str]):
    message = refusal(with_file("zzzzzz: 1"), capsys)
    assert "zzzzzz" in message and "learning_rate" in message and "dataset_name" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", "x"),
        ("seed", "-1"),
        ("learning_rate", "fast"),
        ("learning_rate", "-1e-3"),
        ("learning_rate", "[1, 2]"),
        ("max_train_steps", "0"),
        ("max_train_steps", "2.5"),
        ("mixed_precision", "fp16"),
        ("lr_scheduler_type", "cosin"),
        ("streaming", "perhaps"),
        ("model_type", "hf_vqva"),
        ("task", "priors"),
        ("warn_perplexity_below", "-0.1"),
        ("warn_perplexity_below", "1.5"),
        ("warn_perplexity_below", "few"),
    ],
)
def test_a_bad_value_is_named_with_its_setting(
    with_file: WithFile, capsys: pytest.CaptureFixture[str], field: str, value: str
):
    for arguments in (with_file(f"{field}: {value}"), [f"--{field}={value}"]):
        message = refusal(arguments, capsys)
        assert field in message and value.removeprefix("-").split("e-")[0] in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("codebook_size", "1"),
        ("codebook_size", "4.5"),
        ("codebook_size", "many"),
        ("hidden_channels", "64"),
        ("image_size", "31"),
        ("initial_variance", "wide"),
        ("temperature_decay_steps", "soon"),
        ("norm", "layer"),
        ("latent_projection", "perhaps"),
    ],
)
def test_a_bad_value_is_named_with_its_model_field(
    with_file: WithFile, capsys: pytest.CaptureFixture[str], field: str, value: str
):
    for arguments in (with_file(f"model: {{{field}: {value}}}"), ["--config_overrides", f"{{{field}: {value}}}"]):
        message = refusal(arguments, capsys)
        assert field in message and value in message


def test_a_saved_model_brings_its_own_config(with_file: WithFile, capsys: pytest.CaptureFixture[str]):
    saved = ["--model_name_or_path", "some/model"]
    for arguments in (
        [*saved, "--config_overrides", "{codebook_size: 3}"],
        [*saved, *with_file("model: {codebook_size: 3}")],
    ):
        message = refusal(arguments, capsys)
        assert "some/model" in message and "codebook_size" in message


@pytest.mark.parametrize(
    ("text", "named"),
    [("[1, 2]", "list"), ("", "mapping"), ("a: [", "config.yaml"), ("model: [1]", "model"), ("model: 3", "model")],
    ids="list empty broken_yaml model_is_a_list model_is_a_number".split(),
)
def test_a_file_that_is_no_mapping(with_file: WithFile, capsys: pytest.CaptureFixture[str], text: str, named: str):
    assert named in refusal(with_file(text), capsys)


@pytest.mark.parametrize("text", ["3", "{a", "[1]"])
def test_overrides_that_are_no_mapping(capsys: pytest.CaptureFixture[str], text: str):
    assert "config_overrides" in refusal(["--config_overrides", text], capsys)


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for path in (tmp_path / "nowhere.yaml", tmp_path):
        assert str(path) in refusal(["--config", str(path)], capsys)


def test_stray_words_are_named(capsys: pytest.CaptureFixture[str]):
    assert "stray" in refusal(["stray"], capsys)


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        parse(["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in ("config", "dataset_name", "learning_rate", "model_name_or_path"))
