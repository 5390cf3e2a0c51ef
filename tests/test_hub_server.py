"""The Hub of the tests (hub_server.py) behaves to the real clients as the Hub does, and fails when it is told to."""

import io
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_session
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoConfig, AutoModel, BertConfig, BertModel

from hub_client import CONNECTION_LOST
from hub_files import byte_range
from hub_repositories import GITATTRIBUTES, HubError
from hub_server import Fault, HubServer, at, since

FILES = {
    "README.md": b"---\nlicense: mit\n---\n# A model\n",
    "config.json": b'{"model_type": "bert"}',
    "data/0/picture.png": b"a picture",
    "model.safetensors": bytes(range(256)) * 100,
}
ON_THE_HUB = {".gitattributes": GITATTRIBUTES, **FILES}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of two small and two large files."""
    for name, content in FILES.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "folder"


@pytest.fixture
def pushed(hub: HubServer, hub_api: HfApi, folder: Path) -> str:
    """A model with the files of the folder; the requests for it are forgotten."""
    hub_api.create_repo("org/name")
    hub_api.upload_folder(repo_id="org/name", folder_path=folder)
    hub.reset_requests()
    return "org/name"


def added(**files: str) -> list[CommitOperationAdd]:
    """Small files by their names without the suffix."""
    return [CommitOperationAdd(f"{name}.txt", text.encode()) for name, text in files.items()]


# Pushing.


def test_a_folder_is_pushed_in_one_commit(hub: HubServer, hub_api: HfApi, folder: Path):
    url = hub_api.create_repo("org/name")
    assert (url.repo_id, url.repo_type) == ("org/name", "model")
    made = hub_api.upload_folder(repo_id="org/name", folder_path=folder, commit_message="all of it")
    repository = hub.repositories["org/name"]
    assert repository.head().files == ON_THE_HUB
    assert [commit.message for commit in repository.history()] == ["all of it", "initial commit"]
    assert made.oid == repository.head().oid
    assert {name for name, blob in repository.head().blobs.items() if blob.is_large} == {
        "data/0/picture.png",
        "model.safetensors",
    }


def test_any_file_of_some_size_is_large(hub: HubServer, hub_api: HfApi):
    hub.content.large_size = 5
    hub_api.create_repo("org/name")
    hub_api.create_commit("org/name", added(short="1234", long="12345"), commit_message="two files")
    blobs = hub.repositories["org/name"].head().blobs
    assert (blobs["short.txt"].is_large, blobs["long.txt"].is_large) == (False, True)


def test_what_is_there_is_not_pushed_again(hub: HubServer, hub_api: HfApi, folder: Path, pushed: str):
    head = hub.repositories[pushed].head()
    assert hub_api.upload_folder(repo_id=pushed, folder_path=folder).oid == head.oid
    assert hub.repositories[pushed].head() is head
    asked = {(method, path.rsplit("/", 2)[1]) for method, path in hub.requests}
    assert not {("PUT", "storage"), ("POST", "commit")} & asked
    (folder / "config.json").write_bytes(b"{}")
    hub_api.upload_folder(repo_id=pushed, folder_path=folder)
    assert hub.repositories[pushed].head().files == ON_THE_HUB | {"config.json": b"{}"}
    assert hub.repositories[pushed].head().parent is head


def test_files_and_folders_are_deleted(hub: HubServer, hub_api: HfApi, pushed: str):
    hub_api.delete_file("config.json", pushed)
    hub_api.delete_folder("data", pushed)
    assert set(hub.repositories[pushed].head().files) == {".gitattributes", "README.md", "model.safetensors"}
    with pytest.raises(EntryNotFoundError):
        hub_api.delete_file("config.json", pushed)


def test_a_commit_is_made_whole_or_not_at_all(hub: HubServer, hub_api: HfApi, pushed: str):
    operations = [*added(new="text"), CommitOperationDelete("absent.txt")]
    with pytest.raises(EntryNotFoundError, match="doesn't exist"):
        hub_api.create_commit(pushed, operations, commit_message="half right")
    assert hub.repositories[pushed].head().files == ON_THE_HUB


def test_a_commit_on_another_than_the_newest_is_refused(hub: HubServer, hub_api: HfApi, pushed: str):
    first, second = (commit.oid for commit in reversed(hub.repositories[pushed].history()))
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as refusal:
        hub_api.create_commit(pushed, added(new="text"), commit_message="late", parent_commit=first)
    assert refusal.value.response.status_code == 412
    hub_api.create_commit(pushed, added(new="text"), commit_message="in time", parent_commit=second)


def test_a_commit_cannot_refer_to_a_large_file_that_is_not_there(hub: HubServer, hub_api: HfApi, pushed: str):
    head = hub.repositories[pushed].head()
    operations = [CommitOperationAdd("new.npz", b"never stored")]
    hub.faults = lambda number, method, path: "500" if method == "PUT" else None
    with pytest.raises(RuntimeError, match="new.npz"):
        hub_api.preupload_lfs_files(pushed, operations)
    operations[0]._is_uploaded = True
    with pytest.raises(BadRequestError, match="does not exist"):
        hub_api.create_commit(pushed, operations, commit_message="a pointer to nothing")
    assert hub.repositories[pushed].head() is head


def test_the_store_takes_only_what_was_announced(hub: HubServer, hub_api: HfApi, pushed: str):
    address = f"{hub.url}/{pushed}.git/storage/{'0' * 64}"
    assert get_session().put(address, content=b"unsigned").status_code == 403
    assert get_session().put(f"{address}?signature={hub.content.signature}", content=b"other").status_code == 400


def test_a_card_without_metadata_earns_a_warning(hub_api: HfApi, pushed: str):
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        hub_api.upload_file(path_or_fileobj=b"# bare", path_in_repo="README.md", repo_id=pushed)


UPLOAD = """
import sys
from huggingface_hub import create_repo, upload_folder
create_repo("org/name")
upload_folder(repo_id="org/name", folder_path=sys.argv[1])
"""


def test_with_xet_a_folder_of_many_files_is_pushed_in_several_commits(
    hub: HubServer, hub_environment: dict[str, str], run_with_hub: Callable[..., str], tmp_path: Path
):
    pytest.importorskip("hf_xet")
    hub_environment["HF_HUB_DISABLE_XET"] = "0"
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(300):
        (folder / f"{number}.txt").write_text(str(number))
    run_with_hub(UPLOAD, folder)
    assert [len(commit.files) - 1 for commit in hub.repositories["org/name"].history()] == [300, 250, 0]


# Repositories, branches and tags.


def test_repositories_come_and_go(hub: HubServer, hub_api: HfApi):
    hub_api.create_repo("org/name", repo_type="dataset", private=True)
    hub_api.create_repo("mine")
    assert hub.repositories["datasets/org/name"].is_private and not hub.repositories["owner/mine"].is_private
    assert hub_api.create_repo("org/name", repo_type="dataset", exist_ok=True).repo_id == "org/name"
    with pytest.raises(HfHubHTTPError) as refusal:
        hub_api.create_repo("org/name", repo_type="dataset")
    assert refusal.value.response.status_code == 409
    hub_api.delete_repo("org/name", repo_type="dataset")
    assert set(hub.repositories) == {"owner/mine"}
    with pytest.raises(RepositoryNotFoundError):
        hub_api.delete_repo("org/name", repo_type="dataset")


def test_branches_and_tags(hub: HubServer, hub_api: HfApi, pushed: str):
    hub_api.create_tag(pushed, tag="v1/first")
    hub_api.create_branch(pushed, branch="side/way")
    hub_api.create_commit(pushed, added(new="text"), commit_message="aside", revision="side/way")
    repository = hub.repositories[pushed]
    assert (repository.head("side/way").parent, repository.tags["v1/first"]) == (repository.head(), repository.head())
    for name, commit in {"v1/first": repository.head(), "side/way": repository.head("side/way")}.items():
        assert hub_api.model_info(pushed, revision=name).sha == commit.oid
        assert set(hub_api.list_repo_files(pushed, revision=name)) == set(commit.files)
    assert Path(hub_api.hf_hub_download(pushed, "new.txt", revision="side/way")).read_text() == "text"
    names = hub_api.list_repo_refs(pushed)
    assert ({r.name for r in names.branches}, {r.name for r in names.tags}) == ({"main", "side/way"}, {"v1/first"})
    with pytest.raises(HfHubHTTPError, match="already exists"):
        hub_api.create_tag(pushed, tag="v1/first")
    hub_api.delete_branch(pushed, branch="side/way")
    hub_api.delete_tag(pushed, tag="v1/first")
    with pytest.raises(RevisionNotFoundError):
        hub_api.list_repo_files(pushed, revision="side/way")


def test_listings(hub: HubServer, hub_api: HfApi, pushed: str):
    first = hub.repositories[pushed].head()
    last = hub_api.create_commit(pushed, added(new="text"), commit_message="one more")
    entries = {entry.path: entry for entry in hub_api.list_repo_tree(pushed, recursive=True, expand=True)}
    assert set(entries) == {*ON_THE_HUB, "new.txt", "data", "data/0"}
    assert entries["new.txt"].last_commit.oid == last.oid
    assert entries["model.safetensors"].last_commit.oid == first.oid
    assert entries["model.safetensors"].lfs.sha256 == first.blobs["model.safetensors"].sha256
    assert {entry.path for entry in hub_api.list_repo_tree(pushed, "data")} == {"data/0"}
    assert [entry.path for entry in hub_api.get_paths_info(pushed, ["data", "absent", "new.txt"])] == [
        "data",
        "new.txt",
    ]
    siblings = {sibling.rfilename: sibling for sibling in hub_api.model_info(pushed, files_metadata=True).siblings}
    assert siblings["model.safetensors"].size == siblings["model.safetensors"].lfs.size == 25_600


# Who may do what, and what is not there.


def test_a_private_repository_looks_like_none(hub: HubServer, hub_api: HfApi):
    hub_api.create_repo("org/name", private=True)
    hub_api.create_commit("org/name", added(secret="text"), commit_message="secret")
    assert hub_api.model_info("org/name").private
    for token, status in {False: 401, hub.strangers_token: 404}.items():
        with pytest.raises(RepositoryNotFoundError) as refusal:
            hub_api.model_info("org/name", token=token)
        assert refusal.value.response.status_code == status
        with pytest.raises(RepositoryNotFoundError):
            hub_api.hf_hub_download("org/name", "secret.txt", token=token)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        hub_api.model_info("org/name", token="hf_unknown")


def test_only_the_owner_writes(hub: HubServer, hub_api: HfApi, pushed: str):
    assert (hub_api.whoami()["name"], hub_api.whoami(token=hub.strangers_token)["name"]) == ("owner", "stranger")
    for token, status in {False: 401, hub.strangers_token: 403}.items():
        for write in (
            lambda token: hub_api.create_commit(pushed, added(new="text"), commit_message="mine", token=token),
            lambda token: hub_api.create_repo("org/other", token=token),
            lambda token: hub_api.delete_repo(pushed, token=token),
            lambda token: hub_api.create_tag(pushed, tag="v1", token=token),
        ):
            with pytest.raises(HfHubHTTPError) as refusal:
                write(token)
            assert refusal.value.response.status_code == status
    assert hub.repositories[pushed].head().files == ON_THE_HUB
    assert not hub.repositories[pushed].tags


def test_what_is_not_there_has_an_exception_of_its_own(hub_api: HfApi, pushed: str):
    for error, ask in {
        RepositoryNotFoundError: lambda: hub_api.hf_hub_download("org/absent", "config.json"),
        RevisionNotFoundError: lambda: hub_api.hf_hub_download(pushed, "config.json", revision="absent"),
        EntryNotFoundError: lambda: hub_api.hf_hub_download(pushed, "absent.json"),
    }.items():
        with pytest.raises(error):
            ask()
    with pytest.raises(EntryNotFoundError):
        list(hub_api.list_repo_tree(pushed, "absent"))
    with pytest.raises(HfHubHTTPError, match="knows no"):
        list(hub_api.list_repo_likers(pushed))


# Pulling.


def test_a_snapshot_is_pulled_once(hub: HubServer, hub_api: HfApi, pushed: str):
    snapshot = Path(hub_api.snapshot_download(pushed))
    assert {str(p.relative_to(snapshot)): p.read_bytes() for p in snapshot.rglob("*") if p.is_file()} == ON_THE_HUB
    assert len(hub.requests) == 2 + 2 * len(ON_THE_HUB)
    hub.reset_requests()
    assert Path(hub_api.snapshot_download(pushed)) == snapshot
    assert hub.requests == [("GET", f"/api/models/{pushed}/revision/main")]


def test_a_file_is_pulled_once(hub: HubServer, hub_api: HfApi, pushed: str):
    path = Path(hub_api.hf_hub_download(pushed, "model.safetensors"))
    assert path.read_bytes() == FILES["model.safetensors"]
    assert [method for method, _ in hub.requests] == ["HEAD", "GET"]
    hub_api.create_commit(pushed, added(new="text"), commit_message="another file")
    hub.reset_requests()
    again = Path(hub_api.hf_hub_download(pushed, "model.safetensors"))
    assert [method for method, _ in hub.requests] == ["HEAD"]
    assert again != path and again.samefile(path)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, range(10)),
        ("bytes=2-4", range(2, 5)),
        ("bytes=7-", range(7, 10)),
        ("bytes=-3", range(7, 10)),
        ("bytes=8-99", range(8, 10)),
        ("bytes=-99", range(10)),
        ("bytes=-", range(10)),
        ("lines=1-2", range(10)),
    ],
)
def test_ranges_count_both_ends(asked: str | None, expected: range):
    assert byte_range(asked, 10) == expected


def test_a_range_behind_the_end_is_refused():
    with pytest.raises(HubError) as refusal:
        byte_range("bytes=10-", 10)
    assert (refusal.value.status, refusal.value.headers["Content-Range"]) == (416, "bytes */10")


def test_parts_of_a_file_are_read_through_a_file_system(hub: HubServer, hub_api: HfApi, pushed: str):
    content = FILES["model.safetensors"]
    with fsspec.open(f"hf://{pushed}/model.safetensors", block_size=1000) as file:
        assert file.seek(-300, io.SEEK_END) == len(content) - 300
        assert file.read(100) == content[-300:-200]
        file.seek(0)
        assert file.read() == content
    with pytest.raises(FileNotFoundError):
        fsspec.open(f"hf://{pushed}/absent").open()


def parquet(numbers: range) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"number": list(numbers)}), buffer)
    return buffer.getvalue()


LOAD = """
import sys
from datasets import load_dataset
for streaming in (False, True):
    print(*(row["number"] for row in load_dataset("org/numbers", split="train", streaming=streaming)))
