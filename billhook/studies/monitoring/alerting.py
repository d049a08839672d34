"""Rules over what a run found: its alerts as events."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from billhook.core.events import EventListener
from billhook.core.monitoring.alerts import Alert, Rule, evaluate
from billhook.core.monitoring.observations import observations_of
from billhook.core.monitoring.rules import default_rules, read_rules
from billhook.core.results.json_form import Result
from billhook.core.results.run import RunResult
from billhook.runs.store import Store
from billhook.studies.monitoring.lineage import caused_by, whole_loss

RulesFile = str | Path | None


def rules_of(file: RulesFile, default: str = "") -> tuple[Rule, ...]:
    """Return the rules of a file; without one those that come with Billhook under the name `default`, if any."""
    if file is not None:
        return read_rules(file)
    return default_rules(default) if default else ()


def tell_alerts(store: Store, run: str, watch: EventListener, alerts: Iterable[Alert]) -> None:
    """Store alerts as events of a run, and hand them to who watches."""
    for alert in alerts:
        store.add_event(run, alert.event(), at_once=True)
        watch(alert.event())


def check_result(
    store: Store, run: str, watch: EventListener, result: Result, rules: Sequence[Rule], *, folder: str = ""
) -> tuple[Alert, ...]:
    """Hold the result of a run against rules, and tell of what breaks them.

    `folder`: the checkpoint that the result is about; where that is the last of several prunings, what they lost
    together is held against the rules too, and alerts name the step that caused it.
    """
    at = time.time()
    found = observations_of(result, at)
    if isinstance(result, RunResult):
        found += whole_loss(folder, at) if folder else ()
    elif folder and (step := caused_by(folder)):
        found = tuple(replace(each, step=step) for each in found)
    broken = evaluate(rules, found)
    tell_alerts(store, run, watch, broken)
    return broken
