"""Measured speed as one page: how fast, against what was to be expected, and what next."""

from __future__ import annotations

import math
import shlex

from billhook.core.results.model import SpeedReport
from billhook.report.charts import Axis, Line, Point, figure, key_of, names_chart
from billhook.report.frame import Section, escaped, page_html, stacked_table
from billhook.report.numbers import format_ratio, printable, with_interval
from billhook.report.pages import page
from billhook.report.study_words import short_names
from billhook.report.timing.words import speed_columns, speed_headline, speed_notes, speed_rows


@page(SpeedReport)
def speed_page(report: SpeedReport) -> str:
    """The page of one measurement of speed."""
    made = f"Billhook · speed · {report.environment.machine}"
    return page_html(speed_title(report), made, speed_headline(report), speed_notes(report), speed_sections(report))


def speed_title(report: SpeedReport) -> str:
    """The heading of the page."""
    names = short_names(each.model for each in report.models)
    return f"Speed of {printable(' and '.join(names[each.model] for each in report.models))}"


def speed_sections(report: SpeedReport) -> list[Section]:
    """Rates of each model, a chart of them or of their ratio, and what next."""
    rows = [[escaped(cell) for cell in row] for row in speed_rows(report)]
    table = stacked_table(speed_columns(report), rows)
    return [
        Section("speed", "Speed", table + (_ratios(report) if report.ratio is not None else "")),
        Section("next", "What next", _next(report)),
    ]


def _ratios(report: SpeedReport) -> str:
    """How many times faster the second model is, beside what the weights alone promise."""
    assert report.ratio is not None
    names, found = ("prefill", "decode"), (report.ratio.prefill, report.ratio.decode)
    points = tuple(
        Point(i, math.log(each.value), f"{names[i]}\n{with_interval(each, format_ratio)}", math.log(each.low),
              math.log(each.high))
        for i, each in enumerate(found)
    )  # fmt: skip
    lines = [Line("measured", points)]
    if report.predicted is not None:
        promised = (report.predicted.prefill, report.predicted.decode)
        diamonds = (Point(i, math.log(x), f"{names[i]} by weights {format_ratio(x)}") for i, x in enumerate(promised))
        lines.append(Line("by the weights alone", tuple(diamonds), "--dim", "diamond"))
    text = f"Median over {found[0].n} pairs of runs, with 95% intervals of the median. Right of ×1: faster."
    option = names_chart(lines, Axis("times as fast", "nats_as_ratio"), names, at=0.0)
    return figure(option, title="The second against the first", label=text, caption=text, height=190, key=key_of(lines))


def _next(report: SpeedReport) -> str:
    engine = f"{report.runtime.split(' ')[0]}:" if report.runtime else ""
    models = [shlex.quote(printable(f"{engine}{each.model}")) for each in report.models]
    if len(models) > 1:
        words, command = "Is it as good? Compare them on text:", f"billhook compare {' '.join(models)} --no-speed"
    else:
        words, command = "Is it as good as another one? Compare them:", f"billhook compare {models[0]} OTHER"
    return f'<p class="plain">{words}</p><pre>{escaped(command)}</pre>'
