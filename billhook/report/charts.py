"""Charts of all pages: ECharts options as plain JSON, and the figures around them. charts.js draws them.

A colour is the name of a variable of style.css (`--orange`), a number format one of charts.js (`ratio`), so that one
option serves a light and a dark page. Every point carries a tip: what its tooltip says, and what keys read aloud.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any, Literal

from billhook.core.results.json_form import JsonObject
from billhook.core.results.measured import Estimate

Form = Literal[
    "number", "ratio", "nats_as_ratio", "exp", "nats", "percent", "share", "points", "bytes", "seconds", "integer"
]  # how charts.js writes a number
LOGARITHMS = ("nats_as_ratio", "exp")  # forms of axes whose numbers are logarithms, to the base e
MOST_NATS = 700.0  # of which exp is a number
COLOURS = ("--orange", "--blue", "--green", "--violet", "--pink", "--olive", "--teal", "--grey")
SYMBOLS = ("circle", "square", "diamond", "triangle", "cross", "down", "plus", "star")
DASHES = {"solid": "", "dash": "7 4", "dot": "2 3", "dashdot": "7 3 2 3", "longdash": "12 4"}


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis. `form`: how charts.js writes its numbers; `labels`: of an axis of names; `ticks`: where not round.

    `low`, `high`: its ends; without them it holds every point and whisker, and ends at round numbers. `zero`: it does
    so from 0.
    """

    name: str = ""
    form: Form = "number"
    low: float | None = None
    high: float | None = None
    ticks: tuple[float, ...] = ()
    labels: tuple[str, ...] = ()
    zero: bool = False

    def to_json(self) -> JsonObject:
        """Return the axis as ECharts takes it."""
        if self.labels:
            label = {"width": 130, "overflow": "truncate", "interval": 0, "hideOverlap": False}
            return {"type": "category", "name": self.name, "data": list(self.labels), "axisLabel": label,
                    "axisTick": {"show": False}}  # fmt: skip
        ends = {name: end for name, end in (("min", self.low), ("max", self.high)) if end is not None}
        axis: JsonObject = {"type": "value", "name": self.name, "scale": not self.zero, **ends}
        custom = {"customValues": list(self.ticks)} if self.ticks else {}
        return axis | {"axisLabel": {"formatter": f"@{self.form}", **custom}, "axisTick": custom}


@dataclass(frozen=True, slots=True)
class Point:
    """One point: a place, a value, the ends of its interval where they are known, and what is told of it."""

    x: float
    value: float
    tip: str
    low: float | None = None
    high: float | None = None
    colour: str = ""
    symbol: str = ""
    hollow: bool | None = None

    @staticmethod
    def of(x: float, estimate: Estimate, tip: str, **more: Any) -> Point:
        """Return the point of an estimate."""
        return Point(x, estimate.value, tip, estimate.low, estimate.high, **more)


@dataclass(frozen=True, slots=True)
class Line:
    """Points of one name. `joined`: by a line; `banded`: its intervals are an area; `symbol`: empty for no dots."""

    name: str
    points: tuple[Point, ...]
    colour: str = "--orange"
    symbol: str = "circle"
    dash: str = "solid"
    hollow: bool = False
    joined: bool = False
    banded: bool = False
    shift: int = 0  # pixels, so that equal places do not hide each other
    size: int = 12


def xy_chart(lines: Sequence[Line], x: Axis, y: Axis, *, marks: Mapping[str, float] | None = None) -> JsonObject:
    """Return lines and points over two axes of numbers. `marks`: dotted lines across, at values of y, by name."""
    series = [each for line in lines for each in _series(line, across=False)]
    y = _with_round_ratios(y, lines)
    series += [_mark(name, "yAxis", value) for name, value in (marks or {}).items()]
    below = x.to_json() | ({"axisLine": {"onZero": False}} if y.form == "exp" else {})  # whose 0 is the number 1
    return {"xAxis": below, "yAxis": y.to_json(), "series": series}


def names_chart(lines: Sequence[Line], x: Axis, names: Sequence[str], *, at: float | None = None) -> JsonObject:
    """Return values with whiskers beside names, from top to bottom: `Point.x` is the number of its name.

    `at`: a dotted line downwards, such as no change.
    """
    y = Axis(labels=tuple(names)).to_json() | {"inverse": True}
    series = [each for line in lines for each in _series(line, across=True)]
    x = _with_round_ratios(x, lines)
    series += [] if at is None else [_mark("", "xAxis", at)]
    return {"xAxis": x.to_json(), "yAxis": y, "series": series}


