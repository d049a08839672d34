"""Commands that are killed between two writes: repeated, they end as undisturbed ones do, and leave nothing behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sqlite3
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tiny
from safetensors.torch import load_file
from torch import equal

import billhook
from billhook.core.errors import BillhookError

SMALL: dict[str, Any] = {"data": "../texts.jsonl", "eval_tokens": 128, "eval_length": 32}
SHORT: dict[str, Any] = SMALL | {"tokens": 120, "length": 24, "self_share": 0.0}
TASKS = {"tasks": "../first_test.jsonl", "items": 20, "store": "b.db"}


def prune() -> None:
    if Path("b.db").exists() and any(run.state == "interrupted" for run in billhook.list_runs("b.db")):
        billhook.resume(store="b.db")
    elif not Path("out").exists():
        recovered = {"recover": "fold", "recover_tokens": 320, "recover_length": 32}
        billhook.prune("../tiny", remove="2sites", search="greedy", out="out", store="b.db", **recovered, **SHORT)


def sweep() -> None:
    if not Path("out").exists():
        billhook.sweep("../tiny", ["shortgpt", "sleb"], remove="1blocks", out="out", **SHORT, **TASKS)


def compare() -> None:
    if not Path("out").exists():
        billhook.compare("../tiny", "../other", out="out", timed=False, **SMALL, **TASKS)


def evaluate() -> None:
    billhook.evaluate_tasks("../tiny", **TASKS)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, texts and a task."""
    home, draw = tmp_path_factory.mktemp("killed"), random.Random(0)
    tiny.with_tokenizer(home / "tiny", max_position_embeddings=40)
    tiny.with_tokenizer(home / "other", max_position_embeddings=40, seed=1)
    tiny.write_texts(home / "texts.jsonl", 80)
    words = [" ".join(draw.choices(tiny.WORDS, k=3)) for _ in range(160)]
    rows = [{"query": words[4 * i], "choices": words[4 * i + 1 : 4 * i + 4], "gold": i % 3} for i in range(40)]
    (home / "first_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


def counting(command: Callable[[], None], folder: Path, writes: Any, last: int) -> None:
    """Carry out a command in this process, which ends before its write number `last` if it comes to that."""
    os.chdir(folder)
    connect, changes = sqlite3.connect, ("os.rename", "os.remove", "os.mkdir", "os.rmdir")

    def write() -> None:
        writes.value += 1
        if writes.value == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def traced(*arguments: Any, **options: Any) -> sqlite3.Connection:
        opened = connect(*arguments, **options)
        opened.set_trace_callback(lambda statement: None if statement.startswith(("SELECT", "PRAGMA")) else write())
        return opened

    def on_file(event: str, arguments: tuple[Any, ...]) -> None:
        if event in changes or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            write()

    sqlite3.connect = traced  # type: ignore[assignment]
    sys.addaudithook(on_file)
    command()


def carried_out(command: Callable[[], None], folder: Path, last: int = 0) -> int:
    """Carry out a command in a process of its own. Returns how many writes it came to."""
    folder.mkdir(exist_ok=True)
    context = multiprocessing.get_context("fork")
    writes = context.Value("i", 0)
    child = context.Process(target=counting, args=(command, folder, writes, last))
    child.start()
    child.join()
    assert child.exitcode == (-signal.SIGKILL if last and writes.value == last else 0)
    return int(writes.value)


TIMES = {"seconds", "search_seconds", "site_evaluations", "resumed", "ns_per_token", "speed", "created", "limit"}


def found_in(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The result of the newest run, without times, and all weights."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(each) for name, each in value.items() if name not in TIMES | {"run"}}
        return [plain(each) for each in value] if isinstance(value, list) else value

    result = billhook.show(billhook.list_runs(folder / "b.db")[0].run, folder / "b.db").result
    text = json.dumps(plain(result.to_json())).replace(str(folder), "")
    weights = {}
    for file in sorted((folder / "out").rglob("*.safetensors")):
        weights |= {f"{file.name} {name}": tensor for name, tensor in load_file(file).items()}
    return text, weights


@pytest.mark.parametrize("command", [prune, sweep, compare, evaluate])
def test_killed_at_a_write_a_command_ends_as_an_undisturbed_one(command: Callable[[], None], home: Path) -> None:
    whole, folder, draw = home / f"{command.__name__}-whole", home / command.__name__, random.Random(3)
    writes = carried_out(command, whole)
    for moment in (draw.random() / 2, 1 - draw.random() / 4):
        carried_out(command, folder, max(1, int(moment * writes)))
        with suppress(BillhookError):  # one that was killed before there was a store
            assert all(run.state in ("interrupted", "done") for run in billhook.list_runs(folder / "b.db"))
    carried_out(command, folder)
    (result, weights), (expected, undisturbed) = found_in(folder), found_in(whole)
    assert result == expected
    assert weights.keys() == undisturbed.keys()
    assert all(equal(weights[name], undisturbed[name]) for name in weights)
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()} <= {"b.db", "out"}
    assert billhook.list_runs(folder / "b.db")[0].state == "done"


def test_a_page_that_a_killed_study_left_is_deleted_by_the_next_run(home: Path, tmp_path: Path) -> None:
    left = home / "left"

    def killed_while_publishing() -> None:
        from billhook.studies import run_study

        run_study.publish = lambda aside, out: os.kill(os.getpid(), signal.SIGKILL)
        sweep()

    left.mkdir()
    context = multiprocessing.get_context("fork")
    child = context.Process(target=lambda: (os.chdir(left), killed_while_publishing()))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert [path.name for path in left.glob(".out.*.partial/*.html")] == ["index.html"]
    assert list(left.glob("*.lock"))
    carried_out(sweep, left)
    assert sorted(path.name for path in left.iterdir()) == ["b.db", "out"]
    assert [run.state for run in billhook.list_runs(left / "b.db")] == ["done", "done"], "both have their results"
