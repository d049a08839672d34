"""Checkpoints that were pruned from pruned ones: their steps, and the one that caused a loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from billhook.core.errors import ResultError
from billhook.core.files.foreign_files import read_json_object
from billhook.core.monitoring.alerts import Observation
from billhook.core.plan_files import find_path
from billhook.core.results.measured import Estimate
from billhook.core.results.run import RunResult

REPORT = "report.json"


def lineage(folder: str | Path) -> tuple[RunResult, ...]:
    """Return the prunings that led to a checkpoint, the first one first; empty for one that Billhook did not prune.

    A pruning names the model that it began with; where that is a folder with a report of its own, it goes on there.
    """
    found: list[RunResult] = []
    place, seen = find_path(folder), set[Path]()
    while place is not None and (place / REPORT).is_file() and place.resolve() not in seen:
        seen.add(place.resolve())
        try:
            result = RunResult.from_json(read_json_object(place / REPORT, ResultError))
        except ResultError:  # of an older Billhook
            break
        found.append(result)
        place = find_path(str(result.recipe.get("model", "")))
    return tuple(reversed(found))


def caused_by(folder: str | Path) -> str:
    """Return the step with the greatest loss of perplexity; two that cannot be told apart; or nothing.

    Nothing where there are fewer than two steps, where more than two may be the greatest, or where one has cut the
    vocabulary: no perplexity says what that lost.
    """
    steps = lineage(folder)
    if any(step.vocabulary is not None for step in steps):
        return ""
    losses = {i: step.perplexity.ratio for i, step in enumerate(steps) if step.perplexity is not None}
    if len(losses) < 2:
        return ""
    worst = max(losses.values(), key=lambda ratio: ratio.value)
    if worst.value <= 1:
        return ""
    guilty = [i for i, ratio in losses.items() if ratio is worst or ratio.high > worst.low]
    return " or ".join(_name(steps, i) for i in guilty) if len(guilty) <= 2 else ""


def _name(steps: Sequence[RunResult], number: int) -> str:
    step = steps[number]
    return f"{number + 1} of {len(steps)}, run {step.run}, {Path(step.out).name}"


def whole_loss(folder: str | Path, at: float) -> tuple[Observation, ...]:
    """Return what all steps of a lineage lost together, where they were measured on the same text.

    The ratios of the steps are multiplied, and so are their ends, so that the interval is too wide rather than too
    narrow.
    """
    steps = lineage(folder)
    ratios = [step.perplexity.ratio for step in steps if step.perplexity is not None]
    texts = {step.data.evaluation.source for step in steps}
    if len(steps) < 2 or len(ratios) < len(steps) or len(texts) > 1:
        return ()
    ends = (math.prod(getattr(ratio, end) for ratio in ratios) for end in ("value", "low", "high"))
    value, low, high = (100 * (x - 1) for x in ends)
    whole: Estimate = replace(min(ratios, key=lambda ratio: ratio.n), value=value, low=low, high=high)
    what = f"{texts.pop()}, all {len(steps)} steps"
    return (Observation("quality", what, "%ppl", whole, at, caused_by(folder)),)
