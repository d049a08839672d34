"""What a terminal shows of comparisons, gates, thresholds and servers, at 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from billhook import abtest_words, threshold_page
from billhook.compare_words import (
    VERDICT_COLUMNS,
    close_words,
    comparison_headline,
    comparison_warnings,
    flip_words,
    names_of,
    size_rows,
    verdict_rows,
)
from billhook.lab_words import format_accuracy, format_perplexity, printable, short_names
from billhook.margin import BOUND


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Rows under columns, the first on the left."""
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        drawn.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    return drawn


def comparison_table(console: Console, value: dict[str, Any]) -> None:
    """A comparison: for every model but the first its verdicts, sizes and what is behind them."""
    for warning in comparison_warnings(value):
        console.print(warning)
    names = names_of(value)
    for other in range(1, len(names)):
        console.print(f"A: {names[0]}\nB: {names[other]}\n")
        console.print(plain_table(VERDICT_COLUMNS, verdict_rows(value, other)))
        console.print()
        for words in [*flip_words(value, other), close_words(value, other)]:
            if words:
                console.print(words)
        console.print()
        console.print(plain_table(("", "A", "B", "change"), size_rows(value, other)))
        console.print(f"\n{comparison_headline(value, other)}")
    if value.get("page"):
        console.print(f"Page: {value['page']}", soft_wrap=True)


def task_table(console: Console, value: dict[str, Any]) -> None:
    """One model on tasks: one row a score."""
    for warning in comparison_warnings(value):
        console.print(warning)
    brief = short_names(row["set"] for row in value["rows"])
    rows = [
        (brief[row["set"]], row["score"], format_accuracy(row["value"]), f"{format_accuracy(row['low'])} to {format_accuracy(row['high'])}",
         f"{row['n']:,}")
        for row in value["rows"]
    ]  # fmt: skip
    console.print(plain_table(("Task", "Score", "Right", "95%", "Items"), rows))
    for note in dict.fromkeys(f"{brief[row['set']]}: {row['note']}" for row in value["rows"] if row["note"]):
        console.print(note)


def gate_table(console: Console, value: dict[str, Any]) -> None:
    """A gate: one row a set, then the verdict."""
    for warning in comparison_warnings(value):
        console.print(warning)
    brief = short_names(check["set"] for check in value["checks"])
    rows = []
    for check in value["checks"]:
        text = check["kind"] == "perplexity"
        sides = [format_perplexity(check[s]) if text else format_accuracy(check[s]) for s in ("baseline", "student")]
        much, low, high = (f"{round(check[end], 2) + 0.0:+.2f}".replace("-", "−") for end in ("lost", "low", "high"))
        lost = f"{much} ({low} to {high})"
        may = f"{check['margin']:g}{'%' if text else ' pp'}"
        rows.append(
            (f"{brief[check['set']]}, {'ppl' if text else check['score']}", *sides, lost, may, check["verdict"])
        )
    console.print(plain_table(("Set", "Baseline", "Student", f"Lost ({BOUND})", "May go", "Verdict"), rows))
    for check in value["checks"]:
        if check["note"]:
            console.print(f"{brief[check['set']]}: {check['note']}")
    console.print(f"\n{value['verdict']}: {printable(value['student'])} against {printable(value['baseline'])}")


def baseline_table(console: Console, value: dict[str, Any]) -> None:
    """Stored baselines."""
    rows = [
        (
            printable(each["name"]),
            printable(each["model"]),
            each["fingerprint"],
            ", ".join(short_names(each["sets"]).values()),
        )
        for each in value["baselines"]
    ]
    console.print(plain_table(("Name", "Model", "Fingerprint", "Sets"), rows) if rows else "No baseline is stored.")


def threshold_table(console: Console, value: dict[str, Any]) -> None:
    """The trials of a threshold, what was chosen, and whether it was confirmed."""
    console.print(plain_table(threshold_page.TRIAL_COLUMNS, threshold_page.trial_rows(value)))
    console.print(f"\n{threshold_page.threshold_headline(value)}")
    console.print(threshold_page.knee_words(value))
    for note in threshold_page.threshold_notes(value):
        console.print(note)
    if command := threshold_page.command(value):
        console.print(f"Prune so: {command}", highlight=False, soft_wrap=True)
    console.print(f"Page: {value['page']}", soft_wrap=True)


def ab_table(console: Console, value: dict[str, Any]) -> None:
    """Two servers on the same prompts."""
    for name in ("a", "b"):
        model, url = (printable(value[name][key])[: abtest_words.MOST] for key in ("model", "url"))
        console.print(f"{name.upper()}: {model} at {url}", highlight=False)
    console.print(plain_table(("", "A", "B", "B / A"), abtest_words.ab_rows(value)))
    for note in abtest_words.ab_notes(value):
        console.print(note, style="dim", highlight=False)
