"""The runs of a store as a list: the figures of each, read by SQL alone. No result is decoded whole."""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from billhook.core.errors import ResultError
from billhook.core.files.store_tables import KINDED, TAGGED, connect_to_read
from billhook.core.results.json_form import SCHEMA, JsonObject, decode
from billhook.core.results.run import PerplexityChange, SizeChange, SpeedChange
from billhook.core.results.specs import PRUNE
from billhook.core.results.stored import former_kind
from billhook.runs import is_held

T = TypeVar("T")

Parts = dict[str, str]  # HTML by the id of the element that it replaces

FIGURES = (
    "'$.schema', '$.sizes', '$.perplexity', '$.speed', '$.seconds', '$.model.fingerprint', '$.data.evaluation.hash'"
)


@dataclass(frozen=True, slots=True)
class Figures:
    """What a pruning found, as far as a list shows it. None: not measured. `seconds`: of all stages.

    `fingerprint`: of the teacher; `held_out`: the hash of the text on which perplexity was measured.
    """

    sizes: SizeChange
    perplexity: PerplexityChange | None
    speed: SpeedChange | None
    seconds: float
    fingerprint: str
    held_out: str

    def left(self, what: str) -> float | None:
        """The share of the teacher's `parameters`, `bytes`, … that the student has; None where the teacher has none."""
        had, has = (getattr(sizes, what) for sizes in (self.sizes.teacher, self.sizes.student))
        return has / had if had else None


@dataclass(frozen=True, slots=True)
class Listed:
    """One run in a list. `remove`: what was asked to go; `event`: the number of its last event, 0 without any.

    `finished`: a process has stored a result. `figures`: None of a run without one, and of kinds other than prunings.
    """

    id: str
    kind: str
    created: float
    state: str
    out: str
    model: str
    remove: str
    search: str
    tags: tuple[str, ...]
    event: int
    finished: bool
    figures: Figures | None

    @property
    def stamp(self) -> str:
        """Text that changes with whatever the list shows of the run."""
        return f"{self.id} {self.state} {self.event} {self.finished} {','.join(self.tags)}"


def stamp(runs: list[Listed]) -> int:
    """A number that changes with the states and the tags of runs, not with their events."""
    return zlib.crc32("".join(replace(run, event=0).stamp for run in runs).encode())


@dataclass(frozen=True, slots=True)
class Seen:
    """What a reader has seen of a store. `states`: a number that changes with states and tags."""

    event: int
    states: int

    def __str__(self) -> str:
        return f"{self.event}-{self.states}"

    @staticmethod
    def parse(text: str) -> Seen:
        """Read what `str` wrote; anything else has seen nothing."""
        event, _, states = text.partition("-")
        known = all(part.isascii() and part.isdigit() and len(part) < 20 for part in (event, states))
        return Seen(int(event), int(states)) if known else Seen(-1, -1)


def seen_in(runs: list[Listed]) -> Seen:
    """What a page shows that is made from these runs."""
    return Seen(max((run.event for run in runs), default=0), stamp(runs))


def changed(runs: list[Listed], since: Seen) -> list[Listed]:
    """The runs that have changed since: all where states or tags have, else those with new events."""
    return runs if stamp(runs) != since.states else [run for run in runs if run.event > since.event]


@contextmanager
def opened(store: Path) -> Iterator[sqlite3.Connection]:
    """A connection to a store that changes nothing. Raises ResultError where the file is damaged."""
    try:
        with closing(connect_to_read(store.resolve())) as db:
            db.row_factory = sqlite3.Row
            yield db
    except (sqlite3.DatabaseError, json.JSONDecodeError) as error:
        raise ResultError(f"The store {store} cannot be read ({error}). Give another store.") from error


def version(db: sqlite3.Connection) -> int:
    """The number of migrations that a store has seen."""
    return int(db.execute("PRAGMA user_version").fetchone()[0])


