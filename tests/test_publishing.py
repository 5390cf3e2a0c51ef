"""Publishing: what others pull is the whole model with its code, numbers and card, or what was there before."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BertConfig

import hf_vq
from corpora import picture, save_tokenizer
from hf_vq.cli import main
from hf_vq.evaluation import Evaluation, weights_hash, write_evaluation
from hf_vq.hub_commit import commit_folder
from hf_vq.models.prior_tokenizer import load_tokenizer, sibling, tokenizer_location
from hf_vq.publishing import publish
from hf_vq.reference_tokens import REFERENCE_FILE, hash_of_reference, save_reference_tokens
from hub_client import CONNECTION_LOST, in_process
from hub_server import HubServer, at, since

NAME, PRIOR_NAME = "org/sqvae-tiny", "org/sqvae-tiny-prior"
FAILURES = (HfHubHTTPError, RuntimeError, OSError, *CONNECTION_LOST)
METRICS: dict[str, Any] = {"psnr": 21.25, "ssim": None, "perplexity": 77.5, "usage": 0.5, "num_images": 10}
WITHOUT_PACKAGE = "import sys; sys.modules['hf_vq'] = None\n"
PIXELS = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training leaves: model, numbers, settings, log, pictures."""
    folder = save_tokenizer(tmp_path_factory.mktemp("runs") / "sqvae-tiny")
    tok = hf_vq.ImageTokenizer.from_pretrained(folder)
    save_reference_tokens(folder, tok.model, tok.processor, PIXELS)
    about = {"dataset_name": "uoft-cs/cifar10", "split": "test", "dataset_revision": "abc123"}
    counts = torch.ones(1, 300)
    write_evaluation(
        folder / "evaluation.json",
        Evaluation(METRICS, counts),
        fingerprint=tok.model.fingerprint(),
        weights_sha256=weights_hash(tok.model),
        **about,
    )
    write_run(folder, "uoft-cs/cifar10")
    draw(folder, "step-000010-codes", "step-000020-codes", "step-000020-reconstructions", "curves")
    return folder


@pytest.fixture(scope="module")
def prior_dir(tokenizer_dir: Path) -> Path:
    """A prior for it, beside it."""
    folder, tokenizer = tokenizer_dir.parent / "prior", AutoModel.from_pretrained(tokenizer_dir)
    made_for = {"tokenizer_name_or_path": "../sqvae-tiny", "tokenizer_fingerprint": tokenizer.fingerprint()}
    config = hf_vq.TransformerPriorConfig(
        codebook_size=300, grid_size=2, num_classes=3, hidden_size=16, num_hidden_layers=1, **made_for
    )
    hf_vq.TransformerPrior(config).save_pretrained(folder)
    about = {"dataset_name": "uoft-cs/cifar10", "split": "test"}
    metrics: dict[str, Any] = {"bits_per_token": 7.125, "bits_per_dim": 5.25, "num_images": 10}
    about |= {"tokenizer_fingerprint": tokenizer.fingerprint()}
    write_evaluation(folder / "evaluation.json", Evaluation(metrics, torch.ones(1, 300)), **about)
    write_run(folder, "parquet")
    draw(folder, "step-000020-samples", "curves")
    return folder


