"""A folder to the Hub in one commit: whoever pulls gets the version before, or all of this one."""

import os
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import validate_repo_id

__all__ = ["commit_folder", "full_name"]


def commit_folder(
    api: HfApi,
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    repo_type: str = "model",
    private: bool | None = None,
    revision: str | None = None,
    replaced: Sequence[str] = (),
    commit_message: str | None = None,
) -> CommitInfo:
    """Makes the repository and the branch if need be, and commits all visible files of a folder.

    (`HfApi.upload_folder` may split a folder into several commits.)

    Args:
        api: with the token to use.
        folder: what to upload.
        repo_id: "org/name".
        repo_type: "model" or "dataset".
        private: whether a new repository is private; None is the organisation's default.
        revision: the branch, "main" by default.
        replaced: files that go where the folder has none of that name: names, or patterns such as "data/*".
        commit_message: its first line.

    Raises:
        HfHubHTTPError, RuntimeError, OSError: what the Hub or the network refused, or that the branch moved meanwhile.
            Nothing is visible then, unless the answer to the commit itself was lost; calling again finishes the work.
    """
    repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
    if revision not in (None, "main"):
        api.create_branch(repo_id, repo_type=repo_type, branch=str(revision), exist_ok=True)
    there: Any = api.repo_info(repo_id, repo_type=repo_type, revision=revision)
    files = shown_files(Path(folder))
    stale = [file.rfilename for file in there.siblings or [] if file.rfilename not in files]
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationAdd(name, path) for name, path in files.items()),
        *(CommitOperationDelete(name) for name in stale if any(fnmatch(name, pattern) for pattern in replaced)),
    ]
    # A commit whose answer was lost is not made twice, nor on top of what somebody else pushed meanwhile.
    return api.create_commit(
        repo_id,
        operations,
        commit_message=commit_message or f"Upload {repo_id.split('/')[-1]} with hf_vq",
        repo_type=repo_type,
        revision=revision,
        parent_commit=there.sha,
    )


def full_name(api: HfApi, repo_id: str) -> str:
    """A repository's name with its owner, who is the owner of the token where none is named.

    Raises: HFValidationError (a ValueError) if no repository can have this name.
    """
    validate_repo_id(repo_id)
    return repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"


def shown_files(folder: Path) -> dict[str, Path]:
    """The files in a folder that are not hidden, by their names in a repository."""
    named = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name.as_posix(): path for name, path in named.items() if not any(p.startswith(".") for p in name.parts)}
