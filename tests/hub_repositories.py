"""What a Hub holds: repositories with their commits, branches, tags and large files, and who may see them.

A repository is a chain of commits, each with all its files. A branch points at its newest commit, and one assignment
moves it: whoever reads sees the whole old commit or the whole new one.
"""

import itertools
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property
from hashlib import sha1, sha256
from pathlib import PurePosixPath
from typing import Any, NamedTuple

# In a new repository, as the Hub writes it: files by these names are large files, whatever their size.
LARGE_FILES = ("*.safetensors", "*.parquet", "*.arrow", "*.bin", "*.npz", "*.pt", "*.png", "*.jpg", "*.zip")
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE_FILES).encode()


class HubError(Exception):
    """An answer of status 400 or above. The client picks its exception by `code`, which travels as X-Error-Code."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] = {}):
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


@dataclass(frozen=True)
class Blob:
    """The content of a file. Of a large one, git sees a pointer and the store of large files holds the content."""

    content: bytes = field(repr=False)
    is_large: bool = False

    @cached_property
    def sha256(self) -> str:
        """The name of a large file in the store."""
        return sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """The text that stands in git for a large file."""
        size = len(self.content)
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {size}\n".encode()

    @cached_property
    def git_oid(self) -> str:
        """The name that git gives to what it sees."""
        seen = self.pointer if self.is_large else self.content
        return sha1(b"blob %d\0" % len(seen) + seen).hexdigest()

    @property
    def oid(self) -> str:
        """By this the client knows whether its file is the one on the Hub, in uploads and in its cache (ETag)."""
        return self.sha256 if self.is_large else self.git_oid

    def large_file(self) -> dict[str, Any]:
        """The key `lfs` in listings of large files."""
        if not self.is_large:
            return {}
        return {"lfs": {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}}


@dataclass(frozen=True)
class Commit:
    """A state of all files, and the commit before it."""

    oid: str
    parent: "Commit | None" = field(repr=False)
    message: str
    description: str
    date: str
    blobs: Mapping[str, Blob]

    @property
    def files(self) -> dict[str, bytes]:
        """The content of every file by its path."""
        return {path: blob.content for path, blob in self.blobs.items()}

    @cached_property
    def folders(self) -> set[str]:
        """Git has no folders but those of its files."""
        return {str(parent) for path in self.blobs for parent in PurePosixPath(path).parents} - {"."}

    def last_change(self, path: str) -> "Commit":
        """The commit that gave a file its content."""
        commit = self
        while commit.parent and commit.parent.blobs.get(path) == commit.blobs[path]:
            commit = commit.parent
        return commit

    def entry(self, path: str, expand: bool = False) -> dict[str, Any]:
        """A file or folder as listings name it; `expand` adds the commit of the last change."""
        if path in self.folders:
            inside = sorted((name, blob.oid) for name, blob in self.blobs.items() if name.startswith(f"{path}/"))
            return {"type": "directory", "path": path, "oid": sha1(repr(inside).encode()).hexdigest(), "size": 0}
        blob = self.blobs[path]
        entry = {"type": "file", "path": path, "oid": blob.git_oid, "size": len(blob.content), **blob.large_file()}
        if expand:
            changed = self.last_change(path)
            entry["lastCommit"] = {"id": changed.oid, "title": changed.message, "date": changed.date}
        return entry

    def tree(self, folder: str, recursive: bool) -> list[str]:
        """The paths in a folder, directly or at any depth."""
        root = PurePosixPath(folder)
        paths = sorted([*self.folders, *self.blobs])
        found = [path for path in paths if root in list(PurePosixPath(path).parents)[: None if recursive else 1]]
        if folder and not found:
            raise HubError(404, f"{folder} does not exist on this revision", "EntryNotFound")
        return found


@dataclass
class Repository:
    """A model or data set. `key` is its path in the Hub's addresses: org/name, or datasets/org/name."""

    key: str
    is_private: bool = False
    large_files: dict[str, bytes] = field(default_factory=dict, repr=False)
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._clock = itertools.count()
        self.advance("main", {".gitattributes": Blob(GITATTRIBUTES)}, "initial commit")

    @property
    def id(self) -> str:
        """The name without the kind: org/name."""
        return self.key.removeprefix("datasets/")

    @property
    def kind(self) -> str:
        """model or dataset."""
        return "dataset" if self.key.startswith("datasets/") else "model"

    def head(self, branch: str = "main") -> Commit:
        """The newest commit of a branch."""
        return self.branches[branch]

    def history(self, branch: str = "main") -> list[Commit]:
        """The commits of a branch, newest first."""
        commits = [self.head(branch)]
        while commits[-1].parent:
            commits.append(commits[-1].parent)
        return commits

    def resolve(self, revision: str) -> Commit:
        """The commit that a branch, a tag or a commit's own name means."""
        for names in (self.branches, self.tags, self.commits):
            if revision in names:
                return names[revision]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def advance(self, branch: str, blobs: Mapping[str, Blob], message: str, description: str = "") -> Commit:
        """A commit of all these files on top of a branch. Its clock goes one second a commit, so that names repeat."""
        parent = self.branches.get(branch)
        date = (datetime(2024, 1, 1) + timedelta(seconds=next(self._clock))).isoformat() + ".000Z"
        content = sorted((path, blob.git_oid) for path, blob in blobs.items())
        named = json.dumps([parent.oid if parent else self.key, message, description, date, content])
        commit = Commit(sha1(named.encode()).hexdigest(), parent, message, description, date, dict(blobs))
        self.commits[commit.oid] = commit
        self.branches[branch] = commit
        return commit


class Account(NamedTuple):
    """Whom a token stands for. The owner may read and write everything, others may read what is public."""

    name: str
    is_owner: bool


class Hub:
    """Repositories by their keys, accounts by their tokens, and the size from which any file is a large one."""

    def __init__(self, accounts: Mapping[str, Account], large_size: int = 10_000_000):
        self.accounts = accounts
        self.large_size = large_size
        self.repositories: dict[str, Repository] = {}
        self.signature = secrets.token_hex(8)

    def account(self, token: str | None) -> Account | None:
        """Whom a request comes from; None stands for nobody in particular."""
        if token is None:
            return None
        if token not in self.accounts:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.accounts[token]

    def readable(self, key: str, token: str | None) -> Repository:
        """A repository to read. A private one looks like none at all; who gave no token is asked for one."""
        account = self.account(token)
        repository = self.repositories.get(key)
        if repository is None or (repository.is_private and not (account and account.is_owner)):
            raise HubError(404 if account else 401, "Repository not found", "RepoNotFound")
        return repository

    def owner(self, token: str | None, key: str) -> Account:
        """Who may write to `key`."""
        account = self.account(token)
        if account is None:
            # From https:// the client makes a RepositoryNotFoundError of any 401; from http:// the code must say so.
            raise HubError(401, "Invalid username or password.", "RepoNotFound" if key in self.repositories else None)
        if not account.is_owner:
            raise HubError(403, f"{account.name} may not write to {key}")
        return account

    def writable(self, key: str, token: str | None) -> Repository:
        """A repository to write to."""
        repository = self.readable(key, token)
        self.owner(token, key)
        return repository
