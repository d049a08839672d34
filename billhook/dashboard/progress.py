"""How far a run is: its stage with rate and time left, what is gone so far, and what the process uses."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from billhook.core.events import EventValue
from billhook.core.files.store_tables import MIGRATIONS
from billhook.core.results.json_form import JsonObject
from billhook.dashboard.listing import version

RECENT = 500  # events that are looked at for a rate
BESIDE = ("round", "workers")  # stages of events that tell of another stage
VALUES_SINCE = len(MIGRATIONS[:5])  # the version of a store from which events have values


@dataclass(frozen=True, slots=True)
class Moment:
    """One event: when, of which stage, how far, with which values and with how much of the machine in use."""

    number: int
    at: float
    stage: str
    done: int
    total: int | None
    values: Mapping[str, EventValue]
    resources: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Round:
    """The best candidate of a round of a search: what it removes, how many groups it leaves, its loss."""

    removed: tuple[str, ...]
    narrowed: tuple[str, ...]  # `mlp.4=1211`
    loss: float


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is. `rate`: units of the stage per second; `left`: seconds to the end of the stage.

    `cpu`: cores in use, on average over the last events; `disk_free`: bytes free where the store is. None: not known.
    `rounds`: of the search, in order; a resumed one takes the same. `began`: when the newest attempt did.
    """

    now: Moment
    began: float
    rate: float | None
    left: float | None
    cpu: float | None
    disk_free: int
    rounds: tuple[Round, ...]
    attempts: int

    @property
    def removed(self) -> tuple[float, float, str] | None:
        """How much is gone, how much is to go, and in which unit, if the search says so."""
        for name, value in self.now.values.items():
            unit = name.removeprefix("removed_")
            if unit != name and f"target_{unit}" in self.now.values:
                return float(value), float(self.now.values[f"target_{unit}"]), unit
        return None


def progress_of(db: sqlite3.Connection, store: Path, run: str) -> Progress | None:
    """How far a run is; None before its first event."""
    columns = 'rowid, at, stage, done, total, "values", resources'
    if version(db) < VALUES_SINCE:
        columns = "rowid, at, stage, done, total, '{}', '{}'"
    asked = f"SELECT {columns} FROM events WHERE run = ?"
    recent = [_moment(row) for row in db.execute(f"{asked} ORDER BY at DESC, rowid DESC LIMIT {RECENT}", (run,))]
    if not recent:
        return None
    begun = [
        (number, at) for number, at in db.execute(
            "SELECT rowid, at FROM events WHERE run = ? AND stage = 'load' AND done = 0 ORDER BY rowid", (run,)
        )
    ]  # fmt: skip
    rounds = {each.done: each for each in map(_moment, db.execute(f"{asked} AND stage = 'round' ORDER BY at", (run,)))}
    now = next((each for each in recent if each.stage not in BESIDE), recent[0])
    rate = _rate(recent, now)
    left = (now.total - now.done) / rate if rate and now.total else None
    return Progress(
        now, _attempt_began(begun, recent), rate, left, _cores(recent), shutil.disk_usage(store.parent).free,
        tuple(_round(rounds[done]) for done in sorted(rounds)), len(_attempts(begun)),
    )  # fmt: skip


def _moment(row: sqlite3.Row) -> Moment:
    number, at, stage, done, total, values, used = row
    return Moment(number, at, stage, done or 0, total, _object(values), _object(used))


def _object(text: str) -> JsonObject:
    value = json.loads(text)
    return value if isinstance(value, dict) else {}


def _attempts(begun: list[tuple[int, float]]) -> list[float]:
    """When each attempt began: it loads a model first, which files more than one event at a time."""
    times: list[float] = []
    for _, at in begun:
        if not times or at - times[-1] > 1:
            times.append(at)
    return times


def _attempt_began(begun: list[tuple[int, float]], recent: list[Moment]) -> float:
    return _attempts(begun)[-1] if begun else recent[-1].at


def _rate(recent: list[Moment], now: Moment) -> float | None:
    """Units per second since the stage began, or began again; None before a second has passed. Newest events first."""
    same = takewhile(lambda each: each.stage in (now.stage, *BESIDE), recent)
    steps = [each for each in same if each.stage == now.stage]
    first = now
    for each in steps:
        if each.done > first.done:
            break
        first = each
    passed = now.at - first.at
    return (now.done - first.done) / passed if passed >= 1 and now.done > first.done else None


def _cores(recent: list[Moment]) -> float | None:
    """Cores in use over the last seconds of one process. Events that were written together tell of one moment."""
    times: dict[float, float] = {}  # the last event, by the CPU seconds that were stored with it
    for each in recent:
        if (spent := each.resources.get("cpu_seconds")) is not None:
            times[spent] = max(each.at, times.get(spent, each.at))
    (now, at), *earlier = [*times.items()] or [(0.0, 0.0)]
    for spent, then in earlier:
        if spent > now:  # an earlier process
            return None
        if at - then >= 5:
            return (now - spent) / (at - then)
    return None


def _round(moment: Moment) -> Round:
    values = moment.values
    names = (str(values.get(name, "")) for name in ("removed", "narrowed"))
    removed, narrowed = (tuple(filter(None, text.split(","))) for text in names)
    return Round(removed, narrowed, float(values.get("loss", "nan")))
