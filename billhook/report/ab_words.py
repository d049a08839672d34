"""Two endpoints against each other in words: the rows of the table, and what a reader must know besides.

Nothing is measured here: every number comes from the result.
"""

from __future__ import annotations

import math

from billhook.core.results.ab_report import AbReport, Measure
from billhook.core.results.measured import Estimate
from billhook.report.numbers import Spell, format_accuracy, format_number, format_points, format_ratio, visible_name

MEASURES: dict[str, Measure] = {
    "Latency, s": "latency_s",
    "With retries, s": "total_s",
    "First token, s": "first_token_s",
    "Tokens/s": "tokens_per_s",
}
MOST = 120  # characters of what a server says
FEW_PAIRS = 30


def ab_rows(result: AbReport) -> list[tuple[str, str, str, str]]:
    """The lines of the table: what, A, B, and B against A."""
    a, b, answered = result.a, result.b, result.answered
    p = f"p = {answered.p:.2g}" if answered.only_a + answered.only_b else "–"
    rows = [("Answered", _cell(a.answered, format_accuracy, _whole), _cell(b.answered, format_accuracy, _whole), p)]
    for label, name in MEASURES.items():
        measure = result.measure(name)
        if measure is not None and (name != "total_s" or a.retries or b.retries):
            spell = format_number if name == "tokens_per_s" else _seconds
            cells = _cell(measure.a, spell), _cell(measure.b, spell), _cell(measure.ratio, format_ratio)
            rows.append((label, *cells))
    if (agreement := result.agreement) is not None:
        rows.append(("Same text", "", "", _cell(agreement.same, format_accuracy, _whole)))
        rows.append(("Same words at first", "", "", _cell(agreement.prefix_words)))
    if (task := result.task) is not None:
        for label, score in (("Accuracy", task.acc), ("Accuracy, by length", task.acc_norm)):
            if score is not None:
                first, second = (_cell(side, format_accuracy, _whole) for side in (score.a, score.b))
                rows.append((label, first, second, _cell(score.change, format_points, _format_points, " to ")))
    return rows


def ab_headline(result: AbReport) -> str:
    """Which server is faster and better, as far as the intervals tell, in a sentence."""
    told = []
    for words, name, more in (("latency", "latency_s", False), ("tokens per second", "tokens_per_s", True)):
        measure = result.measure(name)  # type: ignore[arg-type]
        if measure is None:
            continue
        low, high = measure.ratio.low, measure.ratio.high
        side = "no clear difference in" if low <= 1 <= high or not math.isfinite(high) else "B is better in"
        if side.startswith("B") and (low > 1) != more:
            side = "B is worse in"
        told.append(f"{side} {words}, {_cell(measure.ratio, format_ratio)}")
    if (task := result.task) is not None and task.acc is not None:
        change = task.acc.change
        clear = "no clear difference in" if change.low <= 0 <= change.high else (
            "B is better in" if change.low > 0 else "B is worse in")  # fmt: skip
        told.append(f"{clear} accuracy, {_cell(change, format_points, _format_points, ' to ')} pp")
    if (agreement := result.agreement) is not None:
        told.append(f"{format_accuracy(agreement.same.value)} of the answers are the same")
    if not told:
        return "No prompt was answered by both: nothing can be compared."
    words = "; ".join(told)
    return f"{words[0].upper()}{words[1:]}. Over {result.pairs} prompts that both answered."


def where_answers_lie(result: AbReport) -> str:
    """Where every answer is stored, and the command that prints them; empty where there is no store."""
    if not result.run:
        return "The answers are in the result alone: it was not stored."
    run = visible_name(result.run)
    return (
        f"Every answer is in the run store: billhook show {run} --json prints them, and billhook report {run} writes "
        "this page with them beside it, in result.json."
    )


def _cell(estimate: Estimate, spell: Spell = format_number, ends: Spell | None = None, to: str = "–") -> str:
    """`0.21 (0.20–0.22)`; of a single pair without the ends, which are not known."""
    if not math.isfinite(estimate.low):
        return spell(estimate.value)
    low, high = ((ends or spell)(end).removeprefix("×") for end in (estimate.low, estimate.high))
    return f"{spell(estimate.value)} ({low}{to}{high})"


def _seconds(x: float) -> str:
    """Milliseconds are seen."""
    return f"{x:.3f}" if x < 10 else format_number(x)


def _whole(x: float) -> str:
    return f"{100 * x:.0f}"


def _format_points(x: float) -> str:
    return f"{100 * x:+.0f}".replace("-", "−")


def ab_notes(result: AbReport) -> list[str]:
    """What a reader of the numbers must know."""
    answered = result.answered
    notes = [
        f"{len(result.outcomes)} prompts: {answered.both} answered by both, {answered.only_a} by A only, "
        f"{answered.only_b} by B only, {answered.neither} by neither. Times and texts: of those that both answered."
    ]
    for name, side in (("A", result.a), ("B", result.b)):
        if side.errors or side.retries:
            counted = ", ".join(f"{count} {kind}" for kind, count in side.errors.items()) or "no error"
            notes.append(f"{name}: {counted}, {side.retries} further attempts.")
        for kind, detail in side.first_errors.items():
            notes.append(f"  the first {kind}: {visible_name(detail)[:MOST]}")
    if result.pairs and result.tokens_counted_by == "pieces":
        notes.append("Tokens are pieces of the stream, as not both servers count them: a piece may hold several.")
    notes += _task_notes(result)
    if result.pairs < FEW_PAIRS:
        notes.append("The intervals rest on few prompts and are not reliable.")
    asking = result.asking
    notes.append(
        f"{asking.kind}, at most {asking.max_tokens} tokens, temperature {asking.temperature:g}, timeout "
        f"{asking.timeout:g} s, {asking.retries} retries, {asking.concurrency} at a time, in pairs after a "
        "warm-up; in brackets: 95% intervals"
    )
    return notes


def _task_notes(result: AbReport) -> list[str]:
    task = result.task
    if task is None:
        return []
    missing = [
        f"No task scores: {name.upper()} offers no log-probabilities of a prompt ({visible_name(why)[:MOST]})."
        for name, why in task.not_offered.items()
    ]
    errors = task.errors
    scored = f"Scored by both: {task.items} items; not by A {errors['a']}, not by B {errors['b']}."
    return missing or [scored]
