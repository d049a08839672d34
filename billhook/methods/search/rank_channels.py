"""Let channel groups go, the least important first."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence

from billhook.core.errors import BudgetError, UsageError, option
from billhook.core.plan import KeptGroups, Plan, Site
from billhook.core.problem import Problem
from billhook.methods.search import Search, ascending, kept_groups, restricted, search

Ranked = Mapping[Site, Sequence[int]]  # of each site, the places of its groups, the lowest score first
Going = Mapping[Site, int]  # how many groups of a site go


def _losses(problem: Problem, *, uniform: bool = False, multiple: int = 1, parts: str = "mix") -> int:
    """None: it asks the metric alone. Raises what the search raises where all that may go is not enough."""
    problem = _checked(problem, multiple, parts)
    places = {size.site: range(len(size.groups)) for size in problem.anatomy.sites if size.groups}
    every = {site: len(of) for site, of in places.items() if site not in problem.protected}
    if not problem.is_met(_plan(problem, places, every, multiple)):
        raise BudgetError(_beyond(problem))
    return 0


@search(losses=_losses, channel_groups=True)
def rank_channels(problem: Problem, *, uniform: bool = False, multiple: int = 1, parts: str = "mix") -> Search:
    """Rank all channel groups by a metric, then drop them in that order, over all sites at once.

    A site that loses all its groups is removed. `uniform`: each site loses the same share, so that the model keeps its
    stock shape where nothing is protected; beside attention of few groups, mlps lose a little more or less, so that no
    more goes than is needed. `multiple`: as many neurons, or channels of keys, as stay of a site are a multiple of it,
    rounded up; a site with fewer keeps them all. `parts`: mix, mha or mlp, what may become narrower.

    Formula: the shortest beginning of the order, lowest score first, that meets the budgets
    Cost: none besides the metric's.

    Source: An et al. 2024, FLAP (arXiv 2312.11983), one order over all sites; Ma et al. 2023, LLM-Pruner (arXiv
    2305.11627), `uniform`.
    """
    yield from ()
    problem = _checked(problem, multiple, parts)
    assert problem.group_scores is not None
    free = [size.site for size in problem.anatomy.sites if size.site not in problem.protected]
    scores = {site: problem.group_scores[site] for site in free if site in problem.group_scores}
    ranked = {site: ascending(values) for site, values in scores.items()}
    order, ends = _order(scores, ranked, uniform)

    def going(end: int, held: Going) -> Going:
        return {**Counter(order[: ends[end]]), **held}

    def plan(some: Going) -> Plan:
        return _plan(problem, ranked, some, multiple)

    def shortest(held: Going) -> Going | None:
        """What goes by the shortest beginning that meets the budgets, while some sites lose as many as is told."""
        end = bisect_left(range(len(ends)), True, key=lambda end: problem.is_met(plan(going(end, held))))
        return going(end, held) if end < len(ends) else None

    found = shortest({})
    if found is None:
        raise BudgetError(_beyond(problem))
    if uniform:
        end = ends.index(sum(found.values()))
        step = set(order[ends[max(end - 1, 0)] : ends[end]])  # a coarse one may take more than is needed
        ways = (found, going(max(end - 1, 0), {}))
        others = [shortest({site: way.get(site, 0) for site in step}) for way in ways]
        exact = [other for other in others if other is not None]
        if problem.removed_cost(plan(exact[0])) != problem.removed_cost(plan(found)):
            found = min(exact, key=lambda some: _spread(ranked, some))
    return [plan(found)]


def _checked(problem: Problem, multiple: int, parts: str) -> Problem:
    """The problem of the parts that may become narrower. Raises UsageError for what the search has no use for."""
    problem = restricted(problem, parts)
    if problem.group_scores is None:
        raise UsageError(
            f"The search narrow ranks channel groups. Name a metric of groups: {option('metric', 'flap')}."
        )
    if multiple < 1:
        raise UsageError(f"multiple={multiple} is no number of channels. Write for example 8, 32 or 256.")
    return problem


def _beyond(problem: Problem) -> str:
    """Why channel groups alone do not do."""
    return (
        f"{', '.join(map(str, problem.budgets))} cannot be met by channel groups alone, while one attention, one "
        "mlp and everything protected stay. Ask for less, or count in params, bytes, kv or flops."
    )


def _spread(ranked: Ranked, going: Going) -> float:
    """How much larger a share one site loses than another."""
    shares = [going.get(site, 0) / len(places) for site, places in ranked.items()]
    return max(shares) - min(shares)


def _order(scores: Mapping[Site, Sequence[float]], ranked: Ranked, uniform: bool) -> tuple[list[Site], list[int]]:
    """The sites of all groups, lowest score first, and how many may go at a time; if `uniform`, lowest share first."""
    every = []
    for site, values in scores.items():
        for rank, place in enumerate(ranked[site]):
            every.append(((rank + 0.5) / len(values) if uniform else values[place], site))
    every.sort()
    last = len(every)
    ends = [end for end in range(last + 1) if not uniform or end in (0, last) or every[end][0] > every[end - 1][0]]
    return [site for _, site in every], ends


def _plan(problem: Problem, ranked: Ranked, going: Going, multiple: int) -> Plan:
    """What is left when some groups go: sites narrower, or removed where nothing of them would stay and others do."""
    sizes = {size.site: size for size in problem.anatomy.sites}
    removed: set[Site] = set()
    narrowed: set[KeptGroups] = set()
    for site, count in going.items():
        size = sizes[site]
        if count == len(size.groups) and problem.is_valid(Plan(frozenset({*removed, site}))):
            removed.add(site)
            continue
        kept = kept_groups(size, ranked[site], count, multiple)
        if len(kept) < len(size.groups):
            narrowed.add(KeptGroups(site, kept))
    return Plan(frozenset(removed), frozenset(narrowed))