def bar_chart(points: Sequence[Point], x: Axis, y: Axis, *, colour: str = "--blue") -> JsonObject:
    """Return bars with whiskers, `Point.x` being the number of its label of `x`."""
    data = [{"value": [p.x, p.value], "tip": p.tip, "itemStyle": {"color": p.colour or colour}} for p in points]
    bars = {"type": "bar", "data": data, "barCategoryGap": "15%"}
    whiskers = Line("", tuple(replace(p, colour="--ink") for p in points), "--ink", size=0)
    known = any(p.low is not None for p in points)
    axis = y.to_json() | ({} if y.low is not None else {"scale": False})
    series = [bars, *(_series(whiskers, across=False) if known else [])]
    return {"xAxis": x.to_json(), "yAxis": axis, "series": series}


def front_line(points: Sequence[Point]) -> JsonObject:
    """Return the broad grey line that joins a Pareto front, in order of x."""
    data = [[p.x, _known(p.value)] for p in sorted(points, key=lambda p: p.x)]
    style = {"color": "--line", "width": 11, "cap": "round", "join": "round"}
    return {"type": "line", "data": data, "symbol": "none", "silent": True, "lineStyle": style, "z": 0}


def _with_round_ratios(axis: Axis, lines: Sequence[Line]) -> Axis:
    """Give an axis of logarithms, which has no ends of its own, ends around all values, and round ratios as ticks."""
    if axis.form not in LOGARITHMS or axis.ticks:
        return axis
    given = (x for line in lines for p in line.points for x in (p.low, p.value, p.high))
    ends = [x for x in given if x is not None and math.isfinite(x)] or [0.0]
    low, high = min(ends), max(ends)
    low, high = (min(low, 0.0), max(high, 0.0)) if axis.form == "nats_as_ratio" else (low, high)
    room = 0.06 * (high - low) or 0.05
    low, high = low - room, high + room
    ticks = tuple(map(math.log, ratio_ticks(math.exp(low), math.exp(min(high, MOST_NATS)))))
    return replace(axis, low=low, high=high, ticks=ticks)


def _series(line: Line, across: bool) -> list[JsonObject]:
    series: list[JsonObject] = []
    color = line.colour
    if line.banded:
        ends = [[p.x, _known(p.low), _known(p.high)] for p in line.points]
        series.append({"type": "@band", "name": line.name, "color": color, "data": ends})
    if line.joined:
        dashes = list(map(int, DASHES[line.dash].split())) or "solid"
        style = {"color": color, "width": 2, "type": dashes}
        data = [[p.x, _known(p.value)] for p in line.points]
        series.append({"type": "line", "name": line.name, "data": data, "symbol": "none", "silent": True,
                       "lineStyle": style})  # fmt: skip
    if line.symbol:
        data_ = [_item(point, whiskers=not line.banded) for point in line.points]
        series.append({"type": "@interval", "name": line.name, "color": color, "symbol": line.symbol, "data": data_,
                       "hollow": line.hollow, "across": across, "shift": line.shift, "size": line.size})  # fmt: skip
    return series


def _item(point: Point, whiskers: bool) -> JsonObject:
    ends = [_known(point.low), _known(point.high)] if whiskers else [None, None]
    look = {"color": point.colour, "symbol": point.symbol, "hollow": point.hollow}
    given = {name: value for name, value in look.items() if value not in ("", None)}
    return {"value": [point.x, _known(point.value), *ends], "tip": point.tip, **given}


def _mark(name: str, axis: str, value: float) -> JsonObject:
    line = {"color": "--dim", "type": "dotted", "width": 1.5}
    label = {"show": bool(name), "formatter": name, "position": "insideStartTop", "color": "--dim"}
    mark = {"silent": True, "symbol": "none", "lineStyle": line, "label": label, "data": [{axis: value}]}
    return {"type": "scatter", "data": [], "silent": True, "markLine": mark}


def _known(x: float | None) -> float | None:
    return None if x is None or not math.isfinite(x) else x


# -- ticks -------------------------------------------------------------------------------------------------------------


