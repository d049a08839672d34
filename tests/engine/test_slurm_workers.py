"""Workers that are Slurm jobs find what one process finds, and only they are let in."""

from __future__ import annotations

import pickle
import queue
import socket
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from fake_slurm import FakeSlurm
from test_workers import Kept, same, searched

from billhook.core.errors import UsageError
from billhook.core.events import Event
from billhook.core.plan import Plan
from billhook.engine.measurements import DocumentIds, Known
from billhook.engine.racing import Quality, Sums
from billhook.engine.workers.crew import parse_workers
from billhook.engine.workers.hiring import hiring
from billhook.engine.workers.lines import Hiring, Inbox
from billhook.engine.workers.messages import Lost, Start, hello_of
from billhook.engine.workers.network import Address, Reception, call, hang_up
from billhook.engine.workers.slurm_jobs import JobLine, in_queue
from billhook.engine.workers.team import Team
from billhook.models.load import Teacher, load


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return load(tiny.saved(tmp_path_factory.mktemp("slurm") / "model", "llama", num_hidden_layers=6))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """A Slurm, in whose shared folder this process works."""
    monkeypatch.chdir(tmp_path)
    return FakeSlurm(tmp_path / "slurm", monkeypatch)


class FakeJob:
    """A job as submitit tells of it."""

    job_id = "42_0"

    def __init__(self, log: Path) -> None:
        self.paths, self.cancelled = SimpleNamespace(stderr=log), 0

    def cancel(self, check: bool) -> None:
        self.cancelled += 1


def test_jobs_find_what_one_process_finds_also_when_one_is_killed(teacher: Teacher, slurm: FakeSlurm) -> None:
    told: list[Event] = []
    cache = Kept()

    class Killing(Kept):
        """Kills a job after some pieces."""

        def add_partial(self, quality: Quality, nats: Mapping[tuple[Plan, DocumentIds], Sums]) -> None:
            cache.add_partial(quality, nats)
            if len(cache.measured) > 60:
                slurm.kill("42_1")

        def lookup(self, plans: Sequence[Plan]) -> list[Known]:
            return cache.lookup(plans)

    crew = parse_workers("slurm:n=2,cpus=1,partition=debug,time=10,host=127.0.0.1")
    with Team(teacher, hiring(crew, teacher), watch=told.append) as team:
        team.wait()
        assert team.workers == (0, 1, 2)
        folders = list(slurm.folder.parent.glob("billhook-workers-*"))
        assert [each.stat().st_mode & 0o777 for each in folders] == [0o700], "it holds the key"
        same(searched(teacher, "swap", team, Killing()), searched(teacher, "swap", None))
        assert team.workers == (0, 1)
        loads = team.loads()
        assert loads["rate.1"] > 0
        assert loads["rate.2"] > 0, "it took part"
    (lost,) = [str(event.values["lost"]) for event in told if "lost" in event.values]
    assert lost.startswith("Slurm job 42_1")
    assert set(cache.measured.values()) == {1}, "nothing is measured twice"
    assert slurm.cancelled == {"42_0", "42_1"}
    assert not any(each.exists() for each in folders)
    asked = slurm.options
    assert (asked["partition"], asked["time"], asked["cpus-per-task"]) == ("debug", "10", "1")
    assert "gpus-per-node" not in asked
    assert "srun" not in (slurm.folder / "script.sh").read_text(), "a step may have fewer CPUs than its job"


def test_jobs_that_end_before_they_call_are_told_without_accounting(teacher: Teacher, slurm: FakeSlurm) -> None:
    told: list[Event] = []
    assert in_queue("42") == set(), "Slurm knows no such job"
    crew = parse_workers("slurm:n=2,cpus=1,host=127.0.0.1")
    with Team(teacher, hiring(crew, teacher), watch=told.append) as team:
        team.start()
        assert in_queue("42") == {"42_0", "42_1"}
        assert in_queue("7") == set()
        for job in ("42_0", "42_1"):
            slurm.kill(job)
        team.wait()
        assert team.workers == (0,)
    lost = sorted(str(event.values["lost"]) for event in told)
    assert lost == [f"Slurm job {job}, no longer in the queue" for job in ("42_0", "42_1")]


