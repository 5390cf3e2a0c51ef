"""Token data sets on the Hub: pushed in one commit with a card, loaded with plain `load_dataset`."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import DatasetCard, HfApi
from transformers import AutoConfig

import hf_vq
from corpora import picture, save_tokenizer, write_data_set
from hf_vq.cli import main
from hf_vq.commands import tokenize as command
from hf_vq.corpus.transform import TokenizeImages
from hf_vq.publishing import publish
from hf_vq.streams import describe_tokens
from hub_server import HubServer, since

MODEL, TOKENS = "org/sqvae-tiny", "org/tiny-tokens"


@pytest.fixture
def flags(hub_api: HfApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command that tokenizes a folder of images with a published tokenizer to the Hub."""
    monkeypatch.setattr(command, "HF_HOME", str(tmp_path / "home"))
    publish(save_tokenizer(tmp_path / "run"), MODEL)
    images = write_data_set(tmp_path / "images", bad=[5])
    given = ["--dataset_name", str(images), "--output", f"hf://datasets/{TOKENS}", "--dataloader_num_workers", "0"]
    return ["tokenize", MODEL, *given, "--license", "cc-by-4.0"]


def test_pushed_and_loaded_by_name(
    hub: HubServer, flags: list[str], run_with_hub: Callable[..., str], capsys: pytest.CaptureFixture[str]
):
    assert main(flags) == 0
    head = hub.repositories[f"datasets/{TOKENS}"].head()
    assert f"commit {head.oid}" in capsys.readouterr().out
    assert len(hub.repositories[f"datasets/{TOKENS}"].history()) == 2
    card = head.files["README.md"].decode()
    data = DatasetCard(card).data
    assert data.license == "cc-by-4.0" and data.size_categories == "n<1K" and "image tokens" in data.tags
    assert "| images left out as unusable | 1 |" in card and hub.repositories[MODEL].head().oid in card
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    ids = hf_vq.ImageTokenizer.from_pretrained(MODEL).encode(picture(0))
    assert run_with_hub(f"{code}\nprint(len(tokens), row, image.size)") == (
        f"47 {{'label': 0, 'caption': 'picture 0', 'image_tokens': {ids}}} (8, 8)\n"
    )


