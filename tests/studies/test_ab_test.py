"""Two endpoints against each other: real servers on the loopback address, with planted times, texts and faults."""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from endpoints import Request, Server, asked, serving
from typer.testing import CliRunner, Result

import billhook
from billhook import api
from billhook.cli import main, session
from billhook.core import significance, statistics
from billhook.core.errors import (
    BillhookError,
    DataError,
    EndpointError,
    MissingExtra,
    RunError,
    UnknownName,
    UsageError,
)
from billhook.core.results.ab_report import AbReport, Answered, ItemScores, Measure
from billhook.core.results.stored import StoredRun
from billhook.data.choice_tasks import read_items, requests, task_tokens
from billhook.data.prompts import read_prompts
from billhook.methods.evaluate.multiple_choice import log_probabilities, score_choices
from billhook.report import ab_words
from billhook.studies.servers.endpoint import Endpoint, RequestFailed, base_url
from billhook.studies.servers.openai_client import parse_chunk, split_sse

ENV = {"COLUMNS": "80", "TERM": "dumb"}
QUICK: dict[str, Any] = {"timeout": 10.0, "concurrency": 4, "max_tokens": 8}


@pytest.fixture
def start() -> Iterator[Any]:
    """start(behave): a running server, which ends with the test."""
    with ExitStack() as stack:
        yield lambda behave: stack.enter_context(serving(behave))


def file_of(home: Path, texts: list[str]) -> Path:
    path = home / "prompts.txt"
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def plain(server: Server, request: Request) -> None:
    request.stream(["an ", "answer"], usage=2)


def compare(a: Server, b: Server, prompts: Path, **options: Any) -> AbReport:
    return billhook.ab_test(a.url, b.url, prompts, store=prompts.parent / "runs.db", **(QUICK | options))


# -- what is measured -----------------------------------------------------------------------------------------------


def test_ratios_cover_what_was_planted(start: Any, tmp_path: Path) -> None:
    """Each prompt has its own delay at each server; the ratios of the means are known, on a busy machine too."""
    n, draw = 12, random.Random(1)
    took: dict[str, list[list[float]]] = {"first_token_s": [[], []], "latency_s": [[], []]}  # by the servers' clocks
    first = {f"prompt {i}": (draw.uniform(0.03, 0.12), draw.uniform(0.09, 0.36)) for i in range(n)}

    def behave(side: int) -> Any:
        def answer(server: Server, request: Request) -> None:
            if asked(request.body) == "Hello":
                return plain(server, request)
            delay, began = first[asked(request.body)][side], time.perf_counter()
            first_piece = request.stream(["one ", "two ", "three"], first_s=delay, gap_s=delay / 4, usage=30)
            took["first_token_s"][side].append(first_piece - began)
            return took["latency_s"][side].append(time.perf_counter() - began)

        return answer

    told = compare(start(behave(0)), start(behave(1)), file_of(tmp_path, list(first)), concurrency=1)
    planted = [sum(times[side] for times in first.values()) / n for side in (0, 1)]
    shares: dict[Measure, float] = {"first_token_s": 1.0, "latency_s": 1.5}
    for name, share in shares.items():
        measure = told.measure(name)
        assert measure is not None
        seen = [math.fsum(times) / n for times in took[name]]
        assert measure.ratio.low <= seen[1] / seen[0] <= measure.ratio.high, name
        assert measure.ratio.value == pytest.approx(measure.b.value / measure.a.value)
        for side, mean in enumerate((measure.a, measure.b)):
            assert share * planted[side] <= mean.value <= seen[side] + 0.2
            assert mean.low < mean.value < mean.high
    rates = told.measure("tokens_per_s")
    assert rates is not None
    assert rates.ratio.high < 1
    assert (told.tokens_counted_by, told.a.tokens, told.pairs) == ("server", 30 * n, n)
    for outcome in told.outcomes:
        b = outcome.b
        assert b.tokens is not None
        assert b.seconds is not None
        assert b.first_s is not None
        assert 0 < b.first_s < b.seconds <= b.total_s
        assert b.tokens / b.seconds < 30 / (1.5 * first[f"prompt {outcome.prompt - 1}"][1])
    assert told.seconds < told.at_most_seconds
    assert AbReport.from_json(json.loads(json.dumps(told.to_json()))) == told
    assert [row["measure"] for row in told.rows()] == [measure.name for measure in told.measures]
    assert all(isinstance(value, str | float) for row in told.rows() for value in row.values())
    assert len(repr(told).splitlines()) == 1


