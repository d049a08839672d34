"""Trackers: programs that keep runs for teams, as listeners of events. Off unless they are named.

A tracker is a function under `@tracker` that opens a run there and returns a `Tracker`; another package adds one by the
entry point `billhook.tracker`. Each works in a thread of its own, so that a run waits for none, and one that fails is
left out after one warning.
"""

from __future__ import annotations

import importlib.util
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from billhook.core.errors import MissingExtra
from billhook.core.events import ALERT, Event, EventListener, ignore_events
from billhook.core.registry import RegistryWithFacts, split_names
from billhook.core.results.json_form import Result, Row
from billhook.core.results.run import RunResult

SECONDS_BETWEEN = 1.0  # of two events of a stage that are handed on, as in the store
ROUNDS = ("round", "watch")  # stages of which every event counts
MOST_WAIT_S = 30.0  # at the end of a run for what a tracker has not written yet


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told first: the kind of run, a name for it, and what it was asked, as text."""

    kind: str
    name: str
    params: Mapping[str, str]


class Tracker(Protocol):
    """One open run of a tracker. Whatever is raised ends the tracker, and not the run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Keep numbers under their names; `step` rises."""
        ...

    def finish(self, rows: Sequence[Row], page: Path | None) -> None:
        """Keep the rows of the result, and its page where there is one."""
        ...

    def close(self, failed: bool) -> None:
        """End the run there. `failed`: no result came."""
        ...


@dataclass(frozen=True, slots=True)
class Needs:
    """What a tracker imports, and the extra that installs it; nothing of another package's."""

    module: str = ""
    extra: str = ""


Opens = Callable[[TrackedRun], Tracker]
TRACKERS: RegistryWithFacts[Opens, Needs] = RegistryWithFacts("tracker", unstated=Needs())


def tracker(module: str) -> Callable[[Opens], Opens]:
    """Register a tracker that needs a module, which the extra of the tracker's name installs."""

    def register(function: Opens) -> Opens:
        return TRACKERS.add_with(Needs(module, function.__name__))(function)

    return register


@dataclass
class _Worker:
    """One tracker in its own thread. `failed`: is told what went wrong, once."""

    name: str
    open: Opens
    run: TrackedRun
    failed: Callable[[str, str], None]
    waiting: queue.SimpleQueue[Callable[[Tracker], None] | None] = field(default_factory=queue.SimpleQueue)

    def start(self) -> _Worker:
        self.thread = threading.Thread(target=self._work, daemon=True, name=f"billhook-{self.name}")
        self.thread.start()
        return self

    def _work(self) -> None:
        try:
            opened = self.open(self.run)
            while (task := self.waiting.get()) is not None:
                task(opened)
        except Exception as error:  # of a library that others wrote, or of their server or disk
            self.failed(self.name, f"{type(error).__name__}: {error}")


class Tracking:
    """A listener that hands the events of a run to trackers, and its result when it ends."""

    hears_all = True  # also what is stored and not shown: rounds of searches, and the times of stages

    def __init__(self, workers: Sequence[_Worker]) -> None:
        self._workers, self._step = tuple(workers), 0
        self._last: dict[str, float] = {}
        self._held: dict[str, Event] = {}

    @staticmethod
    def start(names: str, kind: str, params: Mapping[str, Any], warn: EventListener = ignore_events) -> Tracking:
        """Open a run at each of the trackers `names`, which commas separate.

        `params`: what the run was asked. `warn`: is told once, by an event of the stage `track`, of a tracker that
        failed. Raises UnknownName, and MissingExtra before any is opened.
        """
        opens = {name: TRACKERS[name] for name in split_names(names)}
        for name in opens:
            needs = TRACKERS.facts(name)
            if needs.module and importlib.util.find_spec(needs.module) is None:
                raise MissingExtra(f"The tracker {name}", needs.extra)
        asked = {key: str(value) for key, value in params.items() if value not in (None, "", {}, [])}
        run = TrackedRun(kind, f"{kind} {asked.get('model', asked.get('target', ''))}".strip(), asked)

        def failed(name: str, why: str) -> None:
            warn(Event("track", values={"tracker": name, "failed": why[:300]}))

        return Tracking([_Worker(name, opening, run, failed).start() for name, opening in opens.items()])

    def __call__(self, event: Event) -> None:
        """Hand an event on; of those of a stage within a second the last one, of rounds each."""
        now, complete = time.monotonic(), event.total is not None and event.done == event.total
        if (
            not complete
            and event.stage not in ROUNDS
            and now - self._last.get(event.stage, -SECONDS_BETWEEN) < SECONDS_BETWEEN
        ):
            self._held[event.stage] = event
            return
        self._last[event.stage] = now
        self._held.pop(event.stage, None)
        self._log(event)

    def _log(self, event: Event) -> None:
        if event.stage in (ALERT, "track"):
            return
        numbers = {name: float(v) for name, v in event.values.items() if isinstance(v, int | float)}
        numbers |= {"done": float(event.done)} if event.total else {}
        if numbers:
            self._step += 1
            step, values = self._step, {f"{event.stage}/{name}": value for name, value in numbers.items()}
            self._all(lambda opened: opened.log(step, values))

    def finish(self, result: object) -> None:
        """Hand the result on: its rows, and the page that it names."""
        for event in self._held.values():
            self._log(event)
        self._held.clear()
        rows = result.rows() if isinstance(result, Result) else []
        page = page_of(result)
        self._all(lambda opened: opened.finish(rows, page))

    def close(self, *, failed: bool = False) -> None:
        """End the run at every tracker; waits for what is not written yet, but not for long."""
        self._all(lambda opened: opened.close(failed))
        end = time.monotonic() + MOST_WAIT_S
        for worker in self._workers:
            worker.waiting.put(None)
        for worker in self._workers:
            worker.thread.join(max(0.0, end - time.monotonic()))
            if worker.thread.is_alive():
                worker.failed(worker.name, f"it has not written all within {MOST_WAIT_S:.0f} s")

    def _all(self, task: Callable[[Tracker], None]) -> None:
        for worker in self._workers:
            worker.waiting.put(task)


def page_of(result: object) -> Path | None:
    """Return the page that a result names, where it is there."""
    named = f"{result.out}/report.html" if isinstance(result, RunResult) else getattr(result, "page", "")
    return Path(named) if named and Path(named).is_file() else None


def numbers_of(rows: Sequence[Row]) -> dict[str, float]:
    """Return the numbers of rows as a flat summary: of several rows under the number of each."""
    flat: dict[str, float] = {}
    for number, row in enumerate(rows):
        before = f"{number}/" if len(rows) > 1 else ""
        flat |= {f"{before}{name}": float(v) for name, v in row.items() if isinstance(v, int | float)}
    return flat


from billhook.runs.trackers import mlflow, tensorboard, trackio, wandb  # noqa: E402, F401
