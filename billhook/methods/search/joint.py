"""Depth and width in one search: how much of every site stays, by what was measured."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from billhook.core.anatomy import SiteSize
from billhook.core.errors import BudgetError, UsageError, option
from billhook.core.integer_program import Bound, cheapest_selections
from billhook.core.plan import PARTS, KeptGroups, MeasureRequest, Plan, Site
from billhook.core.problem import Problem
from billhook.core.results.measured import Loss
from billhook.methods.search import (
    SEARCHES,
    Search,
    ascending,
    drive,
    estimate_losses,
    kept_count,
    kept_groups,
    lowest_full,
    restricted,
    search,
)

CHANGES = (1, 2, 4, 8, 16, 32)  # sites that may change at a time, each tried
ENDS = (4, 2)  # blocks at the beginning and at the end that are often worth more than others
MOVE_PENALTY = 1e-6  # of the largest rise: what the largest move costs besides its own
Ladder = tuple[Plan, ...]  # what may be left of one site, from all of it to nothing, touching no other
Place = tuple[int, int]  # a ladder, and a rung of it


def _losses(
    problem: Problem, *, start: str = "swap", levels: int = 8, rounds: int = 16, tokens: int = 512, multiple: int = 1,
    parts: str = "mix",
) -> int:  # fmt: skip
    """At most: a loss a width of each site, those of `start`, and of all `rounds`, which end where none is better."""
    problem = _checked(problem, levels, multiple, parts)
    free = [size for size in problem.anatomy.sites if size.site not in problem.protected]
    alone = 1 + sum(1 + len(_widths(size, levels, multiple)) for size in free)
    begun = 3
    if start != "none":
        with suppress(BudgetError):  # whole sites alone may not do
            begun += estimate_losses(start, replace(problem, group_scores=None, scores=None).check()) or 0
    return alone + begun + rounds * (1 + 2 * len(free) + len(CHANGES))


@search(losses=_losses, channel_groups=True)
def joint(
    problem: Problem, *, start: str = "swap", levels: int = 8, rounds: int = 16, tokens: int = 512, multiple: int = 1,
    parts: str = "mix",
) -> Search:  # fmt: skip
    """Choose how much of every site stays, from all to nothing, by an integer programme over measured losses.

    The groups of a site go in the order of a metric; of its mlp `levels` - 1 widths in between are tried, of its
    attention as many as it has KV groups. It begins at the best of some plans: by the loss of every site at every
    width alone; as the search `start` (or none) ends, which removes whole sites; and the same share of every site, or
    of all but those of the first four blocks and the last two. Then, round by round, it sees what one width more or
    less at each site does to the plan that is reached: the programme exchanges 1, 2, 4, … 32 of them under the budgets,
    and the best plan on all calibration tokens goes on, until none is better. `tokens`: of the calibration, for what
    only proposes; `multiple`, `parts`: as for `narrow`.

    Formula: min Σ_s rise(s, width of s), subject to the budgets; then the same over one step at each site
    Cost: those of `start`; a loss a width of each site on `tokens`, two a site each round, six on all tokens.

    Source: Bercovich et al. 2024, Puzzle (arXiv 2411.19146), mixed-integer programming over measured alternatives of
    each layer; Sieberling et al. 2024, EvoPress (arXiv 2410.14649), exchanges of levels. Deviations: alternatives are
    the model's own channel groups, not trained; the programme is solved again around each plan that is reached.
    """
    begin = None if start == "none" else SEARCHES[start]
    problem = _checked(problem, levels, multiple, parts)
    sites = problem.anatomy.sites
    ladders = [_ladder(problem, size, levels, multiple, ()) for size in sites]
    every = [(i, rung) for i, ladder in enumerate(ladders) for rung in range(1, len(ladder))]
    alone = yield MeasureRequest((Plan(), *(ladders[i][rung] for i, rung in every)), tokens=tokens)
    rises = {place: loss.mean - alone[0].mean for place, loss in zip(every, alone[1:], strict=True)}
    own = _best(problem, ladders, (0,) * len(ladders), rises, len(ladders))
    begun = [] if own is None else [_plan(ladders, own)]
    begun += _even(problem, parts, multiple)
    if begin is not None:
        with suppress(BudgetError):  # whole sites alone may not do
            begun += (yield from begin(replace(problem, group_scores=None).check()))[-1:]
    if not begun:
        raise BudgetError(f"{', '.join(map(str, problem.budgets))} cannot be met. Ask for less, or protect less.")
    begun = list(dict.fromkeys(begun))
    plan = lowest_full(begun, (yield MeasureRequest(tuple(begun), full_results=1)))[1]
    ladders = [_ladder(problem, size, levels, multiple, plan.narrowed) for size in sites]
    here = tuple(rungs.index(_at(plan, size.site)) for size, rungs in zip(sites, ladders, strict=True))
    for _ in range(rounds):
        there = yield from _exchanged(problem, ladders, here, tokens)
        if there == here:
            break
        here = there
    return [_plan(ladders, here)]


def _checked(problem: Problem, levels: int, multiple: int, parts: str) -> Problem:
    """The problem of the parts that may change. Raises what the search refuses, before anything is measured."""
    problem = restricted(problem, parts)
    if problem.group_scores is None:
        raise UsageError(
            f"The search joint orders channel groups. Name a metric of groups: {option('metric', 'taylor_mix')}."
        )
    if problem.whole_blocks:
        raise BudgetError("The search joint has no use for a budget in blocks. Count in params, bytes, kv or flops.")
    if levels < 1 or multiple < 1:
        raise UsageError(f"levels={levels}, multiple={multiple}: both are 1 or more.")
    return problem


def _widths(size: SiteSize, levels: int, multiple: int) -> set[int]:
    """How many groups of each expert stay at the widths between all of a site and nothing."""
    if not size.groups:
        return set()
    going = (len(size.groups) * step // levels for step in range(1, levels))
    return {kept_count(size, some, multiple) for some in going} - {len(size.groups) // size.experts}


def _exchanged(
    problem: Problem, ladders: Sequence[Ladder], here: tuple[int, ...], tokens: int
) -> Generator[MeasureRequest, list[Loss], tuple[int, ...]]:
    """The best exchange of single steps from `here`, or `here` itself."""
    near = [(i, rung + step) for i, rung in enumerate(here) for step in (-1, 1)]
    near = [(i, rung) for i, rung in near if 0 <= rung < len(ladders[i])]
    near = [place for place in near if problem.is_valid(_plan(ladders, _moved(here, [place])))]
    plans = [_plan(ladders, there) for there in (here, *(_moved(here, [place]) for place in near))]
    moved = yield MeasureRequest(tuple(plans), tokens=tokens)
    rises = {place: loss.mean - moved[0].mean for place, loss in zip(near, moved[1:], strict=True)}
    found = {_plan(ladders, here): here}
    for most in CHANGES:
        other = _best(problem, ladders, here, rises, most)
        if other is not None:
            found.setdefault(_plan(ladders, other), other)
    return found[lowest_full(tuple(found), (yield MeasureRequest(tuple(found), full_results=1)))[1]]


def _even(problem: Problem, parts: str, multiple: int) -> list[Plan]:
    """The same share of every site, and of those between the ends."""
    found: list[Plan] = []
    for early, latter in ((0, 0), ENDS):
        with suppress(BudgetError):  # groups alone may not do
            some = restricted(problem, parts, early, latter)
            found += drive(SEARCHES["rank_channels"](some, uniform=True, multiple=multiple), lambda ask: [])
    return found


def _ladder(problem: Problem, size: SiteSize, levels: int, multiple: int, others: Collection[KeptGroups]) -> Ladder:
    """What may be left of a site, one of `others` too: one rung where it must stay as it is."""
    if size.site in problem.protected:
        return (Plan(),)
    rungs = [Plan()]
    if problem.group_scores is not None and size.site in problem.group_scores:
        order = ascending(problem.group_scores[size.site])
        widths = (kept_groups(size, order, len(order) * step // levels, multiple) for step in range(1, levels))
        kept = {*widths, *(narrow.groups for narrow in others if narrow.site == size.site)}
        some = sorted((groups for groups in kept if len(groups) < len(order)), key=len, reverse=True)
        rungs += [Plan(frozenset(), frozenset({KeptGroups(size.site, groups)})) for groups in some]
    return tuple(dict.fromkeys([*rungs, Plan(frozenset({size.site}))]))


def _at(plan: Plan, site: Site) -> Plan:
    """What of a plan concerns a site."""
    return Plan(plan.removed & {site}, frozenset(narrow for narrow in plan.narrowed if narrow.site == site))


def _moved(here: Sequence[int], places: Sequence[Place]) -> tuple[int, ...]:
    """The rungs of all ladders after some moves."""
    there = list(here)
    for i, rung in places:
        there[i] = rung
    return tuple(there)


def _plan(ladders: Sequence[Ladder], here: Sequence[int]) -> Plan:
    """All that is left of all sites."""
    rungs = [ladder[rung] for ladder, rung in zip(ladders, here, strict=True)]
    removed = frozenset(site for plan in rungs for site in plan.removed)
    return Plan(removed, frozenset(narrow for plan in rungs for narrow in plan.narrowed))


def _best(
    problem: Problem, ladders: Sequence[Ladder], here: tuple[int, ...], rises: Mapping[Place, float], most: int
) -> tuple[int, ...] | None:
    """What to change, at `most` sites, for the least sum of rises that meets the budgets; None if nothing does."""
    spent = problem.removed_cost(_plan(ladders, here))
    costs = []
    for place in rises:
        there = problem.removed_cost(_plan(ladders, _moved(here, [place])))
        costs.append([new - old for new, old in zip(there, spent, strict=True)])
    needed = [least - old for least, old in zip(problem.targets, spent, strict=True)]
    bounds: list[Bound] = [([1] * len(rises), most)]
    bounds += [([int(i == each) for i, _ in rises], 1) for each in range(len(ladders))]
    for part in PARTS:
        gone = [_gone(ladders[i][rung], part) - _gone(ladders[i][here[i]], part) for i, rung in rises]
        bounds.append((gone, _stay(problem, part) - 1 - _gone(_plan(ladders, here), part)))
    # What seems to cost nothing is no reason to take more than is needed.
    largest = [max(1, *(abs(cost[b]) for cost in costs)) for b in range(len(needed))]
    least = MOVE_PENALTY * max(map(abs, rises.values()))
    prices = [
        rise + least * sum(c / n for c, n in zip(cost, largest, strict=True))
        for rise, cost in zip(rises.values(), costs, strict=True)
    ]
    places = list(rises)
    for chosen in cheapest_selections("joint", prices, costs, needed, bounds):
        there = _moved(here, [places[i] for i in chosen])
        if problem.is_met(_plan(ladders, there)):
            return there
    return None


def _gone(plan: Plan, part: str) -> int:
    """How many sites of a part are removed."""
    return sum(site.part == part for site in plan.removed)


def _stay(problem: Problem, part: str) -> int:
    """How many sites of a part there are."""
    return sum(size.site.part == part for size in problem.anatomy.sites)
