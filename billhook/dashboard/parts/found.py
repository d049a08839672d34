"""What a finished run found, as sections: of a pruning its verdict, its path, its sites and its proofs first."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from billhook.core.results.json_form import JsonObject, Result, cell_text
from billhook.core.results.run import RunResult
from billhook.dashboard.commands import prune_command
from billhook.dashboard.layout import command_html
from billhook.dashboard.listing import Listed
from billhook.dashboard.measured import Measured, enriched
from billhook.dashboard.parts.curve import path_sections
from billhook.dashboard.parts.related import gate_verdict, related_runs, related_section
from billhook.dashboard.parts.studies import TOLD
from billhook.report.frame import Section, escaped, html_table, note_lines, scrolling
from billhook.report.numbers import visible_name
from billhook.report.run.curves import gap_chart
from billhook.report.run.use import at_a_glance
from billhook.report.run_report import run_sections, run_title, run_verdict
from billhook.report.run_words import run_notes


def found_parts(
    db: sqlite3.Connection, store: Path, run: Listed, result: Result | JsonObject
) -> tuple[str, list[Section]]:
    """The verdict of a run as HTML, and the sections of its page."""
    if isinstance(result, RunResult):
        return _pruning(db, store, run, result)
    if not isinstance(result, Result):
        words = "Stored by Billhook 0.1, whose results have another form. Run it again."
        return f'<h1>{escaped(run.id)}</h1><p class="verdict">{words}</p>', []
    return _study(run, result)


def _pruning(db: sqlite3.Connection, store: Path, run: Listed, result: RunResult) -> tuple[str, list[Section]]:
    names = tuple({run.id, result.out, str(Path(result.out).resolve())})
    related, measured = related_runs(db, names), Measured(db, result)
    whole = enriched(db, measured)
    notes = note_lines(run_notes(whole))
    title, words = escaped(run_title(whole)), escaped(run_verdict(whole))
    verdict = f'<h1>{title}</h1><p class="verdict">{words}</p>{at_a_glance(whole)}{gate_verdict(related)}{notes}'
    theirs = [section for section in run_sections(whole) if section.id != "loss"]
    return verdict, [
        *path_sections(Measured(db, whole), store),
        *theirs,
        Section("choices", "How clear each choice was", gap_chart(whole)),
        related_section(related),
        Section("make", "Make it again", command_html(prune_command(result.recipe, store))),
    ]


def _study(run: Listed, result: Result) -> tuple[str, list[Section]]:
    told = TOLD.get(type(result))
    if told is not None:
        notes = note_lines(told.notes(result))
        title, words = escaped(told.title(result)), escaped(told.verdict(result))
        return f'<h1>{title}</h1><p class="verdict">{words}</p>{notes}', told.sections(result)
    rows = result.rows()
    table = html_table(tuple(rows[0]), [[cell_text(cell) for cell in row.values()] for row in rows]) if rows else ""
    title = escaped(f"{run.kind} of {visible_name(run.model)}")
    return f"<h1>{title}</h1>", [Section("rows", "What it found", scrolling(table, "Rows"))]
