"""What the metric of a recipe says of a model: scores of sites, blocks and spans, or of channel groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from billhook.metrics import GROUP_METRICS, METRICS
from billhook.plan import Site
from billhook.probe import Probe
from billhook.problem import format_unit, parse_unit
from billhook.proof import RunContext
from billhook.recipe import Recipe
from billhook.records import Event
from billhook.registry import resolve_options
from billhook.search import OF_GROUPS, SEARCHES

ScoreFields = dict[str, Any]  # what a metric gives a Problem: `scores`, or `group_scores`


def method_options(recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of the search and of the metric."""
    methods: list[Callable[..., Any]] = [SEARCHES[recipe.search]]
    methods += [metric_of(recipe)] if recipe.metric else []
    widths = recipe.model_dump(include={"uniform", "multiple"}, exclude_defaults=True)
    found = resolve_options(recipe.set | widths, *methods)
    return found[0], found[1] if recipe.metric else {}


def metric_of(recipe: Recipe) -> Callable[..., Any]:
    """The metric of a recipe; of channel groups for a search that lets those go."""
    assert recipe.metric is not None
    return GROUP_METRICS[recipe.metric] if recipe.search in OF_GROUPS else METRICS[recipe.metric]


def compute_scores(job: RunContext, probe: Probe) -> ScoreFields:
    """What the metric of a recipe says, as fields of a Problem, from the store if it was asked before."""
    recipe = job.recipe
    if recipe.metric is None:
        return {}
    options = method_options(recipe)[1]
    of = {"metric": recipe.metric, "options": options, "tokens": probe.tokens.hash, "loss": probe.loss,
          "dtype": probe.teacher.compute_key}  # fmt: skip
    known = job.store.cached(probe.teacher.fingerprint, "scores", of)
    if known is None:
        job.watch(Event("score", 0, None, recipe.metric))
        scores = metric_of(recipe)(probe, **options)
        if recipe.search in OF_GROUPS:
            known = {str(site): values.tolist() for site, values in scores.items()}
        else:
            known = {format_unit(unit): score.value for unit, score in scores.items()}
        job.store.remember(probe.teacher.fingerprint, "scores", of, known, job.run)
    if recipe.search in OF_GROUPS:
        return {"group_scores": {Site.parse(name): tuple(values) for name, values in known.items()}}
    return {"scores": {parse_unit(name): value for name, value in known.items()}}
