"""The alerts of a store: what its runs told of, runs that stand still, and drift between baselines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path

from billhook.core.errors import UsageError, option
from billhook.core.events import ALERT, Event
from billhook.core.files.cache_keys import BaselineKey
from billhook.core.monitoring.alerts import Alert, Observation, evaluate, exact
from billhook.core.monitoring.observations import percent_lost, points_lost
from billhook.core.results.comparisons import Baseline
from billhook.core.results.monitoring import AlertList
from billhook.core.results.stored import Run, StoredEvent
from billhook.core.statistics import LOSS_EVALUATIONS, paired_difference
from billhook.runs import load_baseline
from billhook.runs.store import STORE, Store
from billhook.studies.gate import baseline_result
from billhook.studies.monitoring.alerting import RulesFile, rules_of


def alerts(*, rules: RulesFile = None, between: Sequence[str] = (), store: str | Path = STORE) -> AlertList:
    """The alerts of a store: those that its runs told of, and those that hold now.

    Arguments:
        rules: a YAML file of rules (default: those of Billhook for runs).
        between: names of baselines, of which each is held against the one before it, for rules of drift.
        store: the run store, which is only read.

    A run that ended early counts as stopped until one that was asked the same is done. Raises UsageError for a baseline
    that is not stored, RecipeError for rules that cannot be read.
    """
    read = rules_of(rules, "runs")
    with closing(Store(Path(store), read_only=True)) as opened:
        runs, now = opened.runs(), time.time()
        told = [Alert.from_event(_event(each)) for run in runs for each in opened.events(run.id, ALERT)]
        seen = [*_standing_still(opened, runs, now), *_drift(opened, between, now)]
        return AlertList(tuple(sorted(told, key=lambda alert: -alert.since)), evaluate(read, seen))


def _event(stored: StoredEvent) -> Event:
    return Event(stored.stage, stored.done, stored.total, stored.values)


def _standing_still(store: Store, runs: Sequence[Run], now: float) -> list[Observation]:
    """Runs, the newest first, that ended early and were not done again, and those that do nothing."""
    found, replaced = [], list[tuple[str, object]]()
    for run in runs:
        asked = (run.kind, run.spec)
        if run.state in ("running", "done"):
            replaced.append(asked)
        elif asked not in replaced:
            found.append(Observation("stopped", run.id, "", exact(now - _last(store, run)), now))
        if run.state == "running":
            found.append(Observation("stalled", run.id, "s", exact(now - _last(store, run)), now))
    return found


def _last(store: Store, run: Run) -> float:
    return max((event.at for event in store.events(run.id)), default=run.created)


def _drift(store: Store, names: Sequence[str], now: float) -> list[Observation]:
    """What each baseline lost against the one before it, on the sets that both were measured on."""
    kept = [_stored(store, name) for name in names]
    found = []
    for first, second in pairwise(kept):
        scores = {(each.source, each.score, each.tokens) for each in first.sets}
        for each in second.sets:
            if (each.source, each.score, each.tokens) not in scores:
                continue
            results = [baseline_result(store, of, each.score, each.tokens) for of in (first, second)]
            before, after = results
            if before is None or after is None:
                continue
            what, change = f"{each.source}, {first.name} to {second.name}", paired_difference(before, after)
            if each.score in LOSS_EVALUATIONS:
                found.append(Observation("drift", what, "%ppl", percent_lost(change), now))
            else:
                found.append(Observation("drift", what, "pp", points_lost(change), now))
    return found


def _stored(store: Store, name: str) -> Baseline:
    found = load_baseline(store, name)
    if found is None:
        names = sorted(Baseline.from_stored(value).name for value in store.all_of(BaselineKey))
        raise UsageError(
            f"There is no baseline {name!r}. Stored: {', '.join(names) or 'none'}. Save one: "
            f"billhook baseline save {name} MODEL; then name both: {option('between', ['v1', 'v2'])}"
        )
    return found
