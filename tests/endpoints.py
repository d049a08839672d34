"""Servers on the loopback address that answer as OpenAI-compatible ones do, or misbehave as they are told to."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]
Behaviour = Callable[["Server", "Request"], None]


class Server(ThreadingHTTPServer):
    """One server. `seen`: paths and bodies of the requests, in order; `over`: set when it is to end."""

    daemon_threads = False  # so that closing waits for all of them
    request_queue_size = 64

    def __init__(self, behave: Behaviour) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.behave, self.seen, self.keys = behave, [], []  # type: ignore[var-annotated]
        self.over, self.lock = threading.Event(), threading.Lock()
        self.models: list[str] = ["model-of-the-test"]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def prompts(self) -> list[str]:
        """What was asked, without the warm-up."""
        return [text for text in map(asked, self.bodies("completions")) if text != "Hello"]

    def bodies(self, path: str) -> list[Body]:
        return [body for at, body in self.seen if at.endswith(path)]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class Request(BaseHTTPRequestHandler):
    server: Server
    body: Body

    def do_GET(self) -> None:
        self.server.keys.append(self.headers.get("authorization"))
        if self.server.models is None:
            return self.stall()
        self.reply(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        self.body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.seen.append((self.path, self.body))
            self.server.keys.append(self.headers.get("authorization"))
        self.server.behave(self.server, self)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def reply(self, code: int, told: Any, **headers: str) -> None:
        raw = told if isinstance(told, bytes) else json.dumps(told).encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(raw)

    def begin(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()

    def event(self, told: Any) -> None:
        self.raw(b"data: " + (told if isinstance(told, bytes) else json.dumps(told).encode()) + b"\n\n")

    def raw(self, raw: bytes) -> None:
        self.wfile.write(raw)
        self.wfile.flush()

    def piece(self, text: str) -> None:
        chat = "messages" in self.body
        said: Body = {"delta": {"content": text}} if chat else {"text": text}
        self.event({"choices": [{"index": 0, **said, "finish_reason": None}]})

    def stream(self, pieces: Sequence[str], first_s: float = 0, gap_s: float = 0, usage: int | None = None) -> float:
        """A whole answer as vLLM streams one: a role, the pieces, an end, the count of tokens, [DONE].

        Returns when the first piece went.
        """
        went = time.perf_counter()
        self.begin()
        self.event({"choices": [{"index": 0, "delta": {"role": "assistant"}, "text": "", "finish_reason": None}]})
        self.raw(b": keep-alive\n\n")
        for number, piece in enumerate(pieces):
            self.server.over.wait(gap_s if number else first_s)
            went = went if number else time.perf_counter()
            self.piece(piece)
        self.event({"choices": [{"index": 0, "delta": {}, "text": "", "finish_reason": "stop"}]})
        if usage is not None:
            self.event({"choices": [], "usage": {"completion_tokens": usage}})
        self.event(b"[DONE]")
        return went

    def stall(self) -> None:
        """Say nothing until the client goes away, or the server ends."""
        self.server.over.wait(60)

    def drip(self) -> None:
        """One byte at a time, forever."""
        self.begin()
        end = time.monotonic() + 60
        try:
            while time.monotonic() < end and not self.server.over.wait(0.05):
                self.raw(b":")
        except OSError:
            pass

    def drop(self) -> None:
        """Close without a word."""
        self.connection.shutdown(socket.SHUT_RDWR)


def asked(body: Body) -> str:
    """The text of a request."""
    return str(body["messages"][-1]["content"] if "messages" in body else body["prompt"])


@contextmanager
def serving(behave: Behaviour) -> Iterator[Server]:
    """A running server."""
    with Server(behave) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()
            thread.join()
