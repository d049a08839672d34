"""Threshold: how much can go within a margin, confirmed on unseen text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Unpack

from billhook.core.errors import UsageError
from billhook.core.events import Event, EventListener, ignore_events
from billhook.core.margin import Margin, MarginCheck
from billhook.core.options import StudyOptions, shows_options
from billhook.core.plan import Plan
from billhook.core.results.specs import PRUNE, ThresholdSpec
from billhook.core.statistics import reliability_note
from billhook.data.token_sets import TokenSet
from billhook.models.device import environment
from billhook.models.load import Teacher
from billhook.report import threshold_page
from billhook.runs.choose_plan import choose_plan
from billhook.runs.evaluation import evaluate_plans
from billhook.runs.job import RunContext
from billhook.runs.prepare import tokens_for, validation_and_test
from billhook.runs.recipe import Recipe, parse_recipe
from billhook.runs.store import STORE
from billhook.studies.run_study import open_study, several, stored_run, write_study


@shows_options(StudyOptions, Recipe.model_fields)
def threshold(
    model: str | Path = "demo",
    *,
    margins: str | Sequence[str] = ("3%ppl",),
    run: str | None = None,
    out: str | Path | None = None,
    store: str | Path = STORE,
    watch: EventListener = ignore_events,
    **options: Unpack[StudyOptions],
) -> dict[str, Any]:
    """How much can go: the last step of a search that is within every margin, chosen on some texts, proved on others.

    `margins`: such as 3%ppl or 1pp:FILE. `run`: the steps of a stored run are taken, with its model and its texts; else
    a search is made by `options`, fields of `Recipe`, up to `remove` (default: 40%). A plan file and a page appear in
    `out` (default: lab/<run>): `prune(plan=...)` takes the plan.
    """
    parsed = [Margin.parse(text) for text in several(margins)]
    stored = stored_run(run, store) if run is not None else None
    if stored is not None and (stored.kind != PRUNE or not (stored.result or {}).get("steps")):
        raise UsageError(f"Run {run} has no steps of a search. `billhook runs` lists the runs.")
    least: dict[str, Any] = {"remove": "40%"}
    given = stored.spec if stored is not None else least | {"model": str(model)}
    recipe = parse_recipe(given | options, "The call")
    spec = ThresholdSpec(recipe.model, tuple(map(str, parsed)), run, recipe.model_dump(exclude_defaults=True))
    with open_study(spec, recipe, Path(store), out, watch) as (bench, folder):
        steps = [] if stored is None else (stored.result or {})["steps"]
        told = find_threshold(bench.job(recipe), bench.teacher, steps, parsed)
        return write_study(told, folder, threshold_page.threshold_page, bench.store, bench.run)


@dataclass(frozen=True)
class MarginTrial:
    """One step of a path on the validation items of every margin."""

    step: int
    kept: tuple[MarginCheck, ...]

    @property
    def within(self) -> bool:
        return all(kept.within for kept in self.kept)


def find_threshold(
    job: RunContext, teacher: Teacher, steps: Sequence[Mapping[str, Any]], margins: Sequence[Margin]
) -> dict[str, Any]:
    """The last of `steps` within every margin on validation items, found by bisection, and its proof on test items.

    `steps`: as a result holds them; without any the search of the recipe makes some. Assumes that what goes later costs
    more, so that the steps within the margins come first. The test items are looked at once, for the plan that was
    chosen, whatever they say.
    """
    calibration, held_out = tokens_for(job.recipe, teacher, job.watch, job)
    steps = list(steps) or [step.to_json() for step in choose_plan(job, teacher, calibration).steps]
    path = [Plan()]
    for step in steps:
        path.append(path[-1].combined_with(Plan.parse([*step["sites"], *step.get("narrowed", ())])))
    sets = {margin: validation_and_test(job.recipe, margin, teacher, held_out) for margin in margins}
    trials = {
        0: MarginTrial(0, tuple(_check_plan(job, teacher, margin, sets[margin][0], Plan()) for margin in margins))
    }
    low, high = 0, len(path)
    while high - low > 1:
        middle = (low + high) // 2
        job.watch(
            Event(
                *("threshold", len(trials), math.ceil(math.log2(len(steps))) + 1),
                {"steps_taken": middle, "steps": len(path)},
            )
        )
        kept = tuple(_check_plan(job, teacher, margin, sets[margin][0], path[middle]) for margin in margins)
        trials[middle] = MarginTrial(middle, kept)
        low, high = (middle, high) if trials[middle].within else (low, middle)
    chosen = path[low]
    proved = [_check_plan(job, teacher, margin, sets[margin][1], chosen) for margin in margins] if low else []
    everything = teacher.anatomy.total("parameters")
    sizes = [1 - teacher.anatomy.total("parameters", plan) / everything for plan in path]
    return {
        "removed": chosen.names(),
        "narrowed": chosen.narrowed_names(),
        "step": low,  # how many of the steps are taken
        "steps": len(steps),
        "share": sizes[low],
        "confirmed": all(kept.within for kept in proved) if low else None,
        "margins": [str(margin) for margin in margins],
        "test": [_check_json(kept, margin) for kept, margin in zip(proved, margins, strict=False)],
        "trials": [
            {"step": n, "share": sizes[n], "within": trial.within,
             "of": [_check_json(kept, margin) for kept, margin in zip(trial.kept, margins, strict=True)]}
            for n, trial in sorted(trials.items())
        ],
        "data": {str(margin): {"validation": a.describe(), "test": b.describe()} for margin, (a, b) in sets.items()},
        "shares": sizes,
        "losses": [step["loss"] for step in steps],
        "loss": job.recipe.loss,
        "knee": knee(sizes[1:], [step["loss"] for step in steps]),
        "model": teacher.name,
        "fingerprint": teacher.fingerprint,
        "environment": asdict(environment(str(teacher.device))),
    }  # fmt: skip


def _check_plan(job: RunContext, teacher: Teacher, margin: Margin, tokens: TokenSet, plan: Plan) -> MarginCheck:
    dense, student = evaluate_plans(job, teacher, [Plan(), plan], tokens, margin.kind)
    return margin.check(dense, student, job.recipe.seed, same=not plan)


def _check_json(kept: MarginCheck, margin: Margin) -> dict[str, Any]:
    lost = kept.in_units(margin.kind)
    return {
        "margin": str(margin), "lost": lost.value, "low": lost.low, "high": lost.high, "limit": float(margin.amount),
        "within": kept.within, "n": lost.n, "reliable": lost.reliable, "note": reliability_note(lost),
    }  # fmt: skip


def knee(shares: Sequence[float], losses: Sequence[float]) -> int | None:
    """Where a curve of losses over what is gone bends most: the point farthest below the line between its ends.

    None where it does not bend upwards, or there are fewer than three points.

    Source: Satopää et al. 2011, Finding a "kneedle" in a haystack.
    """
    if len(shares) < 3 or shares[-1] <= shares[0] or losses[-1] <= losses[0]:
        return None
    wide, tall = shares[-1] - shares[0], losses[-1] - losses[0]
    below = [(x - shares[0]) / wide - (y - losses[0]) / tall for x, y in zip(shares, losses, strict=True)]
    best = max(range(len(below)), key=lambda i: below[i])
    return best if below[best] > 0 else None