def test_the_command_in_the_card_trains_a_prior(
    hub: HubServer, flags: list[str], hub_environment: dict[str, str], repository: Path, tmp_path: Path
):
    main(flags)
    card = hub.repositories[f"datasets/{TOKENS}"].head().files["README.md"].decode()
    (command,) = re.findall(r"```bash\n(.*?)```", card, flags=re.DOTALL)
    words = shlex.split(command.replace("\\\n", " "))
    small = ["--config_overrides", "{hidden_size: 16, num_hidden_layers: 1}", "--max_train_steps", "2"]
    ran = subprocess.run(
        [sys.executable, *words[words.index("training/train.py") :], *small, "--output_dir", str(tmp_path / "prior")],
        cwd=repository, env=hub_environment | {"ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    config = AutoConfig.from_pretrained(tmp_path / "prior")
    assert (config.tokenizer_name_or_path, config.tokenizer_revision) == (MODEL, hub.repositories[MODEL].head().oid)


def test_stage_two_streams_it_without_images(hub: HubServer, flags: list[str], run_with_hub: Callable[..., str]):
    main(flags)
    said = run_with_hub(
        "import sys\nfrom hf_vq.streams import describe_tokens, load_images\n"
        "found = describe_tokens(sys.argv[1])\n"
        "rows = load_images(sys.argv[1], streaming=True, take_tokens=True, validation_size=12).train\n"
        "print(found.tokenizer_name_or_path, found.tokenizer_revision, len(list(rows)))",
        TOKENS,
    )
    assert said == f"{MODEL} {hub.repositories[MODEL].head().oid} 35\n"


@pytest.mark.parametrize("fault", ["500", "drop after"])
def test_after_a_fault_in_any_request_the_same_command_finishes(hub: HubServer, flags: list[str], fault: Any):
    hub.reset_requests()
    assert main(flags) == 0
    requests, whole = len(hub.requests), dict(hub.repositories[f"datasets/{TOKENS}"].head().files)
    assert requests >= 12 and len([name for name in whole if name.endswith(".parquet")]) == 5
    for number in range(requests):
        name = f"org/fault{number}"
        flags[flags.index("--output") + 1] = f"hf://datasets/{name}"
        hub.reset_requests()
        hub.faults = since(number, fault)
        try:
            # The tokenizer's and the data set's libraries may go on from their caches, and tell of a lost Hub elsewise.
            with suppress(RuntimeError):
                main(flags)
        finally:
            hub.faults = None
        repository = hub.repositories.get(f"datasets/{name}")
        shown = dict(repository.head().files) if repository else {}
        assert shown.keys() - {".gitattributes"} in (set(), whole.keys() - {".gitattributes"}), number
        assert main(flags) == 0
        found = hub.repositories[f"datasets/{name}"].head().files
        assert {n: f for n, f in found.items() if n.startswith("data/")} == {
            n: f for n, f in whole.items() if n.startswith("data/")
        }


def test_a_tokenizer_that_moves_meanwhile(
    hub: HubServer, hub_api: HfApi, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A job that goes on has the commit that it began with; the next one has the new one."""
    encode, before = TokenizeImages.encode, hub.repositories[MODEL].head().oid
    calls = iter(range(1000))

    def dying(self: TokenizeImages, batches: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return encode(self, batches)

    with monkeypatch.context() as patched:
        patched.setattr(TokenizeImages, "encode", dying)
        assert main(flags) == 130
    publish(save_tokenizer(tmp_path / "new", hidden_channels=[16, 8]), MODEL)
    assert main(flags) == 0
    described = describe_tokens(TOKENS)
    assert described is not None and described.tokenizer_revision == before
    assert main(flags) == 0
    described = describe_tokens(TOKENS, revision=hub.repositories[f"datasets/{TOKENS}"].head().oid)
    assert described is not None and described.tokenizer_revision == hub.repositories[MODEL].head().oid != before
    assert not list((tmp_path / "home").rglob("*.parquet"))


def test_a_repository_of_something_else_is_left_alone(
    hub: HubServer, hub_api: HfApi, flags: list[str], capsys: pytest.CaptureFixture[str]
):
    hub_api.create_repo("org/mine", repo_type="dataset")
    given = {"path_or_fileobj": b"images", "path_in_repo": "data/train.parquet", "repo_id": "org/mine"}
    hub_api.upload_file(**given, repo_type="dataset")
    flags[flags.index("--output") + 1] = "hf://datasets/org/mine"
    assert main(flags) == 2
    assert "holds data/train.parquet, which no tokenization made" in capsys.readouterr().err
    assert hub.repositories["datasets/org/mine"].head().files["data/train.parquet"] == b"images"


@pytest.mark.parametrize("name", ["org/x/", "../../../evil", "a/b/c", ""])
def test_a_name_that_no_repository_can_have(
    flags: list[str], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
):
    flags[flags.index("--output") + 1] = f"hf://datasets/{name}"
    assert main(flags) == 2
    assert "repo" in capsys.readouterr().err.lower()
    assert not (tmp_path / "home").exists()


def test_what_the_hub_refuses_shows_before_the_work(
    hub: HubServer, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([*flags, "--token", hub.strangers_token]) == 2
    assert "403" in capsys.readouterr().err
    assert not list((tmp_path / "home").rglob("*.parquet"))


def test_a_private_tokenizer_takes_the_token(
    hub: HubServer, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    publish(save_tokenizer(tmp_path / "secret"), "org/secret", private=True)
    flags[1], flags[flags.index("--output") + 1] = "org/secret", str(tmp_path / "out")
    monkeypatch.delenv("HF_TOKEN")
    assert main(flags) == 2
    assert main([*flags, "--token", hub.token]) == 0


def test_a_tokenizer_that_others_cannot_load_is_refused(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
):
    flags[1] = os.fspath(tmp_path / "run")
    assert main(flags) == 2
    assert "others would not find the tokenizer" in capsys.readouterr().err
