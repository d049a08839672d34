"""A vocabulary that a run cut, in rows and sentences."""

from __future__ import annotations

import math

from billhook.core.results.exports import VocabularyChange
from billhook.report.numbers import format_number, pluralize, reliability_note, with_interval


def _bits(x: float) -> str:
    return f"{x:.3f}"


def _more_bits(x: float) -> str:
    return f"{x:+.3f}".replace("-", "−")


def _more(x: float) -> str:
    return f"{x:+.1%}".replace("-", "−")


def vocabulary_rows(change: VocabularyChange) -> list[tuple[str, str, str, str]]:
    """Return lines of a run's table: label, the model as it was given, the student, and the change."""
    text, before, after = change.text, change.rows_before, change.rows_after
    return [
        ("Bits per byte", _bits(text.before.value), _bits(text.after.value), with_interval(text.change, _more_bits)),
        (
            "Tokens of held-out text",
            f"{text.tokens_before:,}",
            f"{text.tokens_after:,}",
            with_interval(text.more, _more),
        ),
        ("Rows of the vocabulary", f"{before:,}", f"{after:,}", _more(after / before - 1)),
    ]


def rows_in_words(change: VocabularyChange) -> str:
    """Return `157,287 of 262,144 rows of the vocabulary removed`."""
    return f"{change.rows_before - change.rows_after:,} of {change.rows_before:,} rows of the vocabulary removed"


def bits_in_words(change: VocabularyChange) -> str:
    """Return the bits per byte before and after, with the interval of their change."""
    text = change.text
    ends = f"95% interval {_more_bits(text.change.low)} to {_more_bits(text.change.high)}"
    values = f"{_bits(text.before.value)} → {_bits(text.after.value)}"
    return f"bits per byte {values} ({_more_bits(text.change.value)}, {ends})"


def vocabulary_verdict(change: VocabularyChange) -> str:
    """Return whether the student is good, in a sentence: by the interval of its bits per byte."""
    bits = change.text.change
    ends = f"{_more_bits(bits.low)} to {_more_bits(bits.high)}"
    on = f"held-out text (95% interval over {pluralize(bits.clusters, 'text')})"
    if not (math.isfinite(bits.low) and math.isfinite(bits.high)):
        return "How much worse it is on held-out text is not known: one text has no interval."
    if bits.high < 0:
        return f"It is better than the model as given: bits per byte change by {ends} on {on}."
    if bits.low <= 0:
        return f"No loss is seen: bits per byte change by {ends} on {on}."
    return f"It is worse than the model as given: bits per byte rise by {ends} on {on}."


def vocabulary_notes(change: VocabularyChange) -> list[str]:
    """Return what chose the rows, what each cut costs, and what the numbers compare."""
    alone = change.alone
    notes = [
        f"Of the vocabulary {change.rows_after:,} of {change.rows_before:,} rows are left, chosen by "
        f"{change.counted:,} tokens of {change.data}, of which {change.used:,} are different; {change.fixed:,} rows "
        f"stay whatever is removed. Alone this leaves {format_number(change.parameters)} parameters, and changes bits "
        f"per byte by {with_interval(alone.change, _more_bits)}."
    ]
    notes.append(
        "The teacher is the model as it was given. Perplexities of other tokens do not compare; bits per byte do."
    )
    if change.by_plan is not None:
        notes[0] += f" What was pruned then changes them by {with_interval(change.by_plan, _more_bits)} more."
        notes[1] += " Losses of the search and gains of a recovery are against the model with the smaller vocabulary."
    if note := reliability_note(change.text.change):
        notes.append(f"Bits per byte: {note}")
    return notes
