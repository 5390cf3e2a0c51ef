"""The Hub's protocol: requests and answers, and the addresses of accounts, repositories, branches and tags.

Those of the files are in hub_files.py.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote

from hub_repositories import Commit, Hub, HubError, Repository


class Request(NamedTuple):
    """What a client asks; `endpoint` is the address at which it found the server."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    endpoint: str

    @property
    def token(self) -> str | None:
        """What the client says it is."""
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def json(self) -> Any:
        """The body of most requests."""
        return json.loads(self.body)

    def asks(self, name: str) -> bool:
        """A switch in the query."""
        return self.query.get(name, ["false"])[0].lower() in ("true", "1")


class Response(NamedTuple):
    """What the server answers."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = {}


def reply(content: Any, status: int = 200, headers: Mapping[str, str] = {}) -> Response:
    """An answer in JSON."""
    return Response(status, json.dumps(content).encode(), {"Content-Type": "application/json", **headers})


Route = Callable[..., Response]
ROUTES: list[tuple[str, re.Pattern[str], Route]] = []
# Names in addresses come quoted, slashes too: a branch v1/x is one part, v1%2Fx.
PARTS = {
    "{api}": r"/api/(?P<key>(?:models|datasets)/[^/]+/[^/]+)",
    "{git}": r"/(?P<key>(?:datasets/)?[^/]+/[^/]+)",
    "{name}": r"(?P<name>[^/]+)",
    "{path}": r"(?P<path>.+)",
}


def route(method: str, address: str) -> Callable[[Route], Route]:
    """Registers a function under a method and an address."""
    for part, pattern in PARTS.items():
        address = address.replace(part, pattern)

    def register(function: Route) -> Route:
        ROUTES.append((method, re.compile(address), function))
        return function

    return register


def answer(hub: Hub, request: Request) -> Response:
    """What the Hub says to a request."""
    try:
        for method, pattern, function in ROUTES:
            if method == request.method and (found := pattern.fullmatch(request.path)):
                parts = {name: unquote(part) for name, part in found.groupdict(default="").items()}
                if "key" in parts:
                    parts["key"] = parts["key"].removeprefix("models/")
                return function(hub, request, **parts)
        raise HubError(404, f"This Hub knows no {request.method} {request.path}")
    except HubError as error:
        return reply({"error": error.message}, error.status, error.headers)


# Accounts, and repositories as wholes.


@route("GET", "/api/whoami-v2")
def whoami(hub: Hub, request: Request) -> Response:
    """Whose token it is."""
    account = hub.account(request.token)
    if account is None:
        raise HubError(401, "Invalid username or password.")
    token = {"accessToken": {"role": "write" if account.is_owner else "read", "displayName": "test"}}
    return reply({"type": "user", "name": account.name, "fullname": account.name, "orgs": [], "auth": token})


def key_of(hub: Hub, request: Request) -> str:
    """The repository that a body names; without an organization it is the user's own."""
    named = request.json()
    account = hub.account(request.token)
    owner = named.get("organization") or (account.name if account else "nobody")
    return ("datasets/" if named.get("type") == "dataset" else "") + f"{owner}/{named['name']}"


@route("POST", "/api/repos/create")
def create_repository(hub: Hub, request: Request) -> Response:
    """An empty repository, public unless the body says otherwise."""
    key, named = key_of(hub, request), request.json()
    url = f"{request.endpoint}/{key}"
    hub.owner(request.token, key)
    if key in hub.repositories:
        # With exist_ok=True the client reads `url` from this refusal.
        return reply({"error": "You already created this repo", "url": url}, 409)
    # Older clients say "private": true.
    is_private = named.get("visibility") == "private" or named.get("private", False)
    repository = hub.repositories[key] = Repository(key, is_private)
    return reply({"url": url, "name": repository.id})


@route("DELETE", "/api/repos/delete")
def delete_repository(hub: Hub, request: Request) -> Response:
    """A repository less, with all its commits."""
    del hub.repositories[hub.writable(key_of(hub, request), request.token).key]
    return reply({})


@route("GET", "{api}(?:/revision/{name})?")
def info(hub: Hub, request: Request, key: str, name: str) -> Response:
    """A repository at a revision. Clients ask first, to learn which commit a branch means, and stay with that one."""
    repository = hub.readable(key, request.token)
    commit = repository.resolve(name or "main")
    siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.blobs)]
    if request.asks("blobs"):
        for sibling in siblings:
            blob = commit.blobs[sibling["rfilename"]]
            large = {"lfs": {**blob.large_file()["lfs"], "sha256": blob.sha256}} if blob.is_large else {}
            sibling |= {"size": len(blob.content), "blobId": blob.git_oid, **large}
    dates = {"createdAt": repository.history()[-1].date, "lastModified": commit.date}
    names = {"id": repository.id, "author": repository.id.split("/")[0], "sha": commit.oid, **dates}
    counts = {"private": repository.is_private, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
    return reply({**names, **counts, "tags": [], "siblings": siblings})


@route("GET", "{api}/refs")
def references(hub: Hub, request: Request, key: str) -> Response:
    """The branches and tags."""
    repository = hub.readable(key, request.token)

    def named(kind: str, commits: Mapping[str, Commit]) -> list[dict[str, str]]:
        return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": commit.oid} for n, commit in commits.items()]

    branches, tags = named("heads", repository.branches), named("tags", repository.tags)
    return reply({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})


def point(names: dict[str, Commit], name: str, commit: Commit) -> Response:
    """A new branch or tag."""
    if name in names:
        raise HubError(409, f"Reference already exists: {name}")
    names[name] = commit
    return reply({})


def unpoint(names: dict[str, Commit], name: str) -> Response:
    """A branch or tag less."""
    if names.pop(name, None) is None:
        raise HubError(404, f"Reference does not exist: {name}", "RevisionNotFound")
    return reply({})


@route("POST", "{api}/branch/{name}")
def create_branch(hub: Hub, request: Request, key: str, name: str) -> Response:
    """A branch that starts at a revision, or at main."""
    repository = hub.writable(key, request.token)
    return point(repository.branches, name, repository.resolve(request.json().get("startingPoint", "main")))


@route("DELETE", "{api}/branch/{name}")
def delete_branch(hub: Hub, request: Request, key: str, name: str) -> Response:
    """A branch less; its commits stay."""
    return unpoint(hub.writable(key, request.token).branches, name)


@route("POST", "{api}/tag/{name}")
def create_tag(hub: Hub, request: Request, key: str, name: str) -> Response:
    """A tag; the address names the revision, the body the tag."""
    repository = hub.writable(key, request.token)
    return point(repository.tags, request.json()["tag"], repository.resolve(name))


@route("DELETE", "{api}/tag/{name}")
def delete_tag(hub: Hub, request: Request, key: str, name: str) -> Response:
    """A tag less; here the address names the tag."""
    return unpoint(hub.writable(key, request.token).tags, name)