def test_agreement_is_what_was_planted(start: Any, tmp_path: Path) -> None:
    """Of 20 answers 5 differ, in their third word."""

    def other(server: Server, request: Request) -> None:
        number = int(asked(request.body).split()[-1]) if asked(request.body) != "Hello" else 0
        request.stream(["red ", "green ", "blau" if number % 4 == 0 else "blue"])

    def same(server: Server, request: Request) -> None:
        request.stream(["red green", " blue"])

    told = compare(start(same), start(other), file_of(tmp_path, [f"number {i}" for i in range(20)]))
    agreement = told.agreement
    assert agreement is not None
    assert agreement.same.value == 0.75
    assert (agreement.same.low, agreement.same.high) == statistics.wilson_interval(15, 20)
    assert agreement.prefix_words.value == pytest.approx((15 * 3 + 5 * 2) / 20)
    assert agreement.prefix_characters.value == pytest.approx((15 * 14 + 5 * 12) / 20)
    assert sum(outcome.same is False for outcome in told.outcomes) == 5
    assert told.tokens_counted_by == "pieces"
    assert (told.outcomes[0].a.pieces, told.outcomes[0].b.pieces) == (2, 3)
    assert any("pieces of the stream" in note for note in ab_words.ab_notes(told))


def test_pairs_are_asked_in_turn_and_in_an_order_of_the_seed(start: Any, tmp_path: Path) -> None:
    log: list[str] = []

    def behave(name: str) -> Any:
        def answer(server: Server, request: Request) -> None:
            log.append(f"{name} {asked(request.body)}")
            plain(server, request)

        return answer

    a, b, prompts = start(behave("a")), start(behave("b")), file_of(tmp_path, [f"p{i}" for i in range(9)])
    orders = []
    for seed in (0, 0, 1):
        log.clear()
        told = compare(a, b, prompts, seed=seed, concurrency=1)
        orders.append([outcome.first for outcome in told.outcomes])
        expected = ["a Hello", "b Hello"]
        for number, first in enumerate(orders[-1]):
            expected += [f"{side} p{number}" for side in (first, "b" if first == "a" else "a")]
        assert log == expected
    assert orders[0] == orders[1] != orders[2]
    assert all(4 <= order.count("a") <= 5 for order in orders)
    drawn = compare(a, b, prompts, limit=4).outcomes
    assert len(drawn) == 4
    assert [each.prompt for each in drawn] == sorted(each.prompt for each in drawn)


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_what_is_sent_is_what_was_asked_for(kind: str, start: Any, tmp_path: Path) -> None:
    def strict(server: Server, request: Request) -> None:
        if "stream_options" in request.body:
            return request.reply(400, {"error": {"message": "unknown field stream_options"}})
        return request.stream(["ok"])

    a, b = start(plain), start(strict)
    b.models = ["first", "second"]
    told = compare(a, b, file_of(tmp_path, ["Grüße 🙂"]), kind=kind, max_tokens=5, temperature=0.5, model_a="mine")
    path = "chat/completions" if kind == "chat" else "/v1/completions"
    what = {"messages": [{"role": "user", "content": "Grüße 🙂"}]} if kind == "chat" else {"prompt": "Grüße 🙂"}
    common = {"max_tokens": 5, "temperature": 0.5, "stream": True, **what}
    assert a.bodies(path)[-1] == {"model": "mine", "stream_options": {"include_usage": True}, **common}
    assert b.bodies(path)[-1] == {"model": "first", **common}
    assert (told.a.model, told.b.model, told.b.errors) == ("mine", "first", {})
    assert told.outcomes[0].b.text == "ok"


# -- a slow server that sometimes fails -----------------------------------------------------------------------------

FAULTS = {  # prompt -> (the error that counts, or none; attempts)
    "fine": (None, 1), "busy once": (None, 2), "broken once": (None, 2), "drop once": (None, 2),
    "busy for long": ("status", 1), "broken": ("status", 3), "drop": ("connection", 3), "half": ("connection", 3),
    "stall": ("timeout", 1), "drip": ("timeout", 1), "garbage": ("malformed", 1), "no json": ("malformed", 1),
    "no text": ("malformed", 1), "no http": ("malformed", 1), "error inside": ("status", 1), "refused": ("status", 1),
    "moved": ("status", 1), "deep": ("malformed", 1),
}  # fmt: skip


