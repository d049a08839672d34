"""The page of a sweep: curves, every trial in one table, what was refused, and how it was measured.

Nothing is measured here: every number comes from the result.
"""

from __future__ import annotations

import shlex
from html import escape

from billhook.core.plan import PARTS
from billhook.core.results.measured import Estimate
from billhook.core.results.studies import SweepResult, TrialResult
from billhook.report.frame import Section, caption, html_table, page_html, scrolling
from billhook.report.numbers import (
    format_accuracy,
    format_duration,
    format_interval,
    format_interval_short,
    format_nats,
    format_number,
    format_perplexity,
    pluralize,
    printable,
)
from billhook.report.pages import page
from billhook.report.study_words import (
    gap_to_best,
    known_fraction,
    peers,
    rank_label,
    reliability_notes,
    removed_words,
    short_names,
    sizes_of,
    sorted_trials,
    sweep_headline,
    tasks_of,
    texts_of,
)
from billhook.report.trials.sets import sets_table
from billhook.report.trials.sweep_curves import curves
from billhook.report.trials.tasks import TITLE, tasks_curves


@page(SweepResult)
def sweep_page(result: SweepResult) -> str:
    """One page of a sweep."""
    made = f"Billhook · sweep · fingerprint {printable(result.fingerprint)}"
    notes = reliability_notes(result)
    return page_html(sweep_title(result), made, sweep_headline(result), notes, sweep_sections(result))


def sweep_title(result: SweepResult) -> str:
    """The heading of the page."""
    tried = {trial.recipe for trial in result.trials} | {each.recipe for each in result.refused}
    return f"{printable(result.model)}: {pluralize(len(tried), 'recipe')}{' compared' if len(tried) > 1 else ''}"


def sweep_sections(result: SweepResult) -> list[Section]:
    """Losses and accuracies against what is left, task by task, what next, all trials, what was refused, how."""
    sections = [
        Section("curves", "Quality against size", curves(result)),
        Section("tasks", TITLE, tasks_curves(result)),
        Section("next", "What next", _next(result)),
        Section("trials", "All results", _all_trials(result)),
        Section("refused", "Refused", _refused(result)),
        Section("how", "How it was measured", _how(result)),
    ]
    return [section for section in sections if section.html]


def _next(result: SweepResult) -> str:
    """The command that makes the best student of every size, by the first text; nothing without a text."""
    texts = texts_of(result)
    if not texts:
        return ""
    best: dict[str, TrialResult] = {}
    for trial in sorted_trials(result):
        best.setdefault(trial.remove, trial)
    lines = []
    for remove, trial in best.items():
        words = (
            f"At {printable(remove)} {printable(trial.recipe)} has the lowest loss on {short_names(texts)[texts[0]]}:"
        )
        asked = (printable(result.model), "--recipe", printable(trial.recipe), "--remove", printable(remove))
        lines.append(f'<p class="plain">{escape(words)}</p><pre>{escape(f"billhook prune {shlex.join(asked)}")}</pre>')
    return "".join(lines) + caption("Nothing is measured again that the store holds.")


def _all_trials(result: SweepResult) -> str:
    """The table of all trials, sortable by every column; at first by size, calibration text and loss."""
    if not result.trials:
        return ""
    texts, tasks, names = texts_of(result), tasks_of(result), short_names(result.teacher)
    heads = [("Recipe", ""), ("Size asked", "")]
    for text in texts:
        heads += [("Perplexity", names[text]), ("Above the best, nats", names[text])]
    heads += [("Accuracy", names[task]) for task in tasks] + [("Left", words) for words in sizes_of(result).values()]
    heads += [("Attention", "removed"), ("MLP", "removed"), ("Calibrated on", "")]
    heads += [("Search", "time"), ("Site evaluations", "")]
    top = "".join(
        _heading(word, about, about in names.values(), word in ("Recipe", "Size asked", "Calibrated on"))
        for word, about in heads
    )
    body = "".join(_trial_row(result, trial) for trial in sorted_trials(result))
    table = f'<table class="sortable"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
    words = (
        "Below each value: its 95% interval. Above the best: the paired difference to the lowest loss of the same size "
        "and calibration text; not told apart: its interval includes 0. Each interval stands for itself: of many, "
        "about one in twenty misses. Bold: on the Pareto front by parameters. Press a heading to sort."
    )
    return scrolling(table, "All results", tall=True) + caption(words)


