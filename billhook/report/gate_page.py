"""A gate as one page: whether a student passes, what it loses on every set, and what next."""

from __future__ import annotations

import shlex
from html import escape

from billhook.core.margin import BOUND
from billhook.core.results.comparisons import GateCheck, GateReport
from billhook.report.charts import Axis, Line, Point, figure, names_chart
from billhook.report.compare_words import (
    GATE_COLUMNS,
    describe_check,
    gate_notes,
    gate_rows,
    gate_sentence,
    seen_warnings,
)
from billhook.report.frame import Section, caption, page_html, stacked_table
from billhook.report.numbers import printable
from billhook.report.pages import page
from billhook.report.study_words import short_names


@page(GateReport)
def gate_page(report: GateReport) -> str:
    """The page of one gate."""
    made = f"Billhook · gate · {report.environment.machine}"
    notes = [*seen_warnings(report.seen), *gate_notes(report)]
    return page_html(gate_title(report), made, gate_verdict(report), notes, gate_sections(report))


def gate_verdict(report: GateReport) -> str:
    """The verdict, and what is behind it: the checks that do not pass, else that all do."""
    names = short_names(check.source for check in report.checks)
    bad = [f"on {names[check.source]} it {describe_check(check)}" for check in report.checks if check.verdict != "PASS"]
    return f"{gate_sentence(report)}: {'; '.join(bad) or 'on every set it loses less than may go'}."


def gate_title(report: GateReport) -> str:
    """The heading of the page."""
    return f"{printable(report.student)}: {report.verdict}"


def gate_sections(report: GateReport) -> list[Section]:
    """Every check, a chart of what is lost, and what next."""
    words = ("PASS", "FAIL", "UNDECIDED")
    rows = [
        [f'<span class="word {cell.lower()}">{cell}</span>' if cell in words else escape(cell) for cell in row]
        for row in gate_rows(report)
    ]
    text = f"Lost: percent of perplexity, or percentage points; each end of an interval is a bound ({BOUND})."
    return [
        Section("checks", "Checks", stacked_table(GATE_COLUMNS, rows) + caption(text) + _charts(report)),
        Section("next", "What next", _next(report)),
    ]


def _charts(report: GateReport) -> str:
    return "".join(_chart([check for check in report.checks if check.is_text == is_text]) for is_text in (True, False))


def _chart(checks: list[GateCheck]) -> str:
    """What is lost on every set of one kind, beside its margin; nothing without a set."""
    if not checks:
        return ""
    names = list(short_names(check.source for check in checks).values())
    lost = tuple(
        Point.of(i, check.lost, f"{names[i]}: {check.verdict}\n{describe_check(check)}", hollow=check.verdict != "PASS")
        for i, check in enumerate(checks)
    )
    margins = tuple(
        Point(i, float(check.margin.amount), f"{names[i]}: {float(check.margin.amount):g} may go")
        for i, check in enumerate(checks)
    )
    lines = [Line("lost", lost), Line("margin", margins, "--dim", "diamond")]
    x = Axis("lost, % of perplexity" if checks[0].is_text else "lost, pp of accuracy", "number", zero=True)
    text = f"Dots: what is lost, with its bounds ({BOUND} each); hollow: does not pass. Diamonds: what may go."
    title = "Perplexity" if checks[0].is_text else "Accuracy"
    option = names_chart(lines, x, names, at=0.0)
    return figure(option, title=title, label=text, caption=text, height=90 + 46 * len(checks))


def _next(report: GateReport) -> str:
    student, baseline = (shlex.quote(printable(text)) for text in (report.student, report.baseline))
    words = {
        "PASS": ("It may be served. See how fast it is:", f"billhook speed {student}"),
        "FAIL": ("See which items it loses:", f"billhook compare {baseline} {student}"),
        "UNDECIDED": (
            "More text or items decide it:",
            f"billhook gate {student} --baseline {baseline} --eval-tokens 65536",
        ),
    }[report.verdict]
    return f'<p class="plain">{words[0]}</p><pre>{escape(words[1])}</pre>'
