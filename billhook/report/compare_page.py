"""A comparison as one self-contained HTML page: verdicts, sizes, and the items that flipped, which can be searched.

Nothing is measured here: every number comes from the result. The page has the head of the run's page, asks the network
for nothing (its Content-Security-Policy forbids it) and escapes every string of the result.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from html import escape

from billhook.core.margin import BOUND
from billhook.core.results.comparisons import Comparison, Flip
from billhook.report.compare_words import (
    VERDICT_COLUMNS,
    agreement_words,
    comparison_headline,
    flip_words,
    model_names,
    seen_warnings,
    set_names,
    size_rows,
    verdict_rows,
)
from billhook.report.frame import html_table, page_html, scrolling
from billhook.report.numbers import printable, token_facts
from billhook.report.pages import page

MOST_FLIPS = 300  # of a task and a pair, on the page; the result has all


@page(Comparison)
def comparison_page(result: Comparison) -> str:
    """The page of one comparison."""
    names = model_names(result)
    others = range(1, len(names))
    return page_html(
        f"{' and '.join(names[1:])} against {names[0]}",
        f"Billhook · compare · {result.environment.machine}",
        " ".join(comparison_headline(result, other) for other in others),
        seen_warnings(result.seen),
        [*(_pair(result, other) for other in others), *(_flips(result, other) for other in others), _how(result)],
    )


def _pair(result: Comparison, other: int) -> str:
    """Verdicts, what is behind them, and sizes of A and one other model."""
    names = model_names(result)
    verdicts = html_table(VERDICT_COLUMNS, verdict_rows(result, other))
    verdicts = re.sub(r"<td>(better|equivalent|worse|undecided)</td>", r'<td class="word \1">\1</td>', verdicts)
    lines = "".join(
        f"<p>{escape(words)}</p>" for words in [*flip_words(result, other), agreement_words(result, other)] if words
    )
    caption = (
        f"<p>A: {escape(names[0])}. B: {escape(names[other])}. Intervals are paired over items; p is adjusted for all "
        f"sets by Holm's method. Equivalent: the lower and the upper bound ({BOUND} each) are within the margin.</p>"
    )
    sizes = scrolling(html_table(("Measure", "A", "B", "Change"), size_rows(result, other)), "Size and speed")
    return (
        f"<section><h2>{escape(names[other])}</h2>{scrolling(verdicts, 'Verdicts')}{caption}{lines}</section>"
        f"<section><h2>Size and speed</h2>{sizes}</section>"
    )


def _flips(result: Comparison, other: int) -> str:
    """The items that A and one other model do not answer alike, task by task."""
    brief, sections = set_names(result), []
    for each in result.sets:
        flips = [flip for flip in each.flips if flip.right[0] != flip.right[other]]
        if not flips:
            continue
        items = "".join(_item(flip, other) for flip in flips[:MOST_FLIPS])
        many = len(flips) > MOST_FLIPS
        cut = f"<p>The first {MOST_FLIPS} of {len(flips)}; result.json has all.</p>" if many else ""
        tools = (
            '<div class="tools"><input type="search" placeholder="Search these items" '
            f'aria-label="Search {escape(brief[each.source])}">'
            '<select aria-label="Who is right"><option value="">all that flipped</option>'
            '<option value="a">only A is right</option><option value="b">only B is right</option></select>'
            '<output aria-live="polite"></output></div>'
        )
        title = f"<h2>{escape(brief[each.source])}: items that flipped, {escape(model_names(result)[other])}</h2>"
        sections.append(f'<section class="flips">{title}{tools}{cut}{items}</section>')
    return "".join(sections)


def _item(flip: Flip, other: int) -> str:
    """One item: what was asked, and what both models give to every choice, or wrote."""
    who = "a" if flip.right[0] else "b"
    head = f"<h3>Item {flip.number} <small>only {who.upper()} is right</small></h3>"
    query = escape(_printable(flip.query))
    details = _choices(flip, other) if flip.choices else _answers(flip, other)
    return f'<article class="flip" data-who="{who}">{head}<p class="query">{query}</p>{details}</article>'


def _choices(flip: Flip, other: int) -> str:
    """A table of the choices with the probability that each model gives to each."""
    a, b = flip.probabilities[0], flip.probabilities[other]
    lines = []
    for i, choice in enumerate(flip.choices):
        cells = "".join(f"<td{' class=said' if p[i] == max(p) else ''}>{p[i]:.1%}</td>" for p in (a, b))
        lines.append(f"<tr{' class=gold' if i == flip.gold else ''}><td>{escape(printable(choice))}</td>{cells}</tr>")
    return f"<table><thead><tr><th>Choice</th><th>A</th><th>B</th></tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _answers(flip: Flip, other: int) -> str:
    """What both wrote, and what is right."""
    texts = (("A", flip.answers[0]), ("B", flip.answers[other]), ("Right", flip.target))
    lines = "".join(f"<dt>{name}</dt><dd>{escape(_printable(text))}</dd>" for name, text in texts)
    return f'<dl class="answers">{lines}</dl>'


def _printable(text: str) -> str:
    """Lines stay lines."""
    return "\n".join(map(printable, text.splitlines()))


def _how(result: Comparison) -> str:
    """On what everything was measured."""
    brief, lines, keys = set_names(result), [], ("tokens", "documents", "texts", "items")
    for each in result.sets:
        facts = {} if each.info.tokens is None else token_facts(each.info.tokens)
        lines.append((brief[each.source], *("–" if facts.get(key) is None else f"{facts[key]:,}" for key in keys)))
    sets = scrolling(html_table(("Set", *(key.capitalize() for key in keys)), lines), "Sets")
    where = [(key, printable(value)) for key, value in asdict(result.environment).items()]
    environment = html_table(("Name", "Value"), where)
    return f"<section><h2>Measured on</h2>{sets}</section><section><h2>Environment</h2>{environment}</section>"
