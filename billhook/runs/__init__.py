"""One run: its recipe, its store, its stages. What a store holds is listed and shown here."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from billhook.core.results.stored import Run, RunSummary, StoredRun

STORE = "billhook.db"


def list_runs(store: str | Path = STORE) -> list[RunSummary]:
    """The runs of a store, the newest first. `pandas.DataFrame` takes the list."""
    from billhook.runs.store import Store  # this package is imported with every recipe

    with closing(Store(Path(store), read_only=True)) as opened:
        return [_summary(run, opened.count_losses(run.id)) for run in opened.runs()]


def _summary(run: Run, losses: int) -> RunSummary:
    """One run in a list. What a study or an evaluation of Billhook 0.1 was asked is not known, beyond its model."""
    from billhook.core.results.specs import PRUNE
    from billhook.core.results.stored import RunSummary

    asked = run.spec if run.kind == PRUNE else {}
    remove = asked.get("remove") or asked.get("plan") or asked.get("within")
    return RunSummary(
        *(
            run.id,
            run.kind,
            run.created,
            run.state,
            str(run.spec.get("model", "")),
            remove,
            asked.get("search"),
            run.out,
            losses,
        )
    )


def show(run: str, store: str | Path = STORE) -> StoredRun:
    """All that the store holds of one run: what it was asked, its state, its events and its result."""
    from billhook.core.results.stored import StoredRun, read_result
    from billhook.runs.store import Store

    with closing(Store(Path(store), read_only=True)) as opened:
        found = opened.run(run)
        events = tuple(opened.events(run))
        result = None if found.result is None else read_result(found.kind, found.result)
        about = {name: getattr(found, name) for name in found.__slots__ if name != "result"}
        return StoredRun(**about, losses=opened.count_losses(run), events=events, result=result)
