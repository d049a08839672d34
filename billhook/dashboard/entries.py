"""What is held against each other: prunings, trials of sweeps and models of comparisons, in the same figures."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from billhook.core.anatomy import Anatomy, ModelSizes
from billhook.core.errors import ResultError
from billhook.core.files.foreign_files import reading
from billhook.core.plan import Plan
from billhook.core.results.comparisons import Comparison
from billhook.core.results.json_form import SCHEMA
from billhook.core.results.measured import Estimate, EvalResult
from billhook.core.results.run import RunResult, SpeedChange
from billhook.core.results.stored import read_result
from billhook.core.results.studies import SweepResult
from billhook.core.statistics import exp_capped, paired_difference
from billhook.dashboard.measured import Measured
from billhook.report.numbers import shown_ratio, visible_name

MOST = 40  # of one page


@dataclass(frozen=True, slots=True)
class Entry:
    """One student, or a recipe at a size. None: not measured, or not known.

    - `quality`: perplexity, student over teacher, on the held-out text `on`, by its hash.
    - `sizes`, `whole`: of student and teacher, as far as they are known.
    - `decode`: decoding speed over the teacher's; `rate`: tokens per second; `memory`: peak bytes of the student.
    - `evaluation`: the nats of the student by document, for pairs; `seconds`: what making it took.
    - `tasks`: the change of its accuracy over the teacher's, by task.
    """

    name: str
    run: str
    kind: str
    plan: Plan
    sizes: ModelSizes | None
    whole: ModelSizes | None
    quality: Estimate | None
    on: str
    decode: Estimate | None = None
    rate: Estimate | None = None
    memory: int | None = None
    seconds: float | None = None
    anatomy: Anatomy | None = None
    repaired: str = ""
    evaluation: EvalResult | None = None
    tasks: Mapping[str, Estimate] = field(default_factory=dict)

    def left(self, what: str) -> float | None:
        """The share of the teacher's `parameters`, … that is left; None where it is not known."""
        if self.sizes is None or self.whole is None or not getattr(self.whole, what):
            return None
        return float(getattr(self.sizes, what) / getattr(self.whole, what))


def entries_of(db: sqlite3.Connection, runs: Sequence[str]) -> list[Entry]:
    """What the runs of these ids made, in their order; their names are told apart. Others have nothing to compare."""
    found: list[Entry] = []
    for run in dict.fromkeys(runs):
        row = db.execute("SELECT kind, result FROM runs WHERE id = ? AND result IS NOT NULL", (run,)).fetchone()
        if row is None or (value := json.loads(row["result"])).get("schema") != SCHEMA:
            continue
        with reading(f"The result of run {run} cannot be read", ResultError, "Run the command again."):
            result = read_result(row["kind"], value)
        if isinstance(result, RunResult):
            found.append(_of_pruning(db, run, result))
        elif isinstance(result, SweepResult):
            found += _of_sweep(run, result)
        elif isinstance(result, Comparison):
            found += _of_comparison(run, result)
    return _told_apart(found)[:MOST]


def _told_apart(entries: Iterable[Entry]) -> list[Entry]:
    """Entries of which no two have one name."""
    taken: dict[str, int] = {}
    named = []
    for each in entries:
        taken[each.name] = taken.get(each.name, 0) + 1
        more = f" ({taken[each.name]})" if taken[each.name] > 1 else ""
        named.append(replace(each, name=each.name + more))
    return named


def _of_pruning(db: sqlite3.Connection, run: str, result: RunResult) -> Entry:
    asked = result.recipe.get("remove") or result.recipe.get("within") or "a plan"
    speed = result.speed
    return Entry(
        f"{run} {visible_name(asked)}", run, "prune", result.plan, result.sizes.student, result.sizes.teacher,
        result.perplexity.ratio if result.perplexity else None, result.data.evaluation.hash,
        _decode_ratio(speed) if speed else None, speed.student.decode_tokens_per_s if speed else None,
        speed.student.peak_bytes if speed else None, math.fsum(result.seconds.values()), result.anatomy,
        ", ".join(report.recovery for report in result.recoveries), _evaluation(db, result),
        {task.file: task.change for task in result.tasks},
    )  # fmt: skip


def _decode_ratio(speed: SpeedChange) -> Estimate:
    """The ratio of decoding speeds as reports show it."""
    return shown_ratio(speed.teacher.decode_tokens_per_s, speed.student.decode_tokens_per_s, speed.ratio.decode)


def _evaluation(db: sqlite3.Connection, result: RunResult) -> EvalResult | None:
    """The perplexity of the student by document: of several recoveries that whose mean the result has."""
    if result.perplexity is None:
        return None
    for each in Measured(db, result).evaluations(result.plan, result.data.evaluation.hash).values():
        if math.isclose(exp_capped(each.mean), result.perplexity.student, rel_tol=1e-9):
            return each
    return None


def _of_sweep(run: str, result: SweepResult) -> list[Entry]:
    """The trials of a sweep, on its first text."""
    text = next((name for name, outcome in result.teacher.items() if outcome.kind == "perplexity"), None)
    return [
        Entry(
            f"{visible_name(trial.recipe)} {visible_name(trial.remove)}", run, "sweep", trial.plan, trial.sizes,
            result.sizes, trial.results[text].change.mapped(exp_capped) if text else None,
            result.evaluation[text].hash if text else "", seconds=trial.search_seconds,
            tasks={name: each.change for name, each in trial.results.items() if each.kind != "perplexity"},
        )
        for trial in result.trials
    ]  # fmt: skip


def _of_comparison(run: str, result: Comparison) -> list[Entry]:
    """The models of a comparison but the first, which they were held against, on its first text."""
    text = next((each for each in result.sets if each.is_text), None)
    whole, entries = result.models[0].sizes, []
    for number, model in enumerate(result.models[1:]):
        pair = text.pairs[number] if text else None
        speed = result.speed[number]
        entries.append(
            Entry(
                visible_name(model.model),
                run,
                "compare",
                Plan(),
                model.sizes if model.sizes.parameters else None,
                whole,
                pair.change.mapped(exp_capped) if pair else None,
                text.info.tokens.hash if text and text.info.tokens else "",
                speed.decode_ratio if speed else None,
                speed.other.decode if speed else None,
                speed.other.peak_bytes if speed else None,
                tasks={
                    each.source: own.change
                    for each in result.sets
                    if not each.is_text and (own := each.pairs[number]) is not None
                },
            )
        )
    return entries


def paired(first: Entry, other: Entry) -> Estimate | None:
    """Perplexity of `other` over that of `first`, in pairs by document; None where they do not share their text."""
    a, b = first.evaluation, other.evaluation
    if a is None or b is None or (a.tokens, a.counts) != (b.tokens, b.counts):
        return None
    return paired_difference(a, b).mapped(exp_capped)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The numbers of the points that no other is as small and as good as: x and y, both lower is better."""
    return [
        i for i, (x, y) in enumerate(points)
        if not any((u <= x and v <= y and (u, v) != (x, y)) for u, v in points)
    ]  # fmt: skip
