"""The page of a run, and the files beside its checkpoint."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from billhook.core.results.run import Answer, RunResult
from billhook.report.frame import (
    Section,
    caption,
    details,
    escaped,
    html_table,
    page_html,
    readable_value,
    whole_spans,
    yaml_lines,
)
from billhook.report.numbers import format_duration, token_facts
from billhook.report.pages import page
from billhook.report.run.card import DRAWING, data_of, model_card
from billhook.report.run.curves import gap_chart, loss_chart, speed_chart
from billhook.report.run.drawing import architecture_svg
from billhook.report.run.sites import removals, sites_table, strip, worth_chart
from billhook.report.run.skills import lost_skills, skills_html
from billhook.report.run.use import at_a_glance, next_html, use_html
from billhook.report.run_words import (
    RECOVERY_COLUMNS,
    checkpoint_type,
    headline,
    quality_verdict,
    recovery_rows,
    run_notes,
    summary_rows,
)
from billhook.report.trials.tasks import tasks_chart


def write_report(result: RunResult, folder: Path) -> None:
    """Write report.json, the page, the drawing and the model card of a result into a folder."""
    (folder / "report.json").write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(run_page(result), encoding="utf-8", errors="backslashreplace")
    (folder / DRAWING).write_text(architecture_svg(result.anatomy, result.plan) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(result), encoding="utf-8")


@page(RunResult)
def run_page(result: RunResult) -> str:
    """One self-contained HTML page."""
    when = re.sub(r"T(\d\d:\d\d).*\+00:00$", r" \1 UTC", result.created)
    made = f"Billhook {result.billhook} · run {result.run} · {when} · {checkpoint_type(result)}"
    notes, lead = run_notes(result, served=False), at_a_glance(result)
    return page_html(run_title(result), made, run_verdict(result), notes, run_sections(result), lead=lead)


def run_title(result: RunResult) -> str:
    """The heading of the page."""
    return f"{result.model.name}, pruned"


def run_verdict(result: RunResult) -> str:
    """Whether the student is good, which skills it lost, and the run in one sentence."""
    return " ".join(filter(None, (quality_verdict(result), lost_skills(result), headline(result))))


def run_sections(result: RunResult) -> list[Section]:
    """The parts of the page, in order: what it saves, how to run it, what next, and how it came about."""
    sections = [
        Section("saves", "What it costs and saves", _measured(result)),
        Section("use", "How to run it", use_html(result)),
        Section("next", "What next", next_html(result)),
        Section("parts", "What was removed", _parts(result)),
        Section("loss", "Loss along the removals", _charts(result)),
        Section("skills", "What pruning breaks first", skills_html(result)),
        Section("recovered", "What recovery gave back", _recovered(result)),
        Section("answers", "The same prompts, answered by both", _answers(result.answers)),
        Section("made", "How it was made", _how(result)),
    ]
    return [section for section in sections if section.html]


def _measured(result: RunResult) -> str:
    rows = [(r.label, r.teacher, r.student, r.change) for r in summary_rows(result)]
    table = whole_spans(html_table(("Measure", "Teacher", "Student", "Change"), rows))
    words = "In brackets: 95% intervals. Teacher: the model before this pruning. Student: the pruned model."
    return f'<div class="measured">{table}</div>{caption(words)}{tasks_chart(result)}{speed_chart(result)}'


def _parts(result: RunResult) -> str:
    drawing = architecture_svg(result.anatomy, result.plan, styled=False)
    every = details("Every site: what it is worth, what it costs, and why it was removed", sites_table(result))
    save = "".join(
        f'<button type="button" data-save="{kind}">Save as {kind.upper()}</button>' for kind in ("svg", "png")
    )
    return (
        f'<div class="drawn"><div class="drawing" role="region" tabindex="0" aria-label="The model before and after">'
        f'{drawing}</div><p class="save">{save}</p></div>'
        f"{strip(result)}{removals(result)}{every}{worth_chart(result)}"
    )


def _charts(result: RunResult) -> str:
    charts = loss_chart(result) + gap_chart(result)
    return f'<div class="charts">{charts}</div>' if charts else ""


def _recovered(result: RunResult) -> str:
    """The recoveries of a run, on every text; nothing where there are none."""
    lines = recovery_rows(result)
    words = "Before and after each, in pairs; in brackets 95% intervals. The gap is that to the teacher."
    table = whole_spans(html_table(RECOVERY_COLUMNS, lines))
    return f'<div class="tight">{table}</div>{caption(words)}' if lines else ""


def _answers(answers: Sequence[Answer]) -> str:
    articles = []
    for answer in answers:
        same = "<small>the same words</small>" if answer.teacher == answer.student else ""
        sides = "".join(
            f"<div><h4>{who}</h4><p>{escaped(text) or '<small>(nothing: it ended at once)</small>'}</p></div>"
            for who, text in (("Teacher", answer.teacher), ("Student", answer.student))
        )
        articles.append(f'<article><h3>{escaped(answer.prompt)} {same}</h3><div class="pair">{sides}</div></article>')
    return "".join(articles)


def _how(result: RunResult) -> str:
    """The recipe, of which only what is not at its default is in sight, data, environment and time."""
    facts = asdict(result.environment) | {f"model {key}": value for key, value in asdict(result.model).items()}
    facts |= {"kind": checkpoint_type(result), "out": result.out, "created": result.created}
    data = {use: token_facts(info) for use, info in data_of(result)}
    keys = list(dict.fromkeys(key for about in data.values() for key in about))
    seconds = {**result.seconds, "total": math.fsum(result.seconds.values())}
    parts = (
        ("Recipe", _recipe(result)),
        ("Data", html_table(
            ("", *data), [(key, *(readable_value(about.get(key)) for about in data.values())) for key in keys]
        )),
        ("Environment", html_table(
            ("Name", "Value"), [(key.replace("_", " "), readable_value(value)) for key, value in facts.items()]
        )),
        ("Time", html_table(("Stage", "Time"), [(stage, format_duration(spent)) for stage, spent in seconds.items()])),
    )  # fmt: skip
    return f'<div class="pair">{"".join(f"<div><h3>{title}</h3>{html}</div>" for title, html in parts)}</div>'


def _recipe(result: RunResult) -> str:
    whole = f"<pre>{escaped(yaml_lines(result.recipe))}</pre>"
    if not result.changed:
        return details("The whole recipe", whole)
    asked = {name: result.recipe[name] for name in result.changed if name in result.recipe and name != "about"}
    words = caption("What differs from the defaults of billhook prune.")
    return f"<pre>{escaped(yaml_lines(asked))}</pre>{words}{details('The whole recipe', whole)}"
