"""Pareto fronts: quality against each size, in charts that single out one student together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from billhook.core.results.measured import Estimate
from billhook.dashboard.entries import Entry, front
from billhook.report.charts import Axis, Form, Line, Point, figure, front_line, key_of, round_ticks, xy_chart
from billhook.report.numbers import (
    format_duration,
    format_interval,
    format_number,
    format_ratio,
    pluralize,
    reliability_note,
)
from billhook.report.trials.tasks import changes_chart

COLOURS = ("--orange", "--blue", "--green", "--violet", "--pink", "--olive", "--teal", "--grey")
SYMBOLS = ("circle", "square", "diamond", "triangle", "cross", "down", "plus", "star")


@dataclass(frozen=True, slots=True)
class Against:
    """One axis of a front. `value`: None where it is not known; `better`: -1 where less is better, 1 where more is."""

    title: str  # what stands after `against`
    axis: str
    form: Form
    value: Callable[[Entry], float | None]
    words: Callable[[Entry, float], str]
    better: int = -1


def _percent(what: str) -> Callable[[Entry], float | None]:
    def value(entry: Entry) -> float | None:
        left = entry.left(what)
        return None if left is None else round(100 * left, 4)

    return value


def _rate(entry: Entry) -> float | None:
    return entry.rate.value if entry.rate else None


def _rate_words(entry: Entry, x: float) -> str:
    assert entry.rate is not None
    return f"{format_number(x)} tokens/s (95%: {format_interval(entry.rate, format_number)}; n = {entry.rate.n})"


AGAINST = (
    Against(
        "parameters", "Parameters left", "percent", _percent("parameters"),
        lambda entry, x: f"{x:.1f}% of the parameters, counted",
    ),
    Against(
        "KV cache", "KV cache left", "percent", _percent("kv_bytes_per_token"),
        lambda entry, x: f"{x:.1f}% of the KV cache, counted",
    ),
    Against(
        "time", "Time of the sites left", "percent", _percent("ns_per_token"),
        lambda entry, x: f"{x:.1f}% of the time of a decoding step, measured without an interval",
    ),
    Against(
        "tokens per second", "Tokens decoded per second", "number", _rate,
        _rate_words, 1,
    ),
    Against(
        "memory", "Peak memory", "bytes", lambda entry: entry.memory,
        lambda entry, x: f"{format_number(x, 'B')} at the peak, one process, no interval",
    ),
    Against(
        "cost", "Time to make it", "seconds", lambda entry: entry.seconds,
        lambda entry, x: f"{format_duration(x)} to make it, counted once",
    ),
)  # fmt: skip


def lines_key(entries: Sequence[Entry]) -> str:
    """The buttons that single a student out in every chart."""
    return key_of([_line(entries, number, ()) for number in range(len(entries))], buttons=True)


def _line(entries: Sequence[Entry], number: int, points: tuple[Point, ...]) -> Line:
    colour, symbol = COLOURS[number % len(COLOURS)], SYMBOLS[(number // len(COLOURS) + number) % len(SYMBOLS)]
    return Line(entries[number].name, points, colour, symbol)


def tasks_chart(entries: Sequence[Entry]) -> str:
    """What each student gains or pays on each task; nothing where they were measured on fewer than two."""
    lines = {entry.name: _line(entries, number, ()) for number, entry in enumerate(entries)}
    looks = {name: (line.colour, line.symbol) for name, line in lines.items()}
    return changes_chart({entry.name: entry.tasks for entry in entries}, looks)


def fronts(entries: Sequence[Entry]) -> list[str]:
    """A chart for each axis of which two students or more are known."""
    return [chart for against in AGAINST if (chart := _front(entries, against))]


def _front(entries: Sequence[Entry], against: Against) -> str:
    known = [
        (number, entry, x, entry.quality) for number, entry in enumerate(entries)
        if (x := against.value(entry)) is not None and entry.quality is not None and math.isfinite(entry.quality.value)
    ]  # fmt: skip
    if len({x for _, _, x, _ in known}) < 2:
        return ""
    best = set(front([(-against.better * x, quality.value) for _, _, x, quality in known]))
    lines = []
    for i, (number, entry, x, quality) in enumerate(known):
        tip = f"{entry.name}: {_quality_words(quality)}; {against.words(entry, x)}" + (
            "; on the front" if i in best else ""
        )
        point = Point(x, math.log(quality.value), tip, _log(quality.low), _log(quality.high), hollow=i not in best)
        lines.append(_line(entries, number, (point,)))
    y = Axis("Perplexity over the teacher's", "nats_as_ratio")
    xs = [x for _, _, x, _ in known]
    option = xy_chart(lines, Axis(against.axis, against.form, ticks=_spread(xs)), y, marks={"as the teacher": 0.0})
    joined = [Point(x, math.log(quality.value), "") for i, (_, _, x, quality) in enumerate(known) if i in best]
    option["series"].insert(0, front_line(joined))
    names = ", ".join(known[i][1].name for i in sorted(best))
    more = "right" if against.better > 0 else "left"
    words = f"Bars: 95% intervals. Filled and joined: the Pareto front, {names}. Better is lower and to the {more}."
    if left := len(entries) - len(known):
        words += f" Without these figures: {pluralize(left, 'student')}."
    label = f"Perplexity over the teacher's against {against.title} of {pluralize(len(known), 'student')}."
    return figure(option, title=f"Quality against {against.title}", label=label, caption=words, height=300)


def _quality_words(quality: Estimate) -> str:
    words = f"perplexity {format_ratio(quality.value)} (95%: {format_interval(quality, format_ratio)}; n = {quality.n})"
    return f"{words}. {reliability_note(quality)}" if not quality.reliable else words


def _log(x: float) -> float:
    return math.log(x) if 0 < x < math.inf else math.nan


def _spread(xs: Sequence[float]) -> tuple[float, ...]:
    low, high = min(xs), max(xs)
    return round_ticks(low - 0.05 * (high - low), high + 0.05 * (high - low), 5)
