"""The settings of a run: a YAML file, and flags on top of it.

Every flag may stand in the file under its own name; the fields of the model's config stand under `model`.
"""

import argparse
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, get_args

import yaml
from transformers import HfArgumentParser, PreTrainedConfig

from engine import EngineArguments
from hf_vq import PixelCNNPriorConfig, SQVAEConfig, TransformerPriorConfig, VQVAEConfig
from hf_vq.code_health import WARN_PERPLEXITY_BELOW
from random_views import Views

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "sqvae_digits.yaml"
# The first of each is the default.
TASKS: dict[str, tuple[Any, ...]] = {
    "tokenizer": (SQVAEConfig, VQVAEConfig),
    "prior": (TransformerPriorConfig, PixelCNNPriorConfig),
}
MODELS = {config.model_type: config for configs in TASKS.values() for config in configs}


@dataclass
class ModelArguments:
    """What is trained, and when to worry about it."""

    task: str = field(default="tokenizer", metadata={"help": f"What to train: one of {', '.join(TASKS)}."})
    model_type: str | None = field(default=None, metadata={"help": f"One of {', '.join(MODELS)}; it fits the task."})
    config_overrides: str | None = field(
        default=None, metadata={"help": "Fields of the model's config, e.g. '{codebook_size: 256, codebook_dim: 8}'."}
    )
    model_name_or_path: str | None = field(default=None, metadata={"help": "A saved model to fine-tune."})
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "The tokenizer whose tokens a prior learns: a folder or a Hub name."}
    )
    tokenizer_revision: str | None = field(default=None, metadata={"help": "Its branch, tag or commit."})
    train_only: str | None = field(
        default=None, metadata={"help": "`decoder`: leave the tokens of model_name_or_path, and what is made for them."}
    )
    warn_perplexity_below: float = field(
        default=WARN_PERPLEXITY_BELOW,
        metadata={"help": "Warn where an evaluation's perplexity is under this share of codebook_size; 0: never."},
    )

    def __post_init__(self) -> None:
        require_choice("task", self.task, TASKS)
        of_task = [config.model_type for config in TASKS[self.task]]
        self.model_type = self.model_type or of_task[0]
        require_choice(f"model_type for the task {self.task}", self.model_type, of_task)
        if (self.tokenizer_name_or_path is None) != (self.task == "tokenizer"):
            raise ValueError("a prior, and nothing else, needs the tokenizer it is for: --tokenizer_name_or_path")
        if self.train_only is not None:
            require_choice("train_only", self.train_only, ("decoder",))
            if self.model_name_or_path is None or self.task != "tokenizer":
                raise ValueError("train_only needs the saved tokenizer whose decoder is trained: --model_name_or_path")
        if not 0 <= self.warn_perplexity_below <= 1:
            raise ValueError(
                f"warn_perplexity_below is a share of codebook_size, in [0, 1], and is {self.warn_perplexity_below}"
            )


