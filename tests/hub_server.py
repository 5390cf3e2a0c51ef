"""A Hub on the loopback interface: the real clients push to it and pull from it, and it can fail on demand.

with HubServer() as hub:
    HfApi(endpoint=hub.url, token=hub.token).create_repo("org/name")
    hub.repositories["org/name"].head("main").files  # path -> bytes
    hub.requests                                     # [(method, path), ...]
    hub.faults = at(3, "drop after")
"""

import socket
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Literal, Self
from urllib.parse import parse_qs, urlsplit

import hub_files  # noqa: F401  registers the addresses of files
from hub_protocol import Request, Response, answer, reply
from hub_repositories import Account, Hub, Repository

Fault = Literal["500", "drop before", "drop after", "drop midway"]
"""What may go wrong with a request, beside being served.

500: the answer is an error of the server, and nothing was done.
drop before: the connection ends before anything was done.
drop after: it was done, and the connection ends before the answer: the client cannot know.
drop midway: the connection ends in the middle of the body that was being sent, either way. Half an upload does nothing.
"""
Faults = Callable[[int, str, str], Fault | None]


def at(number: int, fault: Fault) -> Faults:
    """The request of this number (the first is 0) goes wrong."""
    return lambda asked, method, path: fault if asked == number else None


def since(number: int, fault: Fault) -> Faults:
    """All requests from this number on go wrong, so that trying again does not help."""
    return lambda asked, method, path: fault if asked >= number else None


class HubServer(ThreadingHTTPServer):
    """The server; as a context manager it runs in threads of its own."""

    request_queue_size = 64
    daemon_threads = False  # closing waits for them

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.token, self.strangers_token = "hf_owner", "hf_stranger"
        owner, stranger = Account("owner", is_owner=True), Account("stranger", is_owner=False)
        self.content = Hub({self.token: owner, self.strangers_token: stranger})
        self.faults: Faults | None = None
        self.requests: list[tuple[str, str]] = []
        self.failures: list[str] = []
        self.lock = Lock()
        self.connections: set[socket.socket] = set()

    @property
    def url(self) -> str:
        """What clients take for https://huggingface.co."""
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def repositories(self) -> dict[str, Repository]:
        """All there is, by its path: org/name for a model, datasets/org/name for a data set."""
        return self.content.repositories

    def reset_requests(self) -> None:
        """Starts the list of requests, and so their numbers, anew."""
        with self.lock:
            self.requests.clear()

    def fault_of(self, method: str, path: str) -> Fault | None:
        """Writes a request down, and says what goes wrong with it."""
        with self.lock:
            number = len(self.requests)
            self.requests.append((method, path))
        return self.faults(number, method, path) if self.faults else None

    def serve(self, request: Request) -> Response:
        """The Hub's answer; requests take their turns."""
        with self.lock:
            try:
                return answer(self.content, request)
            except Exception:
                self.failures.append(traceback.format_exc())
                return reply({"error": self.failures[-1]}, 500)

    def process_request(self, request: socket.socket, client_address: tuple[str, int]) -> None:
        with self.lock:
            self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:
        with self.lock:
            self.connections.discard(request)
        super().shutdown_request(request)

    def __enter__(self) -> Self:
        self.thread = Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.thread.join()
        with self.lock:
            for connection in self.connections:
                with suppress(OSError):  # the client was quicker
                    connection.shutdown(socket.SHUT_RDWR)
        self.server_close()


class HubHandler(BaseHTTPRequestHandler):
    """A connection: reads requests, sends answers, and lets go where a fault says so."""

    server: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle(self) -> None:
        with suppress(ConnectionError):  # the client is gone
            super().handle()

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: the server keeps a list."""

    def respond(self) -> None:
        """One request, from its headers on."""
        address = urlsplit(self.path)
        fault = self.server.fault_of(self.command, address.path)
        self.close_connection = fault in ("drop before", "drop after", "drop midway")
        if fault == "drop before":
            return
        size = int(self.headers.get("Content-Length", 0))
        if fault == "drop midway" and size:
            self.rfile.read(size // 2)
            return
        body = self.rfile.read(size)
        if len(body) < size:
            raise ConnectionError("the client is gone")
        request = Request(
            self.command, address.path, parse_qs(address.query), self.headers, body, f"http://{self.headers['Host']}"
        )
        response = reply({"error": "Internal Error"}, 500) if fault == "500" else self.server.serve(request)
        if fault != "drop after":
            self.send(response, half=fault == "drop midway")

    do_HEAD = do_GET = do_POST = do_PUT = do_DELETE = respond

    def send(self, response: Response, half: bool) -> None:
        """An answer, or its headers and half of its body; of one without a body, half of the headers."""
        headers: Mapping[str, object] = {**response.headers, "Content-Length": len(response.body)}
        lines = [f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        head = "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")
        body = b"" if self.command == "HEAD" else response.body
        if half:
            head, body = (head, body[: len(body) // 2]) if body else (head[: len(head) // 2], b"")
        self.wfile.write(head + body)
