"""Rules over what a run found: its alerts as events, and to a webhook where one is asked for."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from billhook.core.errors import UsageError, option
from billhook.core.events import Event, EventListener
from billhook.core.monitoring.alerts import Alert, Rule, evaluate
from billhook.core.monitoring.observations import observations_of
from billhook.core.monitoring.rules import default_rules, read_rules
from billhook.core.results.json_form import Result, encode
from billhook.core.results.run import RunResult
from billhook.report.monitoring.alert_words import alert_sentence
from billhook.runs.store import Store
from billhook.studies.monitoring.lineage import caused_by, whole_loss
from billhook.studies.servers.webhook import Webhook

RulesFile = str | Path | None


def rules_of(file: RulesFile, default: str = "") -> tuple[Rule, ...]:
    """Return the rules of a file; without one those that come with Billhook under the name `default`, if any."""
    if file is not None:
        return read_rules(file)
    return default_rules(default) if default else ()


@dataclass(frozen=True, slots=True)
class Alarm:
    """What is an alert, and the webhook that is told of it, if any."""

    rules: tuple[Rule, ...]
    webhook: Webhook | None = None

    @staticmethod
    def read(rules: RulesFile, webhook: str | None, default: str = "") -> Alarm:
        """Read the rules, as `rules_of`, and the address. Raises RecipeError, UsageError, MissingExtra."""
        read = rules_of(rules, default)
        if webhook is not None and not read:
            raise UsageError(f"{option('webhook')} is told of alerts, and no rule makes any. Add {option('rules')}.")
        return Alarm(read, None if webhook is None else Webhook.parse(webhook))


def tell_alerts(store: Store, run: str, watch: EventListener, alerts: Iterable[Alert]) -> None:
    """Store alerts as events of a run, and hand them to who watches."""
    for alert in alerts:
        store.add_event(run, alert.event(), at_once=True)
        watch(alert.event())


def call_webhook(
    store: Store, run: str, watch: EventListener, hook: Webhook | None, *, target: str, alerts: Sequence[Alert]
) -> None:
    """Send alerts about `target` to a webhook. What goes wrong is an event of the run, and nothing more."""
    if hook is None or not alerts:
        return
    payload = {"text": "\n".join(map(alert_sentence, alerts)), "target": target, "run": run}
    if failure := hook.send(payload | {"alerts": [encode(alert) for alert in alerts]}):
        event = Event("webhook", values={"host": hook.host, "failed": failure})
        store.add_event(run, event, at_once=True)
        watch(event)


def check_result(
    store: Store, run: str, watch: EventListener, result: Result, alarm: Alarm, *, target: str, folder: str = ""
) -> tuple[Alert, ...]:  # fmt: skip
    """Hold the result of a run about `target`, a model, against rules, and tell of what breaks them.

    `folder`: the checkpoint that the result is about; where that is the last of several prunings, what they lost
    together is held against the rules too, and alerts name the step that caused it.
    """
    at = time.time()
    found = observations_of(result, at)
    if isinstance(result, RunResult):
        found += whole_loss(folder, at) if folder else ()
    elif folder and (step := caused_by(folder)):
        found = tuple(replace(each, step=step) for each in found)
    broken = evaluate(alarm.rules, found)
    tell_alerts(store, run, watch, broken)
    call_webhook(store, run, watch, alarm.webhook, target=target, alerts=broken)
    return broken
