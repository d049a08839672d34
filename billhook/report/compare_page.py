"""A comparison as one page: one table of all students, a chart of them, then each student to open.

Nothing is measured here: every number comes from the result. Every string of the result is escaped.
"""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import asdict
from html import escape

from billhook.core.margin import BOUND
from billhook.core.results.comparisons import ComparedSet, Comparison, Flip, PairVerdict, Verdict
from billhook.core.results.measured import Estimate
from billhook.report.charts import COLOURS, SYMBOLS, Axis, Line, Point, figure, key_of, names_chart
from billhook.report.compare_words import (
    VERDICT_COLUMNS,
    agreement_words,
    change_words,
    comparison_headline,
    flip_words,
    margin_words,
    model_names,
    seen_warnings,
    set_names,
    size_rows,
    verdict_counts,
    verdict_rows,
)
from billhook.report.frame import Section, caption, details, html_table, page_html, scrolling, stacked_table
from billhook.report.numbers import format_number, pluralize, printable, token_facts
from billhook.report.pages import page
from billhook.report.study_words import short_names

MOST_FLIPS = 300  # of a task and a pair, on the page; the result has all
WORDS: tuple[Verdict, ...] = ("worse", "undecided", "equivalent", "better")


@page(Comparison)
def comparison_page(result: Comparison) -> str:
    """The page of one comparison."""
    made = f"Billhook · compare · {result.environment.machine}"
    warnings = seen_warnings(result.seen)
    return page_html(comparison_title(result), made, comparison_verdict(result), warnings, compare_sections(result))


def comparison_title(result: Comparison) -> str:
    """The heading of the page."""
    names = model_names(result)
    return (
        f"{' and '.join(names[1:])} against {names[0]}"
        if len(names) < 4
        else f"{len(names) - 1} models against {names[0]}"
    )


def comparison_verdict(result: Comparison) -> str:
    """What all sets say of every student, in a sentence."""
    if len(result.models) == 2:
        return comparison_headline(result)
    names = labels_of(result)
    told = [f"{names[other]} is {verdict_counts(result, other)}" for other in range(1, len(names))]
    return f"Against {names[0]} on {pluralize(len(result.sets), 'set')} ({margin_words(result)}): {'; '.join(told)}."


def labels_of(result: Comparison) -> list[str]:
    """Short names of the models, A first, no two alike."""
    brief = short_names(each.model for each in result.models)
    names = [brief[each.model] for each in result.models]
    many = Counter(names)
    return [f"{name} ({chr(65 + i)})" if many[name] > 1 else name for i, name in enumerate(names)]


def compare_sections(result: Comparison) -> list[Section]:
    """One table of students, what next, a chart of all, each student to open, and on what they were measured."""
    return [
        Section("students", "Students", _students(result)),
        Section("next", "What next", _next(result)),
        Section("changes", "Change against the first model", _charts(result)),
        Section("each", "Each student", "".join(_student(result, other) for other in range(1, len(result.models)))),
        Section("how", "Measured on", _how(result)),
    ]


def word(verdict: str) -> str:
    """A verdict as HTML: its mark, its word and its colour."""
    return f'<span class="word {escape(verdict.lower())}">{escape(verdict)}</span>'


# -- all students ------------------------------------------------------------------------------------------------------


def _students(result: Comparison) -> str:
    """A row for each student: its verdicts, what changed on every set, and its size and speed."""
    names, brief = labels_of(result), set_names(result)
    heads = ["Student", "Verdicts"]
    heads += [f"{brief[each.source]}, {'ppl' if each.is_text else each.score}" for each in result.sets]
    heads += ["Parameters", "KV cache", "Decoding"]
    rows = []
    for other in range(1, len(names)):
        counts = Counter(result.verdicts(other))
        words = "<br>".join(f"{word(each)} on {counts[each]}" for each in WORDS if counts[each]) or "–"
        cells = [words, *(_set_cell(each, other) for each in result.sets), *_size_cells(result, other)]
        rows.append([escape(names[other]), *cells])
    table = stacked_table(heads, rows)
    text = (
        f"Each against {names[0]}; below each value its paired 95% interval. Equivalent: the lower and the upper bound "
        f"({BOUND} each) are within the margin. Undecided: more items would tell."
    )
    return scrolling(table, "Students") + caption(text)


def _set_cell(compared: ComparedSet, other: int) -> str:
    pair = compared.pairs[other - 1]
    if pair is None:
        return "not comparable"
    value, ends = change_words(pair, compared.is_text)
    return f"{word(pair.verdict)}<br>{escape(value)}<small>{escape(ends)}</small>"


def _size_cells(result: Comparison, other: int) -> list[str]:
    rows = {row[0]: row for row in size_rows(result, other)}
    cells = []
    for name in ("Parameters", "KV cache / token", "Decode tokens/s"):
        row = rows.get(name)
        if row is None:
            cells.append("–")
            continue
        value, _, ends = row[3].partition(" (")
        small = f"<small>{escape(ends.replace(')', '', 1))}</small>" if ends else ""
        cells.append(f"{escape(value)}{small}")
    return cells


def _charts(result: Comparison) -> str:
    """Every student on every set, with its interval: one chart of perplexities, one of accuracies."""
    names = labels_of(result)
    charts = [_chart(result, kind) for kind in (True, False)]
    lines = [Line(names[other], (), *_look(other)) for other in range(1, len(names))]
    key = key_of(lines, buttons=True) if len(names) > 2 else ""
    hint = caption("Press a student to single it out in both charts.") if key and all(charts) else ""
    return f'<div class="linked">{key}{hint}{"".join(charts)}</div>' if any(charts) else ""