def write_run(folder: Path, dataset_name: str) -> None:
    record = {
        "settings": {"dataset_name": dataset_name, "train_split": "train", "num_processes": 2},
        "seed": 7,
        "versions": {"python": "3.11", "torch": "2.13"},
        "machine": "x86_64",
        "git_commit": "c0ffee",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(record))
    lines = [{"step": 10, "images": 640, "seconds": 30.0}, {"step": 20, "images": 1280, "seconds": 61.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def draw(folder: Path, *names: str) -> None:
    (folder / "pictures").mkdir()
    for number, name in enumerate(names):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / "pictures" / f"{name}.png")


def files_of(hub: HubServer, name: str = NAME, revision: str = "main") -> dict[str, bytes]:
    return dict(hub.repositories[name].head(revision).files)


def python_of(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)


def test_what_is_published(hub: HubServer, hub_api: HfApi, tokenizer_dir: Path):
    commit = publish(tokenizer_dir, NAME, license="apache-2.0")
    files = files_of(hub)
    assert commit.oid == hub.repositories[NAME].head().oid
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"} <= files.keys()
    assert {
        "modeling_sqvae.py",
        "image_processing_vq.py",
        "evaluation.json",
        "run.yaml",
        REFERENCE_FILE,
    } <= files.keys()
    pictures = {name for name in files if name.startswith("pictures/")}
    assert pictures == {f"pictures/{name}.png" for name in ("codes", "reconstructions", "curves")}
    last = tokenizer_dir / "pictures" / "step-000020-codes.png"
    assert files["pictures/codes.png"] == last.read_bytes()
    assert len(hub.repositories[NAME].history()) == 2  # the empty repository, and one commit


def test_pulled_by_name_it_is_the_same_and_verifies(hub_api: HfApi, tokenizer_dir: Path):
    publish(tokenizer_dir, NAME)
    here, there = (hf_vq.ImageTokenizer.from_pretrained(path) for path in (tokenizer_dir, NAME))
    assert there.model.fingerprint() == here.model.fingerprint()
    assert there([picture(0)])["input_ids"] == here([picture(0)])["input_ids"]
    assert there.verify() == (8, 0, 0.0)
    with pytest.raises(RepositoryNotFoundError):
        hub_api.model_info("org/nothing")
    with pytest.raises(OSError, match="org/nothing"):
        hf_vq.ImageTokenizer.from_pretrained("org/nothing")


def test_verifying_stays_with_the_commit_that_was_loaded(hub_api: HfApi, tokenizer_dir: Path, tmp_path: Path):
    publish(tokenizer_dir, NAME)
    loaded = hf_vq.ImageTokenizer.from_pretrained(NAME)
    publish(save_tokenizer(tmp_path / "other", codebook_dim=3), NAME)
    assert loaded.verify().num_differing == 0
    assert hf_vq.ImageTokenizer.from_pretrained(NAME).model.config.codebook_dim == 3


def test_the_card_s_metadata(hub: HubServer, hub_api: HfApi, tokenizer_dir: Path):
    publish(tokenizer_dir, NAME, license="mit")
    data = ModelCard(files_of(hub)["README.md"].decode()).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("hf-vq", "image-feature-extraction", "mit")
    assert data.datasets == ["uoft-cs/cifar10"] and data.model_name == "sqvae-tiny"
    measured = {result.metric_type: result for result in data.eval_results or []}
    assert {name: result.metric_value for name, result in measured.items()} == {
        name: METRICS[name] for name in ("psnr", "perplexity", "usage")
    }
    assert {(r.dataset_type, r.dataset_split, r.dataset_revision) for r in measured.values()} == {
        ("uoft-cs/cifar10", "test", "abc123")
    }


def test_every_number_in_a_card_was_measured(hub: HubServer, hub_api: HfApi, tokenizer_dir: Path, tmp_path: Path):
    publish(tokenizer_dir, NAME)
    card = files_of(hub)["README.md"].decode()
    for told in (
        "| 21.25 |",
        "| 77.5 |",
        "| 50.0% |",
        "1,280 in 20 steps",
        "0:01:01",
        "| seed | 7 |",
        "`c0ffee`",
        "abc123",
    ):
        assert told in card, told
    assert "SSIM" not in card
    shutil.copytree(tokenizer_dir, tmp_path / "unmeasured")
    for name in ("evaluation.json", "run.yaml", "metrics.jsonl", REFERENCE_FILE):
        (tmp_path / "unmeasured" / name).unlink()
    publish(tmp_path / "unmeasured", "org/unmeasured")
    bare = files_of(hub, "org/unmeasured")["README.md"].decode()
    assert "## Use" in bare and "## Numbers" not in bare and "## Training" not in bare and "verify" not in bare
    assert ModelCard(bare).data.eval_results is None


def test_the_card_has_the_numbers_of_refined_tokens(
    hub: HubServer, hub_api: HfApi, tokenizer_dir: Path, tmp_path: Path
):
    folder = shutil.copytree(tokenizer_dir, tmp_path / "refined")
    numbers = json.loads((folder / "evaluation.json").read_text()) | {"psnr": 21.75, "refine": 3}
    del numbers["usage"]
    (folder / "evaluation-refined.json").write_text(json.dumps(numbers))
    publish(folder, NAME)
    files = files_of(hub)
    card = files["README.md"].decode()
    assert "| | tokens | refined tokens |\n|---|--:|--:|\n| PSNR, mean over images (dB) | 21.25 | 21.75 |" in card
    assert "| 50.0% |  |" in card and "tok(images, refine=3)" in card
    assert json.loads(files["evaluation-refined.json"])["psnr"] == 21.75


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"weights_sha256": "0"}, "was measured with other weights .* --refine 3 --output"),
        ({"refine": None}, "numbers of hf-vq evaluate --refine belong in evaluation-refined.json, and no others do"),
        ({"num_images": 7}, "is of other images than evaluation.json beside it"),
        ({"split": "train"}, "is of other images than evaluation.json beside it"),
    ],
)
def test_numbers_that_do_not_go_beside_each_other_are_refused(
    hub: HubServer, hub_api: HfApi, tokenizer_dir: Path, tmp_path: Path, spoil: dict[str, Any], message: str
):
    folder = shutil.copytree(tokenizer_dir, tmp_path / "refined")
    plain = json.loads((folder / "evaluation.json").read_text())
    (folder / "evaluation-refined.json").write_text(json.dumps(plain | {"refine": 3} | spoil))
    with pytest.raises(ValueError, match=message):
        publish(folder, NAME)


