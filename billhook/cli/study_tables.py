"""Tables of studies in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from billhook.core.results.ab_report import AbReport
from billhook.core.results.comparisons import Baseline, Comparison, GateReport, SeenSets, TaskScores
from billhook.report import ab_words, compare_words, threshold_page
from billhook.report.numbers import printable
from billhook.report.study_words import short_names


def empty_table(*columns: str) -> Table:
    """A table with columns and no rows yet."""
    from billhook.cli.study_tables import plain_table

    return plain_table(columns, ())


# -- the laboratory -------------------------------------------------------------------------------------------------


def sweep_table(console: Console, value: dict[str, Any]) -> None:
    """A table a text, the best of each size first; then the tasks, three to a table."""
    from billhook.report import numbers, study_words

    names, rows = study_words.short_names(value["teacher"]), study_words.sorted_rows(value)
    console.print(f"{numbers.printable(value['model'])}: {study_words.sweep_headline(value)}", highlight=False)
    for text in study_words.texts_of(value) if rows else ():
        teacher = value["teacher"][text]
        whole = f"{numbers.format_perplexity(teacher['value'])} ({numbers.format_interval_short(teacher, numbers.format_perplexity)})"
        table = empty_table("recipe", "left", "perplexity", "above best", "search")
        for place, alike in _places(value, study_words.sorted_rows(value, text)):
            table.add_row(place, style="bold")
            for row in alike:
                told, left = row["results"][text], study_words.fraction_kept(value, row)
                measured = f"{numbers.format_perplexity(told['value'])} ({numbers.format_interval_short(told, numbers.format_perplexity)})".replace(
                    " ()", ""
                )
                cells = f"{left:.1%}", measured, _above(told, alike), numbers.format_duration(row["search_seconds"])
                table.add_row(f" {numbers.printable(row['recipe'])}", *cells)
        console.print(f"\nPerplexity on {names[text]}; the teacher's: {whole}", highlight=False)
        console.print(table)
    for some in _threes(study_words.tasks_of(value) if rows else []):
        table = empty_table("recipe", *(f"{names[task]}, %" for task in some))
        for place, alike in _places(value, rows):
            table.add_row(place, style="bold")
            for row in alike:
                table.add_row(f" {numbers.printable(row['recipe'])}", *(_share(row["results"][task]) for task in some))
        table.add_row("the teacher", *(_share(value["teacher"][task]) for task in some))
        console.print("\nAccuracy on tasks")
        console.print(table)
    for each in value["refused"]:
        console.print(
            f"Refused: {numbers.printable(' '.join(each[key] for key in ('recipe', 'remove', 'data', 'why')))}"
        )
    told = "left: parameters; above best: nats, ≈ where not told apart; in brackets: 95% intervals"
    foot(console, value, [told, *study_words.reliability_notes(value)])


def _above(gap: Any, alike: list[Any]) -> str:
    """How far a row is above the best of those alike, in nats."""
    from billhook.report import numbers, study_words

    state = study_words.rank_label(gap["above_best"])
    far = numbers.format_nats(gap["above_best"]["value"]) + (" ≈" if state else "  ")
    return "–" if len(alike) == 1 else "best" if state == "best" else far


def _places(value: dict[str, Any], rows: list[Any]) -> list[tuple[str, list[Any]]]:
    """Rows by size and calibration text, which is named where there are several."""
    from billhook.report import numbers, study_words

    datas = study_words.short_names(row["data"] for row in value["rows"])
    told: dict[str, list[Any]] = {}
    for row in rows:
        place = numbers.printable(row["remove"]) + (f", by {datas[row['data']]}" if len(datas) > 1 else "")
        told.setdefault(place, []).append(row)
    return list(told.items())


def _threes(names: list[str]) -> list[list[str]]:
    return [names[start : start + 3] for start in range(0, len(names), 3)]


def _share(interval: Any) -> str:
    from billhook.report import numbers as words

    return f"{words.format_accuracy(interval['value'])} ({words.format_interval_short(interval, words.format_accuracy)})".replace(
        "%", ""
    )


def transfer_table(console: Console, value: dict[str, Any]) -> None:
    """Changes against the teacher and against text, in points, three tasks to a table."""
    from billhook.report import numbers, study_words

    def cell(change: float, low: float, high: float) -> str:
        whole = numbers.format_interval({"low": low, "high": high}, lambda x: f"{100 * x:+.0f}".replace("-", "−"))
        return f"{numbers.format_points(change)} ({whole})"

    console.print(f"{numbers.printable(value['model'])}: {study_words.transfer_headline(value)}", highlight=False)
    for some in _threes(list(value["teacher"])):
        table = empty_table("pruned for", *map(numbers.printable, some))
        table.add_row("the teacher, %", *(_share(value["teacher"][task]) for task in some))
        table.add_row("against the teacher", style="bold")
        for row in value["rows"]:
            told = [row["results"][task] for task in some]
            cells = (cell(each["change"], each["change_low"], each["change_high"]) for each in told)
            table.add_row(f" {numbers.printable(row['pruned_for'])}", *cells)
        table.add_row("against text", style="bold")
        for row in value["rows"][1:]:
            told = [row["results"][task]["against_text"] for task in some]
            cells = (cell(each["value"], each["low"], each["high"]) for each in told)
            table.add_row(f" {numbers.printable(row['pruned_for'])}", *cells)
        console.print(table)
    foot(console, value, ["in points of accuracy; in brackets: 95% intervals", *study_words.reliability_notes(value)])


def stability_table(console: Console, value: dict[str, Any]) -> None:
    """Print how far scores and plans agree between calibration sets."""
    from billhook.report import numbers, study_words

    console.print(
        f"{numbers.printable(value['model'])}, {value['metric']}: {study_words.stability_headline(value)}",
        highlight=False,
    )
    table = empty_table("tokens", "sets", "rank correlation", "overlap of plans", "in all", "in some")
    for told in value["sizes"]:
        ranks, overlap, votes = told["rank_correlation"], told["overlap"], study_words.removal_counts(told)
        always = sum(n == told["sets"] for n in votes.values())
        cells = [
            f"{numbers.format_correlation(ranks['mean'])} ({numbers.format_interval(ranks, numbers.format_correlation)})"
        ]
        cells += [
            f"{numbers.format_share(overlap['mean'])} ({numbers.format_interval(overlap, numbers.format_share)})",
            str(always),
        ]
        table.add_row(f"{told['tokens']:,}", str(told["sets"]), *cells, str(len(votes) - always))
    console.print(table)
    foot(console, value, ["in brackets: lowest and highest pair of sets; in all, in some: sites by plans"])


def foot(console: Console, value: dict[str, Any], notes: list[str]) -> None:
    """Print notes and where the page is."""
    from billhook.report import numbers

    for note in notes:
        console.print(note, style="dim", highlight=False)
    if "page" in value:
        console.print(f"Page: {numbers.printable(value['page'])}", highlight=False, soft_wrap=True)


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Rows under columns, the first on the left."""
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        drawn.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    return drawn


