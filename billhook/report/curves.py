"""The curves of a sweep: what study.html draws, with its switches and its key. HTML, every string escaped."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape

from billhook.core.results.studies import SizeName, StudentOutcome, SweepResult
from billhook.report.numbers import pluralize, printable
from billhook.report.study_words import known_fraction, short_names, sizes_of, tasks_of, texts_of

COLOURS = ("#d9691b", "#3b82b0", "#3c9a54", "#9a68d0", "#cf4d8d", "#a08318", "#1c9a9c", "#808b97")  # on both grounds
SYMBOLS = {  # plotly's names, and their outlines for the key, 16 × 16
    "circle": "M14 8A6 6 0 1 1 2 8a6 6 0 1 1 12 0z",
    "square": "M3 3h10v10H3z",
    "diamond": "M8 1l7 7-7 7-7-7z",
    "triangle-up": "M8 2l7 12H1z",
    "x": "M5 2l3 3 3-3 3 3-3 3 3 3-3 3-3-3-3 3-3-3 3-3-3-3z",
    "triangle-down": "M8 14L1 2h14z",
    "cross": "M6 2h4v4h4v4h-4v4H6v-4H2V6h4z",
    "star": "M8 .5l2 5.3h5.6l-4.5 3.5 1.7 5.7L8 11.6l-4.8 3.4 1.7-5.7L.4 5.8H6z",
}
DASHES = {"solid": "", "dash": "7 4", "dot": "2 3", "dashdot": "7 3 2 3", "longdash": "12 4"}


def looks_of(recipes: Sequence[str]) -> dict[str, tuple[str, str]]:
    """(colour, symbol) of every recipe. A family (`sleb-kl`, `sleb-nll`) shares its colour, unless it is large."""
    sizes = Counter(name.partition("-")[0] for name in recipes)
    families: dict[str, list[str]] = {}
    for name in recipes:
        start = name.partition("-")[0]
        families.setdefault(start if sizes[start] <= len(SYMBOLS) else name, []).append(name)
    found, used = {}, dict.fromkeys(COLOURS, 0)
    for family in families.values():
        colour = min(COLOURS, key=used.__getitem__)  # the first of those that the fewest have
        for name in family:
            found[name] = colour, list(SYMBOLS)[(COLOURS.index(colour) + used[colour]) % len(SYMBOLS)]
            used[colour] += 1
    return {name: found[name] for name in recipes}


@dataclass(frozen=True)
class Point:
    """One trial of a line. `size`: as it was asked; `left`: percent of the teacher's, by size; `on`: by set."""

    size: str
    left: dict[SizeName, float | None]
    front: tuple[SizeName, ...]
    on: list[list[float | None]]


@dataclass(frozen=True)
class Line:
    """The trials of one recipe on one calibration text, and their look."""

    recipe: str
    label: str
    data: str
    colour: str
    symbol: str
    dash: str
    points: list[Point]


def numbers_of(result: SweepResult, looks: Mapping[str, tuple[str, str]]) -> dict[str, object]:
    """What study.html draws: a line for each recipe and calibration text, with what is left and the outcomes."""
    datas = short_names(trial.data for trial in result.trials)
    dashes = {data: list(DASHES)[i % len(DASHES)] for i, data in enumerate(datas)}
    lines: dict[tuple[str, str], Line] = {}
    for trial in result.trials:
        look = (*looks[trial.recipe], dashes[trial.data])
        line = Line(trial.recipe, printable(trial.recipe), datas[trial.data], *look, points=[])
        fractions = {size: known_fraction(result, trial, size) for size in sizes_of(result)}
        left = {size: None if share is None else 100 * share for size, share in fractions.items()}
        on = [_ends(trial.results[name]) for name in result.teacher]
        point = Point(printable(trial.remove), left, trial.front, on)
        lines.setdefault((trial.recipe, trial.data), line).points.append(point)
    return {
        "lines": list(map(asdict, lines.values())),
        "sizes": sizes_of(result),
        "on": list(short_names(result.teacher).values()),
        "teacher": [outcome.estimate.value for outcome in result.teacher.values()],
    }


def _ends(outcome: StudentOutcome) -> list[float | None]:
    """Value, low and high: of a text the change in nats, of a task the accuracy."""
    drawn = outcome.change if outcome.kind == "perplexity" else outcome.estimate
    return [x if math.isfinite(x) else None for x in (drawn.value, drawn.low, drawn.high)]


def curves_of(result: SweepResult, kind: str) -> str:
    """One chart and its switches: what it is measured on, and what it is drawn against."""
    names = short_names(result.teacher)
    order, wanted = list(names), texts_of(result) if kind == "perplexity" else tasks_of(result)
    if not wanted:
        return ""
    title = "Loss against what is left" if kind == "perplexity" else "Accuracy against what is left"
    switches = _choice("on", "Measured on", {str(order.index(name)): names[name] for name in wanted})
    switches += _choice("against", "Against", {str(size): words for size, words in sizes_of(result).items()})
    trials = pluralize(len(result.trials), "row")
    label = f"{kind} of {trials} against what is left of the teacher; the table has the numbers"
    at = f'data-on="{order.index(wanted[0])}" data-against="{next(iter(sizes_of(result)))}"'
    box = f'<div class="chart" role="img" aria-label="{escape(label)}" data-kind="{kind}" {at}></div>'
    caption = (
        "Perplexity as a multiple of the teacher's (dotted: as good as the teacher), bars: paired 95% intervals. "
        "Filled and joined by the grey band: the Pareto front, where no other row is both as small and as good, taken "
        "over all texts together."
        if kind == "perplexity"
        else "Share of items answered right; bars: 95% intervals; dotted: the teacher. Filled: the Pareto front by "
        "perplexity."
    )
    return f'<section class="curves"><h2>{title}</h2>{switches}{box}<p class="beyond"></p><p>{caption}</p></section>'


def _choice(key: str, label: str, options: Mapping[str, str]) -> str:
    """Buttons of which one is on."""
    buttons = "".join(
        f'<button type="button" data-value="{escape(value)}" aria-pressed="{"true" if i == 0 else "false"}">'
        f"{escape(words)}</button>"
        for i, (value, words) in enumerate(options.items())
    )
    one = ' class="one"' if len(options) == 1 else ""
    return f'<div{one} role="group" aria-label="{label}" data-choice="{key}"><span>{label}</span>{buttons}</div>'


def key_of(result: SweepResult, looks: Mapping[str, tuple[str, str]]) -> str:
    """The key of both charts: a button a recipe, which singles it out, and the dashes of the calibration texts."""
    buttons = "".join(
        f'<button type="button" aria-pressed="false" data-recipe="{escape(name)}"><svg viewBox="-6 0 28 16" '
        f'aria-hidden="true" style="color:{colour}"><path d="M-6 8h28" class="stroke"/>'
        f'<path d="{SYMBOLS[symbol]}"/></svg>{escape(printable(name))}</button>'
        for name, (colour, symbol) in looks.items()
    )
    datas = list(short_names(trial.data for trial in result.trials).values())
    lines = "".join(
        f'<span><svg viewBox="0 0 40 16" aria-hidden="true"><path d="M0 8h40" class="stroke" stroke-dasharray='
        f'"{list(DASHES.values())[i % len(DASHES)]}"/></svg>calibrated on {escape(data)}</span>'
        for i, data in enumerate(datas)
    )
    hint = "<small>Point at a recipe to single it out; press it to keep it so.</small>" if len(looks) > 1 else ""
    return f'<div class="legend">{buttons}{lines if len(datas) > 1 else ""}{hint}</div>'
