"""The workers of one teacher: who is there, what they compute with, and how busy they are."""

from __future__ import annotations

import queue
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

import torch

from billhook.core.devices.names import format_devices
from billhook.core.events import Event, EventListener, EventValue, ignore_events
from billhook.engine.workers.division import HERE, Division
from billhook.engine.workers.lines import Hiring, Line
from billhook.engine.workers.messages import Answer, Close, Hello, Lost, Measured, Message, Passed, Start, hello_of
from billhook.models.device import dtype_name
from billhook.models.load import Teacher

WORTH_WAITING = 2e12  # products of weights and tokens: some ten seconds of a CPU


@dataclass
class _Load:
    """Work of one worker: `since` when, in seconds of the team; `seconds` at work, `computed` tokens times sites."""

    since: float
    seconds: float = 0.0
    computed: int = 0


class Team:
    """Workers that measure for one teacher; its own process is the first of them.

    The others are started with the first request, and take part from the first batch for which they are ready.

    - `hiring`: how many there are, and how they are started.
    - `memory`, `trust_remote_code`: as the teacher was loaded.
    - `watch`: hears who came, who was refused and who was lost.
    """

    def __init__(
        self, teacher: Teacher, hiring: Hiring, *, memory: int | None = None, trust_remote_code: bool = False,
        watch: EventListener = ignore_events,
    ) -> None:  # fmt: skip
        self._hire, self._watch, workers = hiring.hire, watch, hiring.others + 1
        self.division = Division(workers, workers if teacher.device.type == "cpu" else 1)
        self._threads = hiring.threads if hiring.shared else None
        self._start = Start(
            str(teacher.folder.absolute()),  # since an actor works in the folder of its cluster's start
            _first_devices(teacher), dtype_name(teacher.model.dtype), memory, trust_remote_code, hiring.threads,
        )  # fmt: skip
        self._hello = hello_of(teacher)
        self._inbox: queue.SimpleQueue[tuple[int, Answer]] = queue.SimpleQueue()
        self._lines: dict[int, Line] = {}
        self._waiting: set[int] | None = None  # started and not yet ready; None before they are started
        self._ready: set[int] = set()
        self._numbers = self._tickets = 0
        self._beside = hiring.shared and teacher.device.type == "cpu"  # as processes of this machine
        self._weights = teacher.weight_bytes / teacher.model.dtype.itemsize
        self._users: dict[int, weakref.ref[object]] = {}  # what measures through the team, by number
        self._loads: dict[int, _Load] = {HERE: _Load(0.0)}
        self._seconds = 0.0  # in which anything was measured

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for line in self._lines.values():
            line.close()

    @property
    def workers(self) -> tuple[int, ...]:
        """The numbers of those that take part."""
        return (HERE, *sorted(self._ready))

    def send(self, worker: int, message: Message) -> None:
        """Send a message to a worker other than this process."""
        self._lines[worker].send(message)

    def new_number(self, user: object) -> int:
        """Return the number of a token set that `user` measures; workers forget those whose users are gone."""
        for number in [number for number, earlier in self._users.items() if earlier() is None]:
            del self._users[number]
            for worker in self._ready:
                self.send(worker, Close(number))
        number = self._numbers = self._numbers + 1
        self._users[number] = weakref.ref(user)
        return number

    def new_ticket(self) -> int:
        """Return the ticket of a request."""
        self._tickets += 1
        return self._tickets

    def start(self) -> None:
        """Start the workers, if they have not been started."""
        if self._waiting is None:
            self._lines = dict(enumerate(self._hire(self._inbox), 1))
            self._waiting = set(self._lines)
            for line in self._lines.values():
                line.send(self._start)

    def wait(self) -> None:
        """Start the workers, and wait until each of them is ready, refused or lost."""
        self.start()
        while self._waiting:
            self.answers(wait=True)

    def meet(self, tokens: int) -> None:
        """Start the workers, and admit those that are ready. `tokens`: that pass through the model together.

        Where that takes longer than to load the model, processes of this machine are waited for. Others are not: they
        may have to wait for a place to run. Nor is it where GPUs compute, which are faster than that.
        """
        self.start()
        if self._beside and tokens * self._weights > WORTH_WAITING:
            self.wait()
        self.answers(wait=False)

    def answers(self, *, wait: bool) -> list[tuple[int, Answer]]:
        """Return what workers have answered to requests, and the loss of those that took part.

        `wait`: for the first answer of any kind. Those that are ready are admitted.
        """
        found: list[tuple[int, Answer]] = []
        while True:
            try:
                number, answer = self._inbox.get(block=wait)
            except queue.Empty:
                return found
            wait = False
            if self._waiting and number in self._waiting:
                self._waiting.remove(number)
                self._admit(number, answer)
            elif isinstance(answer, Lost) and number in self._ready:
                self._ready.remove(number)
                self._watch(self.event(worker=number, lost=answer.reason))
                found.append((number, answer))
            elif number in self._ready:
                found.append((number, answer))

    def _admit(self, number: int, answer: Answer) -> None:
        if answer == self._hello:
            self._ready.add(number)
            self._loads[number] = _Load(self._seconds)
            self._watch(self.event(worker=number))
        elif isinstance(answer, Hello):
            self._lines[number].close()
            names = ("software", "model", "compute")
            other = [(name, getattr(answer, name), getattr(self._hello, name)) for name in names]
            differs = [f"{name} {theirs} instead of {ours}" for name, theirs, ours in other if theirs != ours]
            self._watch(self.event(worker=number, refused=", ".join(differs)))
        else:
            assert isinstance(answer, Lost)
            self._watch(self.event(worker=number, lost=answer.reason))

    def event(self, **values: EventValue) -> Event:
        """Return an event of the team: how many of its workers take part, and `values`."""
        return Event("workers", len(self.workers), self.division.workers, values)

    def loads_event(self) -> Event:
        """Return the event that tells `loads`."""
        return self.event(**self.loads())

    # -- load -------------------------------------------------------------------------------------------------------

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Give this process, inside the context, as many threads as every other worker that shares them has."""
        threads, start = torch.get_num_threads(), time.perf_counter()
        if self._threads is not None and self._ready:
            torch.set_num_threads(self._threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            self._seconds += time.perf_counter() - start

    def count(self, worker: int, done: Measured | Passed) -> None:
        """Count what a worker has done."""
        load = self._loads[worker]
        load.seconds += done.seconds
        load.computed += done.computed

    def loads(self) -> Mapping[str, EventValue]:
        """Return by worker its share of the time at work (`load.1`), and its tokens times sites a second (`rate.1`).

        The share is of the time in which anything was measured, since the worker came.
        """
        values: dict[str, EventValue] = {}
        for number, load in sorted(self._loads.items()):
            passed = max(self._seconds - load.since, 1e-9)
            values[f"load.{number}"] = round(min(1.0, load.seconds / passed), 3)
            values[f"rate.{number}"] = round(load.computed / max(load.seconds, 1e-9))
        return values


def _first_devices(teacher: Teacher) -> str:
    """Return the name of as many devices as hold a teacher, as another process sees them that has no others."""
    kind, count = teacher.device.type, len(teacher.devices)
    return kind if count == 1 else format_devices([f"{kind}:{number}" for number in range(count)])
