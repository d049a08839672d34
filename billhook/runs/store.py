"""The run store: one SQLite file. Every finished measurement is in it; large things are folders elsewhere."""

from __future__ import annotations

import json
import math
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, get_args

from billhook.core.errors import ResourceError, ResultError, RunError, UsageError, cannot_write, nearest, option
from billhook.core.events import Event
from billhook.core.files.cache_keys import CacheKey, FactKey, LossKey, PlanLossKey, numbers
from billhook.core.files.foreign_files import reading
from billhook.core.files.store_tables import BRIEF, KINDED, MIGRATIONS, connect_to_read, layout, layout_of
from billhook.core.plan import Plan, shorten
from billhook.core.plan_files import find_path
from billhook.core.results.json_form import JsonObject
from billhook.core.results.measured import Loss
from billhook.core.results.stored import Run, RunState, StoredEvent, former_kind
from billhook.runs import STORE as STORE
from billhook.runs import hold_file, is_held

T = TypeVar("T")

EVENT_SECONDS = 1.0  # between two writes of a run's events


_LOSS_KEY = "model = ? AND tokens = ? AND loss = ? AND dtype = ? AND treatment = ? AND plan = ?"


def _loss_columns(key: LossKey, plan: Plan) -> tuple[str, ...]:
    return (*key.columns().values(), plan.key())


