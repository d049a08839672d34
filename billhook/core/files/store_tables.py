"""The tables of the run store, as migrations: what each version changed, in order."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

from billhook.core.results.specs import PRUNE
from billhook.core.results.stored import former_kind


def _create_tables(db: sqlite3.Connection) -> None:
    script = """
        CREATE TABLE runs (
            id TEXT PRIMARY KEY, created REAL NOT NULL, state TEXT NOT NULL, out TEXT NOT NULL, recipe TEXT NOT NULL,
            environment TEXT NOT NULL, bound TEXT NOT NULL, result TEXT
        );
        CREATE TABLE losses (
            model TEXT, tokens TEXT, loss TEXT, dtype TEXT, treatment TEXT, plan TEXT, sites TEXT NOT NULL,
            sums TEXT NOT NULL, counts TEXT NOT NULL, run TEXT NOT NULL REFERENCES runs (id),
            PRIMARY KEY (model, tokens, loss, dtype, treatment, plan)
        );
        CREATE TABLE evaluations (
            model TEXT, plan TEXT, name TEXT, tokens TEXT, dtype TEXT, sums TEXT NOT NULL, counts TEXT NOT NULL,
            clusters TEXT NOT NULL, run TEXT NOT NULL REFERENCES runs (id),
            PRIMARY KEY (model, plan, name, tokens, dtype)
        );
        CREATE TABLE timings (
            model TEXT, plan TEXT, rival TEXT, environment TEXT, dtype TEXT, protocol TEXT, timing TEXT NOT NULL,
            run TEXT NOT NULL REFERENCES runs (id),
            PRIMARY KEY (model, plan, rival, environment, dtype, protocol)
        );
        CREATE TABLE events (
            run TEXT NOT NULL REFERENCES runs (id), at REAL NOT NULL, stage TEXT NOT NULL, done INTEGER, total INTEGER,
            note TEXT NOT NULL
        );
        CREATE INDEX events_by_run ON events (run, at);
    """
    for statement in script.split(";"):  # one by one: executescript would commit before it begins
        db.execute(statement)


def _create_pieces(db: sqlite3.Connection) -> None:
    """Sums of document groups: what is known of plans that were dropped, or not finished."""
    db.execute(
        "CREATE TABLE pieces (model TEXT, tokens TEXT, loss TEXT, dtype TEXT, treatment TEXT, plan TEXT, quality TEXT, "
        "documents TEXT, sums TEXT NOT NULL, run TEXT NOT NULL REFERENCES runs (id), "
        "PRIMARY KEY (model, tokens, loss, dtype, treatment, plan, quality, documents)) WITHOUT ROWID"
    )


def _create_facts(db: sqlite3.Connection) -> None:
    """What is measured once of a model and is neither loss nor evaluation: scores of a metric, costs of sites."""
    db.execute(
        "CREATE TABLE facts (model TEXT, what TEXT, of TEXT, value TEXT NOT NULL, "
        "run TEXT NOT NULL REFERENCES runs (id), PRIMARY KEY (model, what, of)) WITHOUT ROWID"
    )


def _add_kind(db: sqlite3.Connection) -> None:
    """What a run is. Until then the environment of those that were not prunings said so."""
    db.execute(f"ALTER TABLE runs ADD COLUMN kind TEXT NOT NULL DEFAULT '{PRUNE}'")
    for run, environment in db.execute("SELECT id, environment FROM runs").fetchall():
        kind, rest = former_kind(json.loads(environment))
        db.execute(
            "UPDATE runs SET kind = ?, environment = ? WHERE id = ?", (kind, json.dumps(rest, sort_keys=True), run)
        )


def _add_event_values(db: sqlite3.Connection) -> None:
    """Numbers of events, which were a sentence until then, and what the process used."""
    db.execute("""ALTER TABLE events ADD COLUMN "values" TEXT NOT NULL DEFAULT '{}'""")
    db.execute("ALTER TABLE events ADD COLUMN resources TEXT NOT NULL DEFAULT '{}'")


def _create_tags(db: sqlite3.Connection) -> None:
    """Words that a person puts to a run, to find it again; and the losses of a run are found without a look at all."""
    db.execute("CREATE TABLE tags (run TEXT REFERENCES runs (id), tag TEXT, PRIMARY KEY (run, tag)) WITHOUT ROWID")
    db.execute("CREATE INDEX losses_by_run ON losses (run)")


MIGRATIONS = (_create_tables, _create_pieces, _create_facts, _add_kind, _add_event_values, _create_tags)
KINDED, TAGGED = 4, 6  # the first versions of a store that have kinds and tags
BRIEF = (  # columns of a run: of a pruning without what is most of its result, and is of one model or one path
    "id, kind, created, state, out, recipe, environment, bound, CASE kind WHEN 'prune' "
    "THEN json_remove(result, '$.plan', '$.steps', '$.anatomy') ELSE result END AS result"
)


def layout(db: sqlite3.Connection) -> dict[tuple[str, str], str]:
    """{(table, column): its type} of a database."""
    columns = db.execute(
        "SELECT m.name, c.name, c.type FROM sqlite_master AS m, pragma_table_info(m.name) AS c WHERE m.type = 'table'"
    )
    return {(table, column): kind for table, column, kind in columns}


def layout_of(version: int) -> dict[tuple[str, str], str]:
    """The layout of a store of a version."""
    with closing(sqlite3.connect(":memory:")) as db:
        for migrate in MIGRATIONS[:version]:
            migrate(db)
        return layout(db)


def connect_to_read(path: Path) -> sqlite3.Connection:
    """A connection to a store that changes nothing in it.

    With the right to write, SQLite deletes the -wal and -shm that reading needs, or that a killed process left. Where
    it can make none, as on a full disk or in a folder of somebody else's, it reads without, unless a writer has some.
    """
    db = sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=60)
    try:
        layout(db)
    except sqlite3.OperationalError:
        db.close()
        wal = path.with_name(f"{path.name}-wal")
        if wal.exists() and wal.stat().st_size:
            raise
        db = sqlite3.connect(f"{path.as_uri()}?immutable=1", uri=True)
    db.execute("PRAGMA query_only = ON")
    return db
