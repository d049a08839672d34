"""Ladders: what may be left of each site, from all to nothing, and the cheapest choice of a rung on each."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from billhook.core.anatomy import SiteSize
from billhook.core.integer_program import Bound, cheapest_selections
from billhook.core.plan import PARTS, KeptGroups, Plan, Site
from billhook.core.problem import Problem
from billhook.methods import search as shared

MOVE_PENALTY = 1e-6  # share of the largest rise that the largest move costs besides its own
LEAST_RISE = 1e-9  # that has a logarithm
Ladder = tuple[Plan, ...]  # plans of one site alone, from keeping all of it to removing it
Place = tuple[int, int]  # a ladder, and a rung of it
Rises = dict[Plan, float]  # how much the loss rises under a plan of one site


def widths(problem: Problem, size: SiteSize, levels: int, multiple: int) -> set[int]:
    """Return how many groups are kept at the widths between all of a site and nothing."""
    if not size.groups or not problem.counts_groups(size):
        return set()
    levels = min(levels, len(size.groups))  # more are the same
    removed = (len(size.groups) * step // levels for step in range(1, levels))
    return {shared.kept_count(size, count, multiple) for count in removed} - {len(size.groups)}


def ladder_of(problem: Problem, size: SiteSize, levels: int, multiple: int, extra: Collection[KeptGroups]) -> Ladder:
    """Return the plans of one site, those of `extra` too; a protected site has one rung."""
    if size.site in problem.protected:
        return (Plan(),)
    rungs = [Plan()]
    if problem.group_scores is not None and size.site in problem.group_scores and problem.counts_groups(size):
        order = shared.ascending(problem.group_scores[size.site])
        levels = min(levels, len(order))  # more are the same
        widths = (shared.kept_groups(size, order, len(order) * step // levels, multiple) for step in range(1, levels))
        kept = {*widths, *(narrow.groups for narrow in extra if narrow.site == size.site)}
        narrower = sorted((groups for groups in kept if len(groups) < len(order)), key=len, reverse=True)
        rungs += [Plan(frozenset(), frozenset({KeptGroups(size.site, groups)})) for groups in narrower]
    return tuple(dict.fromkeys([*rungs, Plan(frozenset({size.site}))]))


def part_at(plan: Plan, site: Site) -> Plan:
    """Return the part of a plan that concerns one site."""
    return Plan(plan.removed & {site}, frozenset(narrow for narrow in plan.narrowed if narrow.site == site))


def moved(here: Sequence[int], places: Sequence[Place]) -> tuple[int, ...]:
    """Return the rungs of all ladders after moves."""
    rungs = dict(places)
    return tuple(rungs.get(i, rung) for i, rung in enumerate(here))


def plan_of(ladders: Sequence[Ladder], here: Sequence[int]) -> Plan:
    """Return the plan of all sites at these rungs."""
    rungs = [ladder[rung] for ladder, rung in zip(ladders, here, strict=True)]
    removed = frozenset(site for plan in rungs for site in plan.removed)
    return Plan(removed, frozenset(narrow for plan in rungs for narrow in plan.narrowed))


def curves_of(problem: Problem, ladders: Sequence[Ladder], alone: Rises) -> list[list[float]]:
    """Return the rises of each ladder; see `_curve`."""
    return [_curve(size, ladder, alone) for size, ladder in zip(problem.anatomy.sites, ladders, strict=True)]


def _curve(size: SiteSize, ladder: Ladder, alone: Rises) -> list[float]:
    """Return the rise at each rung of a ladder: as measured, else between widths that were.

    It is a power of the share that is removed, by the widths next to it. Beyond the ends it rises as little as it can:
    with the square of the share before the first, and with the share after the last.
    """
    kept = [len(groups.groups) for plan in ladder for groups in plan.narrowed]
    shares = [0.0, *(1 - count / len(size.groups) for count in kept), 1.0][: len(ladder)]
    known = [(share, max(alone[plan], LEAST_RISE)) for share, plan in zip(shares, ladder, strict=True)
             if plan.narrowed and plan in alone]  # fmt: skip
    curve = []
    for share, plan in zip(shares, ladder, strict=True):
        if not plan or plan in alone:
            curve.append(alone.get(plan, 0.0))
            continue
        less = max((point for point in known if point[0] < share), default=None)
        more = min((point for point in known if point[0] > share), default=None)
        power = 2.0 if less is None else 1.0
        if less is not None and more is not None:
            power = math.log(more[1] / less[1]) / math.log(more[0] / less[0])
        near, rise = less or more or (1.0, LEAST_RISE)
        curve.append(rise * (share / near) ** power)
    return curve


def best_selection(
    problem: Problem, ladders: Sequence[Ladder], here: tuple[int, ...], rises: Mapping[Place, float], most: int
) -> tuple[int, ...] | None:
    """Return the rungs after changes at up to `most` sites that meet the budgets at the least sum of rises, or None."""
    before = problem.removed_cost(plan_of(ladders, here))
    costs = []
    for place in rises:
        after = problem.removed_cost(plan_of(ladders, moved(here, [place])))
        costs.append([new - old for new, old in zip(after, before, strict=True)])
    needed = [target - old for target, old in zip(problem.targets, before, strict=True)]
    bounds: list[Bound] = [([1] * len(rises), most)]
    bounds += [([int(i == ladder) for i, _ in rises], 1) for ladder in range(len(ladders))]
    for part in PARTS:
        removed = [_removed(ladders[i][rung], part) - _removed(ladders[i][here[i]], part) for i, rung in rises]
        sites = sum(size.site.part == part for size in problem.anatomy.sites)
        bounds.append((removed, sites - 1 - _removed(plan_of(ladders, here), part)))
    # A change that seems to cost nothing must not remove more than the budgets need.
    largest = [max(1, *(abs(cost[b]) for cost in costs)) for b in range(len(needed))]
    penalty = MOVE_PENALTY * max(map(abs, rises.values()))
    prices = [
        rise + penalty * sum(c / n for c, n in zip(cost, largest, strict=True))
        for rise, cost in zip(rises.values(), costs, strict=True)
    ]
    places = list(rises)
    for chosen in cheapest_selections(prices, costs, needed, bounds):
        there = moved(here, [places[i] for i in chosen])
        if problem.is_met(plan_of(ladders, there)):
            return there
    return None


def _removed(plan: Plan, part: str) -> int:
    """Return how many sites of a part are removed."""
    return sum(site.part == part for site in plan.removed)