def test_refined_numbers_do_not_stand_alone_or_for_the_others(
    hub: HubServer, hub_api: HfApi, tokenizer_dir: Path, tmp_path: Path
):
    folder = shutil.copytree(tokenizer_dir, tmp_path / "refined")
    numbers = json.dumps(json.loads((folder / "evaluation.json").read_text()) | {"refine": 3})
    (folder / "evaluation.json").write_text(numbers)
    with pytest.raises(ValueError, match=r"belong in evaluation-refined.json, .*/evaluation.json is wrong"):
        publish(folder, NAME)
    (folder / "evaluation.json").rename(folder / "evaluation-refined.json")
    with pytest.raises(ValueError, match="is of other images than evaluation.json"):
        publish(folder, NAME)


def test_the_card_tells_of_the_run_that_went_before(
    hub: HubServer, hub_api: HfApi, tokenizer_dir: Path, tmp_path: Path
):
    folder = Path(shutil.copytree(tokenizer_dir, tmp_path / "second"))
    earlier = folder / "started_from"
    earlier.mkdir()
    write_run(earlier, "org/other")
    publish(folder, "org/second")
    files = files_of(hub, "org/second")
    card = files["README.md"].decode()
    assert {"started_from/run.yaml", "started_from/metrics.jsonl"} <= files.keys()
    assert "--config started_from/run.yaml\naccelerate launch" in card
    assert "| data | `org/other`, split `train` | `uoft-cs/cifar10`, split `train` |" in card
    assert ModelCard(card).data.datasets == ["org/other", "uoft-cs/cifar10"]
    publish(tokenizer_dir, "org/second")
    files = files_of(hub, "org/second")
    assert "started_from/run.yaml" not in files and "started_from" not in files["README.md"].decode()


def test_the_card_names_the_hash_of_the_reference_tokens(hub: HubServer, hub_api: HfApi, tokenizer_dir: Path):
    publish(tokenizer_dir, NAME)
    assert f"`{hash_of_reference(tokenizer_dir)}`" in files_of(hub)["README.md"].decode()


