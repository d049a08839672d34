"""Baselines of servers: what they answered and how fast, and what a watch and a gate make of that."""

from __future__ import annotations

import json
import random
import re
import statistics
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from endpoints import Request, Server, serving
from test_watch import QUICK, Scorer, good, slowest, watched, write_task
from typer.testing import CliRunner

import billhook
from billhook.cli import main
from billhook.core.errors import EndpointError, UsageError
from billhook.core.results.ab_report import RequestOptions
from billhook.core.results.comparisons import Baseline
from billhook.core.results.monitoring import AnsweredProbe, ServedBaseline, TimedPrompt, WatchRound, prompt_digest
from billhook.data.choice_tasks import select_items
from billhook.report.monitoring.alert_words import alert_sentence, watch_rows
from billhook.runs.store import Store
from billhook.studies.gate import baseline_result
from billhook.studies.servers.endpoint import Endpoint
from billhook.studies.servers.watch_rounds import EndpointRounds

ASK: dict[str, Any] = {"timeout": 10.0, "concurrency": 4, "max_tokens": 4}
LIMITS = [
    {"name": "slow", "when": "latency", "above": "1.5x", "against": "baseline"},
    {"name": "lost", "when": "quality", "loses": "1pp"},
]


@pytest.fixture
def start() -> Iterator[Any]:
    """start(behave): a running server, which ends with the test."""
    with ExitStack() as stack:
        yield lambda behave: stack.enter_context(serving(behave))


def rules_file(folder: Path, *rules: dict[str, Any]) -> Path:
    path = folder / "rules.yaml"
    path.write_text(json.dumps({"rules": rules}))  # JSON is YAML
    return path


def save(server: Server, task: Path, store: Path, name: str = "v1", **options: Any) -> Baseline:
    kept = billhook.save_baseline(name, server.url, tasks=str(task), store=store, **(ASK | {"probes": 24} | options))
    assert isinstance(kept, Baseline)
    return kept


# -- what is kept ----------------------------------------------------------------------------------------------------


def test_a_baseline_of_a_server_is_what_it_answered_and_how_fast(start: Any, tmp_path: Path) -> None:
    task, store = write_task(tmp_path / "task.jsonl"), tmp_path / "runs.db"
    server = start(Scorer(task, good))
    kept = save(server, task, store, probes=5)
    numbers = [item.number for item in select_items(task, part="evaluation")[0]]
    (about,) = kept.sets
    with closing(Store(store, read_only=True)) as opened:
        result = baseline_result(opened, kept, about.score, about.tokens)
    assert result is not None
    assert result.sums == tuple(float(good(number)) for number in numbers)
    assert about.value == pytest.approx(sum(map(good, numbers)) / len(numbers))
    assert kept.served is not None
    assert (kept.served.url, kept.model) == (f"{server.url}/v1",) * 2
    assert (kept.served.max_tokens, kept.served.concurrency) == (4, 4)
    assert len(kept.served.times) == 5
    assert all(each.probe.seconds and each.probe.tokens_per_s for each in kept.served.times)
    assert billhook.baselines(store) == [kept]
    assert Baseline.from_json(json.loads(json.dumps(kept.to_json()))) == kept
    assert [(run.kind, run.state, run.model) for run in billhook.list_runs(store)] == [("baseline", "done", kept.model)]


def test_a_server_loses_nothing_against_itself_and_what_it_lost_later_is_told(start: Any, tmp_path: Path) -> None:
    task, store = write_task(tmp_path / "task.jsonl"), tmp_path / "runs.db"
    scorer = Scorer(task, good)
    server = start(scorer)
    save(server, task, store)
    rules = rules_file(tmp_path, *LIMITS)
    result, _ = watched(server.url, store, rounds=1, probes=24, rules=rules)
    own = [each for each in result.observations if each.against == "baseline"]
    assert [(each.kind, each.unit, each.value.n) for each in own] == [("latency", "x", 24), ("throughput", "x", 24)]
    assert not [alert for alert in result.alerts if alert.rule == "lost"]
    scorer.right, scorer.first_s = (lambda number: False), 8 * slowest(store, result)
    result, _ = watched(server.url, store, rounds=1, probes=24, rules=rules)
    by_rule = {alert.rule: alert for alert in result.alerts}
    assert set(by_rule) == {"slow", "lost"}
    slow = by_rule["slow"]
    assert (slow.against, slow.kind, slow.value.low > 1.5) == ("baseline", "latency", True)
    assert "× that of the baseline (" in alert_sentence(slow)
    names = [row[0] for row in watch_rows(result)]
    assert {"latency, against the baseline", "latency, against the first round"} < set(names)


