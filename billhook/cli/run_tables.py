"""Tables of what a store holds, in the terminal."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console

from billhook.cli.progress import event_words
from billhook.cli.session import empty_table, foot, prints, table_of
from billhook.core.results.json_form import Result
from billhook.core.results.stored import RunSummary, StoredRun
from billhook.report.numbers import printable


@prints(StoredRun)
def run_table(console: Console, run: StoredRun) -> None:
    """Print all that the store holds of one run."""
    out = f", out: {run.out}" if run.out else ""
    console.print(f"{run.id}: {run.kind}, {run.state}, {run.losses:,} losses measured{out}")
    for event in run.events:
        at = time.strftime("%H:%M:%S", time.localtime(event.at))
        count = f" {event.done}/{event.total}" if event.total else ""
        words = event_words(event.stage, event.values)
        console.print(f"{at} {event.stage}{count} {words}".rstrip(), style="dim", highlight=False)
    if isinstance(run.result, Result):
        table_of(type(run.result))(console, run.result)
    elif run.result is not None:
        if set(run.result) - {"laboratory", "page"}:
            console.print(
                "Billhook 0.1 stored the result. For its JSON add --json; for tables run the command again: what the "
                "store holds is not measured again."
            )
        foot(console, str(run.result.get("page", "")), [])


@prints("runs")
def runs_table(console: Console, value: dict[str, list[RunSummary]]) -> None:
    """Print the runs of a store, a line each."""
    table = empty_table("run", "kind", "state", "model", "remove", "search", "losses", "out")
    for row in value["runs"]:
        cells = (row.run, row.kind, row.state, row.model, row.remove, row.search)
        table.add_row(*(cell or "–" for cell in cells), f"{row.losses:,}", row.out)
    console.print(table if value["runs"] else "No runs yet. Start one: billhook prune --remove 25%sites")


@prints("tags")
def tags_line(console: Console, value: dict[str, Any]) -> None:
    """Print the tags of a run."""
    console.print(f"{value['run']}: {', '.join(value['tags']) or 'no tags'}", highlight=False)


@prints("dashboard")
def dashboard_line(console: Console, value: dict[str, str]) -> None:
    """Print where the dashboard is to be seen."""
    line = f"{printable(value['store'])}: {value['dashboard']} (Ctrl-C ends it)"
    console.print(line, highlight=False, soft_wrap=True)
