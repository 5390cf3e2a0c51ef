"""The addresses of files on the Hub: how they are pushed and pulled.

A push asks of every file whether it goes into git or to the store of large files (preupload), puts the large ones there
(objects/batch, PUT, verify), and sends one commit with the small ones in it. A pull asks for the commit that a revision
means (/api/models/org/name), perhaps for its files (tree), and fetches each from that commit by name (resolve).
"""

import base64
import json
import re
from collections.abc import Mapping
from fnmatch import fnmatch
from hashlib import sha256
from typing import Any
from urllib.parse import parse_qs

from hub_protocol import Request, Response, reply, route
from hub_repositories import LARGE_FILES, Blob, Hub, HubError

# Pushing.


@route("POST", "/api/validate-yaml")
def validate_card(hub: Hub, request: Request) -> Response:
    """Whether the metadata of a README.md are sound; clients ask before they push one."""
    has_metadata = request.json()["content"].startswith("---")
    warnings = [] if has_metadata else [{"message": "empty or missing yaml metadata in repo card"}]
    return reply({"errors": [], "warnings": warnings})


@route("POST", "{api}/preupload/{name}")
def preupload(hub: Hub, request: Request, key: str, name: str) -> Response:
    """For each file: git or the store of large files, and which content is there already, if any."""
    commit = hub.writable(key, request.token).resolve(name)

    def mode(path: str, size: int) -> str:
        is_large = size >= hub.large_size or any(fnmatch(path, pattern) for pattern in LARGE_FILES)
        return "lfs" if is_large else "regular"

    files = [
        {"path": file["path"], "uploadMode": mode(file["path"], file["size"]), "shouldIgnore": False}
        | ({"oid": commit.blobs[file["path"]].oid} if file["path"] in commit.blobs else {})
        for file in request.json()["files"]
    ]
    return reply({"files": files, "commitOid": commit.oid})


@route("POST", r"{git}\.git/info/lfs/objects/batch")
def large_files_batch(hub: Hub, request: Request, key: str) -> Response:
    """For each large file: where to put it, or no actions where the store has it."""
    repository = hub.writable(key, request.token)
    address = f"{request.endpoint}/{key}.git"
    files = []
    for file in request.json()["objects"]:
        # The upload goes to a store elsewhere, without the token: who knows the signed address may write.
        upload = {"href": f"{address}/storage/{file['oid']}?signature={hub.signature}"}
        actions = {"upload": upload, "verify": {"href": f"{address}/info/lfs/objects/verify"}}
        is_here = file["oid"] in repository.large_files
        files.append({"oid": file["oid"], "size": file["size"]} | ({} if is_here else {"actions": actions}))
    return reply({"transfer": "basic", "objects": files}, headers={"Content-Type": "application/vnd.git-lfs+json"})


@route("PUT", r"{git}\.git/storage/{name}")
def store_large_file(hub: Hub, request: Request, key: str, name: str) -> Response:
    """The content of a large file, under its SHA-256."""
    if request.query.get("signature") != [hub.signature]:
        raise HubError(403, "SignatureDoesNotMatch")
    if sha256(request.body).hexdigest() != name:
        raise HubError(400, "BadDigest")
    hub.repositories[key].large_files[name] = request.body
    return Response()


@route("POST", r"{git}\.git/info/lfs/objects/verify")
def verify_large_file(hub: Hub, request: Request, key: str) -> Response:
    """Whether the content arrived."""
    stored = hub.writable(key, request.token).large_files.get(request.json()["oid"])
    if stored is None or len(stored) != request.json()["size"]:
        raise HubError(404, "Object does not exist")
    return Response()


def operate(blobs: dict[str, Blob], key: str, value: Mapping[str, Any], large_files: Mapping[str, bytes]) -> None:
    """One line of a commit, carried out."""
    path = value["path"]
    match key:
        case "file":
            blobs[path] = Blob(base64.b64decode(value["content"]))
        case "lfsFile":
            if value["oid"] not in large_files:
                raise HubError(400, f"{path}: an LFS pointer pointed to a file that does not exist")
            blobs[path] = Blob(large_files[value["oid"]], is_large=True)
        case "deletedFile" | "deletedFolder":
            folder = path.rstrip("/") + "/"
            gone = [name for name in blobs if (name == path if key == "deletedFile" else name.startswith(folder))]
            if not gone:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del blobs[name]
        case _:
            raise HubError(400, f"a commit cannot hold {key}")


@route("POST", "{api}/commit/{name}")
def commit(hub: Hub, request: Request, key: str, name: str) -> Response:
    """A commit: a line with its message and perhaps the commit it must follow, then a line for each change."""
    repository = hub.writable(key, request.token)
    if name not in repository.branches or request.asks("create_pr"):
        raise HubError(404, f"{name} is not a branch: commits go to branches, and no pull requests", "RevisionNotFound")
    header, *operations = [json.loads(line) for line in request.body.splitlines()]
    parent, about = repository.head(name), header["value"]
    if not parent.oid.startswith(about.get("parentCommit", "")):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    blobs = dict(parent.blobs)
    for operation in operations:
        operate(blobs, operation["key"], operation["value"], repository.large_files)
    made = repository.advance(name, blobs, about["summary"], about.get("description", ""))
    return reply({"success": True, "commitUrl": f"{request.endpoint}/{key}/commit/{made.oid}", "commitOid": made.oid})


# Pulling.


@route("GET", "{api}/tree/{name}(?:/{path})?")
def tree(hub: Hub, request: Request, key: str, name: str, path: str) -> Response:
    """The files and folders in a folder."""
    commit = hub.readable(key, request.token).resolve(name)
    paths = commit.tree(path, request.asks("recursive"))
    return reply([commit.entry(found, request.asks("expand")) for found in paths])


@route("POST", "{api}/paths-info/{name}")
def paths_info(hub: Hub, request: Request, key: str, name: str) -> Response:
    """What is known of these files and folders; of those that are not there, nothing."""
    commit = hub.readable(key, request.token).resolve(name)
    form = parse_qs(request.body.decode())
    paths = [path for path in form.get("paths", []) if path in commit.blobs or path in commit.folders]
    return reply([commit.entry(path, form.get("expand") in (["true"], ["True"])) for path in paths])


def byte_range(asked: str | None, size: int) -> range:
    """The bytes that a Range header asks for; both of its ends count, and either may be missing."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", asked or "")
    if found is None or found.groups() == ("", ""):
        return range(size)
    first, last = found.groups()
    if not first:
        return range(max(0, size - int(last)), size)
    if int(first) >= size:
        raise HubError(416, "Range Not Satisfiable", headers={"Content-Range": f"bytes */{size}"})
    return range(int(first), min(size, int(last) + 1) if last else size)


@route("HEAD", "{git}/resolve/{name}/{path}")
@route("GET", "{git}/resolve/{name}/{path}")
def resolve(hub: Hub, request: Request, key: str, name: str, path: str) -> Response:
    """A file's content. For a large one the Hub redirects to its store; the client takes an answer right here, too."""
    commit = hub.readable(key, request.token).resolve(name)
    headers = {"X-Repo-Commit": commit.oid}
    if path not in commit.blobs:
        raise HubError(404, "Entry not found", "EntryNotFound", headers)
    blob = commit.blobs[path]
    size = len(blob.content)
    headers |= {"ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    if blob.is_large:
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(size)}
    part = byte_range(request.headers.get("Range"), size)
    if len(part) == size:
        return Response(200, blob.content, headers)
    headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{size}"
    return Response(206, blob.content[part.start : part.stop], headers)
