"""Token data sets on the Hub: pushed in one commit with a card, loaded with plain `load_dataset`."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard, HfApi

import hf_vq
from corpora import picture, save_tokenizer, write_data_set
from hf_vq.cli import main
from hf_vq.commands import tokenize as command
from hf_vq.publishing import publish
from hub_client import CONNECTION_LOST
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


def test_a_lost_upload_is_finished_by_the_same_command(
    hub: HubServer, flags: list[str], capsys: pytest.CaptureFixture[str]
):
    lost = 0
    for number in range(3, 12):
        hub.reset_requests()
        hub.faults = since(number, "drop before")
        try:
            lost += main(flags) != 0
        except (*CONNECTION_LOST, RuntimeError):
            lost += 1
        finally:
            hub.faults = None
        repository = hub.repositories.get(f"datasets/{TOKENS}")
        assert repository is None or len(repository.history()) in (1, 2)
    assert lost
    assert main(flags) == 0
    files = hub.repositories[f"datasets/{TOKENS}"].head().files
    assert len([name for name in files if name.endswith(".parquet")]) == 5


def test_a_tokenizer_that_others_cannot_load_is_refused(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
):
    flags[1] = os.fspath(tmp_path / "run")
    assert main(flags) == 2
    assert "others would not find the tokenizer" in capsys.readouterr().err
