"""Servers and folders over time: an alert with the first evaluation that shows a loss, and none without a change."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from endpoints import Request, Server, asked, serving
from typer.testing import CliRunner

import billhook
from billhook.cli import main
from billhook.core.errors import EndpointError, FingerprintError, RunError, UsageError
from billhook.core.events import Event
from billhook.core.files.cache_keys import BaselineKey, EvaluationKey, WatchRoundKey
from billhook.core.monitoring.alerts import ALERT, Alert
from billhook.core.plan import Plan
from billhook.core.results.comparisons import Baseline, BaselineItems, BaselineSet
from billhook.core.results.measured import EvalResult
from billhook.core.results.monitoring import WatchResult
from billhook.data.choice_tasks import requests, select_items
from billhook.data.generation_tasks import select_questions
from billhook.runs.store import Store
from billhook.studies.gate import baseline_result
from billhook.studies.servers import watch as watch_module

HERE = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
ITEMS = 60  # in the file, of which every second one is evaluated
QUICK: dict[str, Any] = {"every": "0.01s", "probes": 0, "timeout": 10.0, "concurrency": 4, "max_tokens": 4}


@pytest.fixture
def start() -> Iterator[Any]:
    """start(behave): a running server, which ends with the test."""
    with ExitStack() as stack:
        yield lambda behave: stack.enter_context(serving(behave))


def write_task(path: Path) -> Path:
    rows = [{"query": f"Item {i}:", "choices": [f"yes{i}", f"no{i}"], "gold": i % 2} for i in range(ITEMS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def keep_baseline(store: Path, task: Path, right: Callable[[int], bool], name: str = "v1") -> None:
    """A baseline as `save_baseline` stores one: whether item `number` of the file was answered rightly."""
    items, texts, _ = select_items(task, part="evaluation")
    sums = tuple(float(right(item.number)) for item in items)
    store_baseline(store, name, EvalResult("acc", "hash", sums, (1,) * len(sums), tuple(texts)), str(task))


def store_baseline(store: Path, name: str, result: EvalResult, source: str) -> None:
    about = BaselineItems((), (source,), None, (result.name,), 0, "", "text", 640, 32, 0)
    sets = (BaselineSet(source, result.name, result.tokens),)
    baseline = Baseline(name, "teacher", f"fingerprint-{name}", "float32 cpu", about, sets)
    with closing(Store(store)) as opened:
        run = opened.new_run("baseline", {}, {}, "-")
        key = EvaluationKey(baseline.fingerprint, Plan(), result.name, result.tokens, baseline.compute)
        opened.add(key, result, run)
        opened.add(BaselineKey("", name), baseline.stored(), run)
        opened.update(run, state="done", result=baseline.to_json())


class Scorer:
    """A server that prefers the right choice of the items in `right`, and the wrong one of the others."""

    def __init__(self, task: Path, right: Callable[[int], bool]) -> None:
        self.right, self.rounds, self.down, self.first_s = right, 0, False, 0.0
        self.items = {
            request.context + request.continuation: (item.number, choice == item.gold)
            for item in select_items(task, part=None)[0]
            for choice, request in enumerate(requests(item))
        }

    def __call__(self, server: Server, request: Request) -> None:
        if self.down:
            return request.reply(503, {"error": "overloaded"})
        if not request.body.get("echo"):
            self.rounds += asked(request.body) == "Hello"
            request.stream(["an ", "answer"], first_s=self.first_s, usage=2)
            return None
        text = request.body["prompt"]
        words = text.split(" ")
        values: list[float | None] = [None, *[-1.0] * (len(words) - 1)]
        if text in self.items:
            number, gold = self.items[text]
            values[-1] = -1.0 if gold == self.right(number) else -5.0
        return request.reply(200, {"choices": [{"text": text, "logprobs": {"token_logprobs": values}}]})


def good(number: int) -> bool:
    return number % 8 != 0


def watched(target: str, store: Path, **options: Any) -> tuple[WatchResult, list[Event]]:
    events: list[Event] = []
    result = billhook.watch(target, "v1", store=store, watch=events.append, **(QUICK | options))
    return result, events


# -- quality ---------------------------------------------------------------------------------------------------------


def test_the_first_evaluation_of_a_degraded_server_alerts_and_a_server_that_stays_does_not(
    start: Any, tmp_path: Path
) -> None:
    task, store, half = write_task(tmp_path / "task.jsonl"), tmp_path / "runs.db", 2
    keep_baseline(store, task, good)
    stays, degrades = Scorer(task, good), Scorer(task, good)
    degrades.right = lambda number: good(number) and degrades.rounds <= half
    result, events = watched(start(stays).url, store, rounds=2 * half)
    assert (result.rounds, result.alerts) == (2 * half, ())
    assert not [event for event in events if event.stage == ALERT]
    assert {each.value.value for each in result.observations if each.kind == "quality"} == {0.0}

    result, events = watched(start(degrades).url, store, rounds=2 * half)
    stages = [(event.stage, event.done) for event in events if event.stage in ("watch", ALERT)]
    assert stages[half + 1] == (ALERT, 0), "right behind round 3, the first that shows it"
    assert [stage for stage, _ in stages].count(ALERT) == 1, "it is told once, however long it holds"
    (alert,) = result.alerts
    shown = [each for each in result.observations if each.kind == "quality"]
    assert [each.value.value > 0 for each in shown] == [False] * half + [True] * half
    assert (alert.rule, alert.severity, alert.what) == ("quality of tasks", "critical", str(task))
    assert (alert.since, alert.value) == (shown[half].at, shown[half].value)
    kept = [item.number for item in select_items(task, part="evaluation")[0]]
    lost = sum(map(good, kept))
    assert alert.value.value == pytest.approx(100 * lost / len(kept)), "what was planted"
    assert alert.value.n == len(kept)
    assert alert.threshold < alert.value.low < alert.value.value < alert.value.high
    with closing(Store(store, read_only=True)) as opened:
        assert [Alert.from_event(Event(e.stage, values=e.values)) for e in opened.events(result.run, ALERT)] == [alert]
        assert opened.run(result.run).state == "done"
    assert WatchResult.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_a_task_that_is_answered_in_writing_is_watched_too(start: Any, tmp_path: Path) -> None:
    path, store, broken = tmp_path / "sums.jsonl", tmp_path / "runs.db", [False]
    rows = [{"query": f"{i} and 1?", "answer": f"It is #### {i + 1}", "target": str(i + 1)} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions, texts, _ = select_questions(path)
    ones = (1.0,) * len(questions)
    store_baseline(store, "v1", EvalResult("strict_match", "hash", ones, (1,) * 40, tuple(texts)), str(path))

    def answer(server: Server, request: Request) -> None:
        first = asked(request.body).split(" ")[0]
        number = int(first) + 1 if first.isdigit() and not broken[0] else 99
        request.stream(["It is", f" #### {number}", "\nQuestion: more"], usage=3)

    server = start(answer)
    assert watched(server.url, store, rounds=1)[0].alerts == ()
    broken[0] = True
    result, _ = watched(server.url, store, rounds=1)
    assert [alert.what for alert in result.alerts] == [str(path)]
    assert result.alerts[0].value.value == 100.0


def test_a_changed_file_of_items_is_refused_before_anything_is_asked(start: Any, tmp_path: Path) -> None:
    task, store = write_task(tmp_path / "task.jsonl"), tmp_path / "runs.db"
    keep_baseline(store, task, good)
    server = start(Scorer(task, good))
    task.write_text("\n".join(task.read_text().splitlines()[:30]) + "\n")
    with pytest.raises(FingerprintError, match="other items than the baseline v1"):
        watched(server.url, store, rounds=1)
    assert not server.seen


def test_a_server_of_the_model_of_the_baseline_loses_nothing_on_any_item(
    start: Any, model: Path, tmp_path: Path
) -> None:
    """A real, tiny model: what `save_baseline` got item by item is what its server gets, in the same order."""
    teacher, path, store = billhook.load(model), tmp_path / "task.jsonl", tmp_path / "runs.db"
    words, draw = [*teacher.tokenizer.get_vocab()][40:80], random.Random(2)
    rows = [
        {"query": " ".join(draw.sample(words, 4)), "choices": draw.sample(words, 3), "gold": i % 3} for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in (*rows, *rows[:6])))  # some items are copies
    billhook.save_baseline("v1", model, data=(), tasks=str(path), items=16, seed=3, device="cpu", store=store)

    def behave(server: Server, request: Request) -> None:
        if not request.body.get("echo"):
            return request.stream(["x"])
        ids = torch.tensor([teacher.tokenizer(request.body["prompt"])["input_ids"]])
        with server.lock, torch.inference_mode():
            logits = teacher.model(ids).logits[0].log_softmax(-1)
        values = [None, *logits[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()]
        return request.reply(
            200, {"choices": [{"text": request.body["prompt"], "logprobs": {"token_logprobs": values}}]}
        )

    result, _ = watched(start(behave).url, store, rounds=1)
    with closing(Store(store, read_only=True)) as opened:
        (about,) = billhook.baselines(store)
        kept = baseline_result(opened, about, "acc", about.sets[0].tokens)
        found = opened.lookup(WatchRoundKey(result.target, result.series, 1))
    assert kept is not None
    assert found is not None
    assert 0 < sum(kept.sums) < len(kept.sums) == 16
    assert found.outcomes[str(path)] == "".join(str(int(x)) for x in kept.sums)


# -- errors and times ------------------------------------------------------------------------------------------------


def test_a_server_that_fails_alerts_and_the_watch_goes_on(start: Any, tmp_path: Path) -> None:
    task, store = write_task(tmp_path / "task.jsonl"), tmp_path / "runs.db"
    keep_baseline(store, task, good)
    scorer = Scorer(task, good)
    server = start(scorer)
    with pytest.raises(EndpointError):
        watched("http://127.0.0.1:1/v1", store, rounds=1, retries=0)
    assert watched(server.url, store, rounds=2)[0].alerts == ()
    scorer.down = True
    result, _ = watched(server.url, store, rounds=1, retries=0)
    assert [(alert.kind, alert.value.value) for alert in result.alerts] == [("errors", 100.0)]
    scorer.down = False
    result, _ = watched(server.url, store, rounds=1)
    assert result.rounds == 4
    assert result.alerts == (), "it is over"
    with closing(Store(store, read_only=True)) as opened:
        rounds = [opened.lookup(WatchRoundKey(result.target, result.series, n)) for n in range(1, 6)]
    assert [found and set(found.outcomes[str(task)]) for found in rounds] == [{"0", "1"}] * 2 + [
        {"-"},
        {"0", "1"},
        None,
    ]


def test_a_slow_server_alerts_in_the_second_slow_round(start: Any, tmp_path: Path) -> None:
    """Each prompt is held against its own time in the first round; the default rule wants two rounds in a row."""
    task, store = write_task(tmp_path / "task.jsonl"), tmp_path / "runs.db"
    keep_baseline(store, task, good)
    scorer = Scorer(task, good)
    server = start(scorer)
    result, _ = watched(server.url, store, rounds=2, probes=24, concurrency=8)
    assert result.alerts == ()
    scorer.first_s = 4 * slowest(store, result)
    result, events = watched(server.url, store, rounds=2, probes=24, concurrency=8)
    assert {alert.kind for alert in result.alerts} == {"latency", "throughput"}
    stages = [event.stage for event in events if event.stage in ("watch", ALERT)]
    assert stages == ["watch", "watch", ALERT, ALERT]


def slowest(store: Path, result: WatchResult) -> float:
    """Seconds of the slowest probe of the first round: a machine has a pace of its own."""
    with closing(Store(store, read_only=True)) as opened:
        first = opened.lookup(WatchRoundKey(result.target, result.series, 1))
    assert first is not None
    return max(probe.seconds for probe in first.probes if probe.seconds is not None)


# -- the series ------------------------------------------------------------------------------------------------------


def test_a_killed_watch_loses_nothing_and_the_next_goes_on_in_its_series(start: Any, tmp_path: Path) -> None:
    task, store = write_task(tmp_path / "task.jsonl"), tmp_path / "runs.db"
    keep_baseline(store, task, good)
    server = start(Scorer(task, good))
    code = (
        f"import billhook; billhook.watch({server.url!r}, 'v1', store={str(store)!r}, **{QUICK | {'every': '0.2s'}!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env=HERE, cwd=tmp_path)
    try:
        end = time.monotonic() + 200  # a busy machine takes long to import torch
        while time.monotonic() < end and _stored_rounds(store) < 2:
            time.sleep(0.05)
        with pytest.raises(RunError, match="Another process"):
            watched(server.url, store, rounds=1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = _stored_rounds(store)
    result, _ = watched(server.url, store, rounds=2)
    assert before >= 2
    assert result.rounds == before + 2 == _stored_rounds(store)


def _stored_rounds(store: Path) -> int:
    with closing(sqlite3.connect(store, timeout=30)) as db:
        return int(db.execute("SELECT count(*) FROM facts WHERE what = 'watch'").fetchone()[0])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rounds": 0}, "Give at least 1"),
        ({"every": "often"}, "no time"),
        ({"tasks": "other.jsonl"}, "was not measured on other.jsonl"),
        ({"device": "cpu"}, "A server loads its model itself"),
        ({"probes": -1}, "Give 0 or more"),
    ],
)
def test_what_cannot_be_watched_is_refused_before_a_run_begins(options: Any, told: str, tmp_path: Path) -> None:
    task, store = write_task(tmp_path / "task.jsonl"), tmp_path / "runs.db"
    keep_baseline(store, task, good)
    with pytest.raises(UsageError, match=told):
        billhook.watch("http://127.0.0.1:1", "v1", store=store, **options)
    with pytest.raises(UsageError, match="holds no baseline 'other'"):
        billhook.watch("http://127.0.0.1:1", "other", store=store)
    assert [run.kind for run in billhook.list_runs(store)] == ["baseline"]


# -- a folder --------------------------------------------------------------------------------------------------------


def test_a_folder_whose_weights_are_exchanged_alerts(tmp_path: Path, text: Path) -> None:
    """The same folder is no loss; one that says something else is, in nats and on the task."""
    store, folder = tmp_path / "runs.db", tiny.with_tokenizer(tmp_path / "model")
    given: dict[str, Any] = {"data": str(text), "eval_tokens": 640, "eval_length": 32, "device": "cpu"}
    billhook.save_baseline("v1", folder, store=store, **given)
    options: dict[str, Any] = {"every": "0.01s", "rounds": 2, "store": store, "device": "cpu"}
    result = billhook.watch(str(folder), "v1", **options)
    assert (result.rounds, result.alerts) == (2, ())
    assert {each.value.value for each in result.observations} == {0.0}
    _spoil(folder)
    result = billhook.watch(str(folder), "v1", **options)
    assert result.rounds == 4
    assert [(alert.kind, alert.what, alert.unit) for alert in result.alerts] == [("quality", str(text), "%ppl")]
    assert result.alerts[0].value.low > 3


def _spoil(folder: Path) -> None:
    """Exchange the rows of the head, so that the model says other words."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lm_head" in name or "embed" in name)
    draw = torch.Generator().manual_seed(random.Random(1).randrange(99))
    tensors[name] = 40 * torch.randn(tensors[name].shape, generator=draw, dtype=torch.float32).to(tensors[name].dtype)
    save_file(tensors, file, metadata={"format": "pt"})


