"""A comparison as one self-contained HTML page: verdicts, sizes, and the items that flipped, which can be searched.

Nothing is measured here: every number comes from the result, a plain JSON object. The page has the head of the run's
page, asks the network for nothing (its Content-Security-Policy forbids it) and escapes every string of the result.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from billhook.core.margin import BOUND
from billhook.report.compare_words import (
    VERDICT_COLUMNS,
    Result,
    close_words,
    comparison_headline,
    comparison_warnings,
    flip_words,
    names_of,
    size_rows,
    verdict_rows,
)
from billhook.report.frame import html_table, scrolling
from billhook.report.numbers import about_tokens, printable
from billhook.report.study_words import short_names

MOST_FLIPS = 300  # of a task and a pair, on the page; the result has all


def comparison_page(result: Result) -> str:
    """The page of one comparison."""
    house, names = files("billhook.report").joinpath("templates"), names_of(result)
    head = house.joinpath("run.html").read_text(encoding="utf-8").partition("</style>")[0]
    body = [_pair(result, other) for other in range(1, len(names))]
    body += [_flips(result, other) for other in range(1, len(names))]
    body.append(_how(result))
    told = [comparison_headline(result, other) for other in range(1, len(names))]
    return Template(head + house.joinpath("compare.html").read_text(encoding="utf-8")).substitute(
        title=escape(f"{' and '.join(names[1:])} against {names[0]}"),
        made=escape(f"Billhook · compare · {result['environment']['machine']}"),
        verdict=escape(" ".join(told)),
        notes="".join(f'<p class="note">{escape(note)}</p>' for note in comparison_warnings(result)),
        body="".join(body),
    )


def _pair(result: Result, other: int) -> str:
    """Verdicts, what is behind them, and sizes of A and one other model."""
    names = names_of(result)
    verdicts = html_table(VERDICT_COLUMNS, verdict_rows(result, other))
    verdicts = re.sub(r"<td>(better|equivalent|worse|undecided)</td>", r'<td class="word \1">\1</td>', verdicts)
    lines = "".join(
        f"<p>{escape(words)}</p>" for words in [*flip_words(result, other), close_words(result, other)] if words
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


def _flips(result: Result, other: int) -> str:
    """The items that A and one other model do not answer alike, task by task."""
    brief, told = short_names(row["set"] for row in result["rows"]), []
    for file, items in result["flips"].items():
        mine = [item for item in items if item["right"][0] != item["right"][other]]
        if not mine:
            continue
        some = "".join(_item(item, other) for item in mine[:MOST_FLIPS])
        cut = f"<p>The first {MOST_FLIPS} of {len(mine)}; result.json has all.</p>" if len(mine) > MOST_FLIPS else ""
        tools = (
            '<div class="tools"><input type="search" placeholder="Search these items" '
            f'aria-label="Search {escape(brief[file])}">'
            '<select aria-label="Who is right"><option value="">all that flipped</option>'
            '<option value="a">only A is right</option><option value="b">only B is right</option></select>'
            '<output aria-live="polite"></output></div>'
        )
        title = f"<h2>{escape(brief[file])}: items that flipped, {escape(names_of(result)[other])}</h2>"
        told.append(f'<section class="flips">{title}{tools}{cut}{some}</section>')
    return "".join(told)


def _item(item: Mapping[str, Any], other: int) -> str:
    """One item: what was asked, and what both models give to every choice, or wrote."""
    who = "a" if item["right"][0] else "b"
    head = f"<h3>Item {item['number']} <small>only {who.upper()} is right</small></h3>"
    query = escape(_printable(str(item["query"])))
    shows = _choices if "choices" in item else _answers
    return f'<article class="flip" data-who="{who}">{head}<p class="query">{query}</p>{shows(item, other)}</article>'


def _choices(item: Mapping[str, Any], other: int) -> str:
    """A table of the choices with the probability that each model gives to each."""
    a, b = item["probabilities"][0], item["probabilities"][other]
    lines = []
    for i, choice in enumerate(item["choices"]):
        cells = "".join(f"<td{' class=said' if p[i] == max(p) else ''}>{p[i]:.1%}</td>" for p in (a, b))
        lines.append(
            f"<tr{' class=gold' if i == item['gold'] else ''}><td>{escape(printable(choice))}</td>{cells}</tr>"
        )
    return f"<table><thead><tr><th>Choice</th><th>A</th><th>B</th></tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _answers(item: Mapping[str, Any], other: int) -> str:
    """What both wrote, and what is right."""
    told = (("A", item["answers"][0]), ("B", item["answers"][other]), ("Right", item["target"]))
    lines = "".join(f"<dt>{name}</dt><dd>{escape(_printable(str(text)))}</dd>" for name, text in told)
    return f'<dl class="answers">{lines}</dl>'


def _printable(text: str) -> str:
    """Lines stay lines."""
    return "\n".join(map(printable, text.splitlines()))


def _how(result: Result) -> str:
    """On what everything was measured."""
    brief = short_names(result["sets"])
    keys = ("tokens", "documents", "texts", "items")
    sides = {name: about_tokens(about) for name, about in result["sets"].items()}
    lines: Iterable[Sequence[str]] = [
        (brief[name], *("–" if about.get(key) is None else f"{about[key]:,}" for key in keys))
        for name, about in sides.items()
    ]
    sets = scrolling(html_table(("Set", *(key.capitalize() for key in keys)), lines), "Sets")
    where = html_table(("Name", "Value"), [(key, printable(value)) for key, value in result["environment"].items()])
    return f"<section><h2>Measured on</h2>{sets}</section><section><h2>Environment</h2>{where}</section>"
