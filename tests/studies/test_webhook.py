"""Webhooks: which addresses are called, what is sent, and that none of it ends a run or tells a secret."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from endpoints import serving
from test_watch import Scorer, good, keep_baseline, watched, write_task
from typer.testing import CliRunner

import billhook
from billhook.cli import main
from billhook.core.errors import UsageError
from billhook.core.events import Event
from billhook.core.monitoring.alerts import ALERT, Alert
from billhook.studies.servers import webhook
from billhook.studies.servers.webhook import Webhook


class Hook(ThreadingHTTPServer):
    """What a webhook is sent: paths, headers and bodies. `answer`: the status, and where a redirect leads."""

    def __init__(self, answer: tuple[int, str] = (200, "")) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.seen, self.stalls = answer, [], threading.Event()  # type: ignore[var-annotated]
        self.stalls.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/services/secret-token?key=hidden"


class _Handler(BaseHTTPRequestHandler):
    server: Hook

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.seen.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
        self.server.stalls.wait(30)
        self.send_response(self.server.answer[0])
        if self.server.answer[1]:
            self.send_header("location", self.server.answer[1])
        self.end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextmanager
def hooked(answer: tuple[int, str] = (200, "")) -> Iterator[Hook]:
    with Hook(answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.stalls.set()
            server.shutdown()
            thread.join()


def resolves_to(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    found = [(socket.AF_INET6 if ":" in each else socket.AF_INET, 1, 6, "", (each, 443)) for each in addresses]
    monkeypatch.setattr(webhook.socket, "getaddrinfo", lambda *arguments, **options: found)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("ftp://example.org/hook", "no http or https address"),
        ("file:///etc/passwd", "no http or https address"),
        ("example.org/hook", "no http or https address"),
        ("https://", "no http or https address"),
        ("https://example.org:99999/", "no http or https address"),
        ("https://user:hunter2@example.org/", "holds a user or a password"),
        ("http://169.254.169.254/latest/meta-data", "a link-local or metadata address"),
        ("http://[fe80::1]/", "a link-local or metadata address"),
        ("http://[fd00:ec2::254]/", "a link-local or metadata address"),
        ("http://100.100.100.200/", "a link-local or metadata address"),
        ("http://[::ffff:169.254.169.254]/", "a link-local or metadata address"),
        ("http://0.0.0.0/", "no address of a host"),
        ("http://224.0.0.1/", "no address of a host"),
    ],
)
def test_an_address_that_must_not_be_called_is_refused(url: str, told: str) -> None:
    with pytest.raises(UsageError, match=told) as refused:
        Webhook.parse(url)
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("addresses", "told"),
    [
        (["127.0.0.1"], "this machine under another name"),
        (["::1"], "this machine under another name"),
        (["93.184.216.34", "169.254.169.254"], "a link-local or metadata address"),
        (["::ffff:127.0.0.1"], "this machine under another name"),
    ],
)
def test_a_name_is_refused_by_what_it_resolves_to(
    addresses: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolves_to(monkeypatch, *addresses)
    with pytest.raises(UsageError, match=told):
        Webhook.parse("https://hooks.example.org/")


def test_a_name_that_changes_its_address_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    resolves_to(monkeypatch, "93.184.216.34")
    hook = Webhook.parse("http://hooks.example.org/")
    with hooked() as server:
        resolves_to(monkeypatch, "127.0.0.1")
        assert hook.send({}) == "its host is not called"
        assert not server.seen


def test_what_is_sent_and_that_a_redirect_is_not_followed() -> None:
    with hooked() as other, hooked((302, other.url)) as server:
        assert Webhook.parse(other.url).send({"text": "hello"}) == ""
        assert Webhook.parse(server.url).send({"text": "hello"}) == "it answered 302"
        (path, headers, body), *more = other.seen
        assert (path, body, more) == ("/services/secret-token?key=hidden", {"text": "hello"}, [])
        assert headers["host"] == f"127.0.0.1:{other.server_port}"
        assert not headers.keys() & {"authorization", "cookie"}


def test_a_webhook_that_stalls_or_is_gone_is_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "TIMEOUT_S", 0.2)
    with hooked() as server:
        server.stalls.clear()
        hook = Webhook.parse(server.url)
        assert hook.send({}) == "ReadTimeout"
    assert hook.send({}) == "ConnectError"
    assert "secret" not in repr(hook)


def test_alerts_of_a_watch_are_sent_and_a_failure_is_an_event(tmp_path: Path) -> None:
    task, store = write_task(tmp_path / "task.jsonl"), tmp_path / "runs.db"
    keep_baseline(store, task, good)
    with serving(Scorer(task, lambda number: False)) as server, hooked() as hook:
        result, events = watched(server.url, store, rounds=2, webhook=hook.url)
        ((_, _, body),) = hook.seen
        assert [each["rule"] for each in body["alerts"]] == [alert.rule for alert in result.alerts]
        assert (body["run"], body["target"]) == (result.run, result.target)
        assert "critical: quality of tasks" in body["text"]
        hook.answer = (500, "")
        result, events = watched(server.url, store, rounds=1, webhook=hook.url)
        assert len(result.alerts) == 1
    (told,) = [event for event in events if event.stage == "webhook"]
    assert dict(told.values) == {"host": "127.0.0.1", "failed": "it answered 500"}
    kept = json.dumps([billhook.show(run.run, store).to_json() for run in billhook.list_runs(store)])
    assert "secret-token" not in kept
    assert "hidden" not in kept


# -- prunings, gates and sweeps --------------------------------------------------------------------------------------

LITTLE: dict[str, Any] = {"tokens": 240, "length": 24, "self_share": 0.0, "eval_tokens": 640, "eval_length": 32}
LITTLE |= {"device": "cpu"}
ALWAYS = [
    {"name": "large", "when": "memory", "above": "1kB"},
    {"name": "worse", "when": "quality", "loses": "0%ppl"},
]


def rules_file(folder: Path) -> Path:
    path = folder / "rules.yaml"
    path.write_text(json.dumps({"rules": ALWAYS}))  # JSON is YAML
    return path


@pytest.mark.parametrize("answer", [(200, ""), (302, "http://127.0.0.1:1/"), (500, "")])
def test_a_pruning_sends_its_alerts_and_ends_well_whatever_is_answered(
    answer: tuple[int, str], model: Path, text: Path, tmp_path: Path
) -> None:
    store, events = tmp_path / "runs.db", list[Event]()
    with hooked(answer) as hook:
        result = billhook.prune(
            model, plan="mlp.1", data=str(text), out=tmp_path / "out", store=store, rules=rules_file(tmp_path),
            webhook=hook.url, watch=events.append, **LITTLE,
        )  # fmt: skip
        ((_, _, body),) = hook.seen
    told = [Alert.from_event(event) for event in events if event.stage == ALERT]
    assert "large" in {alert.rule for alert in told}
    assert [each["rule"] for each in body["alerts"]] == [alert.rule for alert in told]
    assert (body["run"], body["target"]) == (result.run, str(model))
    failures = [dict(event.values) for event in events if event.stage == "webhook"]
    assert failures == ([] if answer[0] == 200 else [{"host": "127.0.0.1", "failed": f"it answered {answer[0]}"}])
    shown = json.dumps(billhook.show(result.run, store).to_json())
    assert '"state": "done"' in shown
    for secret in ("secret-token", "hidden", hook.url):
        assert secret not in shown + json.dumps(body)


def test_a_gate_and_a_sweep_send_theirs(model: Path, tmp_path: Path) -> None:
    """On text that the model wrote itself, nothing is better than the model."""
    store, out, rules = tmp_path / "runs.db", tmp_path / "out", rules_file(tmp_path)
    given: dict[str, Any] = {"data": str(own_text(model, tmp_path / "own.jsonl")), "store": store}
    billhook.prune(model, plan="mlp.0,mlp.1", out=out, **given, **LITTLE)
    little = {name: LITTLE[name] for name in ("eval_tokens", "eval_length", "device")}
    with hooked() as hook:
        report = billhook.gate(out, model, webhook=hook.url, seen=True, rules=rules, **given, **little)
        assert report.checks[0].lost.low > 0
        assert [(body["target"], body["run"]) for *_, body in hook.seen] == [(str(out), newest(store))]
        hook.seen.clear()
        told = billhook.sweep(
            model, ["billhook-depth"], remove=["2mlp"], out=tmp_path / "s", webhook=hook.url, rules=rules, **given,
            **LITTLE,
        )  # fmt: skip
        assert told.trials[0].results[given["data"]].change.low > 0
        assert [(body["target"], body["run"]) for *_, body in hook.seen] == [(str(model), newest(store))]


def own_text(model: Path, path: Path) -> Path:
    """A file of texts that a model wrote."""
    teacher = billhook.load(model, device="cpu")
    torch.manual_seed(0)
    start = torch.randint(3, teacher.model.config.vocab_size, (60, 1))
    ids = teacher.model.generate(
        start, attention_mask=torch.ones_like(start), do_sample=True, max_new_tokens=36, top_k=0
    )
    rows = [{"text": teacher.tokenizer.decode(row, skip_special_tokens=True)} for row in ids]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def newest(store: Path) -> str:
    return billhook.list_runs(store)[0].run


def test_addresses_are_checked_before_a_run_begins(model: Path, tmp_path: Path) -> None:
    store = tmp_path / "runs.db"
    calls: list[Any] = [
        lambda url: billhook.prune(model, remove="1mlp", webhook=url, store=store),
        lambda url: billhook.gate(model, model, webhook=url, store=store),
        lambda url: billhook.sweep(model, webhook=url, rules=rules_file(tmp_path), store=store),
    ]
    for call in calls:
        with pytest.raises(UsageError, match="link-local or metadata address"):
            call("http://169.254.169.254/latest")
    with pytest.raises(UsageError, match="no rule makes any"):
        billhook.sweep(model, webhook="http://127.0.0.1:1/", store=store)
    for command in (["prune", str(model), "--remove", "1mlp"], ["gate", str(model), "--baseline", str(model)]):
        done = CliRunner().invoke(main.app, [*command, "--webhook", "ftp://example.org", "--store", str(store)])
        assert (done.exit_code, "no http or https address" in done.stderr) == (2, True)
    assert not store.exists()
