"""Rules over what a run found: its alerts as events."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from billhook.core.events import EventListener
from billhook.core.monitoring.alerts import Alert, Observation, Rule, evaluate
from billhook.core.monitoring.observations import observations_of
from billhook.core.monitoring.rules import default_rules, read_rules
from billhook.core.results.json_form import Result
from billhook.runs.store import Store

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
    store: Store,
    run: str,
    watch: EventListener,
    result: Result,
    rules: Sequence[Rule],
    *,
    more: Sequence[Observation] = (),
) -> tuple[Alert, ...]:
    """Hold the result of a run against rules, and tell of what breaks them. `more`: further observations."""
    found = evaluate(rules, (*observations_of(result, time.time()), *more))
    tell_alerts(store, run, watch, found)
    return found