class Store:
    """Reads and writes one store file. Every write is one transaction, so that a killed process loses nothing more."""

    def __init__(self, path: Path, *, read_only: bool = False, clock: Callable[[], float] = time.time) -> None:
        """Open the store at `path`, which appears if need be; `read_only` changes nothing, and reads older ones too.

        `clock`: seconds since 1970, for events.
        Raises UsageError for a file that is no store, or one of a newer Billhook.
        """
        self._pending: dict[tuple[str, str], tuple[float, str, Event]] = {}  # the last of a stage, not yet written
        self._written: dict[str, float] = {}  # when a run's events were
        path = (find_path("~") or Path()) / str(path)[2:] if str(path).startswith("~/") else path
        self.path, self._clock, found = path, clock, find_path(path)
        if (found is not None and not path.is_file()) or str(path) == ":memory:":
            raise UsageError(
                f"{option('store', str(path))} is no file. Give the name of one: {option('store', STORE)}."
            )
        if read_only and found is None:
            name = shorten(str(path), 200)
            raise UsageError(f"There is no store {name}. Give the file that prune wrote: {option('store', 'FILE')}.")
        with ExitStack() as opening:
            try:
                if read_only:
                    self._db = connect_to_read(path.resolve())
                else:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    self._db = sqlite3.connect(path, timeout=60, isolation_level=None)
                opening.callback(self._db.close)
                self._db.row_factory = sqlite3.Row
                self._check_version(read_only)
                if not read_only:
                    self._db.execute("PRAGMA journal_mode = WAL")
                    self._db.execute("PRAGMA synchronous = NORMAL")  # a kill loses nothing, a power cut little
                    self._db.execute("PRAGMA foreign_keys = ON")
                    self._migrate()
            except (sqlite3.DatabaseError, OSError, ValueError) as error:
                full = cannot_write(error)
                raise (ResourceError if full else UsageError)(
                    f"{option('store', str(path))} cannot be used ({error}). "
                    + ("Free some space, or give another file." if full else "Give another file, or move this one.")
                ) from error
            opening.pop_all()

    def close(self) -> None:
        with suppress(sqlite3.Error):  # the last events of a run whose disk is full
            self._flush_events()
        self._db.close()

    def _check_version(self, read_only: bool) -> None:
        """Raises UsageError for a newer store, and for a database of something else, which stays as it is."""
        version, tables = self._db.execute(
            "SELECT user_version, (SELECT count(*) FROM sqlite_master) FROM pragma_user_version"
        ).fetchone()
        if version > len(MIGRATIONS):
            raise UsageError(
                f"{option('store', str(self.path))} was written by a newer Billhook. Upgrade, or give another file."
            )
        foreign = tables and not layout(self._db).items() >= layout_of(version).items()
        if foreign or (not version and (tables or read_only)):
            raise UsageError(
                f"{self.path} is not a store of Billhook. Give the file that `billhook prune` wrote, or the name of a "
                "new one."
            )

    def _migrate(self) -> None:
        """Bring a new or an older store up to date."""
        if self._version() == len(MIGRATIONS):
            return
        with self._write():
            for number, migrate in enumerate(MIGRATIONS[self._version() :], self._version() + 1):
                migrate(self._db)
                self._db.execute(f"PRAGMA user_version = {number}")

    def _version(self) -> int:
        return int(self._db.execute("PRAGMA user_version").fetchone()[0])

    @contextmanager
    def _write(self) -> Iterator[None]:
        if self._db.in_transaction:  # an interrupt came between two lines of an earlier write
            self._db.execute("ROLLBACK")
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK") if self._db.in_transaction else None
            raise
        self._db.execute("COMMIT") if self._db.in_transaction else None

    # -- runs -------------------------------------------------------------------------------------------------------

    def new_run(self, kind: str, spec: Mapping[str, Any], environment: Mapping[str, Any], out: str) -> str:
        """Store a new run of a kind, what it is asked, and where; `out` may hold `{run}`. Returns its id."""
        run = "r" + secrets.token_hex(3)
        values = (run, kind, time.time(), "running", out.replace("{run}", run), _json(spec), _json(environment), "{}")
        with self._write():
            self._db.execute(
                "INSERT INTO runs (id, kind, created, state, out, recipe, environment, bound) "
                f"VALUES ({','.join('?' * 8)})",
                values,
            )
        return run

    def runs(self, *, brief: bool = False) -> list[Run]:
        """All runs, the newest first. `brief`: results of prunings without their plan, steps and anatomy."""
        columns = BRIEF if brief and self._version() >= KINDED else "*"
        rows = self._select(f"SELECT {columns} FROM runs ORDER BY created DESC, rowid DESC")
        return [self._now(row) for row in rows]

    def run(self, run: str) -> Run:
        """One run by its id. Raises RunError with the nearest one."""
        rows = self._select("SELECT * FROM runs WHERE id = ?", run)
        if rows:
            return self._now(rows[0])
        near = nearest(run, [row["id"] for row in self._select("SELECT id FROM runs")])
        guess = f" Did you mean {near}?" if near else ""
        raise RunError(f"There is no run {run!r} in {self.path}.{guess} `billhook runs` lists them.")

    def _now(self, row: sqlite3.Row) -> Run:
        """A run as it is: one that is stored as running, and that no process holds, was killed, maybe after its end."""
        run = self._read(_run, row)
        if run.state != "running" or not self.free(run.id):
            return run
        return replace(run, state="interrupted" if run.result is None else "done")

    def killed(self) -> list[Run]:
        """The runs that are stored as running and that no process holds."""
        runs = map(self._now, self._select("SELECT * FROM runs WHERE state = 'running'"))
        return [run for run in runs if run.state != "running"]

    def update(
        self,
        run: str,
        *,
        state: RunState | None = None,
        fingerprints: Mapping[str, str] | None = None,
        result: Mapping[str, Any] | None = None,
        out: str | None = None,
    ) -> None:
        """Set what is given of a run."""
        self._flush_events()
        values = {"bound": fingerprints, "result": result}  # in their order, which tables follow
        texts = {"state": state, "out": out} | {n: json.dumps(v) for n, v in values.items() if v is not None}
        given = {column: text for column, text in texts.items() if text is not None}
        with self._write():
            columns = ", ".join(f"{column} = ?" for column in given)
            self._db.execute(f"UPDATE runs SET {columns} WHERE id = ?", (*given.values(), run))

    def tag(self, run: str, tags: Iterable[str], *, remove: bool = False) -> None:
        """Put tags to a run, or take them away. The same tag twice changes nothing."""
        what = "DELETE FROM tags WHERE run = ? AND tag = ?" if remove else "INSERT OR IGNORE INTO tags VALUES (?, ?)"
        with self._write():
            self._db.executemany(what, [(run, each) for each in tags])

    def tags(self, run: str) -> list[str]:
        """The tags of a run, in order."""
        return [row["tag"] for row in self._select("SELECT tag FROM tags WHERE run = ? ORDER BY tag", run)]

    def _lock_file(self, run: str) -> Path:
        return self.path.with_name(f"{self.path.name}-{run}.lock")

    @contextmanager
    def lock(self, run: str) -> Iterator[None]:
        """Hold a run for this process: a locked file, which dies with the process. Raises RunError if it is held."""
        with ExitStack() as held:
            try:
                held.enter_context(hold_file(self._lock_file(run)))
            except BlockingIOError as error:
                raise RunError(f"Another process works on run {run}. Wait for it, or stop it first.") from error
            yield

    @contextmanager
    def lock_and_track(self, run: str) -> Iterator[None]:
        """Hold a run, and file if it fails or is interrupted."""
        with self.lock(run):
            try:
                yield
            except BaseException as error:
                self.end(run, error)
                raise

    def end(self, run: str, error: BaseException) -> None:
        """Store that an error ended a run; where the disk takes nothing, the run is found to be interrupted."""
        with suppress(sqlite3.Error):
            self.update(run, state="interrupted" if isinstance(error, KeyboardInterrupt) else "failed")

    def free(self, run: str) -> bool:
        """Whether no process holds the run."""
        return not is_held(self._lock_file(run))

    # -- measurements -----------------------------------------------------------------------------------------------

    def lookup(self, key: CacheKey[T]) -> T | None:
        """The value that is stored under a key."""
        columns = key.columns()
        where = " AND ".join(f"{name} = ?" for name in columns)
        rows = self._select(f"SELECT * FROM {key.table} WHERE {where}", *columns.values())
        return self._read(key.decode, rows[0]) if rows else None

    def _select(self, statement: str, *values: str) -> list[sqlite3.Row]:
        """Rows of a store. Raises ResultError where its file is damaged."""
        with reading(f"The store {self.path} cannot be read", ResultError, "Give another store."):
            return self._db.execute(statement, values).fetchall()

    def _read(self, decode: Callable[[Any], T], row: Any) -> T:
        """A row as a value. Raises ResultError where somebody else wrote into it."""
        with reading(f"A row of the store {self.path} cannot be read", ResultError, "Give another store."):
            return decode(row)

    def add(self, key: CacheKey[T], value: T, run: str) -> None:
        """Store a value that a run computed. The first value of a key stays, unless the key `replaces`."""
        with self._write():
            self._insert(key, value, run)

    def _insert(self, key: CacheKey[T], value: T, run: str) -> None:
        columns = key.columns() | key.encode(value) | {"run": run}
        how, marks = "REPLACE" if key.replaces else "IGNORE", ",".join("?" * len(columns))
        self._db.execute(
            f"INSERT OR {how} INTO {key.table} ({','.join(columns)}) VALUES ({marks})", (*columns.values(),)
        )

    def remember(self, key: CacheKey[T], compute: Callable[[], T], run: str) -> T:
        """The value under a key, computed and stored if it is not known."""
        known = self.lookup(key)
        if known is None:
            known = compute()
            self.add(key, known, run)
        return known

    def remember_each(
        self, keys: Sequence[CacheKey[T]], compute: Callable[[list[int]], Iterable[T]], run: str
    ) -> list[T]:
        """The values under several keys. `compute` gives those that are not known, by their numbers and in that order;
        each is stored as soon as it is there."""
        known = dict(enumerate(map(self.lookup, keys)))
        missing = [number for number, value in known.items() if value is None]
        for number, value in zip(missing, compute(missing) if missing else (), strict=True):
            self.add(keys[number], value, run)
            known[number] = value
        return [value for value in known.values() if value is not None]

    def remember_together(self, keys: Sequence[CacheKey[T]], compute: Callable[[], Iterable[T]], run: str) -> list[T]:
        """The values under several keys that are measured together: all of them again if one is not known."""
        known = [value for value in map(self.lookup, keys) if value is not None]
        if len(known) == len(keys):
            return known
        computed = list(compute())
        with self._write():
            for key, value in zip(keys, computed, strict=True):
                self._insert(key, value, run)
        return computed

    def all_of(self, kind: type[FactKey[T]]) -> list[Any]:
        """All values of one kind, whatever they depend on."""
        rows = self._select("SELECT value FROM facts WHERE what = ? ORDER BY model, of", kind.what)
        return [self._read(lambda row: json.loads(row["value"]), row) for row in rows]

    def add_loss(self, key: LossKey, plan: Plan, loss: Loss, run: str) -> None:
        """Store a loss measured in full, in place of its pieces. The same loss measured twice changes nothing."""
        with self._write():
            self._insert(PlanLossKey(key, plan), loss, run)
            self._db.execute(f"DELETE FROM pieces WHERE {_LOSS_KEY} AND quality = 'full'", _loss_columns(key, plan))

    def pieces(self, loss_key: LossKey, plan: Plan) -> dict[str, dict[tuple[int, ...], tuple[float, ...]]]:
        """Quality -> documents of a group -> nats of each, of a plan that may not be known in full."""
        rows = self._select(
            f"SELECT quality, documents, sums FROM pieces WHERE {_LOSS_KEY}", *_loss_columns(loss_key, plan)
        )
        told: dict[str, dict[tuple[int, ...], tuple[float, ...]]] = {}
        for quality, documents, sums in rows:
            told.setdefault(quality, {})[self._read(numbers, documents)] = self._read(numbers, sums)
        return told

    def add_pieces(
        self, loss_key: LossKey, quality: str, nats: Mapping[tuple[Plan, tuple[int, ...]], tuple[float, ...]], run: str
    ) -> None:
        """File nats of document groups, all at once. Lower bounds and estimates have a quality of their own."""
        rows = [
            (*_loss_columns(loss_key, plan), quality, _json(documents), _json(sums), run)
            for (plan, documents), sums in nats.items()
        ]
        with self._write():
            self._db.executemany(f"INSERT OR IGNORE INTO pieces VALUES ({','.join('?' * 10)})", rows)

    def count_losses(self, run: str | None = None) -> int:
        """How many losses are stored: in all, or those that one run measured itself."""
        where, values = ("WHERE run = ?", (run,)) if run else ("", ())
        return int(self._select(f"SELECT count(*) FROM losses {where}", *values)[0][0])

    # -- events -----------------------------------------------------------------------------------------------------

    def add_event(self, run: str, event: Event, *, at_once: bool = False) -> None:
        """Store an event of a run. Of those of a stage within a second the last one is kept, unless one is `at_once`.

        What is held back for that is written with the next event after the second, or when the run or the store ends.
        """
        now = self._clock()
        if at_once:
            self._write_events([(now, run, event)])
            return
        self._pending[run, event.stage] = (now, run, event)
        if now - self._written.get(run, -math.inf) >= EVENT_SECONDS:
            self._written[run] = now
            self._flush_events()

    def _flush_events(self) -> None:
        waiting, self._pending = [*self._pending.values()], {}
        if waiting:
            self._write_events(waiting)

    def _write_events(self, events: Iterable[tuple[float, str, Event]]) -> None:
        from billhook.models.device import resource_use  # torch, which reading a store needs not

        used = _json(resource_use())
        rows = [(run, at, e.stage, e.done, e.total, "", _json(dict(e.values)), used) for at, run, e in events]
        with self._write():
            self._db.executemany(
                'INSERT INTO events (run, at, stage, done, total, note, "values", resources) '
                f"VALUES ({','.join('?' * 8)})",
                rows,
            )

    def events(self, run: str, *stages: str) -> list[StoredEvent]:
        """The events of one run, in order; of some stages, where these are named."""
        self._flush_events()
        which = f"AND stage IN ({','.join('?' * len(stages))})" if stages else ""
        rows = self._select(f"SELECT * FROM events WHERE run = ? {which} ORDER BY at, rowid", run, *stages)
        return [self._read(_event, row) for row in rows]


def _event(row: sqlite3.Row) -> StoredEvent:
    has = set(row.keys())
    values = _object(row["values"]) if "values" in has else {}
    used = _object(row["resources"]) if "resources" in has else {}
    told = {"note": str(row["note"])} if row["note"] else {}  # by Billhook 0.1
    total = None if row["total"] is None else int(row["total"])
    return StoredEvent(float(row["at"]), str(row["stage"]), int(row["done"] or 0), total, told | values, used)


def _run(row: sqlite3.Row) -> Run:
    kind, environment = former_kind(_object(row["environment"]))
    if row["state"] not in get_args(RunState):
        raise ValueError(f"there is no state {row['state']!r}")
    return Run(
        str(row["id"]), str(row["kind"]) if "kind" in row.keys() else kind, float(row["created"]), row["state"],  # noqa: SIM118
        str(row["out"]), _object(row["recipe"]), environment, _object(row["bound"]),
        None if row["result"] is None else _object(row["result"]),
    )  # fmt: skip


def _object(text: str) -> JsonObject:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise TypeError(f"{text[:80]!r} is no JSON object")
    return value


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
