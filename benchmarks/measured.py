"""What a benchmark measured, as text that another machine can go on from: plans, and the outcome of every item."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

from billhook.runs.store import Store

# file: table, columns (the last ones hold JSON), which rows
KEPT = {
    "plans": ("facts", ("model", "what", "of", "value"), 2, "what = 'plan'"),
    "outcomes": ("evaluations", ("model", "plan", "name", "tokens", "dtype", "sums", "counts", "clusters"), 3, "1"),
}
DIGITS = 6  # of a sum of nats; far below what a text changes


def written_down(store: Path, folder: Path) -> None:
    """Write what the `store` file holds of plans that were searched for and of evaluations, sorted, one a line."""
    folder.mkdir(exist_ok=True)
    with closing(sqlite3.connect(store)) as db:
        for name, (table, columns, values, which) in KEPT.items():
            lines = []
            for row in db.execute(f"SELECT {', '.join(columns)} FROM {table} WHERE {which}"):
                told = [*row[:-values], *map(_short, row[-values:])]
                line = dict(zip(columns, told, strict=True))
                lines.append(json.dumps(line, sort_keys=True, separators=(",", ":")) + "\n")
            (folder / f"{name}.jsonl").write_text("".join(sorted(lines)), encoding="utf-8")


def _short(text: str) -> object:
    """A stored value; the sums of nats in it without the digits that say nothing."""
    value = json.loads(text)
    if isinstance(value, list):
        return [round(x, DIGITS) if isinstance(x, float) else x for x in value]
    return value


def put_back(store: Path, folder: Path) -> None:
    """File what `written_down` wrote; what the store knows already stays."""
    with closing(Store(store)) as opened:
        run = opened.new_run("measured before", {}, {}, "")
        opened.update(run, state="done")
    with closing(sqlite3.connect(store)) as db, db:
        for name, (table, columns, values, _) in KEPT.items():
            file = folder / f"{name}.jsonl"
            for row in map(json.loads, file.read_text(encoding="utf-8").splitlines() if file.is_file() else ()):
                cells = [row[c] for c in columns[:-values]]
                cells += [json.dumps(row[c], sort_keys=True) for c in columns[-values:]]
                places = ", ".join("?" * (len(columns) + 1))
                db.execute(
                    f"INSERT OR IGNORE INTO {table} ({', '.join(columns)}, run) VALUES ({places})", (*cells, run)
                )
