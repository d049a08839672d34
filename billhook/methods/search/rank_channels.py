"""Removal of channel groups, the least important first."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product

from billhook.core.errors import BudgetError, UsageError, option
from billhook.core.plan import PARTS, KeptGroups, Plan, Site
from billhook.core.problem import Problem
from billhook.methods.search import Search, ascending, by_experts, kept_groups, restricted, search

Ranked = Mapping[Site, Sequence[int]]  # the places of each site's groups, the lowest score first
Removed = Mapping[Site, int]  # how many groups of each site are removed


def _losses(
    problem: Problem, *, uniform: bool = False, multiple: int = 1, parts: str = "mix", experts: bool = False
) -> int:
    """Return 0: only the metric is needed. Raises what the search raises where all free groups are not enough."""
    problem = _checked(problem, multiple, parts, experts)
    if uniform:
        _check_alike(problem)
    places = {size.site: range(len(size.groups)) for size in problem.anatomy.sites if size.groups}
    free = {site: len(groups) for site, groups in places.items() if site not in problem.protected}
    if not problem.is_met(_plan(problem, places, free, multiple, whole=not uniform)):
        raise _out_of_reach(problem)
    return 0


@search(losses=_losses, channel_groups=True)
def rank_channels(
    problem: Problem, *, uniform: bool = False, multiple: int = 1, parts: str = "mix", experts: bool = False
) -> Search:
    """Rank all channel groups by a metric, then remove them in that order, over all sites at once.

    A site that loses all its groups is removed; where no budget counts groups, it is kept whole until then. `uniform`:
    each attention keeps as many groups as the others, each mlp too, and none is removed, so that the model keeps its
    stock shape unless some are protected. Beside attention of few groups, mlps lose a little more or less, so that no
    more is removed than needed. `multiple`: each site keeps a multiple of this many neurons or channels of keys,
    rounded up; a site with fewer keeps them all. `parts`: mix, mha or mlp, which sites may be narrowed. `experts`:
    mixtures lose whole experts, by the mean score of their neurons, instead of neurons of each expert.

    Formula: the shortest beginning of the order, lowest score first, that meets the budgets
    Cost: none besides the metric's.

    Source: An et al. 2024, FLAP (arXiv 2312.11983), one order over all sites; Ma et al. 2023, LLM-Pruner (arXiv
    2305.11627), `uniform`.
    """
    yield from ()
    problem = _checked(problem, multiple, parts, experts)
    if uniform:
        _check_alike(problem)
    return [ranked_plan(problem, multiple, uniform=uniform)]


def ranked_plan(problem: Problem, multiple: int, *, uniform: bool) -> Plan:
    """Return the plan of the search; `uniform`: of the sites that are not protected. Raises BudgetError without one."""
    assert problem.group_scores is not None
    free = [size.site for size in problem.anatomy.sites if size.site not in problem.protected]
    scores = {site: problem.group_scores[site] for site in free if site in problem.group_scores}
    ranked = {site: ascending(values) for site, values in scores.items()}
    order, ends = _order(scores, ranked, uniform)

    def first(end: int, fixed: Removed) -> Removed:
        return {**Counter(order[: ends[end]]), **fixed}

    def plan(removed: Removed) -> Plan:
        return _plan(problem, ranked, removed, multiple, whole=not uniform)

    def shortest(fixed: Removed) -> Removed | None:
        """Return the shortest beginning of the order that meets the budgets; the `fixed` sites lose their number."""
        end = bisect_left(range(len(ends)), True, key=lambda end: problem.is_met(plan(first(end, fixed))))
        return first(end, fixed) if end < len(ends) else None

    chosen = shortest({})
    if chosen is None:
        raise _out_of_reach(problem)
    if uniform:
        end = ends.index(sum(chosen.values()))
        step = set(order[ends[max(end - 1, 0)] : ends[end]])  # a coarse one may remove more than is needed
        starts = (chosen, first(max(end - 1, 0), {}))
        others = [shortest({site: start.get(site, 0) for site in step}) for start in starts]
        exact = [other for other in others if other is not None]
        if problem.removed_cost(plan(exact[0])) != problem.removed_cost(plan(chosen)):
            chosen = min(exact, key=lambda removed: _spread(ranked, removed))
    return plan(chosen)


def _checked(problem: Problem, multiple: int, parts: str, experts: bool) -> Problem:
    """Return the problem of the parts that may be narrowed. Raises UsageError for unusable options."""
    problem = restricted(problem, parts)
    if problem.group_scores is None:
        raise UsageError(
            f"The search rank_channels ranks channel groups. Name a metric of groups: {option('metric', 'flap')}."
        )
    if multiple < 1:
        raise UsageError(f"multiple={multiple} is not a number of channels. Write for example 8, 32 or 256.")
    return by_experts(problem) if experts else problem


def _check_alike(problem: Problem) -> None:
    """Raise UsageError where the free sites of a part cannot all keep equally many groups."""
    sizes = [size for size in problem.anatomy.sites if size.groups and size.site not in problem.protected]
    for part, mixture in product(PARTS, (False, True)):  # a config has a width for dense mlps, and one for experts
        alike = (size for size in sizes if size.site.part == part and (size.experts > 1) == mixture)
        if len({(len(size.groups), size.experts) for size in alike}) > 1:
            raise UsageError(
                f"{option('uniform', True)} narrows every {part} alike, and they have different widths now. Leave "
                f"{option('uniform')} out, or protect every {part}."
            )


def _out_of_reach(problem: Problem) -> BudgetError:
    """Return the error for a budget that channel groups alone cannot meet."""
    return BudgetError(
        f"{', '.join(map(str, problem.budgets))} cannot be met by channel groups alone, if one attention, one mlp and "
        "all protected sites are kept (all sites, where widths are uniform). Ask for less, or count in params, bytes, "
        "kv or flops."
    )


def _spread(ranked: Ranked, removed: Removed) -> float:
    """Return the difference between the largest and the smallest share that a site loses."""
    shares = [removed.get(site, 0) / len(places) for site, places in ranked.items()]
    return max(shares) - min(shares)


def _order(scores: Mapping[Site, Sequence[float]], ranked: Ranked, uniform: bool) -> tuple[list[Site], list[int]]:
    """Return the sites of all groups, lowest score (`uniform`: share) first, and how many may be removed at a time."""
    keyed = []
    for site, values in scores.items():
        for rank, place in enumerate(ranked[site]):
            keyed.append(((rank + 0.5) / len(values) if uniform else values[place], site))
    keyed.sort()
    last = len(keyed)
    ends = [end for end in range(last + 1) if not uniform or end in (0, last) or keyed[end][0] > keyed[end - 1][0]]
    return [site for _, site in keyed], ends


def _plan(problem: Problem, ranked: Ranked, counts: Removed, multiple: int, *, whole: bool) -> Plan:
    """Return the plan without these groups: sites narrowed, or (`whole`) removed where no group is kept and other sites
    are."""
    sizes = {size.site: size for size in problem.anatomy.sites}
    removed: set[Site] = set()
    narrowed: set[KeptGroups] = set()
    for site, count in counts.items():
        size = sizes[site]
        if whole and count == len(size.groups) and problem.is_valid(Plan(frozenset({*removed, site}))):
            removed.add(site)
            continue
        kept = kept_groups(size, ranked[site], count, multiple) if problem.counts_groups(size) else size.groups
        if len(kept) < len(size.groups):
            narrowed.add(KeptGroups(site, kept))
    return Plan(frozenset(removed), frozenset(narrowed))