def test_the_code_in_the_card_runs(
    hub: HubServer, hub_api: HfApi, tokenizer_dir: Path, run_with_hub: Callable[..., str]
):
    """As a newcomer runs it: the first part with hf_vq, the second without."""
    publish(tokenizer_dir, NAME)
    with_package, without = python_of(files_of(hub)["README.md"].decode())
    images = "from PIL import Image\nimages = [Image.new('RGB', (9, 8), 'red')] * 2\n"
    assert run_with_hub(f"{images}{with_package}\nprint(tok.verify(), reconstructions[0].size)") == (
        "all 8 tokens are the published ones (8, 8)\n"
    )
    assert run_with_hub(f"{WITHOUT_PACKAGE}{images}{without}\nprint(image_tokens.shape, pictures[0].size)") == (
        "torch.Size([2, 2, 2]) (8, 8)\n"
    )


def test_a_prior_names_its_tokenizer_on_the_hub(
    hub: HubServer, hub_api: HfApi, prior_dir: Path, run_with_hub: Callable[..., str]
):
    publish(prior_dir, PRIOR_NAME, with_tokenizer=True)
    config = AutoConfig.from_pretrained(PRIOR_NAME)
    assert config.tokenizer_name_or_path == NAME
    assert config.tokenizer_revision == hub.repositories[NAME].head().oid
    card = files_of(hub, PRIOR_NAME)["README.md"].decode()
    assert "| 7.125 |" in card and "5.250" in card and ModelCard(card).data.base_model == NAME
    with_package, without = python_of(card)
    assert run_with_hub(f"{with_package}\nprint(len(pictures), pictures[0].size)") == "3 (8, 8)\n"
    blocked = "import sys; sys.modules['hf_vq'] = None\n"
    assert (
        run_with_hub(f"{blocked}{without}\nprint(tuple(image_tokens.shape), tuple(nats.shape))") == "(2, 2, 2) (2,)\n"
    )


def test_folders_beside_each_other_can_be_uploaded_as_they_are(
    hub: HubServer, hub_api: HfApi, tokenizer_dir: Path, prior_dir: Path, tmp_path: Path
):
    main(
        ["publish", str(prior_dir), "--repo_id", PRIOR_NAME, "--with_tokenizer", "--dry_run", "--output", str(tmp_path)]
    )
    for name in (NAME, PRIOR_NAME):
        commit_folder(hub_api, tmp_path / name.split("/")[-1], name)
    config = AutoConfig.from_pretrained(PRIOR_NAME)
    assert config.tokenizer_name_or_path == "../sqvae-tiny" and tokenizer_location(config) == NAME
    assert load_tokenizer(config)[0].fingerprint() == config.tokenizer_fingerprint
    card = files_of(hub, PRIOR_NAME)["README.md"].decode()
    assert f"[{NAME}](https://huggingface.co/{NAME})" in card and ModelCard(card).data.base_model == NAME


@pytest.mark.parametrize(
    ("repo_id", "name"),
    [("prior", "../x"), ("./org/prior", "../x"), ("/org/prior", "../x"), ("org/prior", "../../x"), ("org/prior", "x")],
)
def test_what_is_no_repository_has_none_beside_it(repo_id: str, name: str):
    assert sibling(repo_id, name) is None


