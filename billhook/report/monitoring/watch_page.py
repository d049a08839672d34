"""A watch as one page: what is watched, round by round, the alerts, and what next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from billhook.core.monitoring.alerts import Observation
from billhook.core.results.monitoring import WatchResult
from billhook.report.charts import Axis, Line, Point, figure, xy_chart
from billhook.report.frame import Section, escaped, html_table, page_html, scrolling
from billhook.report.monitoring.alert_words import (
    ALERT_COLUMNS,
    WATCH_COLUMNS,
    alert_rows,
    interval_words,
    series_name,
    series_of,
    spell,
    stamp,
    watch_headline,
    watch_notes,
    watch_rows,
)
from billhook.report.numbers import printable
from billhook.report.pages import page


@page(WatchResult)
def watch_page(result: WatchResult) -> str:
    """The page of one watch."""
    made = f"Billhook · watch · run {result.run}"
    return page_html(
        watch_title(result), made, f"{watch_headline(result)}.", watch_notes(result), watch_sections(result)
    )


def watch_title(result: WatchResult) -> str:
    """The heading of the page."""
    return f"{printable(result.target)} against {printable(result.baseline)}"


def watch_sections(result: WatchResult) -> list[Section]:
    """The alerts, a table of all series, a chart of each that has several rounds, and what next."""
    alerts = html_table(ALERT_COLUMNS, [[escaped(cell) for cell in row] for row in alert_rows(result.alerts)])
    seen = html_table(WATCH_COLUMNS, [[escaped(cell) for cell in row] for row in watch_rows(result)])
    charts = "".join(_chart(series) for series in series_of(result) if len(series) > 1)
    again = shlex.join(["billhook", "watch", printable(result.target), "--baseline", printable(result.baseline)])
    return [
        Section("alerts", "Alerts", scrolling(alerts, "Alerts") if result.alerts else ""),
        Section("series", "What is watched", scrolling(seen, "Series")),
        Section("rounds", "Round by round", charts),
        Section("next", "What next", f'<p class="plain">Go on with the same series:</p><pre>{escaped(again)}</pre>'),
    ]


def _chart(series: Sequence[Observation]) -> str:
    """One series over its rounds, with intervals that hold over all of them."""
    unit, name = series[0].unit, series_name(series[0])
    points = tuple(
        Point.of(
            i, each.value, f"{stamp(each.at)}\n{spell(each.value.value, unit)} ({interval_words(each.value, unit)})"
        )
        for i, each in enumerate(series, 1)
    )
    text = f"{name}. Bars: intervals, which hold over all rounds at once; n = {series[-1].value.n:,} in the last round."
    option = xy_chart([Line(name, points)], Axis("round shown", "integer"), Axis(name, "number"))
    return figure(option, title=name, label=text, caption=text, height=220)
