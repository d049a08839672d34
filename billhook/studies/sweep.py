"""Sweep: recipes against each other at several sizes, on several calibration texts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from billhook.core import statistics
from billhook.core.budget import spell_budget
from billhook.core.errors import BudgetError, UsageError, option
from billhook.core.events import Event, EventListener, ignore_events
from billhook.core.options import Amount, SweepOptions, shows_options
from billhook.core.results.measured import Estimate
from billhook.core.results.specs import SweepSpec, plain_options
from billhook.core.results.studies import SIZE_NAMES, RefusedTrial, SizeName, SweepResult, TrialResult
from billhook.data.calibration import require_disjoint
from billhook.data.choice_tasks import load_items
from billhook.data.skills import TASK, with_skills
from billhook.data.skills.tokens import load_skill
from billhook.data.texts import external_sources
from billhook.data.token_sets import TokenSet
from billhook.engine.losses import parse_loss
from billhook.models.device import environment
from billhook.models.load import Model, loaded_by_name, name_of
from billhook.runs.choose_plan import with_site_times
from billhook.runs.prepare import check_search
from billhook.runs.recipe import SITE_TIMES, Recipe, parse_recipe, require_effect, with_overrides
from billhook.runs.store import STORE
from billhook.runs.vocabulary import refuse_vocabulary
from billhook.studies.monitoring.alerting import Alarm, RulesFile, check_result
from billhook.studies.run_study import open_study, several, write_study
from billhook.studies.trials import (
    StudyContext,
    Trial,
    calibration_of,
    evaluate_trials,
    held_out_of,
    outcome_of,
    run_trial,
    trial_result,
)


@shows_options(SweepOptions, Recipe.model_fields)
def sweep(
    model: Model = "demo",
    recipes: str | Sequence[str] = ("billhook",),
    *,
    remove: Amount | Sequence[Amount] = ("10%", "20%", "30%"),
    data: str | Sequence[str] = ("pydoc",),
    eval_data: str | Sequence[str] = (),
    tasks: str | Sequence[str] = (),
    items: int = 200,
    out: str | Path | None = None,
    rules: RulesFile = None,
    webhook: str | None = None,
    store: str | Path = STORE,
    watch: EventListener = ignore_events,
    **options: Unpack[SweepOptions],
) -> SweepResult:
    """Recipes against each other at several sizes on several calibration texts; a page, and the table behind it.

    `recipes`: names of ours, or YAML files. `eval_data`: held-out texts (default: those of `data`); `tasks`: files of
    multiple-choice items, of which `items` are measured. `options`: fields of `Recipe` that overrule every recipe, such
    as `tokens`. `rules`: a YAML file of rules, whose alerts are events; `webhook`: an http or https address that they
    are sent to. Nothing that `store` holds is measured again,
    so that a sweep which was killed resumes.
    """
    alarm = Alarm.read(rules, webhook)
    texts = several(data)
    held_out = several(eval_data) or tuple(dict.fromkeys(filter(None, map(external_sources, texts))))
    if not held_out:
        raise UsageError(
            f"What a model writes itself proves nothing. Name a text to measure on: {option('eval_data', 'FILE')}."
        )
    removes = tuple(map(spell_budget, [remove] if isinstance(remove, str | float) else remove))
    grid = Grid(several(recipes), removes, texts, held_out, with_skills(several(tasks)), items)
    asked = [recipe for _, recipe in recipes_of(grid, name_of(model), options)]
    require_effect({name: value for name, value in options.items() if name not in SITE_TIMES}, *asked)
    spec = SweepSpec(
        *(name_of(model), grid.recipes, grid.removes, texts, several(eval_data), grid.tasks, items),
        options=plain_options(options),
    )
    with open_study(spec, asked[0], Path(store), out, watch, loaded=loaded_by_name(model)) as (study, folder):
        result = write_study(run_sweep(study, grid, options), folder, study.store, study.run)
        check_result(study.store, study.run, watch, result, alarm, target=name_of(model))
        return result


def evaluation_sets(study: StudyContext, grid: Grid, recipe: Recipe) -> dict[str, TokenSet]:
    """Evaluation tokens by name: texts, and the halves of tasks that no search looks at."""
    sets = {source: held_out_of(study, source, recipe) for source in grid.texts}
    for file in grid.tasks:
        if file.startswith(TASK):
            sets[file], _ = load_skill(file, study.teacher, items=grid.items)
        else:
            sets[file] = load_items(file, study.teacher, "evaluation", items=grid.items)
    return sets


# -- recipes against each other -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """What a sweep compares: every recipe at every size on every calibration text; the evaluation sets of all."""

    recipes: tuple[str, ...]
    removes: tuple[str, ...]
    datas: tuple[str, ...]
    texts: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    items: int = 200


def recipes_of(grid: Grid, model: str, common: Mapping[str, Any]) -> list[tuple[str, Recipe]]:
    """(name, recipe) of every combination, size by size; `common` options overrule those of the recipes.

    Raises RecipeError, or BudgetError for a size in tokens, before anything is computed.
    """
    recipes = []
    for data, name, remove in itertools.product(grid.datas, grid.recipes, grid.removes):
        given = {"model": model, "remove": remove, "data": data, **common}
        recipes.append((Path(name).stem, parse_recipe(with_overrides(name, **given), f"The recipe {name}")))
        refuse_vocabulary(recipes[-1][1])
    return recipes


def run_sweep(study: StudyContext, grid: Grid, common: Mapping[str, Any]) -> SweepResult:
    """Every recipe at every size on every calibration text: losses, sizes, times, with intervals, and the front.

    A recipe that cannot meet a size (a run of blocks that would be the whole model) has a row that says why.
    """
    combinations = recipes_of(grid, study.teacher.name, common)
    base = combinations[0][1]
    for _, recipe in combinations:
        with suppress(BudgetError):  # it gets a row that says why
            check_search(recipe, study.teacher)
    sets = evaluation_sets(study, grid, base)
    tokens: dict[tuple[Any, ...], TokenSet] = {}
    trials: list[Trial] = []
    refused: list[RefusedTrial] = []
    for number, (name, recipe) in enumerate(combinations):
        at = {"recipe": name, "remove": str(recipe.remove), "data": Path(recipe.data).name}
        study.watch(Event("sweep", number, len(combinations), at))
        key = (recipe.data, parse_loss(recipe.loss).file, recipe.tokens, recipe.length, recipe.seed, recipe.field,
               recipe.self_share)  # fmt: skip
        if key not in tokens:
            tokens[key] = calibration_of(study, recipe)
            for held_out in sets.values():
                require_disjoint(tokens[key], held_out)
        try:
            trials.append(run_trial(study, name, recipe, tokens[key]))
        except BudgetError as error:
            refused.append(RefusedTrial(name, str(recipe.remove), recipe.data, str(error)))
    teacher = evaluate_trials(study, base, trials, sets)
    anatomy = (
        study.teacher.anatomy if study.teacher.weights is not None else with_site_times(study.job(base), study.teacher)
    )
    return SweepResult(
        study.teacher.name,
        study.teacher.fingerprint,
        teacher={name: outcome_of(result, sets[name], base.seed) for name, result in teacher.items()},
        sizes=anatomy.sizes(),
        trials=_trial_results(trials, [trial_result(t, teacher, sets, anatomy, base.seed) for t in trials], grid, base),
        refused=tuple(refused),
        calibration=tuple(each.info() for each in tokens.values()),
        evaluation={name: each.info() for name, each in sets.items()},
        batch=base.batch,
        context=base.context,
        environment=environment(study.teacher.place),
    )


def _trial_results(
    trials: Sequence[Trial], alone: Sequence[TrialResult], grid: Grid, base: Recipe
) -> tuple[TrialResult, ...]:
    """The results with what the trials are to each other: gaps on each text, and the fronts."""
    best, first = _gaps_to_best(trials, grid, base.seed), _gaps_to_first_text(trials, grid, base.seed)
    compared = []
    for number, result in enumerate(alone):
        outcomes = {
            name: replace(on, above_best=best.get((number, name)), above_first_text=first.get((number, name)))
            for name, on in result.results.items()
        }
        front = tuple(size for size in SIZE_NAMES if _on_front(result, alone, size))
        compared.append(replace(result, results=outcomes, front=front))
    return tuple(compared)


Gaps = dict[tuple[int, str], Estimate]  # by number of the trial, and text


def _gaps_to_best(trials: Sequence[Trial], grid: Grid, seed: int) -> Gaps:
    """On each text: how far each trial is above the lowest of its size and calibration text, in nats, paired."""
    gaps: Gaps = {}
    for remove, data in itertools.product(dict.fromkeys(t.remove for t in trials), grid.datas):
        peers = [i for i, trial in enumerate(trials) if (trial.remove, trial.data) == (remove, data)]
        for text in grid.texts if peers else ():
            best = min(peers, key=lambda i: trials[i].results[text].mean)
            for i in peers:
                gap = statistics.paired_difference(trials[best].results[text], trials[i].results[text], seed)
                gaps[i, text] = replace(gap, low=0.0, high=0.0) if i == best else gap
    return gaps


def _gaps_to_first_text(trials: Sequence[Trial], grid: Grid, seed: int) -> Gaps:
    """Calibrated on another text than the first: what that changed for a recipe at a size, in nats, paired."""
    first = {(trial.recipe, trial.remove): trial for trial in trials if trial.data == grid.datas[0]}
    gaps: Gaps = {}
    for number, trial in enumerate(trials):
        peer = first.get((trial.recipe, trial.remove))
        if peer is not None and peer is not trial:
            for text in grid.texts:
                gaps[number, text] = statistics.paired_difference(peer.results[text], trial.results[text], seed)
    return gaps


def _on_front(result: TrialResult, others: Sequence[TrialResult], size: SizeName) -> bool:
    """Whether no other trial dominates one; by time, which is not known of narrowed sites, among those without."""
    if size == "ns_per_token":
        others = [each for each in others if not each.plan.narrowed]
        if result.plan.narrowed:
            return False
    return not any(_dominates(other, result, size) for other in others)


def _dominates(a: TrialResult, b: TrialResult, size: SizeName) -> bool:
    """Whether `a` is as small and as good as `b` in nats over all texts, and better in one of both."""
    places = [
        (math.fsum(on.nats for on in trial.results.values() if on.nats is not None), getattr(trial.sizes, size))
        for trial in (a, b)
    ]
    (nats, small), (other_nats, other_small) = places
    return a.data == b.data and nats <= other_nats and small <= other_small and places[0] != places[1]
