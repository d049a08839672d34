"""Alerts: what was observed, what a rule allows, and where it is exceeded. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from billhook.core.events import ALERT, Event
from billhook.core.results.json_form import decode, encode
from billhook.core.results.measured import Estimate

Kind = Literal["quality", "drift", "latency", "throughput", "errors", "speed", "memory", "stopped", "stalled"]
Severity = Literal["warning", "critical"]
Unit = Literal["pp", "%ppl", "x", "s", "tokens/s", "%", "bytes", ""]
Against = Literal["", "baseline"]  # what a ratio (`x`) is to; empty: to the first round of its series


@dataclass(frozen=True, slots=True)
class Observation:
    """One value of one thing, `what`, at a time in seconds since 1970.

    - `quality`, `drift`: what was lost, in points (`pp`) or percent of perplexity (`%ppl`).
    - `latency`, `throughput`: in seconds or tokens per second, or as a ratio to a reference (`x`).
    - `errors`: percent of requests; `speed`: percent of the predicted speed; `memory`: bytes.
    - `stopped`, `stalled`: seconds since a run did anything.

    `step`: the step that caused it, where a lineage of checkpoints says so. `against`: what a ratio is to.
    """

    kind: Kind
    what: str
    unit: Unit
    value: Estimate
    at: float
    step: str = ""
    against: Against = ""


@dataclass(frozen=True, slots=True)
class Rule:
    """What is allowed of one kind of observation, in one unit. `what`: of one task or run alone; empty: of all.

    `falls`: the limit is the lowest that is allowed, not the highest. `rounds`: observations in a row that exceed it.
    `against`: what its ratios are to; None: anything.
    """

    name: str
    kind: Kind
    severity: Severity
    limit: float
    unit: Unit
    falls: bool = False
    what: str = ""
    rounds: int = 1
    against: Against | None = None

    def is_about(self, observation: Observation) -> bool:
        """Whether the rule holds for an observation."""
        same = (self.kind, self.unit) == (observation.kind, observation.unit)
        return same and self.what in ("", observation.what) and self.against in (None, observation.against)

    def is_broken_by(self, observation: Observation) -> bool:
        """Whether an observation exceeds the limit with its whole interval."""
        value = observation.value
        return value.high < self.limit if self.falls else value.low > self.limit


@dataclass(frozen=True, slots=True)
class Alert:
    """A rule that does not hold: of `what`, the `value`, the `threshold` in `unit`, and since when, from 1970."""

    rule: str
    severity: Severity
    kind: Kind
    what: str
    value: Estimate
    threshold: float
    unit: Unit
    since: float
    step: str = ""
    against: Against = ""

    def event(self) -> Event:
        """Return the event that tells of the alert."""
        told = encode(self)
        return Event(ALERT, values={**{f"value_{k}": v for k, v in told.pop("value").items()}, **told})

    @staticmethod
    def from_event(event: Event) -> Alert:
        """Return the alert of an event. Raises ResultError for another event."""
        value = {k.removeprefix("value_"): v for k, v in event.values.items() if k.startswith("value_")}
        return decode(Alert, {**event.values, "value": value})


def evaluate(rules: Iterable[Rule], observations: Iterable[Observation]) -> tuple[Alert, ...]:
    """Return the alerts that hold at the last observation of each thing; observations of one thing in their order."""
    ordered = sorted(observations, key=_thing)
    things = [tuple(series) for _, series in groupby(ordered, key=_thing)]
    found = (_alert(rule, series) for rule in rules for series in things if rule.is_about(series[0]))
    return tuple(alert for alert in found if alert is not None)


def _thing(observation: Observation) -> tuple[str, str, str, str]:
    return observation.kind, observation.what, observation.unit, observation.against


def _alert(rule: Rule, series: Sequence[Observation]) -> Alert | None:
    broken = 0
    for observation in reversed(series):
        if not rule.is_broken_by(observation):
            break
        broken += 1
    if broken < rule.rounds:
        return None
    last = series[-1]
    since = series[-broken].at
    about = (rule.name, rule.severity, rule.kind, last.what, last.value, rule.limit, rule.unit, since)
    return Alert(*about, step=last.step, against=last.against)


def new_alerts(alerts: Iterable[Alert], known: Iterable[Alert]) -> tuple[Alert, ...]:
    """Return the alerts of which nothing was known: another rule, another thing, or one that held in between."""
    before = {_told(alert) for alert in known}
    return tuple(alert for alert in alerts if _told(alert) not in before)


def _told(alert: Alert) -> tuple[str, str, str, float]:
    return alert.rule, alert.what, alert.against, alert.since


def exact(value: float) -> Estimate:
    """Return a value that was counted, not sampled, as an estimate."""
    return Estimate(value, value, value, 1, 1, reliable=True)
