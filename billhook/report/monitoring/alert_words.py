"""Alerts and watches as words."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import get_args

from billhook.core.monitoring.alerts import Against, Alert, Kind, Observation, Unit
from billhook.core.results.measured import Estimate
from billhook.core.results.monitoring import AlertList, WatchResult
from billhook.report.numbers import format_duration, format_number, pluralize, printable

NAMES = {"quality": "loss", "drift": "loss", "speed": "speed, of the predicted"}
UNITS: dict[Unit, str] = {
    "pp": " points", "%ppl": "% of perplexity", "x": "×", "%": "%", "s": " s", "tokens/s": " tokens/s",
    "bytes": " GB", "": "",
}  # fmt: skip
KIND_ORDER = get_args(Kind)
WATCH_COLUMNS = ("", "first shown", "last", "interval", "n")
ALERT_COLUMNS = ("since", "severity", "rule", "what", "value", "interval", "limit")


def spell(value: float, unit: Unit) -> str:
    """Return a value with its unit: `2.5 points`, `3.1% of perplexity`, `1.5×`, `8.0 GB`."""
    if not math.isfinite(value):
        return "not known"
    if unit == "bytes":
        return f"{value / 1e9:,.2f}{UNITS[unit]}"
    if unit == "s" and value >= 60:
        return format_duration(value)
    return format_number(value).replace("-", "−") + UNITS[unit]


def interval_words(value: Estimate, unit: Unit) -> str:
    """Return `0.9 to 1.1 s`, or that it is counted or not known."""
    if value.low == value.high:
        return "counted"
    low, high = spell(value.low, unit), spell(value.high, unit)
    both = math.isfinite(value.low) and math.isfinite(value.high) and (unit != "s" or value.high < 60)
    return f"{low.removesuffix(UNITS[unit]) if both else low} to {high}"


def reference_words(unit: Unit, against: Against) -> str:
    """Return what a ratio is to: `the baseline`; empty of other units."""
    return ("the baseline" if against else "the first round") if unit == "x" else ""


def alert_sentence(alert: Alert) -> str:
    """Return one line: what broke which rule, by how much, since when, and the step that caused it."""
    about = f"{alert.severity}: {alert.rule}: {printable(alert.what)}"
    since = f"since {stamp(alert.since)}"
    if alert.kind == "stopped":
        return f"{about} stopped {format_duration(alert.value.value)} ago and was not done again"
    value = f"{NAMES.get(alert.kind, alert.kind)} {spell(alert.value.value, alert.unit)}"
    value += f" that of {of}" if (of := reference_words(alert.unit, alert.against)) else ""
    ends = (
        ""
        if alert.value.low == alert.value.high
        else f" ({interval_words(alert.value, alert.unit)}, n = {alert.value.n:,})"
    )
    step = f"; caused by step {printable(alert.step)}" if alert.step else ""
    return f"{about}: {value}{ends}, limit {spell(alert.threshold, alert.unit)}, {since}{step}"


def stamp(at: float) -> str:
    """Return a time in this machine's zone, to the minute."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))


def alert_rows(alerts: Sequence[Alert]) -> list[tuple[str, ...]]:
    """Return a row for each alert, under `ALERT_COLUMNS`."""
    return [_alert_row(each) for each in alerts]


def _alert_row(alert: Alert) -> tuple[str, ...]:
    of = reference_words(alert.unit, alert.against)
    what = printable(alert.what) + (f", against {of}" if of else "")
    about = (stamp(alert.since), alert.severity, printable(alert.rule), what)
    limit = spell(alert.threshold, alert.unit) if alert.unit else "–"
    return (*about, spell(alert.value.value, alert.unit), interval_words(alert.value, alert.unit), limit)


def watch_rows(result: WatchResult) -> list[tuple[str, ...]]:
    """Return a row for each thing that is watched: its first and last shown value, the interval, and n."""
    rows: list[tuple[str, ...]] = []
    for seen in series_of(result):
        first, last, unit = seen[0].value, seen[-1].value, seen[0].unit
        shown = (spell(first.value, unit), spell(last.value, unit), interval_words(last, unit), f"{last.n:,}")
        rows.append((series_name(seen[0]), *shown))
    return rows


def series_of(result: WatchResult) -> list[list[Observation]]:
    """Return the observations of each thing that is watched, in the order of rounds; things by their kind."""
    things: dict[tuple[Kind, str, Unit, Against], list[Observation]] = {}
    for each in result.observations:
        things.setdefault((each.kind, each.what, each.unit, each.against), []).append(each)
    return [seen for _, seen in sorted(things.items(), key=lambda thing: KIND_ORDER.index(thing[0][0]))]


def series_name(observation: Observation) -> str:
    """Return what is watched, and of what: `loss, gsm8k.jsonl`, `latency, against the baseline`."""
    of = reference_words(observation.unit, observation.against)
    about = f"against {of}" if of else printable(observation.what)
    return f"{NAMES.get(observation.kind, observation.kind)}, {about}"


def watch_headline(result: WatchResult) -> str:
    """Return what a watch found, in one sentence."""
    many = pluralize(result.rounds, "round")
    found = pluralize(len(result.alerts), "alert") if result.alerts else "no alert"
    return f"{many} against {result.baseline}: {found}"


def watch_notes(result: WatchResult) -> list[str]:
    """Return how far the intervals hold, and what cannot raise an alert because it is asked too few things."""
    notes = [
        f"Intervals hold over all rounds at once: a series without change raises an alert with a chance of at most "
        f"{result.alpha:.0%}."
    ]
    blind = dict.fromkeys(
        f"{each.kind} ({each.unit})" for each in result.observations[-12:] if math.isinf(each.value.low)
    )
    if blind:
        notes.append(
            f"Too few values for an interval after {result.rounds} rounds: {', '.join(blind)}. Give more probes."
        )
    return notes


def list_headline(found: AlertList) -> str:
    """Return how many alerts there are."""
    return f"{pluralize(len(found.now), 'alert')} now, {len(found.told)} told by runs"
