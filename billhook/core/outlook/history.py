"""What a store knows of a model: its measured sizes in curves, how its searches went, its anatomy. Plain values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from billhook.core.anatomy import Anatomy
from billhook.core.errors import ResultError
from billhook.core.outlook.loss_curve import LossPoint, PastErrors, past_errors
from billhook.core.results.json_form import JsonObject, decode
from billhook.core.results.measured import Z_95, Estimate
from billhook.core.results.run import PerplexityChange, SizeChange
from billhook.core.results.specs import PRUNE
from billhook.core.results.stored import Run, read_result
from billhook.core.results.studies import SweepResult

# Fields of a recipe that do not shape the curve of its losses against size
APART = ("about", "model", "remove", "plan", "within", "export", "stock", "audit", "memory", "device", "workers",
         "trust_remote_code", "batch", "context", "eval_data", "eval_tokens", "eval_length", "skills")  # fmt: skip


@dataclass(frozen=True, slots=True)
class MeasuredSize:
    """One student of a run: the share of the parameters that it lacks, and what it lost, in nats per token."""

    run: str
    point: LossPoint
    perplexity: float
    teacher: float


@dataclass(frozen=True, slots=True)
class MeasuredCurve:
    """The students of one recipe on one text, the smallest share first. `text`: its hash; `recipe`: in a few words."""

    recipe: str
    text: str
    key: str
    sizes: tuple[MeasuredSize, ...]

    @property
    def points(self) -> list[LossPoint]:
        """What forecasts rest on."""
        return [size.point for size in self.sizes]


@dataclass(frozen=True, slots=True)
class History:
    """What a store knows of one model. `runs`: of the model, the newest first; `anatomy`: None where no run told."""

    model: str
    fingerprint: str
    anatomy: Anatomy | None
    runs: tuple[Run, ...]
    curves: tuple[MeasuredCurve, ...]

    def curves_of(self, run: Run) -> list[MeasuredCurve]:
        """Return the curves of the students of a run, of which newer ones of the same size may stand in their place."""
        own = {(key, text) for _, key, text, _ in _measured(run)}
        return [curve for curve in self.curves if (curve.key, curve.text) in own]

    def past(self, but: MeasuredCurve | None = None) -> PastErrors:
        """Return the errors that forecasts of the other curves would have had."""
        others = [curve.points for curve in self.curves if curve is not but]
        return past_errors(others, "this store")


def history_of(runs: Iterable[Run], fingerprint: str) -> History:
    """Return what runs, the newest first, say of the model with a fingerprint."""
    own = tuple(run for run in runs if run.fingerprints.get("model") == fingerprint or _swept(run) == fingerprint)
    curves: dict[tuple[str, str], tuple[str, list[MeasuredSize]]] = {}
    name, anatomy = "", None
    for run in own:
        name = name or str(run.spec.get("model", ""))
        if run.kind == PRUNE and run.result is not None and run.result.get("schema") is not None:
            told = None if run.result.get("vocabulary") else run.result.get("anatomy")  # which brief runs lack
            anatomy = anatomy or (decode(Anatomy, told) if told else None)
        for recipe, key, text, size in _measured(run):
            curves.setdefault((key, text), (recipe, []))[1].append(size)
    told = [
        MeasuredCurve(recipe, text, key, tuple(_distinct(sizes))) for (key, text), (recipe, sizes) in curves.items()
    ]
    return History(name, fingerprint, anatomy, own, tuple(sorted(told, key=lambda c: -len(c.sizes))))


def recipe_words(spec: JsonObject) -> str:
    """Return the telling part of a recipe in a few words: `joint fast, fold`."""
    words = [str(spec.get("search"))] + ["fast"] * bool(spec.get("fast"))
    recover = str(spec.get("recover") or "").replace("?", "")
    return " ".join(words) + (f", {recover}" if recover else "")


def recipe_key(spec: JsonObject) -> str:
    """Return what recipes whose losses lie on one curve have in common."""
    kept = {name: value for name, value in spec.items() if name not in APART and value not in (None, "", {}, False)}
    kept["recover"] = str(spec.get("recover") or "").replace("?", "")
    return repr(sorted(kept.items()))


def _swept(run: Run) -> str | None:
    return run.result.get("fingerprint") if run.kind == "sweep" and run.result is not None else None


def _measured(run: Run) -> list[tuple[str, str, str, MeasuredSize]]:
    """Return (recipe, key, text, size) of each student that a run measured on text."""
    told = run.result
    if told is None or told.get("schema") is None:
        return []
    if run.kind == PRUNE and told.get("perplexity") is not None:
        change, sizes = decode(PerplexityChange, told["perplexity"]), decode(SizeChange, told["sizes"])
        share = 1 - sizes.student.parameters / sizes.teacher.parameters
        size = MeasuredSize(run.id, _point(share, change.ratio), change.student, change.teacher)
        return [(recipe_words(run.spec), recipe_key(run.spec), told["data"]["evaluation"]["hash"], size)]
    if run.kind != "sweep":
        return []
    swept = read_result(run.kind, told)
    if not isinstance(swept, SweepResult):
        raise ResultError(f"The result of run {run.id} cannot be read. Run the command again.")
    options: dict[str, Any] = dict(run.spec.get("options", {}))
    found = []
    for trial in swept.trials:
        share = 1 - trial.sizes.parameters / swept.sizes.parameters
        for text, outcome in trial.results.items():
            if outcome.kind == "perplexity":
                ratio = outcome.change.mapped(math.exp)
                value, whole = outcome.estimate.value, swept.teacher[text].estimate.value
                size = MeasuredSize(run.id, _point(share, ratio), value, whole)
                key = repr((trial.recipe, trial.data, sorted(options.items())))
                found.append((trial.recipe, key, swept.evaluation[text].hash, size))
    return found


def _point(share: float, ratio: Estimate) -> LossPoint:
    """Return a ratio of perplexities as a loss with its standard error."""
    ends = [math.log(end) for end in (ratio.low, ratio.high) if 0 < end < math.inf]
    return LossPoint(share, math.log(ratio.value), (ends[1] - ends[0]) / (2 * Z_95) if len(ends) == 2 else 0.0)


def _distinct(sizes: Iterable[MeasuredSize]) -> list[MeasuredSize]:
    """Return the newest of each share, the smallest first."""
    newest: dict[float, MeasuredSize] = {}
    for size in sizes:
        newest.setdefault(round(size.point.share, 4), size)
    return [newest[share] for share in sorted(newest)]
