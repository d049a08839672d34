"""The page of a transfer: pruned for one task, measured on another."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from html import escape

from billhook.core.plan import PARTS
from billhook.core.results.measured import Estimate
from billhook.core.results.studies import TransferResult, TrialResult
from billhook.report.frame import Section, caption, page_html, scrolling, stacked_table
from billhook.report.numbers import (
    format_accuracy,
    format_duration,
    format_interval,
    format_interval_short,
    format_number,
    format_points,
    printable,
)
from billhook.report.pages import page
from billhook.report.study_words import gap_to_text, reliability_notes, removed_words, transfer_headline
from billhook.report.trials.sets import sets_table


@page(TransferResult)
def transfer_page(result: TransferResult) -> str:
    """One page of a transfer."""
    made = f"Billhook · transfer · remove {printable(result.remove)}"
    notes = reliability_notes(result)
    return page_html(transfer_title(result), made, transfer_headline(result), notes, transfer_sections(result))


def transfer_title(result: TransferResult) -> str:
    """The heading of the page."""
    return f"{printable(result.model)}: pruned for one task, measured on another"


def transfer_sections(result: TransferResult) -> list[Section]:
    """Pruned for (rows), measured on (columns), against the teacher and against text."""
    pale = "Pale: the 95% interval includes 0. Framed: measured on the task that it was pruned for."
    teacher = _heat(result.trials, lambda trial, task: trial.results[task].change)
    colours = f"Change in percentage points, with its paired 95% interval; orange: worse, blue: better. {pale}"
    text = _heat(result.trials[1:], gap_to_text) if len(result.trials) > 1 else ""
    against = caption(f"The same, against the first row of the table above. {pale}")
    sets = sets_table((printable(name), info) for name, info in result.evaluation.items())
    how = caption("Items that a search looks at are never measured. Differences are paired, item by item.")
    sections = [
        Section("teacher", "Accuracy against the teacher", teacher + caption(colours)),
        Section("text", "Against pruning on text", text and text + against),
        Section("next", "What next", _next(result)),
        Section("accuracies", "Accuracies", _accuracies(result)),
        Section("how", "How it was measured", scrolling(sets, "Token sets") + how),
    ]
    return [section for section in sections if section.html]


def _next(result: TransferResult) -> str:
    """The command that prunes for a task, where that was clearly better than pruning on text."""
    better = [t.recipe for t in result.trials[1:] if t.recipe in t.results and gap_to_text(t, t.recipe).low > 0]
    words = "Pruning for a task is clearly better on that task than pruning on text here:"
    if not better:
        words, better = "Pruning for a task is nowhere clearly better here. Prune on text:", [""]
    lines = []
    for task in better:
        asked = [printable(result.model), "--remove", printable(result.remove)]
        info = result.evaluation.get(task)
        asked += ["--loss", f"task:{printable(info.source if info else task)}"] if task else []
        lines.append(f"<pre>{escape(f'billhook prune {shlex.join(asked)}')}</pre>")
    return f'<p class="plain">{words}</p>{"".join(lines)}'


def _heat(trials: Sequence[TrialResult], change: Callable[[TrialResult, str], Estimate]) -> str:
    """A cell a pair, as deep in colour as the change is large."""
    tasks = list(trials[0].results) if trials else []
    most = max((abs(change(trial, task).value) for trial in trials for task in tasks), default=0) or 1
    top = "".join(f'<th scope="col">{escape(printable(task))}</th>' for task in tasks)
    body = ""
    for trial in trials:
        body += f'<tr><th scope="row">{escape(printable(trial.recipe))}</th>'
        for task in tasks:
            gap = change(trial, task)
            kinds = ["worse" if gap.value < 0 else "better"] + ["pale"] * (gap.low <= 0 <= gap.high)
            kinds += ["own"] * (task == trial.recipe)
            depth = f"{10 + 50 * abs(gap.value) / most:.0f}%"
            words = f"{format_points(gap.value)}<small>{format_interval(gap, format_points)}</small>"
            body += f'<td class="{" ".join(kinds)}" data-vars="depth:{depth}">{words}</td>'
        body += "</tr>"
    head = f"<thead><tr><th>pruned for ↓<br>measured on →</th>{top}</tr></thead>"
    return scrolling(f'<table class="heat">{head}<tbody>{body}</tbody></table>', "pruned for, measured on")


def _accuracies(result: TransferResult) -> str:
    """Plain accuracies, the teacher's first, and what every trial removed."""
    tasks = map(printable, result.teacher)
    heads = ("Pruned for", *tasks, "Attention removed", "MLP removed", "Parameters", "Search time")
    lines = [("the teacher", *(_accuracy(each.estimate) for each in result.teacher.values()), *("–",) * 4)]
    for trial in result.trials:
        cells = (_accuracy(trial.results[name].estimate) for name in result.teacher)
        removed = (f"{gone} {narrowed}".strip() for gone, narrowed in (removed_words(trial, part) for part in PARTS))
        ends = format_number(trial.sizes.parameters), format_duration(trial.search_seconds)
        lines.append((escape(printable(trial.recipe)), *cells, *removed, *ends))
    return scrolling(stacked_table(heads, lines), "Accuracies") + caption("With each value: its 95% interval.")


def _accuracy(estimate: Estimate) -> str:
    """An accuracy with its interval."""
    ends = format_interval_short(estimate, format_accuracy)
    return f"{format_accuracy(estimate.value)}<small>{ends}</small>"