@dataclass(frozen=True)
class FakeQuestions:
    """What a server is asked, without a server: probes of given seconds."""

    seconds: tuple[float | None, ...]
    endpoint: Endpoint = Endpoint("target", "http://127.0.0.1:1/v1")  # noqa: RUF009 - an immutable value
    options: RequestOptions = RequestOptions()  # noqa: RUF009 - an immutable value
    probes: int = 40
    tasks: tuple[Any, ...] = ()

    def prompts(self) -> list[str]:
        return [f"prompt {i}" for i in range(len(self.seconds))]

    def ask(self) -> WatchRound:
        probes = tuple(AnsweredProbe(s, None if s is None else 10 / s) for s in self.seconds)
        return WatchRound(0, 0.0, (), {}, probes, len(probes))

    def unreachable(self, error: EndpointError) -> WatchRound:
        raise AssertionError(error)


def test_times_against_the_baseline_are_medians_over_prompts_in_pairs() -> None:
    draw = random.Random(4)
    before = [draw.uniform(0.1, 5.0) for _ in range(40)]
    now = [None if i == 7 else 1.7 * x * draw.uniform(0.99, 1.01) for i, x in enumerate(before)]
    times = [TimedPrompt(prompt_digest(f"prompt {i}"), AnsweredProbe(x, 10 / x)) for i, x in enumerate(before)]
    draw.shuffle(times)  # they are found by the prompt, not by their place
    served = ServedBaseline("http://127.0.0.1:1/v1", "", "chat", 128, 1, tuple(times[:-3]))
    rounds: Any = EndpointRounds(FakeQuestions(tuple(now)), (), served)  # type: ignore[arg-type]
    found = {(each.kind, each.against): each.value for each in rounds.measure(1, None).observations if each.unit == "x"}
    known = {each.prompt for each in times[:-3]}
    ratios = [
        after / then for i, (then, after) in enumerate(zip(before, now, strict=True))
        if after is not None and prompt_digest(f"prompt {i}") in known
    ]  # fmt: skip
    assert set(found) == {("latency", "baseline"), ("throughput", "baseline")}, "the first round has none before it"
    latency = found["latency", "baseline"]
    assert (latency.value, latency.n) == (pytest.approx(statistics.median(ratios)), len(ratios))
    assert 1.6 < latency.low <= latency.value <= latency.high < 1.8
    assert found["throughput", "baseline"].value == pytest.approx(statistics.median([1 / x for x in ratios]))
    again = replace(rounds, served=replace(served, times=served.times[:5]))
    assert again.series != rounds.series, "other times are another series"


def test_a_gate_holds_a_folder_against_what_a_server_got(start: Any, model: Path, tmp_path: Path) -> None:
    """A real, tiny model, whose server answers as it does: no item differs."""
    teacher, path, store = billhook.load(model), tmp_path / "task.jsonl", tmp_path / "runs.db"
    words, draw = [*teacher.tokenizer.get_vocab()][40:80], random.Random(2)
    rows = [
        {"query": " ".join(draw.sample(words, 4)), "choices": draw.sample(words, 3), "gold": i % 3} for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in (*rows, *rows[:6])))  # some items are copies

    def behave(server: Server, request: Request) -> None:
        if not request.body.get("echo"):
            return request.stream(["x"])
        ids = torch.tensor([teacher.tokenizer(request.body["prompt"])["input_ids"]])
        with server.lock, torch.inference_mode():
            logits = teacher.model(ids).logits[0].log_softmax(-1)
        values = [None, *logits[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()]
        told = {"choices": [{"text": request.body["prompt"], "logprobs": {"token_logprobs": values}}]}
        return request.reply(200, told)

    save(start(behave), path, store, probes=0, seed=3, items=16)
    report = billhook.gate(model, "v1", margins="30pp", device="cpu", store=store)
    (check,) = report.checks
    assert (check.lost.value, check.n) == (0.0, 16)
    assert check.baseline == check.student
    assert 0 < check.baseline < 1


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"tasks": ()}, "none is named. Give tasks"),
        ({"data": "pydoc"}, "gives no perplexity of a text. Leave data= out"),
        ({"tasks": ("lmeval:piqa",)}, "run by its harness"),
        ({"device": "cpu"}, "A server loads its model itself. Leave device= out"),
        ({"probes": -1}, "Give 0 or more"),
        ({"score": "f1"}, "is no score of a task"),
        ({"api_key_env": "NO_SUCH_KEY"}, "is not set"),
        ({"name": "v1"}, "The baseline v1 is stored already"),
    ],
)
def test_what_a_server_cannot_be_saved_by_is_refused_before_it_is_asked(
    options: Any, told: str, start: Any, tmp_path: Path
) -> None:
    task, store = write_task(tmp_path / "task.jsonl"), tmp_path / "runs.db"
    server = start(Scorer(task, good))
    save(server, task, store, probes=0)
    asked = len(server.seen)
    given: dict[str, Any] = {"name": "v2", "tasks": (str(task),), **ASK, **options}
    with pytest.raises(UsageError, match=told):
        billhook.save_baseline(given.pop("name"), server.url, store=store, **given)
    assert len(server.seen) == asked
    assert len(billhook.list_runs(store)) == 1