def round_ticks(low: float, high: float, most: int = 6) -> tuple[float, ...]:
    """Return at most `most` round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return (low,)
    power = math.floor(math.log10((high - low) / most))
    steps = (digit * 10.0**p for p in (power, power + 1, power + 2) for digit in (1, 2, 5))
    step = next(s for s in steps if math.floor(high / s + 1e-9) - math.ceil(low / s - 1e-9) < most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(float(f"{i * step:.12g}") for i in range(first, last + 1))


def ratio_ticks(low: float, high: float, most: int = 8) -> tuple[float, ...]:
    """Return round numbers from `low` to `high`, both above 0, for an axis on which equal ratios are equally far."""
    for digits in ((1, 1.2, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
        found = [float(f"{d * 10.0**p:.12g}") for p in powers for d in digits if low <= d * 10.0**p <= high]
        if len(found) < 3:
            return round_ticks(low, high, most)
        if len(found) <= most:
            return tuple(found)
    return tuple(found[:: math.ceil(len(found) / most)])


# -- figures -----------------------------------------------------------------------------------------------------------


def figure(option: JsonObject, *, title: str, label: str, caption: str, height: int = 320, key: str = "") -> str:
    """Return one chart as HTML. `label` says what is to be seen; `caption` what it means and where it comes from.

    `key`: HTML of `key_of`, where lines have names that the chart does not show.
    """
    return _figure(option, {"data-height": str(height)}, (title, label, caption), key)


def switched_figure(
    options: Mapping[tuple[str, ...], JsonObject],
    switches: Sequence[tuple[str, Mapping[str, str]]],
    *,
    title: str,
    label: str,
    caption: str,
    height: int = 320,
) -> str:
    """Return a chart of which buttons choose what is drawn: the name of each switch, and its words by value.

    `options`: by one value of every switch, none of which holds a space. The first of each is drawn at first.
    """
    buttons = "".join(_switch(name, choices) for name, choices in switches)
    first = " ".join(next(iter(choices)) for _, choices in switches)
    named = {" ".join(values): option for values, option in options.items()}
    return _figure(named, {"data-height": str(height), "data-shown": first}, (title, label, caption), buttons)


def _figure(option: JsonObject, more: Mapping[str, str], words: tuple[str, str, str], above: str) -> str:
    title, label, caption = words
    told = {"aria-label": label, **more, "data-option": json.dumps(option, allow_nan=False)}
    given = " ".join(f'{name}="{escape(value)}"' for name, value in told.items())
    head = f"<h3>{escape(title)}</h3>" if title else ""
    return (
        f'<figure class="chart">{head}{above}<p class="axis above"></p><div class="plot" role="img" tabindex="0" '
        f'{given}></div><p class="axis below"></p><output class="aloud"></output>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _switch(name: str, choices: Mapping[str, str]) -> str:
    """Buttons of which one is on."""
    buttons = "".join(
        f'<button type="button" data-value="{escape(value)}" aria-pressed="{"false" if i else "true"}">'
        f"{escape(words)}</button>"
        for i, (value, words) in enumerate(choices.items())
    )
    one = " hidden" if len(choices) == 1 else ""
    told = f'class="switch" role="group" aria-label="{escape(name)}" data-switch{one}'
    return f"<div {told}><span>{escape(name)}</span>{buttons}</div>"


def key_of(lines: Sequence[Line], *, buttons: bool = False) -> str:
    """Return the key of lines as HTML. With `buttons` each singles its line out in all charts of one `.linked`."""
    entries = []
    for line in {line.name: line for line in lines}.values():
        stroke = f'<path class="stroke" d="M-6 8h28" stroke-dasharray="{DASHES[line.dash]}"/>' if line.joined else ""
        mark = (
            f'<path class="{"hollow" if line.hollow else "full"}" d="{OUTLINES[line.symbol]}"/>' if line.symbol else ""
        )
        svg = f'<svg class="tone{line.colour}" viewBox="-6 0 28 16" aria-hidden="true">{stroke}{mark}</svg>'
        words = f"{svg}{escape(line.name)}"
        if buttons:
            told = f'data-series="{escape(line.name)}" aria-pressed="false"'
            entries.append(f'<button type="button" {told}>{words}</button>')
        else:
            entries.append(f"<span>{words}</span>")
    return f'<div class="key">{"".join(entries)}</div>'


OUTLINES = {  # those of charts.js, 16 × 16
    "circle": "M14 8A6 6 0 1 1 2 8a6 6 0 1 1 12 0z",
    "square": "M3 3h10v10H3z",
    "diamond": "M8 1l7 7-7 7-7-7z",
    "triangle": "M8 2l7 12H1z",
    "cross": "M5 2l3 3 3-3 3 3-3 3 3 3-3 3-3-3-3 3-3-3 3-3-3-3z",
    "down": "M8 14L1 2h14z",
    "plus": "M6 2h4v4h4v4h-4v4H6v-4H2V6h4z",
    "star": "M8 .5l2 5.3h5.6l-4.5 3.5 1.7 5.7L8 11.6l-4.8 3.4 1.7-5.7L.4 5.8H6z",
}