def faulty(server: Server, request: Request) -> None:
    """As `FAULTS` says."""
    text = asked(request.body)
    seen = server.prompts().count(text)
    if text == "busy once" and seen == 1:
        request.reply(429, {"error": {"message": "busy"}}, Retry_After="0.2")
    elif text == "busy for long":
        request.reply(503, b"", Retry_After="3600")
    elif text == "broken" or (text == "broken once" and seen == 1):
        request.reply(500, b"\x1b[31mTraceback")
    elif text == "drop" or (text == "drop once" and seen == 1):
        request.drop()
    elif text == "half":
        request.begin()
        request.piece("half an ")
    elif text in ("stall", "drip"):
        getattr(request, text)()
    elif text == "garbage":
        request.reply(200, b"<html>\xff\xfe hello</html>")
    elif text == "no http":
        request.raw(b"\x00\x01\x02 garbage\r\n\r\n")
    elif text in ("no json", "no text", "error inside", "deep"):
        told: dict[str, bytes] = {
            "no json": b"{nonsense", "no text": b'{"choices": [{"delta": {"content": 5}}]}',
            "error inside": b'{"error": {"message": "out of memory"}}', "deep": b"[" * 100_000,
        }  # fmt: skip
        request.begin()
        request.event(told[text])
    elif text == "refused":
        request.reply(400, {"error": {"message": "too long"}})
    elif text == "moved":
        request.reply(302, b"", location="http://127.0.0.1:1/")
    else:
        request.stream(["an ", "answer"], first_s=0.05, usage=2)


def test_a_slow_server_that_sometimes_fails_is_told_as_it_is(start: Any, tmp_path: Path) -> None:
    a, b = start(plain), start(faulty)
    began = time.monotonic()
    told = compare(a, b, file_of(tmp_path, list(FAULTS)), timeout=2.0, retries=2, concurrency=6)
    assert time.monotonic() - began < 30
    found = {}
    for text, outcome in zip(FAULTS, told.outcomes, strict=True):
        found[text] = (outcome.b.error, outcome.b.attempts)
        assert (outcome.b.text is None) == (outcome.b.error is not None)
        assert outcome.a.text == "an answer"
        assert b.prompts().count(text) == outcome.b.attempts
    assert found == FAULTS
    details = {text: outcome.b.detail for text, outcome in zip(FAULTS, told.outcomes, strict=True)}
    assert "asks to wait 3600 s" in details["busy for long"]
    assert "out of memory" in details["error inside"]
    assert details["refused"] == "400 too long"
    assert "after 1 pieces" in details["half"]
    assert told.answered == Answered(both=4, only_a=14, only_b=0, neither=0, p=significance.mcnemar(14, 0))
    counted = {kind: sum(error == kind for error, _ in FAULTS.values()) for kind in told.b.errors}
    assert told.b.errors == counted
    assert told.b.retries == sum(attempts - 1 for _, attempts in FAULTS.values())
    assert (told.a.errors, told.a.retries, told.pairs) == ({}, 0, 4)
    busy = told.outcomes[list(FAULTS).index("busy once")].b
    assert busy.seconds is not None
    assert busy.total_s >= 0.2 + busy.seconds
    total, latency = told.measure("total_s"), told.measure("latency_s")
    assert total is not None
    assert latency is not None
    assert total.ratio.value > latency.ratio.value > 1


def test_two_servers_that_never_answer_end_in_time(start: Any, tmp_path: Path) -> None:
    a, b = start(lambda server, request: request.stall()), start(lambda server, request: request.drip())
    began = time.monotonic()
    told = compare(a, b, file_of(tmp_path, ["one", "two", "three"]), timeout=0.3)
    assert time.monotonic() - began < 5
    assert told.a.errors == told.b.errors == {"timeout": 3}
    assert told.answered == Answered(both=0, only_a=0, only_b=0, neither=3, p=1.0)
    assert told.agreement is None
    assert told.measure("latency_s") is None
    assert told.seconds < told.at_most_seconds
    assert "Latency" not in str(ab_words.ab_rows(told))


