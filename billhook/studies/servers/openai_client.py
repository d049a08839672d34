"""What an OpenAI-compatible server is asked: its models, answers, streamed and timed, and log-probabilities.

Whatever a server does ends as a value: an answer, or an error of one of four kinds. What it sends is data.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import httpx

from billhook.core.errors import EndpointError, option
from billhook.core.results.ab_report import Completion
from billhook.core.results.json_form import JsonObject
from billhook.data.choice_tasks import Request
from billhook.report.numbers import printable
from billhook.studies.servers.endpoint import (
    MOST_BYTES,
    Connection,
    Endpoint,
    RequestFailed,
    parse_object,
    redact_key,
    request_json,
    send,
    with_retries,
)

MOST_EVENT = 2**20  # bytes of one event of a stream
DONE = b"[DONE]"
NO_ECHO = "the answer does not repeat the prompt with them"


# -- the first words ------------------------------------------------------------------------------------------------


async def choose_model(connection: Connection) -> Connection:
    """The connection with a model: the given one, or the first that the server lists. Raises EndpointError."""
    end = connection.endpoint
    answer, _ = await with_retries(connection, lambda: request_json(connection, "models"))
    if not isinstance(answer, RequestFailed):
        listed = answer.get("data")
        names = [m.get("id") for m in listed if isinstance(m, dict)] if isinstance(listed, list) else []
        first = next((name for name in names if isinstance(name, str) and name), "")
        if end.model or first:
            return replace(connection, endpoint=replace(end, model=end.model or first))
        raise EndpointError(
            f"{end.name}, {end.url}, lists no model. Name one: {option(f'model_{end.name.lower()}', 'NAME')}."
        )
    if answer.code in (401, 403):
        raise EndpointError(f"{end.name}, {end.url}, wants a key ({_printable_detail(answer)}). {_hint(end)}")
    if answer.kind in ("connection", "timeout") or not (end.model and answer.code < 500):
        raise EndpointError(
            f"{end.name}, {end.url}, cannot be asked ({_printable_detail(answer)}). Start the server, or correct "
            f"{option(end.name.lower())}; this must list its models: curl {end.url}/models"
        )
    return connection  # some servers list nothing, and the model is named


async def warm_up(connection: Connection) -> Connection:
    """Ask for one short answer that is not counted. Raises EndpointError where the request itself is refused.

    A server that refuses to be asked for its count of tokens is not asked for it again.
    """
    end = connection.endpoint
    answer = await complete(connection, text="Hello")
    if answer.code in (400, 422):
        other = replace(connection, endpoint=replace(end, counts=False))
        if (await complete(other, text="Hello")).error is None:
            return other
    if 400 <= answer.code < 500 and answer.code not in (408, 425, 429):
        hint = _hint(end) if answer.code in (401, 403) else f"Look at {option('kind')} and the name of the model."
        raise EndpointError(
            f"{end.name}, {end.url}, refuses to answer as {printable(end.model)[:100]} "
            f"({_printable_detail(answer)}). {hint}"
        )
    return connection


def _hint(end: Endpoint) -> str:
    name = option(f"api_key_env_{end.name.lower()}", "VARIABLE")
    return f"Put the key into an environment variable and name that: {name}."


def _printable_detail(outcome: RequestFailed | Completion) -> str:
    """A detail that a terminal can show."""
    return printable(outcome.detail)


# -- answers --------------------------------------------------------------------------------------------------------


async def complete(connection: Connection, text: str = "", messages: Sequence[Mapping[str, Any]] = ()) -> Completion:
    """The answer to a text, or to the messages of a chat."""
    start = time.perf_counter()
    outcome, attempts = await with_retries(connection, lambda: _streamed(connection, text, messages))
    total = time.perf_counter() - start
    if isinstance(outcome, RequestFailed):
        return Completion(
            error=outcome.kind, detail=outcome.detail, code=outcome.code, attempts=attempts, total_s=total
        )
    return replace(outcome, text=redact_key(connection.endpoint, outcome.text or ""), attempts=attempts, total_s=total)


async def _streamed(connection: Connection, text: str, messages: Sequence[Mapping[str, Any]]) -> Completion:
    """One attempt."""
    asking = connection.options
    body: JsonObject = {"model": connection.endpoint.model, "max_tokens": asking.max_tokens, "stream": True}
    body["temperature"] = asking.temperature
    if connection.endpoint.counts:
        body["stream_options"] = {"include_usage": True}
    if asking.kind == "chat":
        path, body["messages"] = "chat/completions", list(messages) or [{"role": "user", "content": text}]
    else:
        path, body["prompt"] = "completions", text
    texts: list[str] = []
    first, tokens, finished = None, None, False
    start = time.perf_counter()
    async with send(connection, path, body) as response, aclosing(_payloads(response)) as payloads:
        async for payload in payloads:
            piece = parse_chunk(payload, asking.kind)
            if piece.generated:
                first = first if first is not None else time.perf_counter() - start
                texts.append(piece.text)
            tokens = piece.tokens if piece.tokens is not None else tokens
            finished = finished or piece.finished
    if not finished:
        raise RequestFailed("connection", f"the stream ended in the middle, after {len(texts)} pieces", again=True)
    seconds = time.perf_counter() - start
    return Completion("".join(texts), seconds=seconds, first_s=first, pieces=len(texts), tokens=tokens)


async def _payloads(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """The payloads of a stream, up to [DONE] or its end. Raises RequestFailed for what is no stream of events."""
    buffer, size, some = b"", 0, False
    async with aclosing(response.aiter_raw()) as pieces:  # type: ignore[type-var]
        async for chunk in pieces:
            size += len(chunk)
            events, buffer = split_sse(buffer + chunk)
            if size > MOST_BYTES or len(buffer) > MOST_EVENT:
                raise RequestFailed("malformed", f"more bytes than an answer has: {size}")
            for payload in events:
                some = True
                yield payload
                if payload == DONE:
                    return
    for payload in split_sse(buffer + b"\n\n")[0]:  # some servers close without the blank line
        some = True
        yield payload
    if size and not some:
        raise RequestFailed("malformed", f"no server-sent events: {buffer[:80]!r}")


def split_sse(buffer: bytes) -> tuple[list[bytes], bytes]:
    """The payloads of the whole server-sent events in `buffer`, and what is left of it.

    Comments, which keep a connection alive, and fields other than `data` are passed over. Lines end as the standard
    of server-sent events says, and nowhere else: a payload may hold U+2028.
    """
    *whole, rest = re.split(rb"\r\n\r\n|\n\n|\r\r", buffer)
    payloads = []
    for event in whole:
        lines = [line[5:].removeprefix(b" ") for line in re.split(rb"\r\n|\n|\r", event) if line.startswith(b"data:")]
        payloads += [b"\n".join(lines)] if lines else []
    return payloads, rest


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one event of a stream brings. `generated`: whether the model said or thought something."""

    text: str = ""
    generated: bool = False
    tokens: int | None = None
    finished: bool = False


