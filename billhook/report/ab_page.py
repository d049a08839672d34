"""Two servers on the same prompts as one page: which is better, ratios with intervals, and where the answers lie."""

from __future__ import annotations

import math
import shlex
from html import escape

from billhook.core.results.ab_report import AbReport, Completion, PromptOutcome
from billhook.core.results.measured import Estimate
from billhook.report.ab_words import MEASURES, ab_headline, ab_notes, ab_rows, where_answers_lie
from billhook.report.charts import Axis, Line, Point, figure, names_chart
from billhook.report.frame import Section, caption, html_table, page_html, stacked_table
from billhook.report.numbers import format_ratio, printable, visible_name
from billhook.report.pages import page

MOST = 200  # prompts whose answers are on the page; the result has all


@page(AbReport)
def ab_page(result: AbReport) -> str:
    """The page of one comparison of two servers."""
    made = f"Billhook · abtest · run {printable(result.run)}"
    return page_html(ab_title(result), made, ab_headline(result), ab_notes(result), ab_sections(result))


def ab_title(result: AbReport) -> str:
    """The heading of the page."""
    return f"{visible_name(result.b.model)} against {visible_name(result.a.model)}"


def ab_sections(result: AbReport) -> list[Section]:
    """The table, a chart of ratios, where the answers lie, and the answers that differ."""
    both = (("A", result.a), ("B", result.b))
    sides = [(name, visible_name(side.model), visible_name(side.url)) for name, side in both]
    rows = [[escape(cell) for cell in row] for row in ab_rows(result)]
    table = stacked_table(("Measure", "A", "B", "B against A"), rows)
    servers = html_table(("", "Model", "Server"), sides)
    sections = [
        Section("measures", "What was measured", table + _chart(result)),
        Section("answers", "Where the answers lie", _where(result) + _answers(result)),
        Section("next", "What next", _next(result)),
        Section("servers", "Servers", servers),
    ]
    return [section for section in sections if section.html]


def _chart(result: AbReport) -> str:
    """B against A in times and rates; nothing where nothing was measured."""
    measures = ((label, result.measure(name)) for label, name in MEASURES.items())
    found = [(label, measure.ratio) for label, measure in measures if measure is not None]
    if not found:
        return ""
    points = tuple(_point(i, label, ratio) for i, (label, ratio) in enumerate(found))
    option = names_chart([Line("B ÷ A", points)], Axis("B ÷ A", "nats_as_ratio"), [name for name, _ in found], at=0.0)
    text = (
        f"Means over the {result.pairs} prompts that both answered, in pairs; whiskers: 95% intervals. Dotted: no "
        "difference. Of seconds less is better, of tokens/s more."
    )
    return figure(option, title="B against A", label=text, caption=text, height=90 + 46 * len(found))


def _point(place: int, label: str, ratio: Estimate) -> Point:
    known = math.isfinite(ratio.low) and math.isfinite(ratio.high) and ratio.low > 0
    ends = (math.log(ratio.low), math.log(ratio.high)) if known else (None, None)
    told = f" ({format_ratio(ratio.low)} to {format_ratio(ratio.high)})" if known else ", no interval"
    return Point(place, math.log(ratio.value), f"{label}\n{format_ratio(ratio.value)}{told}", *ends)


def _where(result: AbReport) -> str:
    drawn = (
        f" Prompts are numbered from 0, as they were drawn from {printable(result.prompts)}." if result.prompts else ""
    )
    return caption(where_answers_lie(result) + drawn)


def _answers(result: AbReport) -> str:
    """Prompts whose answers differ, or that one side failed, side by side."""
    differing = [outcome for outcome in result.outcomes if not outcome.same]
    if not differing:
        return caption("Both gave the same text to every prompt.")
    cut = caption(f"The first {MOST} of {len(differing)} that differ.") if len(differing) > MOST else ""
    return cut + "".join(map(_article, differing[:MOST]))


def _article(outcome: PromptOutcome) -> str:
    sides = "".join(
        f"<div><h4>{name}</h4><p>{_text(side)}</p></div>" for name, side in (("A", outcome.a), ("B", outcome.b))
    )
    head = f"<h3>Prompt {outcome.prompt} <small>{outcome.first.upper()} was asked first</small></h3>"
    return f'<article>{head}<div class="pair">{sides}</div></article>'


def _text(side: Completion) -> str:
    if side.text is None:
        return f"<small>{escape(printable(side.error or 'no answer'))}: {escape(visible_name(side.detail))}</small>"
    return escape("\n".join(map(printable, side.text.splitlines()))) or "<small>(nothing)</small>"


def _next(result: AbReport) -> str:
    few = result.pairs < 30
    words = "Ask more prompts: the intervals rest on few." if few else "Ask again at the load that you expect:"
    sides = [shlex.quote(printable(side.url)) for side in (result.a, result.b)]
    prompts = shlex.quote(printable(result.prompts)) if result.prompts else "PROMPTS.jsonl"
    load = "" if few else " --concurrency 8"
    code = f"billhook abtest --a {sides[0]} --b {sides[1]} --prompts {prompts}{load}"
    return f'<p class="plain">{words}</p><pre>{escape(code)}</pre>'