# -- before a prompt is asked ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "found"),
    [("http://h:1", "http://h:1/v1"), ("http://h:1/", "http://h:1/v1"), ("https://h/v1/", "https://h/v1"),
     ("http://[::1]:8/v1", "http://[::1]:8/v1"), ("http://h/openai", "http://h/openai/v1"),
     ("https://h/v1beta/openai", "https://h/v1beta/openai")],
)  # fmt: skip
def test_both_forms_of_an_address_are_taken(given: str, found: str) -> None:
    assert base_url(given, "a") == found


@pytest.mark.parametrize(
    ("given", "told"),
    [("localhost:8000", "no http or https address"), ("ftp://h", "Write for example a='http://"), ("", "a=''"),
     ("http://h:99999", "no http"), ("http://", "no http"), ("http://h/v1/v1", "Write a='http://h/v1'."),
     ("http://h/v1/chat/completions", "Write a='http://h/v1'."), ("http://u:secret@h/v1", "api_key_env_a="),
     ("http://h/v1?key=secret", "would be stored"), ("http://h h/", "no http")],
)  # fmt: skip
def test_other_addresses_are_refused(given: str, told: str) -> None:
    with pytest.raises(UsageError, match=re.escape(told)) as caught:
        base_url(given, "a")
    assert "secret" not in str(caught.value)


def test_a_server_that_cannot_be_asked_is_told_before_a_prompt_is(start: Any, tmp_path: Path) -> None:
    good, prompts = start(plain), file_of(tmp_path, ["one"])
    empty, silent, refusing = start(plain), start(plain), start(lambda s, r: r.reply(404, {"message": "no model\x1b"}))
    empty.models, silent.models = [], None  # type: ignore[assignment]
    gone = Server(plain)
    gone.server_close()
    for server, words in (
        (gone, ("cannot be asked", "curl", "correct b=")),
        (empty, ("lists no model", "model_b='NAME'")),
        (silent, ("no whole answer within 0.4 s",)),
        (refusing, ("refuses to answer as model-of-the-test (404", "Look at kind=", "�")),
    ):
        with pytest.raises(EndpointError) as caught:
            compare(good, server, prompts, timeout=0.4, retries=1)
        assert [word for word in words if word not in str(caught.value)] == []
        assert caught.value.exit_code == 3
    assert good.prompts() == []
    assert [run.state for run in api.list_runs(tmp_path / "runs.db")] == ["failed"] * 4


@pytest.mark.parametrize(
    ("options", "kind", "told"),
    [({"kind": "chatty"}, UsageError, "There is no kind 'chatty'"), ({"retries": -1}, UsageError, "at least 0"),
     ({"timeout": 0}, UsageError, "timeout"), ({"timeout": math.nan}, UsageError, "timeout"),
     ({"temperature": -1}, UsageError, "temperature"), ({"concurrency": 0}, UsageError, "at least 1"),
     ({"retry": 1}, UnknownName, "Did you mean 'retries'"),
     ({"api_key_env_b": "NOT_SET"}, UsageError, "export NOT_SET")],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused(options: Any, kind: type[BillhookError], told: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=re.escape(told)):
        billhook.ab_test("http://h", "http://h", file_of(tmp_path, ["x"]), store=tmp_path / "s.db", **options)
    assert not (tmp_path / "s.db").exists()


def test_without_httpx_the_line_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("billhook.studies.servers.endpoint.importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=re.escape("pip install 'billhook[abtest]'")):
        Endpoint.create("A", "http://h")


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [("x.txt", " \n\n", "is empty"), ("x.md", "x", "not .txt or .jsonl"), ("x.jsonl", '{"text": "x"}', "row 1, is not"),
     ("x.jsonl", '{"prompt": "x"}\n{"messages": []}', "row 2, is no"), ("x.jsonl", "{", "is not JSON"),
     ("x.jsonl", '{"messages": [{"role": "user", "content": "x"}]}', "Use kind='chat'"),
     ("x.jsonl", '{"query": " ", "choices": ["a", "b"], "gold": 0}', "no text before its choices")],
)  # fmt: skip
def test_a_file_without_prompts_is_refused(name: str, text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(BillhookError, match=re.escape(told)):
        read_prompts(tmp_path / name, "text")
    with pytest.raises(DataError, match="missing"):
        read_prompts(tmp_path / "none.txt")


def test_prompts_are_read_from_rows_too(start: Any, tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"messages": chat}) + "\n\n" + json.dumps({"prompt": "a\u2028b"}) + "\n")
    a = start(plain)
    told = compare(a, a, path, concurrency=1)
    assert [outcome.prompt for outcome in told.outcomes] == [1, 3]
    assert [body["messages"] for body in a.bodies("completions")[2::2]] == [
        chat,
        [{"role": "user", "content": "a\u2028b"}],
    ]


