"""Stability: how far scores and plans depend on the calibration text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from billhook.core import statistics
from billhook.core.errors import UsageError, option
from billhook.core.events import Event, EventListener, ignore_events
from billhook.core.options import StabilityOptions, shows_options
from billhook.core.plan import Plan, Site
from billhook.core.results.specs import StabilitySpec, plain_options
from billhook.core.results.studies import PairSpread, StabilityResult, StabilitySize
from billhook.data.splits import disjoint_parts
from billhook.data.token_sets import DOCUMENT_TOKENS
from billhook.methods.metrics import METRICS
from billhook.models.device import environment
from billhook.models.load import Model, loaded_by_name, name_of
from billhook.runs.prepare import probe_of
from billhook.runs.recipe import Recipe, parse_recipe, require_effect
from billhook.runs.search import compute_scores
from billhook.runs.store import STORE
from billhook.studies.run_study import open_study, write_study
from billhook.studies.trials import StudyContext, calibration_of, run_trial


@shows_options(StabilityOptions, Recipe.model_fields)
def stability(
    model: Model = "demo",
    metric: str = "loo_kl",
    *,
    sizes: Sequence[int] = (512, 2048),
    draws: int = 4,
    out: str | Path | None = None,
    store: str | Path = STORE,
    watch: EventListener = ignore_events,
    **options: Unpack[StabilityOptions],
) -> StabilityResult:
    """How far scores and plans depend on the calibration text: `draws` sets of each of `sizes` tokens, disjoint.

    Rank correlation of a metric's scores of sites, and overlap of the plans of the recipe's search. `options`: fields
    of `Recipe`; `remove` is needed.
    """
    METRICS[metric]
    if draws < 2 or not sizes:
        raise UsageError(f"Stability compares sets: ask for at least 2 {option('draws')} and one of {option('sizes')}.")
    first = parse_recipe({"model": name_of(model), **options}, "The call")
    require_effect(options, first)
    spec = StabilitySpec(name_of(model), metric, tuple(sizes), draws, plain_options(options))
    with open_study(spec, first, Path(store), out, watch, loaded=loaded_by_name(model)) as (study, folder):
        result = run_stability(study, metric, tuple(sizes), draws, options)
        return write_study(result, folder, study.store, study.run)


# -- how far a result can be trusted --------------------------------------------------------------------------------


def run_stability(
    study: StudyContext, metric: str, sizes: Sequence[int], draws: int, common: Mapping[str, Any]
) -> StabilityResult:
    """Scores and plans over disjoint calibration sets: `draws` sets of each of `sizes` tokens, seed by seed.

    For each size: the mean Spearman correlation between the scores of two sets, and the mean overlap (Jaccard) of the
    plans that they lead to, with the range over the pairs.
    """
    found = []
    recipes = [parse_recipe({"model": study.teacher.name, **common, "tokens": size}) for size in sizes]
    enough = draws * (max(sizes) + DOCUMENT_TOKENS)  # a portion ends with its last document
    largest = recipes[sizes.index(max(sizes))].model_copy(update={"tokens": enough, "self_share": 0.0})
    whole = calibration_of(study, largest, least=draws * max(sizes))
    parts = [disjoint_parts(whole, size, draws) for size in sizes]
    for size, recipe, sets in zip(sizes, recipes, parts, strict=True):
        scores, plans = [], []
        for number, tokens in enumerate(sets):
            study.watch(Event("stability", number, draws, {"tokens": size}))
            job = study.job(recipe.model_copy(update={"metric": metric}))
            scored_by = compute_scores(job, probe_of(job.recipe, study.teacher, tokens, job))["scores"]
            scores.append({unit: value for unit, value in scored_by.items() if isinstance(unit, Site)})
            plans.append(run_trial(study, metric, recipe, tokens).plan)
        pairs = list(itertools.combinations(range(len(sets)), 2))
        correlation = _spread([_spearman(scores[i], scores[j]) for i, j in pairs])
        overlap = _spread([_overlap(plans[i], plans[j]) for i, j in pairs])
        found.append(StabilitySize(size, len(sets), correlation, overlap, tuple(plans)))
    return StabilityResult(
        study.teacher.name,
        study.teacher.fingerprint,
        metric=metric,
        search=recipes[0].search,
        remove=str(recipes[0].remove),
        data=whole.info(),
        sizes=tuple(found),
        environment=environment(study.teacher.place),
    )


def _spread(values: Sequence[float]) -> PairSpread:
    return PairSpread(math.fsum(values) / len(values), min(values), max(values))


def _overlap(a: Plan, b: Plan) -> float:
    touched, others = ({*plan.removed, *plan.narrowed} for plan in (a, b))
    return len(touched & others) / len(touched | others)


def _spearman(a: Mapping[Site, float], b: Mapping[Site, float]) -> float:
    """Spearman's rank correlation of two rankings of the same sites; ties have their mean rank."""
    sites = sorted(a)
    ranks = [statistics.ranks([scores[site] for site in sites]) for scores in (a, b)]
    return statistics.correlation(*ranks)
