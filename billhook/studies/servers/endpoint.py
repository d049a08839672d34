"""One OpenAI-compatible server: its address, its key, and one request to it, bounded in time and tried again."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import httpx

from billhook.core.errors import MissingExtra, UsageError, option
from billhook.core.results.ab_report import RequestOptions
from billhook.core.results.json_form import JsonObject

T = TypeVar("T")
FIRST_WAIT_S = 0.5  # before a second attempt, and twice as long before each further one
MOST_BYTES = 32 * 2**20  # of one answer
LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One server. `key_env` names the environment variable that holds its key; the key itself is never kept."""

    name: str  # A or B
    url: str  # with /v1
    model: str = ""
    key_env: str = ""
    counts: bool = True  # whether it is asked for its count of tokens: some refuse that

    @staticmethod
    def create(name: str, url: str, model: str = "", key_env: str = "") -> Endpoint:
        """An endpoint whose address and key have been looked at. Raises UsageError, and MissingExtra without httpx."""
        end = Endpoint(name, base_url(url, name.lower()), model, key_env)
        _key(end)
        return end


class RequestFailed(Exception):
    """One attempt that failed. `retry`: whether another one may help; `after_s`: when, if the server says so."""

    def __init__(self, kind: str, detail: str, again: bool = False, after_s: float | None = None) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail, self.retry, self.after_s = kind, detail, again, after_s
        self.code = 0  # the HTTP status, if there was one


@dataclass(frozen=True, slots=True)
class Connection:
    """An endpoint with the open client that talks to it. `draw`: for the waits."""

    endpoint: Endpoint
    options: RequestOptions
    client: httpx.AsyncClient = field(repr=False)
    draw: random.Random = field(repr=False)


# -- addresses and keys ---------------------------------------------------------------------------------------------


def base_url(url: str, name: str) -> str:
    """The address under which `models` and `completions` stand. `http://host:8000` and `http://host:8000/v1` are one.

    Raises UsageError for what is no such address.
    """
    example = f"Write for example {option(name, 'http://127.0.0.1:8000/v1')}."
    try:
        parts = urlsplit(url.strip())
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        whole = whole and not re.search(r"\s", parts.netloc + parts.path)
    except ValueError:
        whole = False
    if not whole:
        raise UsageError(f"{option(name, url)} is no http or https address. {example}")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UsageError(
            f"{option(name)} holds more than an address: a user, a password, or what follows ? or #. They would be "
            "stored. "
            f"Leave them out; {option(f'api_key_env_{name}')} names the variable that holds a key."
        )
    path = parts.path.rstrip("/")
    short = re.sub(r"/(chat/completions|completions|models)$", "", path)
    short = re.sub(r"/v1(/v1)+$", "/v1", short)
    if short != path:
        better = urlunsplit((parts.scheme, parts.netloc, short, "", ""))
        raise UsageError(f"{option(name, url)} is longer than the address of the server. Write {option(name, better)}.")
    if not any(re.match(r"v\d", piece) for piece in path.split("/")):
        path += "/v1"
    whole_url = urlunsplit((parts.scheme, parts.netloc, path, "", ""))
    httpx = _httpx()
    try:
        httpx.URL(whole_url)
    except httpx.InvalidURL as error:
        raise UsageError(f"{option(name, url)} is no address ({error}). {example}") from error
    return whole_url


def _httpx() -> Any:
    if importlib.util.find_spec("httpx") is None:
        raise MissingExtra("Asking endpoints", "abtest")
    import httpx

    return httpx


