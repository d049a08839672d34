"""A forecast in words, as a curve and as a table, and the runs that spend the same budget better."""

from __future__ import annotations

import math
from collections.abc import Sequence

from billhook.core.outlook.loss_curve import LossForecast
from billhook.core.outlook.machines import Machine
from billhook.core.outlook.roofline import Resources
from billhook.core.results.measured import Z_95
from billhook.core.results.run import RunResult
from billhook.core.statistics import exp_capped
from billhook.dashboard.layout import compare_address, run_address
from billhook.dashboard.listing import Listed
from billhook.dashboard.measured import Stop
from billhook.dashboard.outlooks import Known, Needs, predicted, same_text
from billhook.report.charts import Axis, Line, Point, figure, key_of, xy_chart
from billhook.report.frame import caption, escaped, html_table, scrolling
from billhook.report.numbers import format_number, format_ratio, pluralize

PLACES = {
    "beyond": "beyond the largest measured size", "between": "between measured sizes",
    "below": "below the smallest measured size",
}  # fmt: skip
DRAWN = 25  # shares of the curve
NEAR = 0.01  # a run that removes so much less than asked spends the same budget


def forecast_words(known: Known, share: float, found: LossForecast | None) -> str:
    """The forecast as a sentence with where it comes from."""
    if share == 0:
        return '<p class="plain">Nothing is removed: this is the teacher.</p>'
    if found is None:
        words = "No measured size of this recipe loses anything, so there is nothing to forecast from."
        return f'<p class="plain">{words}</p>'
    teacher = known.curve.sizes[0].teacher
    ratio = [format_ratio(exp_capped(x)) for x in (found.value, found.low, found.high)]
    own = [format_number(teacher * exp_capped(x)) for x in (found.value, found.low, found.high)]
    words = (
        f"With {100 * share:.1f}% of the parameters removed, perplexity {ratio[0]} ({ratio[1][1:]} to {ratio[2][1:]}) "
        f"of the teacher's: {own[0]} ({own[1]} to {own[2]})."
    )
    about = (
        f"A forecast {PLACES[found.place]}, from {pluralize(found.n, 'measured size')} of this recipe. The interval "
        f"holds {100 * found.level:.0f}% of such forecasts, by {found.errors} past ones of {found.source}. Runs: "
        f"{', '.join(dict.fromkeys(size.run for size in known.curve.sizes))}."
    )
    return f'<p class="plain"><strong>{escaped(words)}</strong></p>{caption(about)}'


def curve_figure(known: Known, share: float, stops: Sequence[Stop]) -> str:
    """Measured sizes, the forecast between and beyond them, and the asked one."""
    top = max([share, *(point.share for point in known.curve.points), stops[-1].shares["parameters"]]) * 1.15
    if not share > 0 or predicted(known, share) is None:
        return ""
    shares = [min(top, 0.98) * (i + 1) / DRAWN for i in range(DRAWN)]
    drawn = tuple(
        Point(100 * each, found.value, f"{100 * each:.1f}% removed: {_ratio_words(found)}", found.low, found.high)
        for each in sorted({*shares, share}) if (found := predicted(known, each)) is not None
    )  # fmt: skip
    measured = tuple(
        Point(
            100 * size.point.share, size.point.nats,
            f"{size.run}: {100 * size.point.share:.1f}% removed, {format_ratio(exp_capped(size.point.nats))}, measured",
            size.point.nats - Z_95 * size.point.se, size.point.nats + Z_95 * size.point.se,
        )
        for size in known.curve.sizes
    )  # fmt: skip
    asked = predicted(known, share)
    lines = [
        Line("Forecast, 90% interval", drawn, "--blue", symbol="", joined=True, banded=True, dash="dash"),
        Line("Measured, 95% interval", measured, "--orange", "circle"),
    ]
    if asked is not None:
        tip = f"Asked: {100 * share:.1f}% removed, {_ratio_words(asked)}"
        lines.append(Line("Asked", (Point(100 * share, asked.value, tip, asked.low, asked.high),), "--ink", "diamond"))
    option = xy_chart(
        lines,
        Axis("Parameters removed", "percent", low=0),
        Axis("Perplexity over the teacher's", "nats_as_ratio"),
    )
    text = "Perplexity over the teacher's, on held-out text. Nothing is run for the forecast."
    label = f"Forecast of perplexity from 0 to {100 * top:.0f}% of the parameters removed."
    return figure(option, title="", label=label, caption=text, key=key_of(lines))