def comparison_table(console: Console, value: Comparison) -> None:
    """A comparison: for every model but the first its verdicts, sizes and what is behind them."""
    _warn(console, value.seen)
    names = compare_words.model_names(value)
    for other in range(1, len(names)):
        console.print(f"A: {names[0]}\nB: {names[other]}\n")
        console.print(plain_table(compare_words.VERDICT_COLUMNS, compare_words.verdict_rows(value, other)))
        console.print()
        for words in [*compare_words.flip_words(value, other), compare_words.agreement_words(value, other)]:
            if words:
                console.print(words)
        console.print()
        console.print(plain_table(("", "A", "B", "change"), compare_words.size_rows(value, other)))
        console.print(f"\n{compare_words.comparison_headline(value, other)}")
    if value.page:
        console.print(f"Page: {value.page}", soft_wrap=True)


def _warn(console: Console, seen: Sequence[SeenSets]) -> None:
    for warning in compare_words.seen_warnings(seen):
        console.print(warning)


def task_table(console: Console, value: TaskScores) -> None:
    """One model on tasks: one row for each score."""
    _warn(console, value.seen)
    console.print(plain_table(compare_words.SCORE_COLUMNS, compare_words.score_rows(value)))
    for note in compare_words.score_notes(value):
        console.print(note)


def gate_table(console: Console, value: GateReport) -> None:
    """A gate: one row for each check, then the verdict."""
    _warn(console, value.seen)
    console.print(plain_table(compare_words.GATE_COLUMNS, compare_words.gate_rows(value)))
    for note in compare_words.gate_notes(value):
        console.print(note)
    console.print(f"\n{compare_words.gate_sentence(value)}")


def baseline_table(console: Console, value: dict[str, Sequence[Baseline]]) -> None:
    """Stored baselines, under `baselines`."""
    rows = [
        (printable(each.name), printable(each.model), each.fingerprint,
         ", ".join(short_names(kept.source for kept in each.sets).values()))
        for each in value["baselines"]
    ]  # fmt: skip
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


def ab_table(console: Console, value: AbReport) -> None:
    """Two servers on the same prompts."""
    for name, side in (("A", value.a), ("B", value.b)):
        model, url = (printable(text)[: ab_words.MOST] for text in (side.model, side.url))
        console.print(f"{name}: {model} at {url}", highlight=False)
    console.print(plain_table(("", "A", "B", "B / A"), ab_words.ab_rows(value)))
    for note in ab_words.ab_notes(value):
        console.print(note, style="dim", highlight=False)
