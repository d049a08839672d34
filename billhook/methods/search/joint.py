"""Depth and width in one search: how much of each site to keep, by measured losses."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from billhook.core.anatomy import SiteSize
from billhook.core.errors import BudgetError, UsageError, option
from billhook.core.plan import KeptGroups, MeasureRequest, Plan, Site
from billhook.core.problem import Problem
from billhook.core.results.measured import Loss
from billhook.methods import search as shared
from billhook.methods.search import SEARCHES, Search, lowest_full, restricted, search
from billhook.methods.search.ladders import (
    Ladder,
    Place,
    Rises,
    best_selection,
    curves_of,
    ladder_of,
    moved,
    part_at,
    plan_of,
    widths,
)
from billhook.methods.search.rank_channels import ranked_plan

CHANGES = (1, 2, 4, 8, 16, 32)  # how many sites may change at once; each number is tried
ENDS = (4, 2)  # blocks at the beginning and at the end that often matter more than others
FEW = 8  # groups of an attention, of which each is measured


def _losses(
    problem: Problem, *, start: str = "swap", levels: int = 8, rounds: int = 16, tokens: int = 512, multiple: int = 1,
    parts: str = "mix", experts: bool = False, heads: bool = True,
) -> int:  # fmt: skip
    """Return at most how many: one for each width of each site, those of `start`, and those of all `rounds`."""
    problem = _checked(problem, levels, multiple, parts, experts)
    free = [size for size in problem.anatomy.sites if size.site not in problem.protected]
    alone = 1 + sum(1 + len(widths(problem, size, levels, multiple)) for size in free)
    alone += sum(len(size.groups) for size in _with_few_groups(problem)) if heads else 0
    starts = 3
    if start != "none":
        with suppress(BudgetError):  # whole sites alone may not be enough
            starts += shared.estimate_losses(start, replace(problem, group_scores=None, scores=None).check()) or 0
    return alone + starts + rounds * 2 * (1 + len(free) + len(CHANGES))


@search(losses=_losses, channel_groups=True, whole_sites=True)
def joint(
    problem: Problem, *, start: str = "swap", levels: int = 8, rounds: int = 16, tokens: int = 512, multiple: int = 1,
    parts: str = "mix", experts: bool = False, heads: bool = True,
) -> Search:  # fmt: skip
    """Choose how much of each site to keep, from all to nothing, by an integer programme over measured losses.

    Groups of a site are removed in the order of a metric; those of an attention, where it has at most eight, in the
    order of the loss without each one alone, of which metrics say little (`heads=False`: by the metric too). An mlp has
    `levels` - 1 widths in between, an attention as many as it has KV groups. The search begins at the best of these
    plans: the programme's, by the loss of each site alone, of which it measures the widths that the programme chooses,
    until it chooses no other; the end of the search `start` (or none), which removes whole sites; and the same share of
    each site, with and without the first four blocks and the last two. In each round it measures one width more and one
    less at each site, first of the half that promises most by the losses alone. The programme makes 1, 2, 4, … 32 of
    these changes under the budgets, and the best plan on all calibration tokens is kept, until none is better.
    `tokens`: of the calibration, for estimates that only propose; `multiple`, `parts`, `experts`: as for
    `rank_channels`.

    Formula: min Σ_s rise(s, width of s), subject to the budgets; then the same over one step at each site
    Cost: those of `start`; at most a loss for each width of each site, and for each of few groups, on `tokens`; in each
    round one or two for each site on `tokens`, and six on all tokens.

    Source: Bercovich et al. 2024, Puzzle (arXiv 2411.19146), mixed-integer programming over measured alternatives of
    each layer; Sieberling et al. 2024, EvoPress (arXiv 2410.14649), exchanges of levels. Deviations: alternatives are
    the model's own channel groups, not trained; the programme is solved again around each plan that is reached.
    """
    start_search = None if start == "none" else SEARCHES[start]
    problem = _checked(problem, levels, multiple, parts, experts)
    sites = problem.anatomy.sites
    alone = (yield from _without_each_group(problem, tokens)) if heads else {}
    problem = _ordered(problem, alone)
    ladders = [ladder_of(problem, size, levels, multiple, ()) for size in sites]
    cheapest = yield from _cheapest(problem, ladders, tokens, alone)
    starts = [] if cheapest is None else [plan_of(ladders, cheapest)]
    starts += _uniform(problem, parts, multiple)
    if start_search is not None:
        with suppress(BudgetError):  # whole sites alone may not be enough
            starts += (yield from start_search(replace(problem, group_scores=None).check()))[-1:]
    if not starts:
        raise BudgetError(f"{', '.join(map(str, problem.budgets))} cannot be met. Ask for less, or protect less.")
    starts = list(dict.fromkeys(starts))
    plan = lowest_full(starts, (yield MeasureRequest(tuple(starts), full_results=1)))[1]
    ladders = [ladder_of(problem, size, levels, multiple, plan.narrowed) for size in sites]
    here = tuple(rungs.index(part_at(plan, size.site)) for size, rungs in zip(sites, ladders, strict=True))
    for _ in range(rounds):
        there = yield from _best_change(problem, ladders, here, alone, tokens)
        if there == here:
            break
        here = there
    return [plan_of(ladders, here)]


def _checked(problem: Problem, levels: int, multiple: int, parts: str, experts: bool) -> Problem:
    """Return the problem of the parts that may change. Raises before anything is measured."""
    problem = restricted(problem, parts)
    if problem.group_scores is None:
        raise UsageError(
            f"The search joint orders channel groups. Name a metric of groups: {option('metric', 'cfsp')}."
        )
    if problem.whole_blocks:
        raise BudgetError("The search joint has no use for a budget in blocks. Count in params, bytes, kv or flops.")
    if levels < 1 or multiple < 1:
        raise UsageError(f"levels={levels}, multiple={multiple}: both must be 1 or more.")
    return shared.by_experts(problem) if experts else problem


def _with_few_groups(problem: Problem) -> list[SiteSize]:
    """Return the attentions that may be narrowed and have so few groups that each is measured.

    Before groups have scores, all of these count.
    """
    scored = problem.group_scores or {}
    return [
        size for size in problem.anatomy.sites
        if size.site.part == "attention" and 1 < len(size.groups) <= FEW
        and (not scored or size.site in scored) and size.site not in problem.protected and problem.counts_groups(size)
    ]  # fmt: skip


def _without(size: SiteSize, group: int) -> Plan:
    """Return the plan that takes one group of a site away."""
    return Plan(frozenset(), frozenset({KeptGroups(size.site, tuple(g for g in size.groups if g != group))}))


def _without_each_group(problem: Problem, tokens: int) -> Generator[MeasureRequest, list[Loss], Rises]:
    """Return the rises without each group alone, of attentions that have few."""
    plans = [_without(size, group) for size in _with_few_groups(problem) for group in size.groups]
    if not plans:
        return {}
    whole, *losses = yield MeasureRequest((Plan(), *plans), tokens=tokens, estimate=True, phase="alone")
    return {plan: loss.mean - whole.mean for plan, loss in zip(plans, losses, strict=True)}


def _ordered(problem: Problem, rises: Rises) -> Problem:
    """Return the problem with the scores of these groups replaced by what the loss rises without them."""
    if not rises:
        return problem
    measured: Mapping[Site, Sequence[float]] = {
        size.site: tuple(rises[_without(size, group)] for group in size.groups) for size in _with_few_groups(problem)
    }
    return replace(problem, group_scores={**(problem.group_scores or {}), **measured})


def _cheapest(
    problem: Problem, ladders: Sequence[Ladder], tokens: int, alone: Rises
) -> Generator[MeasureRequest, list[Loss], tuple[int, ...] | None]:
    """Return the rungs at which the sum of the rises of sites alone is least under the budgets, or None.

    At first one width in the middle and the removal of each site are measured, then what the programme chooses, until
    all that it chooses has been measured. `alone`: rises that are known, to which these are added.
    """
    whole = (0,) * len(ladders)
    places = [(i, rung) for i, ladder in enumerate(ladders) for rung in range(1, len(ladder))]
    first = [(i, rung) for i, rung in places if rung in (len(ladders[i]) // 2, len(ladders[i]) - 1)]
    wanted = [(i, rung) for i, rung in first if ladders[i][rung] not in alone]
    cheapest: tuple[int, ...] | None = None
    while wanted:
        plans = (Plan(), *(ladders[i][rung] for i, rung in wanted))
        losses = yield MeasureRequest(plans, tokens=tokens, estimate=True, phase="alone")
        alone |= {plan: loss.mean - losses[0].mean for plan, loss in zip(plans, losses, strict=True)}
        curves = curves_of(problem, ladders, alone)
        cheapest = best_selection(
            problem, ladders, whole, {(i, rung): curves[i][rung] for i, rung in places}, len(ladders)
        )
        chosen = [] if cheapest is None else list(enumerate(cheapest))
        wanted = [(i, rung) for i, rung in chosen if rung and ladders[i][rung] not in alone]
    return cheapest


def _best_change(
    problem: Problem, ladders: Sequence[Ladder], here: tuple[int, ...], alone: Rises, tokens: int
) -> Generator[MeasureRequest, list[Loss], tuple[int, ...]]:
    """Return the rungs after the best exchange of single steps from `here`; `here` if none is better.

    The steps that promise most for what they remove, by the rises alone, are measured first, the others only if no
    exchange of these is better.
    """
    curves = curves_of(problem, ladders, alone)
    near = [(i, rung + step) for i, rung in enumerate(here) for step in (-1, 1)]
    near = [(i, rung) for i, rung in near if 0 <= rung < len(ladders[i])]
    near = [place for place in near if problem.is_valid(plan_of(ladders, moved(here, [place])))]
    before = problem.removed_cost(plan_of(ladders, here))

    def promise(place: Place) -> tuple[float, Place]:
        i, rung = place
        after = problem.removed_cost(plan_of(ladders, moved(here, [place])))
        gone = sum(abs(new - old) / target for new, old, target in zip(after, before, problem.targets, strict=True))
        return (curves[i][rung] - curves[i][here[i]]) / max(gone, 1e-12), place

    rises: dict[Place, float] = {}
    for later in (False, True):
        wanted = []
        for direction in (-1, 1):
            steps = sorted((place for place in near if (place[1] - here[place[0]]) == direction), key=promise)
            half = -(-len(steps) // 2)
            wanted += steps[half:] if later else steps[:half]
        plans = [plan_of(ladders, there) for there in (here, *(moved(here, [place]) for place in wanted))]
        losses = yield MeasureRequest(tuple(plans), tokens=tokens, estimate=True, phase="changes")
        rises |= {place: loss.mean - losses[0].mean for place, loss in zip(wanted, losses[1:], strict=True)}
        candidates = {plan_of(ladders, here): here}
        for most in CHANGES:
            there = best_selection(problem, ladders, here, rises, most)
            if there is not None:
                candidates.setdefault(plan_of(ladders, there), there)
        reached = tuple(candidates)
        losses = yield MeasureRequest(reached, full_results=1, phase="changes")
        if (best := candidates[lowest_full(reached, losses)[1]]) != here:
            return best
    return here


def _uniform(problem: Problem, parts: str, multiple: int) -> list[Plan]:
    """Return plans that remove the same share of each site, and of each site between the ends."""
    plans: list[Plan] = []
    for early, latter in ((0, 0), ENDS):
        with suppress(BudgetError):  # groups alone may not be enough
            inner = restricted(problem, parts, early, latter)
            plans.append(ranked_plan(inner, multiple, uniform=True))
    return plans