def _look(other: int) -> tuple[str, str]:
    return COLOURS[(other - 1) % len(COLOURS)], SYMBOLS[(other - 1) % len(SYMBOLS)]


def _chart(result: Comparison, is_text: bool) -> str:
    sets = [each for each in result.sets if each.is_text == is_text and any(each.pairs)]
    if not sets:
        return ""
    names, brief, students = labels_of(result), set_names(result), len(result.models) - 1
    lines = []
    for other in range(1, len(names)):
        shift = round(9 * (other - 1 - students / 2))
        points = tuple(
            _point(each, pair, i, f"{names[other]}, {brief[each.source]}")
            for i, each in enumerate(sets) if (pair := each.pairs[other - 1]) is not None
        )  # fmt: skip
        lines.append(Line(names[other], points, *_look(other), shift=shift))
    margins = tuple(_margin(each, i) for i, each in enumerate(sets))
    lines.append(Line("margin", margins, "--dim", size=0, shift=round(9 * students / 2)))
    x = Axis("perplexity ÷ the first model’s", "nats_as_ratio") if is_text else Axis("change of accuracy", "points")
    option = names_chart(lines, x, [brief[each.source] for each in sets], at=0.0)
    side = "right: worse" if is_text else "left: worse"
    text = (
        f"Dots: change against {names[0]}, {side}; whiskers: paired 95% intervals. Dotted: no change. Grey, below each "
        "set: its margin."
    )
    title = "Perplexity" if is_text else "Accuracy"
    label = f"{title} of {students} students on {len(sets)} sets; the table of students has the numbers."
    height = 90 + len(sets) * (9 * students + 36)
    return figure(option, title=title, label=label, caption=text, height=height)


def _point(compared: ComparedSet, pair: PairVerdict, place: int, name: str) -> Point:
    value, ends = change_words(pair, compared.is_text)
    tip = f"{name}: {pair.verdict}\n{value} ({ends})\n{compared.n:,} {'documents' if compared.is_text else 'items'}"
    return Point.of(place, _scaled(pair.change, compared.is_text), tip, hollow=pair.verdict == "undecided")


def _scaled(change: Estimate, is_text: bool) -> Estimate:
    return change if is_text else change.mapped(lambda share: 100 * share)


def _margin(compared: ComparedSet, place: int) -> Point:
    pair = next(pair for pair in compared.pairs if pair is not None)
    limit = pair.margin.limit if compared.is_text else 100 * pair.margin.limit
    return Point(place, 0.0, f"margin {pair.margin}", -limit, limit)


def _next(result: Comparison) -> str:
    """What to do next: more items for what is undecided, recovery for what is worse, a baseline for what is good."""
    names = [shlex.quote(printable(each.model)) for each in result.models]
    verdicts = [verdict for other in range(1, len(names)) for verdict in result.verdicts(other)]
    steps = []
    if "undecided" in verdicts:
        more = max((pair.more or 0 for each in result.sets for pair in each.pairs if pair is not None), default=0)
        tasks = [each.source for each in result.sets if not each.is_text]
        count = f"about {format_number(more)} more texts or items decide" if more else "more texts or items decide"
        asked = f" --tasks {shlex.quote(','.join(map(printable, tasks)))}" if tasks else ""
        steps.append((f"Decide what is undecided: {count} all of it.",
                      f"billhook compare {' '.join(names)}{asked} --eval-tokens 65536"))  # fmt: skip
    if "worse" in verdicts:
        steps.append(("Get quality back where it is worse: prune again with a recovery.",
                      f"billhook prune {names[0]} --remove 10% --recover fold,lora"))  # fmt: skip
    if verdicts and not {"worse", "undecided"} & set(verdicts):
        steps.append(("Keep it so: a gate fails as soon as a later student loses more.",
                      f"billhook gate {names[-1]} --baseline {names[0]}"))  # fmt: skip
    return "".join(f'<p class="plain">{escape(words)}</p><pre>{escape(code)}</pre>' for words, code in steps)


# -- each student ------------------------------------------------------------------------------------------------------


def _student(result: Comparison, other: int) -> str:
    """Verdicts, what is behind them, sizes and flipped items of one student; in sight where it is the only one."""
    names = model_names(result)
    rows = [[word(cell) if cell in WORDS else escape(cell) for cell in row] for row in verdict_rows(result, other)]
    verdicts = stacked_table(VERDICT_COLUMNS, rows)
    lines = "".join(caption(words) for words in [*flip_words(result, other), agreement_words(result, other)] if words)
    about = caption(
        f"A: {names[0]}. B: {names[other]}. Intervals are paired over items; p is adjusted for all sets by Holm's "
        "method."
    )
    sizes = scrolling(html_table(("Measure", "A", "B", "Change"), size_rows(result, other)), "Size and speed")
    body = f"{scrolling(verdicts, 'Verdicts')}{about}{lines}<h4>Size and speed</h4>{sizes}{_flips(result, other)}"
    if len(names) == 2:
        return body
    return details(labels_of(result)[other], body)


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
        title = f"<h4>{escape(brief[each.source])}: items that flipped</h4>"
        sections.append(f'<div class="flips">{title}{tools}{cut}{items}</div>')
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
    return f"{sets}<h3>Environment</h3>{html_table(('Name', 'Value'), where)}"