# -- streams --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_events_are_the_same_however_they_arrive(end: bytes) -> None:
    wanted = [b'{"a": "x\xe2\x80\xa8\xc2\x85y"}', b"two\nlines", b"[DONE]"]
    lines = [b": hello", b"", b"event: x", b"id: 1", b"data: " + wanted[0], b"", b"data:two", b"data: lines", b"", b"",
             b"retry: 5", b"", b"data: [DONE]", b"", b""]  # fmt: skip
    whole = end.join(lines)
    assert split_sse(whole) == (wanted, b"")
    for size in (1, 2, 3, 7):
        found, rest = [], b""
        for start in range(0, len(whole), size):
            some, rest = split_sse(rest + whole[start : start + size])
            found += some
        assert found == wanted


def test_a_piece_is_text_or_thought_and_a_count_is_a_count() -> None:
    def piece(told: object, kind: str = "chat") -> Any:
        return parse_chunk(json.dumps(told).encode(), kind)

    thought = piece({"choices": [{"delta": {"content": None, "reasoning_content": "hm"}}]})
    assert (thought.text, thought.generated, thought.finished) == ("", True, False)
    assert not piece({"choices": [{"delta": {"role": "assistant", "content": ""}}]}).generated
    assert not piece({"id": 1}).generated
    assert piece({"choices": [{"delta": None, "finish_reason": "length"}]}).finished
    assert piece({"choices": [{"text": "x"}]}, "text").text == "x"
    assert piece({"choices": [], "usage": {"completion_tokens": 7}}).tokens == 7
    for wrong in (True, -1, 2**40, "7", None, math.nan):
        assert piece({"choices": [], "usage": {"completion_tokens": wrong}}).tokens is None
    for shape in ({"choices": 5}, {"choices": ["x"]}, {"choices": [{"delta": 5}]}):
        with pytest.raises(RequestFailed, match="malformed"):
            piece(shape)


# -- task scores ----------------------------------------------------------------------------------------------------


def tokens_of(text: str) -> list[str]:
    return re.findall(r"\s*\S+|\s+$", text)


def planted(salt: str, before: str, token: str) -> float:
    """The log-probability of a token after a text: anything, but always the same."""
    return -random.Random(f"{salt}|{before}|{token}").uniform(0.1, 9)


def scoring(salt: str, refuses_0: bool = False, bos: bool = False) -> Any:
    """A server that tells the log-probabilities of a prompt, as vLLM does."""

    def behave(server: Server, request: Request) -> None:
        body = request.body
        if not body.get("echo"):
            return request.stream(["an ", "answer"])
        if refuses_0 and body["max_tokens"] == 0:
            return request.reply(400, {"error": "max_tokens must be at least 1"})
        words, values, before = tokens_of(body["prompt"]), [], ""
        for word in words:
            values.append(planted(salt, before, word) if before or bos else None)
            before += word
        values = [None, *values] if bos else values
        new = body["max_tokens"]
        text, usage = before + " new" * new, {"prompt_tokens": len(values), "completion_tokens": new}
        logprobs = {"tokens": words, "token_logprobs": values + [-0.5] * new}
        return request.reply(200, {"choices": [{"text": text, "logprobs": logprobs}], "usage": usage})

    return behave


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """15 items, some with contexts, some with blanks at the end of the query."""
    path, draw = tmp_path / "task.jsonl", random.Random(5)
    rows: list[dict[str, Any]] = []
    for i in range(15):
        choices = [f"word{draw.randrange(99)}" + " more" * draw.randrange(3) for _ in range(2 + i % 3)]
        rows.append({"query": f"Question {i}?" + " " * (i % 2), "choices": choices, "gold": i % 2})
        if i % 7 == 0:
            rows[-1] |= {"contexts": [f"Gap {c} of {i}" for c in choices], "continuation": "the end."}
        if i % 5 == 0:
            rows[-1]["subject"] = "high_school_physics"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def scores_a(told: AbReport, number: int) -> ItemScores:
    scores = told.outcomes[number].scores_a
    assert scores is not None
    return scores


