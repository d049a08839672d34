"""What each task gains or pays: changes of accuracy side by side, or along the sizes of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from billhook.core.results.json_form import JsonObject
from billhook.core.results.measured import Estimate
from billhook.core.results.run import RunResult
from billhook.core.results.studies import SizeName, SweepResult, TrialResult
from billhook.report.charts import (
    COLOURS,
    SYMBOLS,
    Axis,
    Line,
    Point,
    figure,
    key_of,
    names_chart,
    switched_figure,
    xy_chart,
)
from billhook.report.numbers import format_interval, format_points, join_words, pluralize, printable
from billhook.report.study_words import known_fraction, short_names, sizes_of, tasks_of

Changes = Mapping[str, Estimate]  # of the accuracy by task: student minus teacher, as a share of the items, in pairs
TITLE = "What each task gains or pays"
AXIS = "change of accuracy"
MOST_NAMES = 8  # of tasks, in a sentence
HOW = "Whiskers: paired 95% intervals over items. Dotted: as the teacher."


def tasks_chart(result: RunResult) -> str:
    """The change of accuracy on each task of a pruning; nothing where there are fewer than two."""
    return changes_chart({"student": {task.file: task.change for task in result.tasks}})


def changes_chart(
    students: Mapping[str, Changes], looks: Mapping[str, tuple[str, str]] | None = None, title: str = TITLE
) -> str:
    """The change of each student on each task, side by side; nothing where there are fewer than two tasks.

    The task that pays most stands on top. `looks`: colour and symbol by student, of a page whose key tells them.
    """
    worst: dict[str, float] = {}
    for changes in students.values():
        for task, change in changes.items():
            worst[task] = min(worst.get(task, change.value), change.value)
    tasks = sorted(worst, key=worst.__getitem__)
    if len(tasks) < 2:
        return ""
    brief, shown = short_names(tasks), {name: changes for name, changes in students.items() if changes}
    lines = []
    for number, (name, changes) in enumerate(shown.items()):
        points = tuple(_point(i, changes[task], f"{name}, {brief[task]}") for i, task in enumerate(tasks)
                       if task in changes)  # fmt: skip
        shift = round(9 * (number - (len(shown) - 1) / 2))
        lines.append(Line(name, points, *(looks[name] if looks else _look(number)), shift=shift))
    option = names_chart(lines, Axis(AXIS, "points"), [brief[task] for task in tasks], at=0.0)
    told = [f"{name}: {payers(changes)}" if len(shown) > 1 else payers(changes) for name, changes in shown.items()]
    label = f"Change of accuracy of {pluralize(len(shown), 'student')} on {pluralize(len(tasks), 'task')}."
    height = 90 + len(tasks) * (9 * len(shown) + 30)
    words = f"{' '.join(told[:6])} {HOW}"
    key = key_of(lines) if len(shown) > 1 and not looks else ""
    return figure(option, title=title, label=label, caption=words, height=height, key=key)


def payers(changes: Changes) -> str:
    """Which tasks are lower, which higher, and of which neither is certain, in a sentence each."""
    brief = short_names(changes)
    kinds = (
        ("Lower", [brief[task] for task, change in changes.items() if change.high < 0]),
        ("Higher", [brief[task] for task, change in changes.items() if change.low > 0]),
        ("No change seen", [brief[task] for task, change in changes.items() if change.low <= 0 <= change.high]),
    )
    return " ".join(f"{words}: {join_words(names, MOST_NAMES)}." for words, names in kinds if names)


def tasks_curves(result: SweepResult) -> str:
    """The change on all tasks against the size that is left, recipe by recipe; of one size side by side.

    Nothing where there are fewer than two tasks.
    """
    tasks, rows = tasks_of(result), _rows(result)
    if len(tasks) < 2 or not rows:
        return ""
    if all(len(trials) == 1 for trials in rows.values()):
        students = {name: {task: trials[0].results[task].change for task in tasks} for name, trials in rows.items()}
        return changes_chart(students, title="")
    sizes = sizes_of(result)
    options: dict[tuple[str, ...], JsonObject] = {
        (str(i), str(size)): _option(result, tasks, trials, size)
        for i, trials in enumerate(rows.values()) for size in sizes
    }  # fmt: skip
    switches = [
        ("Recipe", {str(i): name for i, name in enumerate(rows)}),
        ("Against", {str(size): words for size, words in sizes.items()}),
    ]
    brief = short_names(tasks)
    key = key_of([Line(brief[task], (), *_look(i), joined=True) for i, task in enumerate(tasks)])
    label = f"Change of accuracy on {pluralize(len(tasks), 'task')} against what is left of the teacher."
    words = f"One line per task, of one recipe at a time. {HOW} The table of all results has the accuracies."
    return key + switched_figure(options, switches, title="", label=label, caption=words)


def _rows(result: SweepResult) -> dict[str, list[TrialResult]]:
    """The trials of each recipe and calibration text, by a name that tells them apart."""
    datas = short_names(trial.data for trial in result.trials)
    rows: dict[str, list[TrialResult]] = {}
    for trial in result.trials:
        data = f", calibrated on {datas[trial.data]}" if len(datas) > 1 else ""
        rows.setdefault(f"{printable(trial.recipe)}{data}", []).append(trial)
    return rows


def _option(result: SweepResult, tasks: Sequence[str], trials: Sequence[TrialResult], size: SizeName) -> JsonObject:
    """One recipe: a line for each task against the share of a size that is left."""
    brief, words = short_names(tasks), sizes_of(result)[size]
    found = [(left, trial) for trial in trials if (left := known_fraction(result, trial, size)) is not None]
    known = sorted(found, key=lambda pair: pair[0])
    lines = []
    for number, task in enumerate(tasks):
        points = tuple(
            _point(100 * left, trial.results[task].change, f"{brief[task]}, {100 * left:.1f}% of {words} left")
            for left, trial in known
        )
        shift = round(5 * (number - (len(tasks) - 1) / 2))
        lines.append(Line(brief[task], points, *_look(number), joined=True, shift=shift, size=10))
    x = Axis(f"% of the teacher’s {words} left", "percent")
    return xy_chart(lines, x, Axis(AXIS, "points"), marks={"teacher": 0.0})


def _point(place: float, change: Estimate, name: str) -> Point:
    ends = format_interval(change, format_points)
    tip = f"{name}\n{format_points(change.value)} pp ({ends})\n{pluralize(change.n, 'item')}"
    return Point.of(place, change.mapped(lambda share: 100 * share), tip, hollow=change.low <= 0 <= change.high)


def _look(number: int) -> tuple[str, str]:
    return COLOURS[number % len(COLOURS)], SYMBOLS[number % len(SYMBOLS)]
