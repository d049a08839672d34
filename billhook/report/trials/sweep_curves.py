"""The curves of a sweep: one chart of perplexities and one of accuracies, with their switches and their key."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from billhook.core.results.json_form import JsonObject
from billhook.core.results.studies import SizeName, StudentOutcome, SweepResult, TrialResult
from billhook.report.charts import (
    COLOURS,
    DASHES,
    SYMBOLS,
    Axis,
    Line,
    Point,
    front_line,
    key_of,
    ratio_ticks,
    switched_figure,
    xy_chart,
)
from billhook.report.numbers import (
    format_accuracy,
    format_interval,
    format_perplexity_ratio,
    pluralize,
    printable,
)
from billhook.report.study_words import known_fraction, short_names, sizes_of, tasks_of, texts_of

Looks = Mapping[str, tuple[str, str]]  # colour and symbol by recipe


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
            found[name] = colour, SYMBOLS[(COLOURS.index(colour) + used[colour]) % len(SYMBOLS)]
            used[colour] += 1
    return {name: found[name] for name in recipes}


def curves(result: SweepResult) -> str:
    """Both charts, and the key that singles recipes out in them; nothing where there are no trials."""
    recipes = list(dict.fromkeys(trial.recipe for trial in result.trials))
    if not recipes:
        return ""
    looks = looks_of(recipes)
    charts = [_curve(result, looks, kind) for kind in ("perplexity", "accuracy")]
    key = key_of([Line(printable(name), (), *look, joined=True) for name, look in looks.items()], buttons=True)
    hint = "<p><small>Press a recipe to single it out in both charts.</small></p>" if len(looks) > 1 else ""
    datas = list(short_names(trial.data for trial in result.trials).values())
    dashes = [
        Line(f"calibrated on {data}", (), "--ink", "", list(DASHES)[i % len(DASHES)], joined=True)
        for i, data in enumerate(datas)
    ]
    return f'<div class="linked">{key}{key_of(dashes) if len(datas) > 1 else ""}{hint}{"".join(charts)}</div>'


def _curve(result: SweepResult, looks: Looks, kind: str) -> str:
    """One chart and its switches: what it is measured on, and what it is drawn against."""
    names, order = short_names(result.teacher), list(result.teacher)
    wanted = texts_of(result) if kind == "perplexity" else tasks_of(result)
    if not wanted:
        return ""
    options: dict[tuple[str, ...], JsonObject] = {
        (str(order.index(on)), size): _option(result, looks, on, size) for on in wanted for size in sizes_of(result)
    }
    switches = [
        ("Measured on", {str(order.index(name)): names[name] for name in wanted}),
        ("Against", {str(size): words for size, words in sizes_of(result).items()}),
    ]
    label = (
        f"{kind} of {pluralize(len(result.trials), 'row')} against what is left of the teacher; the table has the "
        "numbers"
    )
    caption = (
        "Perplexity as a multiple of the teacher's (dotted: as good as the teacher), whiskers: paired 95% intervals. "
        "Filled and joined by the grey band: the Pareto front, where no other row is both as small and as good, taken "
        "over all texts together. Equal distances are equal ratios."
        if kind == "perplexity"
        else "Share of items answered right; whiskers: 95% intervals; dotted: the teacher. Filled: the Pareto front by "
        "perplexity."
    )
    title = "Loss against what is left" if kind == "perplexity" else "Accuracy against what is left"
    return switched_figure(options, switches, title=title, label=label, caption=caption, height=430)


def _option(result: SweepResult, looks: Looks, on: str, size: SizeName) -> JsonObject:
    """One chart: a line for each recipe and calibration text."""
    is_text = result.teacher[on].kind == "perplexity"
    datas = list(dict.fromkeys(trial.data for trial in result.trials))
    known = [trial for trial in result.trials if known_fraction(result, trial, size) is not None]
    most = _most(known, on) if is_text else math.inf
    lines: dict[tuple[str, str], list[Point]] = {(trial.recipe, trial.data): [] for trial in known}
    fronts: dict[str, list[Point]] = {}
    for trial in sorted(known, key=lambda trial: known_fraction(result, trial, size) or 0.0):
        point = _point(result, trial, on, size, most)
        lines[trial.recipe, trial.data].append(point)
        if is_text and size in trial.front:
            fronts.setdefault(trial.data, []).append(point)
    drawn = [
        Line(
            printable(recipe), tuple(points), *looks[recipe], list(DASHES)[datas.index(data) % len(DASHES)], joined=True
        )
        for (recipe, data), points in lines.items()
    ]
    x = Axis(f"% of the teacher’s {sizes_of(result)[size]} left", "percent")
    name, teacher = short_names(result.teacher)[on], result.teacher[on].estimate.value
    y = _ratio_axis(name, drawn, known, on, most) if is_text else Axis(f"accuracy, {name}", "share")
    option = xy_chart(drawn, x, y, marks={"teacher": 0.0 if is_text else teacher})
    option["series"] = [front_line(points) for points in fronts.values()] + option["series"]
    return option


def _drawn(outcome: StudentOutcome) -> tuple[float, float | None, float | None]:
    """Value, low and high: of a text the change in nats, of a task the accuracy."""
    of = outcome.change if outcome.kind == "perplexity" else outcome.estimate
    low, high = (end if math.isfinite(end) else None for end in (of.low, of.high))
    return of.value, low, high


def _most(trials: Sequence[TrialResult], on: str) -> float:
    """Where a few rows lie far above the others, the loss at which they are drawn as arrows."""
    losses = sorted(_drawn(trial.results[on])[0] for trial in trials)
    if not losses:
        return math.inf
    third = losses[math.floor(0.75 * (len(losses) - 1))]
    near = [loss for loss in losses if loss <= max(2.5 * third, 0.7)]
    return near[-1] + math.log(1.3) if near and len(near) < len(losses) else math.inf


def _point(result: SweepResult, trial: TrialResult, on: str, size: SizeName, most: float) -> Point:
    outcome, front = trial.results[on], size in trial.front
    left = 100 * (known_fraction(result, trial, size) or 0.0)
    value, low, high = _drawn(outcome)
    is_text = outcome.kind == "perplexity"
    spell = format_perplexity_ratio if is_text else format_accuracy
    of = outcome.change if is_text else outcome.estimate
    data = short_names(each.data for each in result.trials)[trial.data]
    tip = "\n".join([
        printable(trial.recipe), f"{printable(trial.remove)}, {data}", f"{left:.1f}% of {sizes_of(result)[size]} left",
        f"{spell(value)} ({format_interval(of, spell)})", *(["on the front"] if front else []),
    ])  # fmt: skip
    if value > most:
        return Point(left, most, tip, symbol="arrow", hollow=False)
    return Point(left, value, tip, low, high, hollow=not front)


def _ratio_axis(name: str, lines: Sequence[Line], trials: Sequence[TrialResult], on: str, most: float) -> Axis:
    """An axis of equal ratios, from the teacher or the lowest to what is not drawn as an arrow."""
    points = [point for line in lines for point in line.points]
    low = min([0.0, *(point.value for point in points)])
    high = max([0.0, *(point.value for point in points)])
    reach = max([high, *(min(point.high, high + math.log(1.15)) for point in points if point.high is not None)])
    bottom, top = low - 0.04 * (high - low), reach + 0.05 * (reach - low) + 1e-3
    beyond = sum(_drawn(trial.results[on])[0] > most for trial in trials)
    words = f"{pluralize(beyond, 'point')} above {format_perplexity_ratio(most)}" if beyond else ""
    told = f"perplexity ÷ teacher’s, {name}" + (f"; arrows: {words}" if words else "")
    ticks = tuple(map(math.log, ratio_ticks(math.exp(bottom), math.exp(min(top, 700.0)))))
    return Axis(told, "nats_as_ratio", low=bottom, high=top, ticks=ticks)