def _key(endpoint: Endpoint) -> str:
    """The key of an endpoint, or nothing. Raises UsageError where the variable does not hold one."""
    if not endpoint.key_env:
        return ""
    key = os.environ.get(endpoint.key_env, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        what = "holds what is no key" if key else "is not set"
        raise UsageError(
            f"The environment variable {endpoint.key_env!r} {what}. Type first: export {endpoint.key_env}=…"
        )
    return key


@asynccontextmanager
async def connect(endpoint: Endpoint, options: RequestOptions) -> AsyncIterator[Connection]:
    """A connection to an endpoint, closed at the end."""
    httpx = _httpx()
    headers = {"accept-encoding": "identity", "content-type": "application/json"}
    if key := _key(endpoint):
        headers["authorization"] = f"Bearer {key}"
    away = urlsplit(endpoint.url).hostname not in LOCAL  # a proxy is none of this machine's business
    client = httpx.AsyncClient(headers=headers, timeout=options.timeout, trust_env=away)
    async with client:
        yield Connection(endpoint, options, client, random.Random(f"{options.seed} {endpoint.name}"))


# -- one request ----------------------------------------------------------------------------------------------------


async def with_retries(connection: Connection, once: Callable[[], Awaitable[T]]) -> tuple[T | RequestFailed, int]:
    """(what `once` gives, or its last failure; the number of attempts). Each has the timeout for itself.

    Refusals for now (429, 5xx) and broken connections are tried again, after a wait that doubles and is jittered, or
    after what the server asks for; if that is longer than the timeout, not at all.
    """
    asking = connection.options
    for attempt in range(1, asking.retries + 2):
        try:
            async with asyncio.timeout(asking.timeout):
                return await once(), attempt
        except (RequestFailed, TimeoutError, _httpx().HTTPError) as error:
            failure = _failure(error, asking.timeout)
        wait = failure.after_s
        if wait is None:
            wait = min(asking.timeout, FIRST_WAIT_S * 2 ** (attempt - 1) * connection.draw.uniform(0.5, 1))
        elif wait > asking.timeout:
            failure.detail += f"; it asks to wait {wait:.0f} s, longer than the timeout"
        if not failure.retry or attempt > asking.retries or wait > asking.timeout:
            failure.detail = redact_key(connection.endpoint, failure.detail)
            return failure, attempt
        await asyncio.sleep(wait)
    raise AssertionError("the last attempt returns")


def _failure(error: Exception, timeout: float) -> RequestFailed:
    """What an exception of httpx means."""
    httpx = _httpx()
    if isinstance(error, RequestFailed):
        return error
    if isinstance(error, TimeoutError | httpx.TimeoutException):
        return RequestFailed("timeout", f"no whole answer within {timeout:g} s")
    words = str(error) or type(error).__name__
    if isinstance(error, httpx.RemoteProtocolError) and not re.search("disconnected|closed", words):
        return RequestFailed("malformed", f"this is not HTTP: {words}"[:300])
    return RequestFailed("connection", words[:300], again=True)


def redact_key(endpoint: Endpoint, text: str) -> str:
    """A text without the key of the endpoint, which some servers send back."""
    key = _key(endpoint)
    return text.replace(key, "[key]") if key else text


@asynccontextmanager
async def send(connection: Connection, path: str, body: Mapping[str, Any] | None) -> AsyncIterator[httpx.Response]:
    """Send a request (GET without a body) and look at the status. Raises RequestFailed for any but 200."""
    method, content = ("GET", None) if body is None else ("POST", json.dumps(body).encode())
    async with connection.client.stream(method, f"{connection.endpoint.url}/{path}", content=content) as response:
        if response.status_code != 200:
            code = response.status_code
            again = code == 429 or code >= 500
            raw = await read_body(response, 4096)
            failure = RequestFailed("status", f"{code} {_said(raw)}".strip(), again, _after(response.headers, again))
            failure.code = code
            raise failure
        yield response


async def read_body(response: httpx.Response, most: int) -> bytes:
    """The body, or its first `most` bytes."""
    raw = bytearray()
    async with aclosing(response.aiter_raw()) as pieces:  # type: ignore[type-var]
        async for piece in pieces:
            raw += piece
            if len(raw) >= most:
                break
    return bytes(raw[:most])


def _said(raw: bytes) -> str:
    """What a body says of an error, in at most 300 characters."""
    text = raw.decode("utf-8", "replace")
    try:
        parsed = json.loads(text)
        inner = parsed.get("error", parsed)
        text = str(inner.get("message", inner) if isinstance(inner, dict) else inner)
    except (ValueError, AttributeError, RecursionError):
        pass
    return " ".join(text.split())[:300]


def _after(headers: Mapping[str, str], again: bool) -> float | None:
    """Seconds that Retry-After asks to wait: a number, or a date."""
    asked = headers.get("retry-after") if again else None
    if asked is None:
        return None
    try:
        return max(0.0, float(asked))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(asked).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def parse_object(raw: bytes) -> JsonObject:
    """One JSON object. Raises RequestFailed for anything else, and for an error instead of one."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise RequestFailed("malformed", f"no JSON: {raw[:80]!r}") from error
    if not isinstance(value, dict):
        raise RequestFailed("malformed", f"no JSON object: {raw[:80]!r}")
    if value.get("error"):
        raise RequestFailed("status", _said(raw))
    return value


async def request_json(connection: Connection, path: str, body: Mapping[str, Any] | None = None) -> JsonObject:
    """One JSON object, whole."""
    async with send(connection, path, body) as response:
        raw = await read_body(response, MOST_BYTES)
    return parse_object(raw)
