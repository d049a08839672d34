"""What other runs of the store say of the student of one: gates, comparisons, and items that flipped."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass

from billhook.core.files.foreign_files import reading
from billhook.core.results.comparisons import Comparison, GateReport
from billhook.core.results.json_form import SCHEMA, Result
from billhook.core.results.stored import read_result
from billhook.dashboard.layout import run_address
from billhook.report.compare_words import (
    GATE_COLUMNS,
    comparison_headline,
    describe_check,
    flip_words,
    gate_rows,
    gate_sentence,
)
from billhook.report.frame import Section, escaped, html_table, scrolling


@dataclass(frozen=True, slots=True)
class Related:
    """A run that evaluated the student of another one. `number`: of the student among the models of a comparison."""

    run: str
    result: GateReport | Comparison
    number: int


def related_runs(db: sqlite3.Connection, names: tuple[str, ...]) -> list[Related]:
    """The finished gates and comparisons of a model by any of its names, the newest first."""
    found = []
    for row in db.execute(
        "SELECT id, kind, recipe, result FROM runs WHERE kind IN ('gate', 'compare') AND result IS NOT NULL "
        "ORDER BY created DESC"
    ):
        asked = json.loads(row["recipe"])
        models = [str(asked.get("model", "")), *map(str, asked.get("others", ()))]
        number = next((i for i, model in enumerate(models) if model.rstrip("/") in names), None)
        if number is None:
            continue
        result = _read(row["kind"], row["result"])
        if isinstance(result, GateReport) or (isinstance(result, Comparison) and number):
            found.append(Related(str(row["id"]), result, number))
    return found


def _read(kind: str, text: str) -> Result | None:
    value = json.loads(text)
    if value.get("schema") != SCHEMA:
        return None
    with reading("A result of the store cannot be read"):
        found = read_result(kind, value)
    return found if isinstance(found, Result) else None


def gate_verdict(related: list[Related]) -> str:
    """The sentence of the newest gate as HTML; that there was none where there was none."""
    gate = next((each for each in related if isinstance(each.result, GateReport)), None)
    if gate is None or not isinstance(gate.result, GateReport):
        command = "billhook gate STUDENT BASELINE"
        return f'<p class="note">No gate was run on it. One says if it is good enough: <code>{command}</code></p>'
    checks = "; ".join(f"{check.source}: {describe_check(check)}" for check in gate.result.checks)
    word = gate.result.verdict.lower()
    return (
        f'<p class="plain"><span class="word {word}">{escaped(gate_sentence(gate.result))}</span> '
        f'<a href="{run_address(gate.run)}">gate {escaped(gate.run)}</a>: {escaped(checks)}</p>'
    )


def related_section(related: list[Related]) -> Section:
    """The gates and comparisons of a student, with the items that flipped."""
    return Section("proofs", "Gates and comparisons", "".join(_blocks(related)))


def _blocks(related: list[Related]) -> Iterator[str]:
    for each in related:
        link = f'<a href="{run_address(each.run)}">{escaped(each.run)}</a>'
        if isinstance(each.result, GateReport):
            table = scrolling(html_table(GATE_COLUMNS, gate_rows(each.result)), "Gate")
            yield f"<h3>Gate {link}: {escaped(gate_sentence(each.result))}</h3>{table}"
            continue
        flips = "".join(f"<li>{escaped(words)}</li>" for words in flip_words(each.result, each.number))
        headline = escaped(comparison_headline(each.result, each.number))
        yield f"<h3>Comparison {link}</h3><p>{headline}</p><ul>{flips}</ul>"


def comparisons_between(db: sqlite3.Connection, names: set[str]) -> str:
    """The items that flipped in comparisons of models with these names; nothing where there is none."""
    found = {each.run: each for name in sorted(names) for each in related_runs(db, (name.rstrip("/"),))}
    shown = [each for each in found.values() if isinstance(each.result, Comparison)]
    return "".join(_blocks(shown))