def by_hand(task: Path, salt: str, name: str) -> list[bool]:
    """Whether the likeliest choice is right, item by item."""
    right = []
    for item in read_items(task):
        sums = []
        for request in requests(item):
            whole = tokens_of(request.context + request.continuation)
            head = len(tokens_of(request.context.rstrip()))
            values = [planted(salt, "".join(whole[:i]), whole[i]) for i in range(head, len(whole))]
            sums.append(math.fsum(values) / (request.characters if name == "acc_norm" else 1))
        right.append(sums.index(max(sums)) == item.gold)
    return right


def test_task_scores_are_the_sums_by_hand(start: Any, task: Path) -> None:
    a, b = start(scoring("a")), start(scoring("b", refuses_0=True, bos=True))
    told = compare(a, b, task)
    scored = told.task
    assert scored is not None
    assert scored.not_offered == {}
    assert (scored.items, scored.errors) == (15, {"a": 0, "b": 0})
    for name, score in (("acc", scored.acc), ("acc_norm", scored.acc_norm)):
        hand = [by_hand(task, salt, name) for salt in "ab"]
        assert score is not None
        assert [score.a.value, score.b.value] == pytest.approx([sum(each) / 15 for each in hand])
        assert score.change.value == pytest.approx((sum(hand[1]) - sum(hand[0])) / 15)
        assert score.change.low <= score.change.value <= score.change.high
    assert {body["max_tokens"] for body in b.bodies("/v1/completions")[1:]} == {1}
    assert a.bodies("chat/completions")[-1]["messages"][0]["content"].startswith(("Question", "Gap", "The following"))
    assert len(scores_a(told, 0).values) == 2
    assert told.outcomes[1].gold == 1
    assert AbReport.from_json(json.loads(json.dumps(told.to_json()))) == told
    assert any(row[0] == "Accuracy" for row in ab_words.ab_rows(told))