def test_one_job_of_a_command_that_is_itself_one_of_an_array(
    teacher: Teacher, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")  # which the job would take for its own
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    with Team(teacher, hiring(parse_workers("slurm:n=1,cpus=1,host=127.0.0.1"), teacher)) as team:
        team.wait()
        assert team.workers == (0, 1)
    assert slurm.cancelled == {"42"}


def test_a_slurm_that_does_not_answer_says_nothing_of_its_jobs(slurm: FakeSlurm) -> None:
    (slurm.folder / "squeue").write_text("#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact' >&2; exit 1\n")
    assert in_queue("42") is None


def test_what_slurm_refuses_is_told_in_its_words(teacher: Teacher, slurm: FakeSlurm) -> None:
    crew = parse_workers("slurm:n=2,partition=closed")
    with Team(teacher, hiring(crew, teacher)) as team, pytest.raises(UsageError, match="invalid partition specified"):
        team.start()
    assert not list(slurm.folder.parent.glob("billhook-workers-*"))


def test_an_address_that_is_not_this_machines_is_refused_before_jobs_start(teacher: Teacher, slurm: FakeSlurm) -> None:
    with pytest.raises(UsageError, match=r"cannot call this machine as 192\.0\.2\.77"):
        hiring(parse_workers("slurm:n=2,host=192.0.2.77"), teacher)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port}"):
            hiring(parse_workers(f"slurm:n=2,host=127.0.0.1,port={port}"), teacher)


def received(address: Address, number: int, inbox: Inbox, *answers: object) -> JobLine:
    """The line of a worker that says `answers` when it has got the first message, or hangs up."""
    line = call(address, number)
    assert isinstance(pickle.loads(line.recv_bytes()), Start)
    for answer in answers:
        line.send_bytes(answer if isinstance(answer, bytes) else pickle.dumps(answer))
    with suppress(EOFError, OSError):
        line.recv_bytes()  # until the coordinator hangs up
    line.close()


@pytest.mark.parametrize("foreign", ["model", "compute", "software"])
def test_a_worker_that_computes_something_else_is_refused_over_the_network(
    foreign: str, teacher: Teacher, tmp_path: Path
) -> None:
    told: list[Event] = []
    job = FakeJob(tmp_path / "log")

    def hire(inbox: Inbox) -> list[JobLine]:
        line = JobLine(1, inbox, job, lambda: None)
        reception = Reception("127.0.0.1", 0, lambda number, connection: line.answer(connection))
        receptions.append(reception)
        other = replace(hello_of(teacher), **{foreign: "another"})
        threads.append(threading.Thread(target=received, args=(reception.address, 1, inbox, other)))
        threads[0].start()
        return [line]

    threads: list[threading.Thread] = []
    receptions: list[Reception] = []
    with Team(teacher, Hiring(1, hire), watch=told.append) as team:
        team.wait()
        assert team.workers == (0,)
        threads[0].join()
    receptions[0].close()
    assert job.cancelled == 1
    ours = getattr(hello_of(teacher), foreign)
    assert [event.values["refused"] for event in told] == [f"{foreign} another instead of {ours}"]


def test_answers_that_cannot_be_read_and_jobs_that_end_too_early_are_losses(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"first\nthe model is \xff not there\n")  # not UTF-8
    inbox: Inbox = queue.SimpleQueue()
    start = Start("folder", "cpu", "float32", None, False, None)
    lines = [JobLine(number, inbox, FakeJob(log), lambda: None) for number in range(3)]
    for line in lines:
        line.send(start)
    reception = Reception("127.0.0.1", 0, lambda number, connection: lines[number].answer(connection))
    foreign = b"cbillhook.engine\nNoSuchMessage\n."
    for number, answers in ((0, [foreign]), (1, [])):
        worker = threading.Thread(target=received, args=(reception.address, number, inbox, *answers))
        worker.start()
        if not answers:
            while lines[number]._line is None:
                threading.Event().wait(0.01)
            hang_up(lines[number]._line)
        number_lost, lost = inbox.get()
        worker.join()
        assert number_lost == number
        assert isinstance(lost, Lost)
        expected = "NoSuchMessage" if answers else "Slurm job 42_0, the model is \ufffd not there"
        assert expected in lost.reason
    lines[2].lose_if_over({"42_0"})
    assert inbox.empty(), "it waits"
    lines[2].lose_if_over({"42_1"})
    lines[2].lose_if_over(set())
    assert inbox.get() == (2, Lost("Slurm job 42_0, the model is \ufffd not there"))
    assert inbox.empty()
    reception.close()


def test_a_stranger_is_not_let_in_and_nothing_of_what_it_says_is_read(tmp_path: Path) -> None:
    admitted: queue.SimpleQueue[int] = queue.SimpleQueue()

    def admit(number: int, connection: Connection[Any, Any]) -> None:
        admitted.put(number)

    reception = Reception("127.0.0.1", 0, admit)
    address = reception.address
    with pytest.raises(AuthenticationError):
        call(replace(address, key=b"guessed"), 1)

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "read",)

    with Client((address.host, address.port)) as line:  # says no key at all
        line.recv_bytes()
        line.send_bytes(pickle.dumps(Bomb()))
        assert line.recv_bytes() == b"#FAILURE#"
        with pytest.raises((EOFError, OSError)):
            line.recv_bytes()
    call(address, 7).close()
    assert admitted.get() == 7
    assert admitted.empty()
    assert not (tmp_path / "read").exists()
    reception.close()
    with pytest.raises(OSError, match="refused"):
        call(address, 8)