"""


def test_datasets_load_and_stream(hub_api: HfApi, run_with_hub: Callable[..., str]):
    hub_api.create_repo("org/numbers", repo_type="dataset", private=True)
    shards = [
        CommitOperationAdd(f"data/train-{shard:05}-of-00002.parquet", parquet(range(4 * shard, 4 * shard + 4)))
        for shard in range(2)
    ]
    hub_api.create_commit("org/numbers", shards, commit_message="numbers", repo_type="dataset")
    assert run_with_hub(LOAD) == "0 1 2 3 4 5 6 7\n" * 2
    rows = load_dataset("org/numbers", split="train", streaming=True)
    assert [row["number"] for row in rows] == list(range(8))


PULL = """
from transformers import AutoConfig, AutoModel
print(AutoConfig.from_pretrained("org/bert").hidden_size, AutoModel.from_pretrained("org/bert").dtype)
"""


def test_transformers_push_and_pull(hub: HubServer, hub_api: HfApi, run_with_hub: Callable[..., str]):
    tiny = BertConfig(vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    BertModel(tiny).push_to_hub("org/bert")
    assert {"README.md", "config.json", "model.safetensors"} < set(hub.repositories["org/bert"].head().files)
    assert run_with_hub(PULL) == "4 torch.float32\n"
    assert AutoConfig.from_pretrained("org/bert").hidden_size == 4
    assert AutoModel.from_pretrained("org/bert").config.vocab_size == 8


# Failing.

FAULTS: tuple[Fault, ...] = ("500", "drop before", "drop after", "drop midway")


def on(part: str, fault: Fault) -> Callable[[int, str, str], Fault | None]:
    """Every request whose address has `part` in it goes wrong."""
    return lambda number, method, path: fault if part in path else None


@pytest.mark.parametrize("fault", FAULTS)
def test_a_commit_that_goes_wrong(hub: HubServer, hub_api: HfApi, pushed: str, fault: Fault):
    head = hub.repositories[pushed].head()
    hub.faults = on("/commit/", fault)
    with pytest.raises(HfHubHTTPError if fault == "500" else CONNECTION_LOST):
        hub_api.create_commit(pushed, added(new="text"), commit_message="unlucky")
    # Only now may the client wonder: the commit is there, and nobody said so.
    assert (hub.repositories[pushed].head() is head) == (fault != "drop after")
    assert hub.requests[-1] == ("POST", f"/api/models/{pushed}/commit/main")  # the client tries commits once


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("part", ["/preupload/", "/objects/batch", "/storage/", "/objects/verify"])
def test_the_client_tries_again_before_the_commit(hub: HubServer, hub_api: HfApi, pushed: str, part: str, fault: Fault):
    went_wrong = []

    def once(number: int, method: str, path: str) -> Fault | None:
        if part not in path or went_wrong:
            return None
        went_wrong.append(path)
        return fault

    hub.faults = once
    hub_api.upload_file(path_or_fileobj=b"x" * 50_000, path_in_repo="new.npz", repo_id=pushed)
    assert hub.repositories[pushed].head().files["new.npz"] == b"x" * 50_000
    assert [path for _, path in hub.requests].count(went_wrong[0]) == 2


def test_a_pull_resumes_in_the_middle(hub: HubServer, hub_api: HfApi, pushed: str, monkeypatch: pytest.MonkeyPatch):
    # A chunk reaches the file when it is whole, and by default it is 10 MB.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.faults = at(1, "drop midway")
    path = Path(hub_api.hf_hub_download(pushed, "model.safetensors"))
    assert path.read_bytes() == FILES["model.safetensors"]
    assert [method for method, _ in hub.requests] == ["HEAD", "GET", "GET"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_pull_that_goes_wrong_leaves_no_file(hub: HubServer, hub_api: HfApi, pushed: str, fault: Fault):
    hub.faults = since(1, fault)
    with pytest.raises((HfHubHTTPError, *CONNECTION_LOST)):
        hub_api.hf_hub_download(pushed, "config.json")
    hub.faults = None
    assert Path(hub_api.hf_hub_download(pushed, "config.json")).read_bytes() == FILES["config.json"]


@pytest.mark.parametrize("fault", FAULTS)
def test_wherever_the_hub_vanishes_the_branch_is_at_the_old_or_the_new_commit(
    hub: HubServer, hub_api: HfApi, folder: Path, fault: Fault
):
    for number in range(20):
        name = f"org/name-{number}"
        hub_api.create_repo(name)
        hub.reset_requests()
        hub.faults = since(number, fault)
        try:
            hub_api.upload_folder(repo_id=name, folder_path=folder)
        except (RuntimeError, HfHubHTTPError, *CONNECTION_LOST):
            assert hub.repositories[name].head().files in ({".gitattributes": GITATTRIBUTES}, ON_THE_HUB)
        else:
            break
        hub.faults = None
        hub_api.upload_folder(repo_id=name, folder_path=folder)
        assert hub.repositories[name].head().files == ON_THE_HUB
    assert number == 9


def test_a_mistake_of_the_server_is_no_injected_one(hub: HubServer, hub_api: HfApi, pushed: str):
    hub.content.large_size = None
    with pytest.raises(HfHubHTTPError, match="TypeError"):
        hub_api.create_commit(pushed, added(new="text"), commit_message="in vain")
    assert "TypeError" in hub.failures[0]
    hub.failures.clear()
