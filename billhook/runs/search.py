"""One search of a run: importance scores first, then rounds of candidates."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any

from billhook.core.anatomy import Anatomy
from billhook.core.budget import UNITS, Budget
from billhook.core.errors import PlanError, UsageError, option
from billhook.core.events import Event, EventListener, EventValue, hear_all
from billhook.core.files.cache_keys import ScoresKey
from billhook.core.plan import MeasureRequest, Plan, Site, shorten
from billhook.core.problem import Problem, format_unit, parse_unit
from billhook.core.registry import OptionValues, resolve_options, wrong_return
from billhook.core.results.measured import Loss
from billhook.engine.probe import Probe
from billhook.methods.metrics import GROUP_METRICS, METRICS, group_metric_scores, metric_scores
from billhook.methods.search import SEARCHES, Search, drive, estimate_losses, lowest_full, narrows
from billhook.runs.executor import Executor, OnProgress, RefitExecutor
from billhook.runs.job import RunContext, report_loads
from billhook.runs.recipe import Recipe

ScoreFields = OptionValues  # what a metric gives a Problem: `scores`, or `group_scores`


SITES_HOLD_LITTLE = 1.5  # times the share that was asked for is removed of the sites: worth telling


def tell_shares(
    recipe: Recipe, anatomy: Anatomy, watch: EventListener, of_rows: Callable[[Budget], float | None] = lambda of: None
) -> None:
    """Tell of shares of the model that are much larger shares of its sites, since other parts hold the rest.

    `of_rows`: says which percentage of the vocabulary holds as much as a budget asks for; None where that cannot be
    cut, or was asked for already.
    """
    for budget in recipe.budgets:
        share = budget.share_of_sites(anatomy)
        if share is not None and 1 >= share > SITES_HOLD_LITTLE * budget.amount / 100:
            held = budget.amount / 100 / share
            told: dict[str, EventValue] = {
                "unit": budget.unit, "asked": float(budget.amount), "of_sites": float(100 * share),
                "elsewhere": float(100 - 100 * held), "smaller": float(budget.amount * held),
            }  # fmt: skip
            rows = of_rows(budget)
            watch(Event("budget", 1, 1, told if rows is None else {**told, "vocabulary": rows}))


def method_options(recipe: Recipe) -> tuple[OptionValues, OptionValues]:
    """The options of the search and of the metric."""
    methods: list[Callable[..., Any]] = [SEARCHES[recipe.search]]
    methods += [metric_of(recipe)] if recipe.metric else []
    widths = recipe.model_dump(include={"uniform", "multiple"}, exclude_defaults=True)
    found = resolve_options(recipe.set | widths, *methods)
    if scores_experts(recipe) and not found[0].get("experts"):
        raise UsageError(
            f"The metric {recipe.metric} scores whole experts, and {recipe.search} would remove neurons of each. Add "
            f"{option('set', {'experts': True})}, or take a metric of channel groups: {option('metric', 'cfsp')}."
        )
    return found[0], found[1] if recipe.metric else {}


def metric_of(recipe: Recipe) -> Callable[..., Any]:
    """The metric of a recipe; of channel groups for a search that removes those. Raises UsageError for another kind."""
    assert recipe.metric is not None
    of_groups = narrows(recipe.search)
    if recipe.metric not in (GROUP_METRICS if of_groups else METRICS):
        mine, other = ("channel groups", "sites or blocks") if of_groups else ("sites or blocks", "channel groups")
        fit = ["oneshot"] if of_groups else [name for name in SEARCHES if narrows(name)]
        if recipe.metric in (METRICS if of_groups else GROUP_METRICS):
            raise UsageError(
                f"The metric {recipe.metric} scores {other}, and the search {recipe.search} takes scores of {mine}. "
                f"Searches for it: {', '.join(option('search', name) for name in fit)}."
            )
    return GROUP_METRICS[recipe.metric] if of_groups else METRICS[recipe.metric]


def scores_experts(recipe: Recipe) -> bool:
    """Whether the metric of a recipe scores the experts of mixtures alone."""
    return recipe.metric is not None and recipe.metric in GROUP_METRICS and GROUP_METRICS.facts(recipe.metric).experts


def compute_scores(job: RunContext, probe: Probe) -> ScoreFields:
    """What the metric of a recipe says, as fields of a Problem, from the store if it was asked before."""
    recipe = job.recipe
    if recipe.metric is None:
        return {}
    metric, options = recipe.metric, method_options(recipe)[1]

    def compute() -> OptionValues:
        job.watch(Event("score", 0, None, {"metric": metric}))
        if narrows(recipe.search):
            return {
                str(site): values.tolist() for site, values in group_metric_scores(metric, probe, **options).items()
            }
        return {format_unit(unit): score.value for unit, score in metric_scores(metric, probe, **options).items()}

    teacher = probe.teacher
    key = ScoresKey(teacher.fingerprint, metric, options, probe.tokens.hash, probe.loss, teacher.compute_key)
    values = job.store.remember(key, compute, job.run)
    if narrows(recipe.search):
        return {"group_scores": {Site.parse(name): tuple(groups) for name, groups in values.items()}}
    return {"scores": {parse_unit(name): value for name, value in values.items()}}


def search_of(recipe: Recipe, problem: Problem) -> Search:
    """The search of a recipe, with its options, on a problem."""
    return SEARCHES[recipe.search](problem, **method_options(recipe)[0])


def run_search(job: RunContext, problem: Problem, measure: Executor | RefitExecutor) -> list[Plan]:
    """The path of the recipe's search on one problem."""
    total, name = expected_losses(job.recipe, problem), job.recipe.search
    steps = _checked_requests(name, search_of(job.recipe, problem))
    path = drive(steps, partial(_round, job, problem, measure, total))
    try:
        problem.anatomy.check(path[-1], problem.protected)
    except PlanError as error:
        raise wrong_return("search", name, PATH, f"a plan that is refused: {error}") from error
    if not problem.is_met(path[-1]):
        raise wrong_return("search", name, PATH, f"one that ends with {shorten(str(path[-1]))}")
    return path