class Listing:
    """Reads the runs of one store, and keeps what cannot change: what they were asked, their events, ended figures."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self._asked: dict[str, _Asked] = {}
        self._ended: dict[tuple[str, int], Figures | None] = {}  # by run and its last event
        self._events: dict[str, int] = {}  # the last of each run

    def runs(self) -> list[Listed]:
        """All runs, the newest first."""
        with opened(self.store) as db:
            known = self._events
            fresh = db.execute(
                "SELECT run, max(rowid) FROM events WHERE rowid > ? GROUP BY +run", (max(known.values(), default=0),)
            )
            self._events = known | dict(fresh.fetchall())
            kind = "kind" if version(db) >= KINDED else "NULL"
            tags, new = _tags(db), [run for (run,) in db.execute("SELECT id FROM runs") if run not in self._asked]
            for run in new:
                columns = f"{kind} AS kind, recipe, environment"
                row = db.execute(f"SELECT {columns} FROM runs WHERE id = ?", (run,)).fetchone()
                self._asked[run] = _asked(row)
            rows = db.execute(
                "SELECT id, created, state, out, result IS NOT NULL AS finished FROM runs "
                "ORDER BY created DESC, rowid DESC"
            ).fetchall()
            return [self._listed(db, row, tags.get(row["id"], ())) for row in rows if row["id"] in self._asked]

    def _listed(self, db: sqlite3.Connection, row: sqlite3.Row, tags: tuple[str, ...]) -> Listed:
        run, state, finished = row["id"], row["state"], bool(row["finished"])
        asked, event = self._asked[run], self._events.get(run, 0)
        if state == "running" and not is_held(lock_file(self.store, run)):
            state = "done" if finished else "interrupted"
        figures = self._figures(db, run, event) if finished and asked.kind == PRUNE else None
        return Listed(
            run, asked.kind, row["created"], state, row["out"], asked.model, asked.remove, asked.search, tags, event,
            finished, figures,
        )  # fmt: skip

    def _figures(self, db: sqlite3.Connection, run: str, event: int) -> Figures | None:
        if (run, event) not in self._ended:
            (text,) = db.execute(f"SELECT json_extract(result, {FIGURES}) FROM runs WHERE id = ?", (run,)).fetchone()
            self._ended[run, event] = _figures(json.loads(text))
        return self._ended[run, event]


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a run was asked, as far as a list shows it."""

    kind: str
    model: str
    remove: str
    search: str


def _asked(row: sqlite3.Row) -> _Asked:
    spec, (former, _) = json.loads(row["recipe"]), former_kind(json.loads(row["environment"]))
    kind = row["kind"] or former
    pruning = spec if kind == PRUNE else {}
    removed = pruning.get("remove") or pruning.get("plan") or pruning.get("within") or ""
    return _Asked(kind, str(spec.get("model", "")), str(removed), str(pruning.get("search") or ""))


def lock_file(store: Path, run: str) -> Path:
    """The file that a process holds which works on a run."""
    return store.with_name(f"{store.name}-{run}.lock")


def _tags(db: sqlite3.Connection) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    if version(db) >= TAGGED:
        for run, tag in db.execute("SELECT run, tag FROM tags ORDER BY run, tag"):
            found[run] = (*found.get(run, ()), tag)
    return found


def _figures(found: list[Any]) -> Figures | None:
    """Figures from the values of FIGURES. None for a result of Billhook 0.1, which had another form."""
    schema, sizes, perplexity, speed, seconds, fingerprint, held_out = found
    if schema != SCHEMA:
        return None
    return Figures(
        decode(SizeChange, sizes), _decoded(PerplexityChange, perplexity), _decoded(SpeedChange, speed),
        sum(map(float, seconds.values())), str(fingerprint), str(held_out),
    )  # fmt: skip


def _decoded(kind: type[T], value: JsonObject | None) -> T | None:
    return None if value is None else decode(kind, value)