def _ratio_words(found: LossForecast) -> str:
    value, low, high = (format_ratio(exp_capped(x)) for x in (found.value, found.low, found.high))
    return f"{value} (90%: {low[1:]} to {high[1:]})"


def needs_table(result: RunResult, machine: Machine, teacher: Resources, student: Needs) -> str:
    """Weights, KV cache, speed and the largest batch of both models on a machine."""
    batch = teacher.workload.batch
    prompt = teacher.workload.prompt_tokens * batch
    lines = [
        _line("Weights", teacher.weight_bytes, student.weight_bytes, "B"),
        _line("KV cache of the batch", teacher.kv_cache_bytes, student.kv_cache_bytes, "B"),
        ("Fits in memory", *("yes" if fits else "no" for fits in (teacher.fits, student.fits)), ""),
        _line("Largest batch", teacher.largest_batch, student.largest_batch, ""),
        _line("Decoded tokens/s", batch / teacher.decode_seconds, batch / student.decode_seconds, ""),
        _line("Prefill tokens/s", prompt / teacher.prefill_seconds, prompt / student.prefill_seconds, ""),
    ]  # fmt: skip
    if machine.watts is not None:
        joules = [machine.watts * seconds / batch for seconds in (teacher.decode_seconds, student.decode_seconds)]
        lines.append(_line("Energy per token", joules[0], joules[1], "J"))
    table = scrolling(html_table(("", "Teacher", "Student", "Change"), lines), "Needs")
    between = "" if student.exact else " Between the plans of the path it is linear; beyond its last one, on that line."
    text = (
        f"Context {teacher.workload.context:,}, batch {batch}. The best that the figures of {machine.name} allow, by "
        f"roofline, so that there is no interval: a real engine reaches less. Figures: {machine.source}.{between}"
    )
    return f'<div class="measured">{table}</div>{caption(text)}'


def _line(label: str, before: float | None, after: float | None, unit: str) -> tuple[str, str, str, str]:
    change = "–"
    if before and after is not None:
        change = "unchanged" if math.isclose(before, after) else f"{after / before - 1:+.1%}".replace("-", "−")
    return label, format_number(before, unit), format_number(after, unit), change


def better_runs(able: Sequence[Listed], chosen: Listed, share: float, found: LossForecast | None) -> str:
    """Runs that remove as much or more, and have lower perplexity than the forecast."""
    rows = []
    for run in able:
        figures = run.figures
        if figures is None or not same_text(figures, chosen) or found is None:
            continue
        left, quality = figures.left("parameters"), figures.perplexity
        if left is None or quality is None or 1 - left < share - NEAR:
            continue
        nats = math.log(quality.ratio.value)
        if nats >= found.value:
            continue
        ends = (
            f"({format_ratio(quality.ratio.low)[1:]} to {format_ratio(quality.ratio.high)[1:]}; n = {quality.ratio.n})"
        )
        sure = "below the forecast's interval" if nats < found.low else "within the forecast's interval"
        rows.append((nats, run, f"{1 - left:.1%}", f"{format_ratio(quality.ratio.value)} {ends}", sure))
    if not rows:
        words = (
            "No run of this teacher on this held-out text removes as much and has lower perplexity than the forecast."
        )
        return f'<p class="plain">{words}</p>'
    rows.sort(key=lambda row: row[0])
    lines = "".join(
        f'<tr><th scope="row"><a href="{run_address(run.id)}">{escaped(run.id)}</a> {escaped(run.search)} '
        f"{escaped(run.remove)}</th><td>{gone}</td><td>{escaped(ratio)}</td><td>{sure}</td></tr>"
        for _, run, gone, ratio, sure in rows
    )
    head = "".join(
        f'<th scope="col">{name}</th>' for name in ("Run", "Removed", "Perplexity (95%)", "Against the forecast")
    )
    table = scrolling(f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>", "Better runs")
    address = compare_address(list(dict.fromkeys([chosen.id, *(run.id for _, run, *_ in rows)])))
    return f'{table}<p><a href="{escaped(address)}">Compare them with {escaped(chosen.id)}</a></p>'