def test_a_prior_for_a_published_tokenizer(
    hub: HubServer, hub_api: HfApi, tokenizer_dir: Path, prior_dir: Path, tmp_path: Path
):
    publish(tokenizer_dir, "other/name")
    publish(prior_dir, PRIOR_NAME, tokenizer_repo_id="other/name")
    assert AutoConfig.from_pretrained(PRIOR_NAME).tokenizer_name_or_path == "other/name"
    # Published once more from what was pulled, it needs no word about its tokenizer.
    prior = AutoModelForCausalLM.from_pretrained(PRIOR_NAME)
    prior.save_pretrained(prior_dir.parent / "pulled")
    publish(prior_dir.parent / "pulled", "org/again")
    assert AutoConfig.from_pretrained("org/again").tokenizer_name_or_path == "other/name"
    # It keeps its tokenizer's commit, whatever has become of its main.
    publish(save_tokenizer(tmp_path / "new", hidden_channels=[16, 8]), "other/name")
    publish(prior_dir.parent / "pulled", "org/again")
    assert AutoConfig.from_pretrained("org/again").tokenizer_revision == prior.config.tokenizer_revision


def test_a_branch_of_prior_and_tokenizer(hub: HubServer, hub_api: HfApi, tokenizer_dir: Path, prior_dir: Path):
    publish(prior_dir, "tiny-prior", tokenizer_repo_id="tiny", with_tokenizer=True, revision="trial")
    owner = hub_api.whoami()["name"]
    assert "config.json" not in files_of(hub, f"{owner}/tiny")
    config = AutoConfig.from_pretrained(f"{owner}/tiny-prior", revision="trial")
    assert config.tokenizer_name_or_path == f"{owner}/tiny"
    assert config.tokenizer_revision == hub.repositories[f"{owner}/tiny"].head("trial").oid


def test_a_prior_whose_tokenizer_nobody_would_find_is_refused(
    hub: HubServer, hub_api: HfApi, prior_dir: Path, tmp_path: Path
):
    with pytest.raises(
        ValueError, match=r"in the folder \.\./sqvae-tiny, where nobody else finds it: .*\(as org/sqvae-tiny"
    ):
        publish(prior_dir, PRIOR_NAME)
    publish(save_tokenizer(tmp_path / "other", hidden_channels=[16, 8]), "org/other")
    with pytest.raises(ValueError, match="was made for the tokenizer .*sqvae-tiny.*org/other.* is not it: fingerprint"):
        publish(prior_dir, PRIOR_NAME, tokenizer_repo_id="org/other")
    assert PRIOR_NAME not in hub.repositories


def test_numbers_of_another_model_are_refused(hub: HubServer, hub_api: HfApi, tokenizer_dir: Path, tmp_path: Path):
    folder = save_tokenizer(tmp_path / "other", hidden_channels=[16, 8])
    shutil.copyfile(tokenizer_dir / "evaluation.json", folder / "evaluation.json")
    with pytest.raises(ValueError, match="was measured with another tokenizer .*measure again"):
        publish(folder, NAME)
    # Another decoder for the same tokens has other numbers, too.
    shutil.copytree(tokenizer_dir, tmp_path / "decoder")
    model = AutoModel.from_pretrained(tokenizer_dir)
    torch.nn.init.zeros_(next(model.decoder.parameters()))
    model.save_pretrained(tmp_path / "decoder")
    with pytest.raises(ValueError, match="was measured with other weights .*measure again"):
        publish(tmp_path / "decoder", NAME)
    (folder / "evaluation.json").write_text('{"psnr": 21.25}')
    with pytest.raises(ValueError, match="does not say what was measured"):
        publish(folder, NAME)
    assert NAME not in hub.repositories


def test_what_is_no_model_of_ours_is_refused(hub: HubServer, hub_api: HfApi, tmp_path: Path):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a bert: name a tokenizer or a prior"):
        publish(tmp_path, NAME)
    for name in ("bad id!!", "a/b/c", "", "org/"):
        with pytest.raises(ValueError, match=r"[Rr]epo"):
            publish(tmp_path, name)