@pytest.mark.parametrize("options", [{"served_model": "x"}, {"timeout": 3.0}])
def test_what_is_about_servers_is_refused_of_a_model(options: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is about a server"):
        billhook.save_baseline("v1", "demo", store=tmp_path / "runs.db", **options)
    assert not (tmp_path / "runs.db").exists()


def test_a_server_that_fails_once_leaves_no_baseline(start: Any, tmp_path: Path) -> None:
    task, store = write_task(tmp_path / "task.jsonl"), tmp_path / "runs.db"
    scorer = Scorer(task, good)

    def behave(server: Server, request: Request) -> None:
        broken = "yes3" in str(request.body.get("prompt"))
        return request.reply(500, {"error": "no memory"}) if broken else scorer(server, request)

    server = start(behave)
    with pytest.raises(EndpointError, match=r"requests to .* failed \(status: 500 no memory\).*nothing is stored"):
        save(server, task, store, retries=0)
    assert billhook.baselines(store) == []
    assert [run.state for run in billhook.list_runs(store)] == ["failed"]


def test_times_are_compared_only_where_a_server_is_asked_alike(start: Any, tmp_path: Path) -> None:
    task, store = write_task(tmp_path / "task.jsonl"), tmp_path / "runs.db"
    server = start(Scorer(task, good))
    save(server, task, store)
    with pytest.raises(UsageError, match="was asked with max_tokens=4, and its times hold for that alone"):
        watched(server.url, store, rounds=1, max_tokens=5)
    with pytest.raises(UsageError, match="concurrency=4"):
        watched(server.url, store, rounds=1, concurrency=1)


def test_a_rule_about_times_needs_a_baseline_that_has_some(start: Any, tmp_path: Path, model: Path, text: Path) -> None:
    store = tmp_path / "runs.db"
    billhook.save_baseline("v1", model, data=str(text), eval_tokens=640, eval_length=32, device="cpu", store=store)
    with pytest.raises(UsageError, match="The rule 'slow' is about the baseline's times, and v1 is not of a server"):
        billhook.watch(str(model), "v1", rules=rules_file(tmp_path, *LIMITS), store=store, rounds=1, device="cpu")
    assert [run.kind for run in billhook.list_runs(store)] == ["baseline"]


# -- the command line ------------------------------------------------------------------------------------------------


def test_the_commands_save_list_and_watch_a_server_in_80_columns(start: Any, tmp_path: Path) -> None:
    task, store = write_task(tmp_path / "task.jsonl"), tmp_path / "runs.db"
    server, runner = start(Scorer(task, good)), CliRunner(env={"COLUMNS": "80", "TERM": "dumb"})
    kept = ["baseline", "save", "v1", server.url, "--tasks", str(task), "--probes", "24", "--store", str(store)]
    done = runner.invoke(main.app, kept)
    assert done.exit_code == 0, done.stderr
    assert server.url in done.stdout.replace("\n", "")
    done = runner.invoke(main.app, [*kept[:4], "--store", str(store)])
    assert (done.exit_code, "Give --tasks" in done.stderr) == (2, True)
    command = ["watch", server.url, "--baseline", "v1", "--every", "0.01s", "--probes", "24", "--rounds", "1"]
    done = runner.invoke(main.app, [*command, "--store", str(store)])
    assert done.exit_code == 0, done.stderr
    assert re.search(r"latency, against the .*\nbaseline", done.stdout), "a row of its own"
    assert re.search(r" to [0-9.]+ tokens/s", done.stdout)
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert QUICK["max_tokens"] != 32, "the defaults of both commands are the same"