def test_log_probabilities_are_those_of_the_model_itself(start: Any, model: Path, tmp_path: Path) -> None:
    """A server over a real, tiny model, and `billhook.evaluate` over the same model and file."""
    teacher = billhook.load(model)
    words = [*teacher.tokenizer.get_vocab()][40:60]
    path = tmp_path / "task.jsonl"
    rows = [{"query": " ".join(words[i : i + 4]) + " " * (i % 2), "choices": words[i % 3 : i % 3 + 3], "gold": i % 3}
            for i in range(6)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def behave(server: Server, request: Request) -> None:
        if not request.body.get("echo"):
            return request.stream(["x"])
        ids = torch.tensor([teacher.tokenizer(request.body["prompt"])["input_ids"]])
        with server.lock, torch.inference_mode():
            logits = teacher.model(ids).logits[0].log_softmax(-1)
        values = [None, *logits[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()]
        choice = {"text": request.body["prompt"], "logprobs": {"token_logprobs": values}}
        return request.reply(200, {"choices": [choice]})

    server = start(behave)
    told = compare(server, server, path)
    tokens = task_tokens(path, teacher.tokenizer)
    sums = log_probabilities(teacher.model, tokens)
    for document, number in enumerate(tokens.clusters):
        expected = [value for value, of in zip(sums, tokens.documents, strict=True) if of == document]
        assert list(scores_a(told, number - 1).values) == pytest.approx(expected, abs=1e-4)
    assert told.task is not None
    right = score_choices(tokens, sums)
    for name, score in (("acc", told.task.acc), ("acc_norm", told.task.acc_norm)):
        assert score is not None
        assert score.a.value == pytest.approx(right[name].mean)


def test_an_item_that_one_server_fails_is_in_neither_accuracy(start: Any, task: Path) -> None:
    def sometimes(server: Server, request: Request) -> None:
        if request.body.get("echo") and "Question 3?" in request.body["prompt"]:
            return request.reply(400, b"too long")
        return scoring("b")(server, request)

    told = compare(start(scoring("a")), start(sometimes), task)
    assert told.task is not None
    assert (told.task.items, told.task.errors) == (14, {"a": 0, "b": 1})
    hand = by_hand(task, "a", "acc")
    assert told.task.acc is not None
    assert told.task.acc.a.value == pytest.approx((sum(hand) - hand[3]) / 14)
    failed = told.outcomes[3].scores_b
    assert failed is not None
    assert "too long" in failed.error


@pytest.mark.parametrize("how", ["generated only", "refused", "nothing", "hostile"])
def test_where_no_log_probabilities_are_offered_it_says_so_and_goes_on(how: str, start: Any, task: Path) -> None:
    def without(server: Server, request: Request) -> None:
        if not request.body.get("echo"):
            return request.stream(["an ", "answer"])
        logprobs: Any = {"tokens": [" x"], "token_logprobs": [-0.5]}  # llama.cpp's server: of the generated token only
        if how == "refused":
            return request.reply(404, {"error": {"message": "\x1b[31mno \u202eroute"}})
        if how == "hostile":
            logprobs = {"token_logprobs": [None, *[float("nan")] * 50]}
        text = request.body["prompt"] if how == "hostile" else " x"
        choice = {"text": text, "logprobs": None if how == "nothing" else logprobs}
        return request.reply(200, {"choices": [choice], "usage": {"completion_tokens": 1}})

    a, b = start(scoring("a")), start(without)
    told = compare(a, b, task, limit=3)
    assert told.task is not None
    assert list(told.task.not_offered) == ["b"]
    assert told.task.acc is None
    assert told.agreement is not None
    assert told.agreement.same.value == 1
    (note,) = (note for note in ab_words.ab_notes(told) if "No task scores" in note)
    assert note.startswith("No task scores: B offers no log-probabilities of a prompt (")
    assert note.isprintable()


# -- keys, the store, the terminal ----------------------------------------------------------------------------------


def test_a_key_goes_to_its_server_and_nowhere_else(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "sk-very-secret"
    monkeypatch.setenv("KEY_OF_B", key + "\n")

    def gossip(server: Server, request: Request) -> None:
        if request.headers.get("authorization") != f"Bearer {key}":
            return request.reply(401, {"error": {"message": "wrong key"}})
        if asked(request.body) == "fail":
            return request.reply(418, f"your {request.headers['authorization']}".encode())
        return request.stream(["you said ", key])

    a, b, prompts = start(plain), start(gossip), file_of(tmp_path, ["fail", "talk"])
    with pytest.raises(EndpointError, match=r"401 wrong key.*api_key_env_b='VARIABLE'"):
        compare(a, b, prompts)
    told = compare(a, b, prompts, api_key_env_b="KEY_OF_B")
    assert set(b.keys) == {None, f"Bearer {key}"}
    assert set(a.keys) == {None}
    assert told.outcomes[1].b.text == "you said [key]"
    assert told.outcomes[0].b.detail == "418 your Bearer [key]"
    assert key not in json.dumps(told.to_json())
    for file in tmp_path.iterdir():
        assert key.encode() not in file.read_bytes()
    assert "KEY_OF_B" in json.dumps(api.show(told.run, tmp_path / "runs.db").spec)
    assert key not in "".join(capsys.readouterr())


def command(*arguments: object) -> Result:
    before = signal.getsignal(signal.SIGTERM)
    try:
        return CliRunner().invoke(main.app, [str(a) for a in arguments], env=ENV, prog_name="billhook")
    finally:
        signal.signal(signal.SIGTERM, before)


HOSTILE = "\x1b]0;owned\x07\x1b[2J\u202e[bold]<script>\ud83d"


def test_the_command_shows_and_files_what_it_found(start: Any, tmp_path: Path) -> None:
    def hostile(server: Server, request: Request) -> None:
        if asked(request.body) == "p1":
            return request.reply(400, {"error": {"message": HOSTILE}})
        return request.stream([HOSTILE], usage=123456)

    a, b, store = start(plain), start(hostile), tmp_path / "runs.db"
    b.models = [HOSTILE + "x" * 90]
    prompts = file_of(tmp_path, [f"p{i}" for i in range(5)])
    arguments = ("abtest", "--a", a.url, "--b", b.url, "--prompts", prompts, "--store", store, "--quiet")
    shown, told = command(*arguments), command(*arguments, "--json")
    assert (shown.exit_code, told.exit_code) == (0, 0), shown.output
    for stdout in (shown.stdout, command("runs", "--store", store).stdout):
        assert max(map(len, stdout.splitlines())) <= 80, stdout
        assert not set(stdout) & set("\x1b\x07\u202e")
    for words in ("Latency, s", "First token, s", "Tokens/s", "Answered", "80.0%", "1 status", "not reliable"):
        assert words in shown.stdout, shown.stdout
    result = json.loads(told.stdout)
    assert result["outcomes"][0]["b"]["text"] == HOSTILE
    assert HOSTILE[:5] in result["b"]["model"]
    kept = api.show(result["run"], store)
    assert (kept.state, kept.result) == ("done", AbReport.from_json(result))
    assert "Latency, s" in command("show", result["run"], "--store", store).stdout
    assert api.list_runs(store)[0].kind == "abtest"
    with pytest.raises(RunError, match=r"is no pruning\. Begin it again: billhook abtest"):
        billhook.resume(result["run"], store=store)
    with pytest.raises(RunError, match="no unfinished run"):
        billhook.resume(store=store)


def test_a_study_of_the_version_before_is_shown_by_its_page(capsys: pytest.CaptureFixture[str]) -> None:
    result = {"laboratory": "sweep", "page": "lab/r1/index.html"}
    run = StoredRun("r1", "sweep", 0.0, "done", "lab/r1", {}, {}, {}, losses=3, events=(), result=result)
    session.print_result(run)
    assert capsys.readouterr().out.splitlines() == [
        "r1: sweep, done, 3 losses measured, out: lab/r1",
        "Page: lab/r1/index.html",
    ]


def test_a_server_that_is_gone_is_one_message_and_exit_code_3(start: Any, tmp_path: Path) -> None:
    arguments = ("--prompts", file_of(tmp_path, ["x"]), "--store", tmp_path / "s.db", "--retries", "0", "--json")
    done = command("abtest", "--a", start(plain).url, "--b", "http://127.0.0.1:1/v1", *arguments)
    assert (done.exit_code, done.stdout) == (3, "")
    assert "B, http://127.0.0.1:1/v1, cannot be asked" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_it_with_its_code(sent: signal.Signals, start: Any, tmp_path: Path) -> None:
    a, store = start(plain), tmp_path / "runs.db"
    b = start(lambda s, r: r.stall() if asked(r.body) != "Hello" else plain(s, r))

    def interrupt() -> None:
        end = time.monotonic() + 30
        while not b.prompts() and time.monotonic() < end:
            time.sleep(0.02)
        os.kill(os.getpid(), sent)

    thread = threading.Thread(target=interrupt)
    thread.start()
    done = command(
        "abtest", "--a", a.url, "--b", b.url, "--prompts", file_of(tmp_path, ["x", "y"]), "--store", store, "--json"
    )
    thread.join()
    assert (done.exit_code, done.stdout) == (130, ""), done.stderr
    assert done.stderr.splitlines()[-1].startswith("Interrupted.")
    assert [run.state for run in api.list_runs(store)] == ["interrupted"]


# -- statistics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 7, 40])
def test_the_interval_of_a_share_solves_wilsons_equation(n: int) -> None:
    for count in {0, 1, n // 2, n}:
        low, high = statistics.wilson_interval(count, n)
        assert 0 <= low <= count / n <= high <= 1
        assert low < high
        for end in {low, high} - {0.0, 1.0}:  # the ends are the shares that are 1.96 standard errors away
            assert abs(count / n - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n), rel=1e-5)


def test_a_paired_ratio_is_the_ratio_of_the_means() -> None:
    draw = random.Random(1)
    a = [draw.uniform(1, 2) for _ in range(40)]
    b = [3 * x * draw.uniform(0.9, 1.1) for x in a]
    told, scaled = statistics.paired_ratio(a, b), statistics.paired_ratio([10 * x for x in a], [20 * x for x in b])
    assert told.value == pytest.approx(math.fsum(b) / math.fsum(a))
    assert told.low < told.value < told.high
    assert told.high - told.low < 0.2, "pairs, not two samples"
    assert (scaled.low, scaled.high) == pytest.approx((2 * told.low, 2 * told.high))
    assert statistics.paired_ratio([2.0], [3.0]).value == 1.5
    with pytest.raises(ValueError, match="paired"):
        statistics.paired_ratio([1.0], [1.0, 2.0])