# -- the command line ------------------------------------------------------------------------------------------------


def command(server: Server, store: Path, *more: str) -> list[str]:
    return ["watch", server.url, "--baseline", "v1", "--every", "0.01s", "--probes", "0", "--store", str(store), *more]


def test_the_command_shows_what_it_found_and_leaves_with_4_for_a_critical_alert(start: Any, tmp_path: Path) -> None:
    task, store = write_task(tmp_path / "task.jsonl"), tmp_path / "runs.db"
    keep_baseline(store, task, good)
    scorer = Scorer(task, good)
    server, runner = start(scorer), CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})
    done = runner.invoke(main.app, command(server, store, "--rounds", "2"))
    assert done.exit_code == 0, done.stderr
    assert "2 rounds against v1: no alert" in done.stdout
    assert "a chance of at most 1%" in done.stdout
    scorer.right = lambda number: False
    done = runner.invoke(main.app, command(server, store, "--rounds", "1"))
    assert done.exit_code == 4
    sentence = f"critical: quality of tasks: {task}: loss"
    assert "3 rounds against v1: 1 alert" in done.stdout
    assert sentence in done.stdout
    assert f"alert {sentence}" in done.stderr, "at once"
    assert "Rules are broken: quality of tasks." in done.stderr
    done = runner.invoke(main.app, command(server, store, "--rounds", "1", "--json", "--quiet"))
    told = WatchResult.from_json(json.loads(done.stdout))
    assert (told.rounds, done.exit_code) == (4, 4)
    assert sentence in done.stderr
    shown = runner.invoke(main.app, ["show", told.run, "--store", str(store)])
    assert f"alert {sentence}" in shown.stdout
    listed = runner.invoke(main.app, ["alerts", "--store", str(store)])
    assert (listed.exit_code, "0 alerts now, 2 told by runs" in listed.stdout) == (0, True), listed.stdout


def test_an_interrupted_watch_says_how_to_go_on(start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, store = write_task(tmp_path / "task.jsonl"), tmp_path / "runs.db"
    keep_baseline(store, task, good)
    server = start(Scorer(task, good))

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch_module.time, "sleep", interrupt)
    done = CliRunner().invoke(main.app, command(server, store))
    assert done.exit_code == 130
    assert f"Go on with: billhook watch {server.url} --baseline v1" in done.stderr.replace("\n", " ")
    assert [run.state for run in billhook.list_runs(store) if run.kind == "watch"] == ["interrupted"]
    assert _stored_rounds(store) == 1
