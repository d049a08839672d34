"""Threshold: how much can be removed within a margin, confirmed on unseen text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Unpack

from billhook.core.errors import UsageError
from billhook.core.events import Event, EventListener, ignore_events
from billhook.core.margin import Margin
from billhook.core.options import StudyOptions, shows_options
from billhook.core.plan import Plan
from billhook.core.registry import OptionValues
from billhook.core.results.json_form import decode
from billhook.core.results.measured import Step
from billhook.core.results.specs import PRUNE, ThresholdSpec
from billhook.core.results.studies import MarginLoss, ThresholdData, ThresholdResult, ThresholdTrial
from billhook.core.statistics import knee
from billhook.data.token_sets import TokenSet
from billhook.models.device import environment
from billhook.models.load import Model, Teacher, loaded_by_name, name_of
from billhook.runs.choose_plan import choose_plan
from billhook.runs.evaluation import evaluate_plans
from billhook.runs.job import RunContext
from billhook.runs.prepare import tokens_for, validation_and_test
from billhook.runs.recipe import Recipe, parse_recipe, require_effect
from billhook.runs.store import STORE
from billhook.studies.run_study import open_study, several, stored_run, write_study


@shows_options(StudyOptions, Recipe.model_fields)
def threshold(
    model: Model = "demo",
    *,
    margins: str | Sequence[str] = ("3%ppl",),
    run: str | None = None,
    out: str | Path | None = None,
    store: str | Path = STORE,
    watch: EventListener = ignore_events,
    **options: Unpack[StudyOptions],
) -> ThresholdResult:
    """How much can be removed: the last step within every margin, chosen on some texts, proved on others.

    `margins`: such as 3%ppl or 1pp:FILE. `run`: the steps of a stored run are taken, with its model and its texts; else
    a search is made by `options`, fields of `Recipe`, up to `remove` (default: 40%). A plan file and a page appear in
    `out` (default: studies/<run>): `prune(plan=...)` takes the plan.
    """
    parsed = list(dict.fromkeys(map(Margin.parse, several(margins))))
    stored = stored_run(run, store) if run is not None else None
    if stored is not None and (stored.kind != PRUNE or not (stored.result or {}).get("steps")):
        raise UsageError(f"Run {run} has no steps of a search. `billhook runs` lists the runs.")
    least: OptionValues = {"remove": "40%"}
    given = stored.spec if stored is not None else least | {"model": name_of(model)}
    recipe = parse_recipe(given | options, "The call")
    require_effect(options, recipe)
    spec = ThresholdSpec(recipe.model, tuple(map(str, parsed)), run, recipe.model_dump(exclude_defaults=True))
    with open_study(spec, recipe, Path(store), out, watch, loaded=loaded_by_name(model)) as (study, folder):
        steps = [] if stored is None else [decode(Step, step) for step in (stored.result or {})["steps"]]
        result = find_threshold(study.job(recipe), study.teacher, steps, parsed)
        return write_study(result, folder, study.store, study.run)


def find_threshold(
    job: RunContext, teacher: Teacher, steps: Sequence[Step], margins: Sequence[Margin]
) -> ThresholdResult:
    """The last of `steps` within every margin on validation items, found by bisection, and its proof on test items.

    Without steps the search of the recipe makes some. Assumes that later removals cost more, so that the steps within
    the margins come first. The test items are looked at once, for the plan that was chosen, whatever they say.
    """
    calibration, held_out = tokens_for(job.recipe, teacher, job.watch, job)
    steps = tuple(steps or choose_plan(job, teacher, calibration).steps)
    path = [Plan()]
    for step in steps:
        path.append(path[-1].combined_with(Plan(frozenset(step.sites), frozenset(step.narrowed))))
    everything = teacher.anatomy.total("parameters")
    shares = tuple(1 - teacher.anatomy.total("parameters", plan) / everything for plan in path)
    sets = {margin: validation_and_test(job.recipe, margin, teacher, held_out) for margin in margins}
    trials = _bisect(job, teacher, path, shares, {margin: validation for margin, (validation, _) in sets.items()})
    low = max(trial.step for trial in trials if trial.within or not trial.step)
    proved = _lost_by(job, teacher, path[low], {margin: test for margin, (_, test) in sets.items()}) if low else ()
    losses = tuple(step.loss for step in steps)
    return ThresholdResult(
        teacher.name,
        teacher.fingerprint,
        margins=tuple(margins),
        plan=path[low],
        step=low,
        steps=len(steps),
        share=shares[low],
        confirmed=all(each.within for each in proved) if low else None,
        test=proved,
        trials=trials,
        data={str(margin): ThresholdData(first.info(), second.info()) for margin, (first, second) in sets.items()},
        shares=shares,
        losses=losses,
        loss=job.recipe.loss,
        knee=knee(shares[1:], losses),
        environment=environment(teacher.place),
    )


def _bisect(
    job: RunContext, teacher: Teacher, path: Sequence[Plan], shares: Sequence[float], sets: Mapping[Margin, TokenSet]
) -> tuple[ThresholdTrial, ...]:
    """What was tried to find the last plan of a path within all margins, by step; the first is without a step."""

    def tried(step: int) -> ThresholdTrial:
        losses = _lost_by(job, teacher, path[step], sets)
        return ThresholdTrial(step, shares[step], all(each.within for each in losses), losses)

    trials = {0: tried(0)}
    low, high = 0, len(path)
    while high - low > 1:
        middle = (low + high) // 2
        total = math.ceil(math.log2(len(path) - 1)) + 1
        job.watch(Event("threshold", len(trials), total, {"steps_taken": middle, "steps": len(path)}))
        trials[middle] = tried(middle)
        low, high = (middle, high) if trials[middle].within else (low, middle)
    return tuple(trial for _, trial in sorted(trials.items()))


def _lost_by(job: RunContext, teacher: Teacher, plan: Plan, sets: Mapping[Margin, TokenSet]) -> tuple[MarginLoss, ...]:
    """What a plan loses under every margin, on its items."""
    losses = []
    for margin, tokens in sets.items():
        before, after = evaluate_plans(job, teacher, [Plan(), plan], tokens, margin.kind)
        check = margin.check(before, after, job.recipe.seed, same=not plan)
        losses.append(MarginLoss(margin, check.in_units(margin.kind), float(margin.amount), check.within))
    return tuple(losses)