def _heading(word: str, about: str, file: bool, words: bool) -> str:
    """A heading that sorts; `words`: its column holds words."""
    kind = ' class="file"' if file else ""
    small = f" <small{kind}>{escape(about)}</small>" if about else ""
    return f'<th scope="col"{" data-words" * words}><button type="button">{escape(word)}{small}</button></th>'


def _trial_row(result: SweepResult, trial: TrialResult) -> str:
    recipe, remove = printable(trial.recipe), printable(trial.remove)
    data = short_names(each.data for each in result.trials)[trial.data]
    shares = (known_fraction(result, trial, size) for size in sizes_of(result))
    cells = [_cell(remove, remove)]
    for text in texts_of(result):
        estimate, gap = trial.results[text].estimate, gap_to_best(trial, text)
        ends = format_interval_short(estimate, format_perplexity)
        cells.append(_cell(estimate.value, format_perplexity(estimate.value), ends))
        state = rank_label(gap) if peers(result, trial) > 1 else "alone"
        far = _cell(gap.value, format_nats(gap.value), format_interval(gap, format_nats), state)
        cells.append({"best": _BEST, "alone": _cell(0, "–")}.get(state, far))
    cells += [_accuracy_cell(trial.results[task].estimate) for task in tasks_of(result)]
    cells += [_cell(2, "–") if share is None else _cell(share, f"{share:.1%}") for share in shares]
    for removed, narrowed in (removed_words(trial, part) for part in PARTS):
        cells.append(_cell(removed, str(removed), narrowed))
    cells.append(_cell(data, data))
    cells.append(_cell(trial.search_seconds, format_duration(trial.search_seconds)))
    cells.append(_cell(trial.site_evaluations, format_number(trial.site_evaluations)))
    front = ' class="front"' if "parameters" in trial.front else ""
    return f'<tr{front}><th scope="row" data-sort="{escape(recipe)}">{escape(recipe)}</th>{"".join(cells)}</tr>'


_BEST = '<td data-sort="0"><b class="best">best</b></td>'


def _cell(sort: object, words: str, about: str = "", remark: str = "") -> str:
    """A cell: what it is sorted by, what it says, its interval and a remark."""
    mark = f" <i>{remark}</i>" if remark else ""
    small = f"<small>{escape(about)}</small>" if about else ""
    return f'<td data-sort="{escape(str(sort))}">{escape(words)}{mark}{small}</td>'


def _accuracy_cell(estimate: Estimate) -> str:
    """A cell of an accuracy with its interval."""
    ends = format_interval_short(estimate, format_accuracy)
    return _cell(estimate.value, format_accuracy(estimate.value), ends)


def _refused(result: SweepResult) -> str:
    datas = short_names(each.data for each in result.refused)
    lines = [
        (printable(each.recipe), printable(each.remove), datas[each.data], printable(each.reason))
        for each in result.refused
    ]
    head = ("Recipe", "Size asked", "Calibrated on", "Why")
    return f'<div class="why">{html_table(head, lines)}</div>' if lines else ""


def _how(result: SweepResult) -> str:
    """Teacher, texts and tasks with their sizes, calibration, timing."""
    names = short_names(result.teacher)
    lines = []
    for name, outcome in result.teacher.items():
        spell = format_perplexity if outcome.kind == "perplexity" else format_accuracy
        ends = format_interval(outcome.estimate, spell)
        lines.append((names[name], outcome.kind, spell(outcome.estimate.value), ends))
    teacher = html_table(("Measured on", "Kind", "Teacher", "95% interval"), lines)
    sets = [(f"measured on {names[name]}", info) for name, info in result.evaluation.items()]
    sets += [("calibration", info) for info in result.calibration]
    timing = "Time per token was not measured."
    if result.sizes.ns_per_token:
        timing = (
            f"Time per token: measured site by site, {pluralize(result.batch, 'sequence')} at a time, "
            f"{result.context:,} tokens before the one that is timed."
        )
    words = (
        "Calibration and held-out documents are never the same. All rows are measured on the same held-out documents, "
        f"so that differences are paired; intervals resample whole texts, or items of a task. {timing}"
    )
    return f"{teacher}<h3>Token sets</h3>{scrolling(sets_table(sets), 'Token sets')}{caption(words)}"
