"""The curve of quality against size as HTML, with a handle to move along the path, and what would come next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from billhook.core.plan import Plan
from billhook.core.results.measured import Z_95, Estimate
from billhook.core.results.run import RunResult
from billhook.dashboard.commands import point_command, prune_command
from billhook.dashboard.layout import command_html, origin
from billhook.dashboard.measured import HeldOut, Measured, Stop, next_removal, stops_of
from billhook.report.charts import Axis, Line, Point, figure, key_of, xy_chart
from billhook.report.frame import Section, escaped
from billhook.report.numbers import (
    Spell,
    format_interval,
    format_nats,
    format_number,
    format_ratio,
    join_words,
    pluralize,
)
from billhook.report.run.narrowed import narrowed_sites

MOST_NAMES = 12  # of removed sites, in words


def path_sections(measured: Measured, store: Path) -> list[Section]:
    """The curve with its handle, and the next removal."""
    stops = stops_of(measured)
    return [
        Section("path", "Quality against size", _path(measured.result, stops, store)),
        Section("removal", "The next removal", _next(measured, stops, store)),
    ]


def _path(result: RunResult, stops: Sequence[Stop], store: Path) -> str:
    chart = _chart(result, stops)
    panels = "".join(_panel(result, stop, stops, store) for stop in stops)
    handle = (
        '<label class="aloud" for="handle">Point on the path of the search</label><input type="range" id="handle" '
        f'min="0" max="{len(stops) - 1}" value="{len(stops) - 1}">'
    )
    if len(stops) == 1:
        return "<p>This run removes nothing, so that there is no path.</p>"
    if len(stops) == 2:  # of one step there is neither a curve nor a way to move along it
        return _panel(result, stops[1], stops, store)
    hint = (
        "<p>Drag the line, or use the arrow keys on the handle: what is removed at that point, and how to make it.</p>"
    )
    return f'<div class="path">{chart}{handle}{hint}{panels}</div>'


def _chart(result: RunResult, stops: Sequence[Stop]) -> str:
    """Nats per token against the share of the parameters that is gone."""
    calibration = tuple(
        Point(
            _percent(stop), stop.loss, f"{_gone(stop)} removed: {_loss_words(result, stop)}",
            *(stop.interval.low, stop.interval.high) if stop.interval else (None, None),
        )
        for stop in stops if stop.loss is not None
    )  # fmt: skip
    lines = [
        Line(f"Calibration: {result.loss}", calibration, "--orange", joined=True, banded=len(calibration) > 1, size=9)
    ]
    for repaired, name, symbol in ((False, "Held-out: perplexity, log of the ratio", "diamond"),
                                   (True, "Held-out, after the recovery", "square")):  # fmt: skip
        points = tuple(
            Point(_percent(stop), _log(each.ratio.value), f"{_gone(stop)} removed: {_held_out_words(each)}",
                  _log(each.ratio.low), _log(each.ratio.high))
            for stop in stops for each in stop.held_out if each.repaired == repaired
        )  # fmt: skip
        if points:
            colour, shift = ("--green", 6) if repaired else ("--blue", -6)
            lines.append(Line(name, points, colour, symbol, shift=shift))
    n = next((stop.interval.n for stop in stops if stop.interval), None)
    held = sum(len(stop.held_out) for stop in stops)
    words = (
        f"Orange: the loss of the search, {result.loss} in {result.loss_unit} per token on "
        f"{result.data.calibration.tokens:,} calibration tokens"
        + (f", with its 95% interval over {pluralize(n, 'document')}." if n else "; the store has no interval of it.")
        + f" Lower is better. Perplexity on {result.data.evaluation.tokens:,} held-out tokens, in pairs with the "
        f"teacher's, was measured at {pluralize(held, 'point')}; e to the power of nats is the ratio."
    )
    option = xy_chart(
        lines,
        Axis("Parameters removed", "percent", low=0),
        Axis(f"{result.loss_unit} per token", "nats", zero=True),
    )
    label = f"Loss along {pluralize(len(stops) - 1, 'step')}, from 0% to {_gone(stops[-1])} of the parameters."
    return figure(option, title="", label=label, caption=words, key=key_of(lines))


def _percent(stop: Stop) -> float:
    return round(100 * stop.shares["parameters"], 4)


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def _gone(stop: Stop) -> str:
    return f"{100 * stop.shares['parameters']:.1f}%"


def _panel(result: RunResult, stop: Stop, stops: Sequence[Stop], store: Path) -> str:
    """What is known of one point of the path, and the command that makes it."""
    last = stop is stops[-1]
    head = f"{_gone(stop)} of the parameters removed" + (", as in this run" if last else "")
    gone = [f"{_names(result, stop.plan)}."] if stop.plan else ["Nothing is removed: this is the teacher."]
    if stop.step and stop.step.gap is not None:
        error = "" if stop.step.gap_se is None else f" ± {format_number(Z_95 * stop.step.gap_se)}"
        gone.append(
            f"Last removed: {_step_names(stop)}. The second best would have cost {format_number(stop.step.gap)}{error} "
            f"{result.loss_unit} more (95%)."
        )
    lines = [*gone, _loss_words(result, stop) + ".", *(f"{_held_out_words(each)}." for each in stop.held_out)]
    lines.append(_size_words(stop))
    body = "".join(f"<p>{escaped(line[:1].upper() + line[1:])}</p>" for line in lines)
    hidden = "" if last else " hidden"
    command = (
        command_html(point_command(result.recipe, store, stop.plan, stop.shares["parameters"])) if stop.plan else ""
    )
    return f'<article class="point" data-x="{_percent(stop)}"{hidden}><h3>{escaped(head)}</h3>{body}{command}</article>'


def _names(result: RunResult, plan: Plan) -> str:
    """Which sites a plan removes, and how many it narrows."""
    names = plan.names()
    words = []
    if names:
        words.append(f"{pluralize(len(names), 'site')} removed: {join_words(names, MOST_NAMES)}")
    if plan.narrowed:
        kinds = list(map(str, narrowed_sites(replace(result, plan=plan))))
        words.append(f"{pluralize(len(plan.narrowed), 'site')} narrowed: {join_words(kinds, MOST_NAMES)}")
    return "; ".join(words)


def _step_names(stop: Stop) -> str:
    assert stop.step is not None
    narrow = [f"{pluralize(len(stop.step.narrowed), 'site')} narrower"] if stop.step.narrowed else []
    return join_words([*map(str, stop.step.sites), *narrow], MOST_NAMES) or "nothing"


def _loss_words(result: RunResult, stop: Stop) -> str:
    """`kl 0.165 (0.150 to 0.181; n = 9 documents) …`, or that no interval is stored."""
    if stop.loss is None:
        return f"the loss ({result.loss}) was not measured here"
    unit = f"{result.loss_unit} per token on calibration tokens"
    if stop.interval is None:
        return f"loss ({result.loss}) {format_nats(stop.loss)} {unit}; no interval is stored"
    return f"loss ({result.loss}) {format_nats(stop.loss)} {_ends(stop.interval, format_nats)} {unit}"


def _ends(estimate: Estimate, spell: Spell) -> str:
    return f"(95%: {format_interval(estimate, spell)}; n = {estimate.n})"


def _held_out_words(each: HeldOut) -> str:
    which = "held-out perplexity after the recovery" if each.repaired else "held-out perplexity"
    return f"{which} {format_ratio(each.ratio.value)} {_ends(each.ratio, format_ratio)}"


def _size_words(stop: Stop) -> str:
    sizes = stop.sizes
    words = [f"{format_number(sizes.parameters)} parameters", f"{format_number(sizes.bytes, 'B')} on disk"]
    words += (
        [f"{format_number(sizes.kv_bytes_per_token, 'B')} of KV cache per token"] if sizes.kv_bytes_per_token else []
    )
    words += [f"{sizes.ns_per_token / 1e6:.3g} ms per decoded token in its sites"] if sizes.ns_per_token else []
    return f"Counted: {join_words(words)}."


def _next(measured: Measured, stops: list[Stop], store: Path) -> str:
    """Which removal would come next, what it costs and saves, and the command that tries it."""
    result, found = measured.result, next_removal(measured, stops)
    done = stops[-1].shares["parameters"]
    if found is None:
        more = f"{100 * done + 1:.3g}%params"
        words = "No removal beyond this plan was measured, so that nothing is said of the next 1%. To measure it:"
        return f'<p class="plain">{escaped(words)}</p>{command_html(_larger(result, store, more))}'
    change = found.change
    saves = [f"{100 * found.parameters / result.anatomy.total('parameters'):.2g}% of the parameters"]
    saves += [f"{found.ns_per_token / 1e6:.3g} ms per token"] if found.ns_per_token else []
    where = (
        "measured from this plan" if found.after == stops[-1].steps
        else f"measured after {pluralize(found.after, 'step')} of {stops[-1].steps}, not from this plan"
    )  # fmt: skip
    words = (
        f"Next: remove {found.site}. It costs {format_nats(change.value)} {result.loss_unit} "
        f"({format_interval(change, format_nats)}) and saves {join_words(saves)}."
    )
    about = f"{origin(change, f'Rise of {result.loss} in pairs on calibration tokens, {where}')}"
    plan = stops[-1].plan.without(found.site)
    command = point_command(result.recipe, store, plan, done + found.parameters / result.anatomy.total("parameters"))
    return f'<p class="plain"><strong>{escaped(words)}</strong></p><p>{escaped(about)}</p>{command_html(command)}'


def _larger(result: RunResult, store: Path, remove: str) -> str:
    fields = {name: value for name, value in result.recipe.items() if name not in ("plan", "within")}
    return prune_command({**fields, "remove": remove}, store)
