"""Runs that share their search with workers end as others do, also those that are killed and resumed."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from collections.abc import Mapping
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_slurm import FakeSlurm
from test_workers import LocalLine, never

import billhook
from billhook.cli.progress import event_words
from billhook.core.errors import FingerprintError
from billhook.core.events import Event
from billhook.core.files.cache_keys import LossKey
from billhook.core.plan import Plan
from billhook.core.results.run import RunResult
from billhook.engine.workers.crew import Crew
from billhook.engine.workers.lines import Hiring
from billhook.engine.workers.messages import Message, Open, Start
from billhook.engine.workers.processes import ProcessLine
from billhook.engine.workers.team import Team
from billhook.models.load import Teacher
from billhook.runs import job
from billhook.runs.store import Store

SHORT: dict[str, Any] = {"remove": "3sites", "tokens": 640, "length": 32, "self_share": 0.0, "eval_tokens": 128,
                         "eval_length": 32, "search": "swap", "finalists": 0}  # fmt: skip
PIECES = 12  # such a search stores more waves than this


@pytest.fixture(scope="module")
def alone(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """What one process finds."""
    folder = tmp_path_factory.mktemp("alone")
    return billhook.prune(model, out=folder / "out", data=text, store=folder / "b.db", **SHORT)


def same(got: RunResult, expected: RunResult) -> None:
    assert got.plan == expected.plan
    assert [step.sites for step in got.steps] == [step.sites for step in expected.steps]
    assert [step.loss for step in got.steps] == pytest.approx([step.loss for step in expected.steps], rel=1e-4)
    assert got.perplexity is not None
    assert expected.perplexity is not None
    assert got.perplexity.student == pytest.approx(expected.perplexity.student, rel=1e-6)


class Patient(Team):
    """A team whose workers take part in the shortest search, because it waits for them."""

    def start(self) -> None:
        fresh = self._waiting is None
        super().start()
        if fresh:
            self.wait()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "Team", Patient)


def once_only(
    self: Store, key: LossKey, quality: str, nats: Mapping[tuple[Plan, tuple[int, ...]], Any], run: str
) -> None:
    """`Store.add_pieces`, of pieces that are not stored yet."""
    for plan, documents in nats:
        assert documents not in self.pieces(key, plan).get(quality, {})
    add_pieces(self, key, quality, nats, run)


add_pieces = Store.add_pieces


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("workers", [2, "slurm:n=1,host=127.0.0.1"])
def test_a_run_with_workers_ends_as_without(
    workers: int | str, alone: RunResult, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    slurm, told, store = FakeSlurm(tmp_path / "slurm", monkeypatch), list[Event](), tmp_path / "b.db"
    got = billhook.prune(
        model, out=tmp_path / "out", data=text, store=store, workers=workers, watch=told.append, **SHORT
    )
    assert slurm.cancelled == (set() if workers == 2 else {"42"})
    assert workers == 2 or "time" not in slurm.options, "the cluster's own limit"
    same(got, alone)
    words = [event_words(event.stage, event.values) for event in told if event.stage == "workers"]
    assert words[0] == "1 takes part"
    assert words[-1].startswith("busy ")
    with closing(Store(store, read_only=True)) as opened:
        loads = [event.values for event in opened.events(got.run, "workers") if "load.1" in event.values]
        assert opened.run(got.run).spec["workers"] == workers
    assert loads[-1]["rate.1"] > 0
    assert not [each for each in psutil.Process().children() if "workers" in " ".join(each.cmdline())]


@pytest.fixture
def hired(monkeypatch: pytest.MonkeyPatch) -> list[Message]:
    """What is asked of workers that are in this process, with `Start` for each that is hired."""
    asked: list[Message] = []

    class Heard(LocalLine):
        def send(self, message: Message) -> None:
            asked.extend([message] if isinstance(message, Start | Open) else [])
            super().send(message)

    def hiring(crew: Crew, teacher: Teacher) -> Hiring:
        return Hiring(1, lambda inbox: [Heard(1, inbox, teacher, never)])

    monkeypatch.setattr(job, "hiring", hiring)
    return asked


def test_workers_share_the_proof_of_what_is_not_trained(
    hired: list[Message], model: Path, text: Path, tmp_path: Path
) -> None:
    options = {"data": text, "store": tmp_path / "b.db", "workers": 2, **SHORT}
    for recover, losses in (("none", ["kl", "nll"]), ("fold", ["kl"])):
        billhook.prune(model, out=tmp_path / recover, recover=recover, seed=len(recover), **options)
        assert list(dict.fromkeys(each.loss for each in hired if isinstance(each, Open))) == losses
        assert sum(isinstance(each, Start) for each in hired) == 1
        hired.clear()


def test_a_sweep_has_the_same_workers_in_all_its_trials(
    hired: list[Message], model: Path, text: Path, tmp_path: Path
) -> None:
    options = {name: value for name, value in SHORT.items() if name != "search"}
    options |= {"remove": ["2sites", "3sites"], "data": [str(text)]}
    alone, shared = (
        billhook.sweep(model, "sleb", out=tmp_path / str(n), store=tmp_path / f"{n}.db", workers=n, **options)
        for n in (1, 2)
    )
    assert [trial.plan for trial in shared.trials] == [trial.plan for trial in alone.trials]
    assert sum(isinstance(each, Start) for each in hired) == 1
    assert "nll" in [each.loss for each in hired if isinstance(each, Open)], "they evaluate too"


def killed_at(folder: Path, options: dict[str, Any], moment: int, line: Connection[Any, Any]) -> None:
    """Prune with a worker, and end by SIGKILL when `moment` waves are stored; tell who the worker is."""
    os.chdir(folder)
    count = 0

    def counting(self: Store, *arguments: Any) -> None:
        nonlocal count
        add_pieces(self, *arguments)
        count += 1
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    class Told(Patient):
        def start(self) -> None:
            super().start()
            lines = [line for line in self._lines.values() if isinstance(line, ProcessLine)]
            line.send([each.process.pid for each in lines])

    setattr(job, "Team", Told)  # noqa: B010
    setattr(Store, "add_pieces", counting)  # noqa: B010
    billhook.prune(**options)


def ended(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


@pytest.mark.parametrize(
    ("seed", "other"), [(0, {}), (1, {"workers": 1}), (2, {"workers": "slurm:n=1,host=127.0.0.1"})]
)
def test_a_killed_run_takes_its_workers_along_and_resumes(
    seed: int,
    other: dict[str, Any],
    alone: RunResult,
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moment = random.Random(seed).randint(1, PIECES)
    options = {"model": model, "out": "out", "data": text, "store": "b.db", "workers": 2, **SHORT}
    context = multiprocessing.get_context("fork")
    line, theirs = context.Pipe()
    child = context.Process(target=killed_at, args=(tmp_path, options, moment, theirs))
    child.start()
    theirs.close()
    workers = line.recv()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert workers
    while not all(map(ended, workers)):
        os.sched_yield()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Store, "add_pieces", once_only)
    FakeSlurm(tmp_path / "slurm", monkeypatch)
    with pytest.raises(FingerprintError, match="search differ"):
        billhook.resume(store="b.db", workers=1, search="greedy")
    same(billhook.resume(store="b.db", **other), alone)
