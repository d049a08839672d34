"""What a run cost so far: seconds, CPU seconds and measured losses."""

from __future__ import annotations

import sqlite3
from itertools import pairwise

from billhook.dashboard.listing import Listed, version
from billhook.dashboard.progress import VALUES_SINCE, Progress
from billhook.report.frame import Section, escaped
from billhook.report.numbers import format_duration, format_number


def cost_section(db: sqlite3.Connection, run: Listed, found: Progress | None) -> Section:
    """What the run cost, from its events and its result. All of it is counted: there are no intervals."""
    seconds, cpu, memory = _use(db, run.id)
    losses = db.execute("SELECT count(*) FROM losses WHERE run = ?", (run.id,)).fetchone()[0]
    facts = [
        ("Time at work", format_duration(seconds), "from the first to the last event, of all attempts"),
        ("Processor time", "–" if cpu is None else format_duration(cpu), "of all cores and attempts"),
        ("Most memory", "–" if memory is None else format_number(memory, "B"), "at any event"),
        ("Losses measured", f"{losses:,}", "by this run itself; others came from the store"),
    ]
    if found is not None:
        facts.append(("Attempts", str(found.attempts), "each after an interruption but the first"))
    drawn = "".join(
        f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}<small>{escaped(about)}</small></dd></div>"
        for name, value, about in facts
    )
    title = "What it cost" if run.finished else "What it cost so far"
    return Section("cost", title, f'<dl class="facts">{drawn}</dl>')


def _use(db: sqlite3.Connection, run: str) -> tuple[float, float | None, float | None]:
    """Seconds between events, CPU seconds, and the most memory; a process that was killed begins again at 0."""
    used = "resources" if version(db) >= VALUES_SINCE else "'{}'"
    rows = db.execute(
        f"SELECT at, json_extract({used}, '$.cpu_seconds'), json_extract({used}, '$.memory_bytes') FROM events "
        "WHERE run = ? ORDER BY rowid",
        (run,),
    ).fetchall()
    cpu = [spent for _, spent, _ in rows if spent is not None]
    begun = [0, *(i for i, (a, b) in enumerate(pairwise(cpu), 1) if b < a), len(cpu)]
    total = sum(cpu[last - 1] for last in begun[1:]) if cpu else None
    memory = max((bytes_ for *_, bytes_ in rows if bytes_ is not None), default=None)
    return _at_work(db, run, [at for at, *_ in rows]), total, memory


def _at_work(db: sqlite3.Connection, run: str, times: list[float]) -> float:
    """Seconds from the first to the last event of every attempt."""
    loads = db.execute(
        "SELECT at FROM events WHERE run = ? AND stage = 'load' AND done = 0 ORDER BY rowid", (run,)
    ).fetchall()
    begins = sorted({at for (at,) in loads})
    spans = [b - a for a, b in pairwise(times) if b not in begins]
    return sum(spans)