PATH = "a list of plans, of which the last meets the budgets and keeps what is protected or not counted"


def _checked_requests(name: str, steps: Search) -> Search:
    """The steps of a search, as long as they are what a search yields and returns."""
    if not isinstance(steps, Generator):
        raise wrong_return("search", name, f"a generator of MeasureRequest that returns {PATH}", steps)
    answer: list[Loss] | None = None
    while True:
        try:
            request = steps.send(answer)  # type: ignore[arg-type]
        except StopIteration as end:
            path: list[Plan] = end.value
            if not isinstance(path, list) or not path or not all(isinstance(plan, Plan) for plan in path):
                raise wrong_return("search", name, PATH, path if path else f"{path!r}") from end
            return path
        if not isinstance(request, MeasureRequest) or not all(isinstance(plan, Plan) for plan in request.plans):
            raise wrong_return("search", name, "a generator that yields MeasureRequest of plans", request)
        answer = yield request


# -- progress -------------------------------------------------------------------------------------------------------


def _round(
    job: RunContext, problem: Problem, measure: Executor | RefitExecutor, total: int | None, ask: MeasureRequest
) -> list[Loss]:
    """Measure one Ask of a search that has about `total` losses to measure (None: unknown), and show how far it is."""
    if not ask.plans:
        return measure(ask)
    spent = [problem.removed_cost(Plan(frozenset.intersection(*(plan.removed for plan in ask.plans))))]
    if ask.phase:  # each plan is another change of the first one
        spent = [problem.removed_cost(ask.plans[0])]
    elif any(plan.narrowed for plan in ask.plans):  # each plan lacks other widths, so that they have nothing in common
        spent = list(map(problem.removed_cost, ask.plans))
    sofar: dict[str, EventValue] = {"phase": ask.phase} if ask.phase else {}
    least = map(min, zip(*spent, strict=True))
    for budget, done, target in zip(problem.budgets, least, problem.targets, strict=True):
        sofar |= {
            f"removed_{budget.unit}": in_units(budget, done),
            f"target_{budget.unit}": in_units(budget, target),
        }
    before = sum(len(earlier.plans) for earlier, _ in measure.rounds)
    total = None if total is None else max(total, before + len(ask.plans))
    losses = measure(ask, progress_of_request(job, sofar, before=before, total=total))
    if not all(loss.bound for loss in losses):
        mean, plan = lowest_full(ask.plans, losses)
        narrowed = ",".join(f"{narrow.site}={len(narrow.groups)}" for narrow in sorted(plan.narrowed))
        values: dict[str, EventValue] = {"removed": ",".join(plan.names()), "narrowed": narrowed, "loss": mean}
        event = Event("round", before + len(losses), total, values)
        job.store.add_event(job.run, event)
        hear_all(job.watch, event)
    report_loads(job)
    return losses


def in_units(budget: Budget, amount: Fraction | int) -> float:
    """An amount as `removed_cost` counts, in the unit of the budget."""
    fine = UNITS[budget.unit].fine
    return math.ceil(amount) if fine == 1 else float(amount / fine)


def progress_of_request(
    job: RunContext, sofar: Mapping[str, EventValue], *, before: int, total: int | None
) -> OnProgress:
    """Return what shows every loss of one request: `before` of `total` losses were known when it began."""

    def show(done: int, of: int, best: float) -> None:
        known: dict[str, EventValue] = {"objective": job.recipe.loss, "lowest": best} if math.isfinite(best) else {}
        most = None if total is None else max(total, before + of)
        job.watch(Event("search", before + done, most, {**sofar, **known}))

    return show


def expected_losses(recipe: Recipe, problem: Problem) -> int | None:
    """About how many losses the search of a recipe asks for, by its own closed form; None where it has none.

    The metric's scores need not be known yet.
    """
    if recipe.metric is not None and narrows(recipe.search):
        problem = replace(problem, group_scores=problem.group_scores or {})
    elif recipe.metric is not None:
        problem = replace(problem, scores=problem.scores or {})
    return estimate_losses(recipe.search, problem, **method_options(recipe)[0])