def test_somebody_who_pushes_meanwhile_is_not_overwritten(
    hub: HubServer, hub_api: HfApi, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    publish(tokenizer_dir, NAME)
    create_commit = HfApi.create_commit

    def later(self: HfApi, *args: Any, **kwargs: Any) -> Any:
        theirs = CommitOperationAdd("config.json", b"{}")
        create_commit(hub_api, NAME, [theirs], commit_message="mend")
        return create_commit(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(HfApi, "create_commit", later)
        with pytest.raises(HfHubHTTPError):
            publish(tokenizer_dir, NAME)
    assert files_of(hub)["config.json"] == b"{}"


def test_a_branch_and_a_private_repository(hub: HubServer, hub_api: HfApi, tokenizer_dir: Path, tmp_path: Path):
    publish(tokenizer_dir, NAME, private=True)
    before = files_of(hub)
    publish(save_tokenizer(tmp_path / "wide", codebook_dim=3), NAME, revision="wide")
    assert files_of(hub) == before
    assert hf_vq.ImageTokenizer.from_pretrained(NAME, revision="wide").model.config.codebook_dim == 3
    assert hf_vq.ImageTokenizer.from_pretrained(NAME).model.config.codebook_dim == 2
    with pytest.raises(OSError, match=NAME):
        hf_vq.ImageTokenizer.from_pretrained(NAME, token=False, cache_dir=tmp_path / "stranger")
    with pytest.raises(HfHubHTTPError):
        publish(tokenizer_dir, NAME, token=hub.strangers_token)


def test_a_name_without_an_owner_is_one_s_own(hub: HubServer, hub_api: HfApi, tokenizer_dir: Path):
    publish(tokenizer_dir, "tiny")
    (name,) = hub.repositories
    assert name == f"{hub_api.whoami()['name']}/tiny"
    assert f'from_pretrained("{name}"' in files_of(hub, name)["README.md"].decode()


def test_files_that_are_gone_go(hub: HubServer, hub_api: HfApi, tokenizer_dir: Path, tmp_path: Path):
    publish(tokenizer_dir, NAME)
    hub_api.upload_file(path_or_fileobj=b"mine", path_in_repo="NOTES.txt", repo_id=NAME)
    for name in ("modeling_vqvae.py", "examples/modeling_vqvae.py", "demo.py"):
        hub_api.upload_file(path_or_fileobj=b"code", path_in_repo=name, repo_id=NAME)
    publish(save_tokenizer(tmp_path / "bare"), NAME)
    files = files_of(hub)
    assert {"NOTES.txt", "demo.py", "examples/modeling_vqvae.py"} <= files.keys()
    of_old = {"modeling_vqvae.py", "pictures/codes.png", "evaluation.json", "run.yaml", "metrics.jsonl", REFERENCE_FILE}
    assert not of_old & files.keys()


def test_dry_run_writes_what_would_be_published(hub: HubServer, hub_api: HfApi, prior_dir: Path, tmp_path: Path):
    flags = ["--repo_id", PRIOR_NAME, "--with_tokenizer", "--dry_run", "--output", str(tmp_path)]
    assert main(["publish", str(prior_dir), *flags]) == 0
    assert not hub.repositories
    assert {path.name for path in tmp_path.iterdir()} >= {"sqvae-tiny", "sqvae-tiny-prior"}
    config = AutoConfig.from_pretrained(tmp_path / "sqvae-tiny-prior")
    assert config.tokenizer_name_or_path == "../sqvae-tiny" and config.tokenizer_revision is None
    card = (tmp_path / "sqvae-tiny-prior" / "README.md").read_text()
    # Once more in its own place: nothing is lost.
    flags[-1] = str(tmp_path)
    assert main(["publish", str(tmp_path / "sqvae-tiny-prior"), *flags]) == 0
    assert (tmp_path / "sqvae-tiny-prior" / "README.md").read_text() == card
    # Of what was not measured nothing is told, whatever lay there.
    shutil.copytree(prior_dir, unmeasured := prior_dir.parent / "unmeasured")
    (unmeasured / "evaluation.json").unlink()
    assert main(["publish", str(unmeasured), *flags]) == 0
    assert "7.125" not in (tmp_path / "sqvae-tiny-prior" / "README.md").read_text()
    publish(tmp_path / "sqvae-tiny-prior", PRIOR_NAME, with_tokenizer=True)
    assert hub.repositories.keys() == {NAME, PRIOR_NAME}


def test_the_command_says_what_is_wrong(
    hub: HubServer, hub_api: HfApi, tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["publish", str(tmp_path), "--repo_id", NAME]) == 2
    assert "holds no trained model" in capsys.readouterr().err
    assert main(["publish", str(tokenizer_dir), "--repo_id", NAME, "--output", str(tmp_path)]) == 2
    assert "--output is where --dry_run writes" in capsys.readouterr().err
    assert main(["publish", str(tokenizer_dir), "--repo_id", "org/", "--dry_run", "--output", str(tmp_path)]) == 2
    hub.faults = since(0, "drop before")
    assert main(["publish", str(tokenizer_dir), "--repo_id", NAME]) == 2
    assert not list(tmp_path.iterdir()) and not hub.repositories


@pytest.fixture(scope="module")
def versions(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two versions of a model."""
    return tokenizer_dir, save_tokenizer(tmp_path_factory.mktemp("second") / "wide", codebook_dim=3)


def count_requests(hub: HubServer, work: Callable[[], object]) -> int:
    hub.reset_requests()
    work()
    return len(hub.requests)


@pytest.mark.parametrize("fault", ["500", "drop before", "drop after", "drop midway"])
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
def test_after_a_fault_in_any_request_main_is_the_old_or_the_whole_new_version(
    hub: HubServer, tmp_path: Path, versions: tuple[Path, Path], fault: str, lasting: bool
):
    old_dir, new_dir = versions
    with in_process(hub, tmp_path):
        publish(old_dir, "org/count")
        old = files_of(hub, "org/count")
        requests = count_requests(hub, lambda: publish(new_dir, "org/count"))
        new = files_of(hub, "org/count")
        assert requests >= 8 and old.keys() != new.keys()
        for number in range(requests):
            name = f"org/fault{number}"
            publish(old_dir, name)
            hub.reset_requests()
            hub.faults = (since if lasting else at)(number, fault)
            try:
                publish(new_dir, name)
            except FAILURES:
                pass
            finally:
                hub.faults = None
            found = named_alike(files_of(hub, name), name, "org/count")
            assert found in (old, new), (number, fault)
            publish(new_dir, name)
            assert named_alike(files_of(hub, name), name, "org/count") == new


def named_alike(files: dict[str, bytes], name: str, other: str) -> dict[str, bytes]:
    """Cards hold the repository's name."""
    short, other_short = name.split("/")[-1].encode(), other.split("/")[-1].encode()
    card = files["README.md"].replace(name.encode(), other.encode()).replace(short, other_short)
    return files | {"README.md": card}


@pytest.mark.parametrize("fault", ["500", "drop before", "drop midway"])
def test_after_a_fault_in_any_request_of_a_download_the_next_one_is_whole(
    hub: HubServer, tmp_path: Path, tokenizer_dir: Path, fault: str
):
    with in_process(hub, tmp_path / "count"):
        publish(tokenizer_dir, NAME)
        requests = count_requests(hub, lambda: hf_vq.ImageTokenizer.from_pretrained(NAME))
    expected = hf_vq.ImageTokenizer.from_pretrained(tokenizer_dir)
    assert requests >= 6
    for number in range(requests):
        with in_process(hub, tmp_path / f"{number}"):
            hub.reset_requests()
            hub.faults = since(number, fault)
            try:
                tok = hf_vq.ImageTokenizer.from_pretrained(NAME)
            except (OSError, ValueError, *FAILURES):
                tok = None
            finally:
                hub.faults = None
            for found in filter(None, (tok, hf_vq.ImageTokenizer.from_pretrained(NAME))):
                for key, tensor in expected.model.state_dict().items():
                    assert torch.equal(found.model.state_dict()[key], tensor), (number, key)
