"""Let channel groups go, the least important first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from billhook.errors import BudgetError, UsageError
from billhook.plan import Narrow, Plan, Site, SiteSize
from billhook.problem import Problem
from billhook.search import Search, restricted, search

Order = list[tuple[Site, int]]  # a site, and the place of a group in it


@search
def narrow(problem: Problem, *, uniform: bool = False, multiple: int = 1, parts: str = "mix") -> Search:
    """Rank all channel groups by a metric, then drop them in that order, over all sites at once.

    A site that loses all its groups is removed. `uniform`: each site of a kind loses the same share. `multiple`: what
    stays of a site is a multiple of this, rounded up; a site with fewer groups keeps them all. `parts`: mix, mha or
    mlp, what may become narrower.

    Formula: the shortest beginning of the order, lowest score first, that meets the budgets
    Cost: none besides the metric's.

    Source: An et al. 2024, FLAP (arXiv 2312.11983), one order over all sites; Ma et al. 2023, LLM-Pruner (arXiv
    2305.11627), `uniform`.
    """
    yield from ()
    problem = restricted(problem, parts)
    if problem.group_scores is None:
        raise UsageError("The search narrow ranks channel groups. Name a metric of groups: --metric flap.")
    if multiple < 1:
        raise UsageError(f"multiple={multiple} is no number of groups. Write for example 8, 32 or 256.")
    sizes = {s.site: s for s in problem.anatomy.sites if s.site in problem.group_scores}
    free = {site: size for site, size in sizes.items() if site not in problem.protected}
    order = _order({site: problem.group_scores[site] for site in free}, uniform)

    def plan(count: int) -> Plan:
        return _plan(problem, free, order[:count], multiple)

    low, high = 0, len(order)
    if not problem.met(plan(high)):
        raise BudgetError(
            f"{', '.join(map(str, problem.budgets))} cannot be met by channel groups alone, while one attention, one "
            "mlp and everything protected stay. Ask for less, or count in params, bytes, kv or flops."
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if problem.met(plan(middle)) else (middle, high)
    return [plan(high)]


def _order(scores: Mapping[Site, Sequence[float]], uniform: bool) -> Order:
    """All groups, lowest score first; if `uniform`, lowest share of its site first."""
    every = []
    for site, values in scores.items():
        ranked = sorted(range(len(values)), key=lambda place, values=values: (values[place], place))  # type: ignore[misc]
        for rank, place in enumerate(ranked):
            every.append(((rank + 0.5) / len(ranked) if uniform else values[place], site, place))
    return [(site, place) for _, site, place in sorted(every)]


def _plan(problem: Problem, sizes: Mapping[Site, SiteSize], going: Order, multiple: int) -> Plan:
    """What is left when some groups go: sites narrower, or removed where nothing of them would stay and others do."""
    gone: dict[Site, list[int]] = {}
    for site, place in going:
        gone.setdefault(site, []).append(place)
    removed: set[Site] = set()
    narrowed: set[Narrow] = set()
    for site, places in gone.items():
        size = sizes[site]
        if len(places) == len(size.groups) and problem.legal(Plan(frozenset({*removed, site}))):
            removed.add(site)
            continue
        kept = _kept(size, places, math.lcm(multiple, size.multiple))
        if len(kept) < len(size.groups):
            narrowed.add(Narrow(site, kept))
    return Plan(frozenset(removed), frozenset(narrowed))


def _kept(size: SiteSize, places: Sequence[int], multiple: int) -> tuple[int, ...]:
    """The groups that stay, a multiple of them, and as many of every expert; `places` go, the first ones first."""
    each = len(size.groups) // size.experts
    count = each - len(places) // size.experts
    count = min(each, max(multiple, -(-count // multiple) * multiple))
    rank = {place: i for i, place in enumerate(places)}  # what is not named goes last
    stay: list[int] = []
    for expert in range(size.experts):
        mine = range(expert * each, (expert + 1) * each)
        stay += sorted(mine, key=lambda place: rank.get(place, len(rank)), reverse=True)[:count]
    return tuple(size.groups[place] for place in sorted(stay))