@dataclass
class DataArguments:
    """What it is trained on."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "A Hub name, a local folder, `parquet` with data_files, or `digits`, which are built in."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the data set."})
    data_files: str | None = field(
        default=None, metadata={"help": "Files: one pattern, or '{train: a-*.parquet, test: b.parquet}'."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of the images; found by itself if alone."})
    label_column: str | None = field(
        default=None, metadata={"help": "Column of a prior's classes; found by itself if alone; `none` for no classes."}
    )
    train_split: str = field(default="train", metadata={"help": "The split to train on."})
    validation_split: str | None = field(default=None, metadata={"help": "The split to watch while training."})
    test_split: str | None = field(
        default=None, metadata={"help": "The split that is read once, at the end; `none` for no test."}
    )
    validation_size: int | None = field(
        default=None, metadata={"help": "Rows held out where there is no validation split: min(5000, a tenth)."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read the data while training."})
    keep_in_memory: bool = field(default=False, metadata={"help": "Keep the data in memory instead of on disk."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where prepared data go."})
    random_flip: bool = field(default=False, metadata={"help": "Mirror training images left to right, one in two."})
    random_shift: int = field(default=0, metadata={"help": "Most pixels by which training images are moved."})
    max_bad_examples: int = field(default=100, metadata={"help": "Undecodable images to skip before giving up."})

    def __post_init__(self) -> None:
        if self.max_bad_examples < 0:
            raise ValueError(f"max_bad_examples must be 0 or more, and is {self.max_bad_examples}")
        if self.random_shift < 0:
            raise ValueError(f"random_shift must be 0 or more pixels, and is {self.random_shift}")
        if self.dataset_name == "digits":
            for f in fields(self):
                if f.name not in ("dataset_name", "validation_size", "test_split", "max_bad_examples", "label_column"):
                    self._refuse_for_digits(f.name, f.default)

    @property
    def views(self) -> Views:
        """How training images are varied."""
        return Views(self.random_flip, self.random_shift)

    def _refuse_for_digits(self, name: str, default: object) -> None:
        if getattr(self, name) != default:
            raise ValueError(f"{name} is {getattr(self, name)!r}, but the embedded digits have no such choice: drop it")


@dataclass
class HubArguments:
    """Where it is published."""

    push_to_hub: bool = field(default=False, metadata={"help": "Publish the model on the Hub when it is trained."})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Its repository, org/name; by default yours, named as the output_dir."}
    )
    hub_private_repo: bool | None = field(default=None, metadata={"help": "Make a new repository private."})
    hub_token: str | None = field(default=None, metadata={"help": "By default the one that was logged in with."})
    hub_license: str | None = field(default=None, metadata={"help": "Of the weights, for the card: apache-2.0, ..."})
    tokenizer_repo_id: str | None = field(default=None, metadata={"help": "Of a prior: its tokenizer's repository."})
    with_tokenizer: bool = field(default=False, metadata={"help": "Of a prior: publish its tokenizer, too."})


class RunArguments(NamedTuple):
    """All settings of a run."""

    model: ModelArguments
    data: DataArguments
    engine: EngineArguments
    hub: HubArguments
    model_fields: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """What is trained and how, for run.yaml."""
        flat = asdict(self.model) | asdict(self.data) | asdict(self.engine)
        del flat["config_overrides"]
        return {**flat, "model": self.model_fields}


def parse(arguments: Sequence[str]) -> RunArguments:
    """Reads the command line, and the file that --config names; without arguments, the embedded default.

    Raises:
        ValueError: an unknown name, with the nearest known one, or a value out of range.
        SystemExit: from argparse, with its own message.
    """
    path = choose_config(arguments)
    in_file = read_config(path) if path else {}
    in_file_model = as_mapping(in_file.pop("model", None), f"model in {path}")

    groups = (ModelArguments, DataArguments, EngineArguments, HubArguments)
    names = [f.name for group in groups for f in fields(group)]
    parser = HfArgumentParser(list(groups), allow_abbrev=False, description="Trains a tokenizer or a prior.")  # type: ignore[arg-type]  # its NewType fits no class
    parser.add_argument("--config", help="A YAML file with any of these settings, and the model's fields as `model`.")
    check_places(in_file, names, path)
    check_names(in_file, names, f"setting in {path}")
    # As flags in front of the real ones, the file's values are converted by the same parser.
    model, data, engine, hub, *_, stray = parser.parse_args_into_dataclasses(
        [*as_flags(in_file), *arguments], look_for_args_file=False, return_remaining_strings=True
    )
    check_names((word.partition("=")[0] for word in stray), [f"--{name}" for name in names], "flag")
    overrides = as_mapping(read_yaml(model.config_overrides or "", "config_overrides"), "config_overrides")
    assert model.model_type is not None
    config_class = MODELS[model.model_type]
    check_names(in_file_model, list(own_fields(config_class)), f"field of the model {model.model_type} in {path}")
    model_fields = convert_fields(config_class, in_file_model | overrides)
    if model.model_name_or_path and model_fields and not model.train_only:
        raise ValueError(
            f"{model.model_name_or_path} brings its own config: drop {', '.join(model_fields)}, or model_name_or_path"
        )
    return RunArguments(model, data, engine, hub, model_fields)


def choose_config(arguments: Sequence[str]) -> Path | None:
    """The file that --config names; without it the embedded default, unless other data or a saved model are named."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--dataset_name", "--dataset-name")
    parser.add_argument("--model_name_or_path", "--model-name-or-path")
    known, _ = parser.parse_known_args(arguments)
    names_something = known.dataset_name or known.model_name_or_path
    return known.config or (None if names_something else DEFAULT_CONFIG)


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; of a run.yaml, the settings of that run."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}: --config takes a YAML file, such as {DEFAULT_CONFIG}")
    content = read_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping of settings, and holds {type(content).__name__}")
    if isinstance(content.get("settings"), dict):
        content = {name: value for name, value in content["settings"].items() if name != "num_processes"}
    return content


def read_yaml(text: str, where: str) -> Any:
    """What a YAML text says; `where` names it in the ValueError that a text of another kind raises."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML: {error}") from error


def as_mapping(value: Any, what: str) -> dict[str, Any]:
    """`value`, where null stands for nothing."""
    if not isinstance(value or {}, dict):
        raise ValueError(f"{what} must be a mapping such as {{codebook_size: 256}}, got {value!r}")
    return value or {}


def as_flags(settings: dict[str, Any]) -> list[str]:
    """A mapping as command-line flags; null leaves the default."""
    flags = []
    for name, value in settings.items():
        if isinstance(value, dict | list):
            value = yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()
        elif name == "mixed_precision" and value is False:
            value = "no"  # as YAML reads the word
        flags += [] if value is None else [f"--{name}={value}"]
    return flags


def check_places(in_file: dict[str, Any], names: Sequence[str], path: Path | None) -> None:
    """Raises a ValueError for a field of a model that stands beside the flags."""
    of_models = {f.name for config in MODELS.values() for f in fields(config)}
    for name in of_models.intersection(in_file).difference(names):
        raise ValueError(f"{name} in {path} is a field of the model: put it under `model`")


def require_choice(what: str, value: str, choices: Iterable[str]) -> None:
    """Raises a ValueError that names the choices unless `value` is one of them."""
    if value not in choices:
        raise ValueError(f"{what} must be one of {', '.join(choices)}, and is {value}")


def check_names(given: Iterable[str], known: Sequence[str], what: str) -> None:
    """Raises a ValueError that suggests the nearest known name."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise ValueError(f"unknown {what}: {name}; {hint}")


def convert_fields(config_class: type[PreTrainedConfig], given: dict[str, Any]) -> dict[str, Any]:
    """Fields of a model's config, numbers that YAML reads as strings (1e-4) converted, names and values checked."""
    known = own_fields(config_class)
    check_names(given, list(known), f"field of the model {config_class.model_type}")
    converted = {name: convert_number(value, known[name]) for name, value in given.items()}
    config_class(**converted)
    return converted


def own_fields(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """The fields that a config has beyond those of every config, with their types."""
    general = {f.name for f in fields(PreTrainedConfig)}
    return {f.name: f.type for f in fields(config_class) if f.name not in general}


def convert_number(value: Any, kind: Any) -> Any:
    """`value` as a number if it is a word such as 1e-4 where `kind`, the type of a field, allows numbers."""
    kinds = set(get_args(kind)) or {kind}
    if not isinstance(value, str) or str in kinds or not kinds & {int, float}:
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    return int(number) if float not in kinds and number.is_integer() else number