def parse_chunk(payload: bytes, kind: str) -> Chunk:
    """Read one payload: text, the count of tokens, the end. Raises RequestFailed for what has another shape."""
    if payload == DONE:
        return Chunk(finished=True)
    event = parse_object(payload)
    usage, choices = event.get("usage") or {}, event.get("choices") or []
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    counted = tokens if type(tokens) is int and 0 <= tokens < 2**31 else None
    if not choices:
        return Chunk(tokens=counted)
    choice = choices[0] if isinstance(choices, list) else None
    if not isinstance(choice, dict):
        raise RequestFailed("malformed", f"choices that are none: {choices!r}"[:300])
    said = (choice.get("delta") or choice.get("message") or {}) if kind == "chat" else {"content": choice.get("text")}
    if not isinstance(said, dict) or not isinstance(text := said.get("content") or "", str):
        raise RequestFailed("malformed", f"a piece that is no text: {choice!r}"[:300])
    thought = said.get("reasoning_content") or said.get("reasoning")
    return Chunk(text, bool(text or thought), counted, bool(choice.get("finish_reason")))


# -- log-probabilities ----------------------------------------------------------------------------------------------


async def prompt_logprobs_support(connection: Connection, request: Request) -> int | str:
    """With how many new tokens a server gives the log-probabilities of a prompt (0 or 1), or why it does not."""
    text, why = request.context + request.continuation, ""
    for new_tokens in (0, 1):  # older servers refuse 0
        outcome, _ = await with_retries(connection, lambda n=new_tokens: prompt_logprobs(connection, text, n))  # type: ignore[misc]
        if not isinstance(outcome, RequestFailed):
            return new_tokens
        why = _printable_detail(outcome)
    return why


async def prompt_logprobs(connection: Connection, text: str, new_tokens: int) -> list[float | None]:
    """Log-probability in nats of every token of `text`; None for the first, which nothing stands before.

    By `completions` with `echo`, as vLLM and llama-cpp-python offer it. llama.cpp's own server takes the request and
    gives those of the generated token only, which must not be taken for the prompt's: the echo is looked for.
    """
    body = {
        "model": connection.endpoint.model, "prompt": text, "max_tokens": new_tokens, "temperature": 0, "echo": True,
        "logprobs": 1,
    }  # fmt: skip
    answer = await request_json(connection, "completions", body)
    try:
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        back, values = choice["text"], (choice["logprobs"] or {})["token_logprobs"]
        new = usage.get("completion_tokens", new_tokens) if new_tokens else 0
        values = values[: len(values) - new]
        good = back.startswith(text) and all(type(v) in (float, int) and math.isfinite(v) for v in values[1:])
    except (LookupError, TypeError, AttributeError) as error:
        raise RequestFailed("malformed", NO_ECHO) from error
    if not good or not values or (values[0] is not None and type(values[0]) not in (float, int)):
        raise RequestFailed("malformed", NO_ECHO)
    return list(values)


async def endpoint_choice_logprobs(
    connection: Connection, choices: Sequence[Request], new_tokens: int
) -> list[float] | RequestFailed:
    """Log-probability in nats of the continuation of every request, or what went wrong.

    Context and continuation are sent together, and the context alone without the blanks at its end: the continuation's
    tokens are the rest, as `billhook.data.choice_tasks` has it.
    """
    known: dict[str, int] = {}
    sums = []
    for request in choices:
        head, whole = request.context.rstrip(), request.context + request.continuation
        values: list[float | None] = []
        for text in (whole,) if head in known else (head, whole):
            outcome, _ = await with_retries(connection, lambda t=text: prompt_logprobs(connection, t, new_tokens))  # type: ignore[misc]
            if isinstance(outcome, RequestFailed):
                return outcome
            values = outcome
            known.setdefault(head, len(values))  # the context is the first of both
        rest = [value for value in values[known[head] :] if value is not None]
        if not rest:
            return RequestFailed("malformed", "a choice has no token of its own")
        sums.append(math.fsum(rest))
    return sums
