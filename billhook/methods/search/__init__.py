"""Searches: generators that yield MeasureRequests, are sent their losses and return the path of plans to the answer.

A search sees a Problem and losses: no model, no file, no clock, no torch. The returned path starts with the first
removal and ends with the plan that meets the budgets; a search without an order returns its answer alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, TypeVar, overload

from billhook.core.anatomy import SiteSize
from billhook.core.errors import UsageError, option
from billhook.core.plan import MeasureRequest, Plan, Site
from billhook.core.problem import Move, Problem
from billhook.core.registry import RegistryWithFacts
from billhook.core.results.measured import Loss

Search = Generator[MeasureRequest, list[Loss], list[Plan]]
F = TypeVar("F", bound=Callable[..., Search])
SCREENING_TOKENS = 1024  # for losses that only rank candidates
SWAP_LIMIT = 64  # exchanges measured in each round, of the hundreds that a model of 60 sites has
Count = Callable[..., int]  # (problem, options of the search) -> about how many losses it requests; measures nothing


@dataclass(frozen=True, slots=True)
class SearchFacts:
    """Facts that a search states in its decorator.

    - `losses`: about how many losses it requests, or at most; a closed form over the problem and the search's options.
      It may only read whether the problem has scores. Without it, progress has no end.
    - `channel_groups`: the search narrows sites too, and takes metrics of channel groups.
    - `whole_sites`: one of channel groups that chooses whole sites to remove too.
    """

    losses: Count | None = None
    channel_groups: bool = False
    whole_sites: bool = False


SEARCHES: RegistryWithFacts[Callable[..., Search], SearchFacts] = RegistryWithFacts("search", unstated=SearchFacts())


@overload
def search(function: F, /) -> F:
    """Add a search without facts."""


@overload
def search(*, losses: Count | None = ..., channel_groups: bool = ..., whole_sites: bool = ...) -> Callable[[F], F]:
    """Return the decorator that adds a search with these facts."""


def search(
    function: F | None = None,
    /,
    *,
    losses: Count | None = None,
    channel_groups: bool = False,
    whole_sites: bool = False,
) -> F | Callable[[F], F]:
    """Add a search under its own name, with its facts: see SearchFacts."""

    def add(given: F) -> F:
        SEARCHES.add_with(SearchFacts(losses, channel_groups, whole_sites))(given)
        return given

    return add if function is None else add(function)


def narrows(name: str) -> bool:
    """Return whether a search narrows sites, and takes metrics of channel groups. Raises UnknownName."""
    return SEARCHES.facts(name).channel_groups


def estimate_losses(name: str, problem: Problem, **options: Any) -> int | None:
    """Return about how many losses a search requests on a problem; None where it does not state it.

    Raises what the search raises for options that it refuses.
    """
    count = SEARCHES.facts(name).losses
    return None if count is None else count(problem, **options)


def drive(steps: Search, measure: Callable[[MeasureRequest], list[Loss]]) -> list[Plan]:
    """Run a search: measure each request, send the losses back, return its path."""
    try:
        request = next(steps)
        while True:
            request = steps.send(measure(request))
    except StopIteration as end:
        path: list[Plan] = end.value
        return path


# -- steps that searches share --------------------------------------------------------------------------------------


def cost_per_unit(rise: float, worth: float | Fraction) -> float:
    """Return the rise of the loss per unit of the budget that a move frees (`worth`); lower is removed first.

    Of removals that lower the loss, one that frees more is better: their rise is multiplied.
    """
    return rise / float(worth) if rise > 0 else rise * float(worth)


def lowest_full(plans: Sequence[Plan], losses: Sequence[Loss]) -> tuple[float, Plan]:
    """Return the lowest loss that is known in full, and its plan; of equal ones the first."""
    loss, i = min((loss.mean, i) for i, loss in enumerate(losses) if not loss.bound)
    return loss, plans[i]


def restricted(problem: Problem, parts: str, early: int = 0, latter: int = 0) -> Problem:
    """Return the problem with fewer moves: those of `parts` (mix, mha or mlp), outside the end blocks.

    `early`, `latter`: how many first and last blocks are kept. Raises UsageError for another word, BudgetError if
    the budget cannot be met so.
    """
    kept = {"mix": (), "mha": ("mlp",), "mlp": ("attention",)}.get(parts)
    if kept is None:
        raise UsageError(f"parts={parts!r} is not known. Write mix, mha or mlp.")
    alive, blocks = problem.anatomy.sites_present(), problem.anatomy.blocks
    protected = {s for s in alive if s.part in kept or s.block < early or s.block >= blocks - latter}
    return replace(problem, protected=problem.protected | protected).check() if protected else problem


def single_moves(problem: Problem) -> list[Move]:
    """Return the moves from the unpruned model, which rankings order."""
    return problem.moves(Plan())


def move_scores(problem: Problem, moves: Sequence[Move]) -> dict[Move, float] | None:
    """Return the metric's score of each move, a block by its own score; None without a metric.

    Raises UsageError if the metric does not score such moves.
    """
    if problem.scores is None:
        return None
    keys: dict[Move, Site | int] = {move: move[0].block if problem.whole_blocks else move[0] for move in moves}
    if missing := [key for key in keys.values() if key not in problem.scores]:
        one, kind = (f"block {missing[0]}", "blocks") if problem.whole_blocks else (missing[0], "sites")
        raise UsageError(
            f"The metric gives no score for {one}, and this budget removes {kind}. Take another metric, such as "
            f"{option('metric', 'cosine')}, or {option('search', 'contiguous')} for a metric of runs."
        )
    return {move: problem.scores[key] for move, key in keys.items()}


def improve_by_swaps(
    problem: Problem, plan: Plan, limit: int = SWAP_LIMIT
) -> Generator[MeasureRequest, list[Loss], tuple[Plan, float]]:
    """Make the best single exchange (restore one move, make another), until none lowers the loss.

    Returns the plan and its loss. Restoring alone counts too, where the budgets stay met. Each half is measured alone
    on few tokens; the `limit` exchanges (0: all) with the lowest sums are measured in full, most of them dropped early.
    """
    groups = problem.groups()
    now = (yield MeasureRequest((plan,), phase="exchanges"))[0].mean
    while True:
        outside = [g for g in groups if not set(g) & plan.removed and problem.is_valid(Plan(frozenset(g)))]
        less = {g: Plan(plan.removed - set(g)) for g in problem.removed_moves(plan)}
        more = {h: p for h in outside if problem.is_valid(p := plan.without(*h))}
        pairs: dict[Plan, tuple[Move, Move | None]] = {p: (g, None) for g, p in less.items() if problem.is_met(p)}
        for g, without in less.items():
            pairs |= {p: (g, h) for h in outside if problem.is_met(p := without.without(*h)) and problem.is_valid(p)}
        halves = (plan, *less.values(), *more.values())
        losses = yield MeasureRequest(halves, tokens=SCREENING_TOKENS, phase="exchanges")
        few = {p: loss.mean for p, loss in zip(halves, losses, strict=True)}
        gain = {g: few[p] - few[plan] for g, p in less.items()}
        rise = {h: few[p] - few[plan] for h, p in more.items()}
        promising = sorted(pairs, key=lambda p: (_expected(pairs[p], gain, rise), p.key()))[: limit or None]
        plans = (plan, *promising)
        expected = (-math.inf, *(_expected(pairs[p], gain, rise) for p in promising))
        request = MeasureRequest(plans, full_results=1, expected=expected, phase="exchanges")
        loss, best = lowest_full(plans, (yield request))
        if best == plan or loss >= now:
            return plan, now
        now, plan = loss, best


def _expected(pair: tuple[Move, Move | None], gain: dict[Move, float], rise: dict[Move, float]) -> float:
    """Return what an exchange would add to the loss if its halves did not interact."""
    restored, removed = pair
    return gain[restored] + (rise.get(removed, 0.0) if removed is not None else 0.0)


def drop_redundant(problem: Problem, plan: Plan, order: Sequence[Move]) -> Plan:
    """Return a plan without the removals that the budgets do not need: moves are restored in `order` while possible."""
    for move in order:
        restored = Plan(plan.removed - set(move))
        if set(move) <= plan.removed and problem.is_met(restored):
            plan = restored
    return plan


def ascending(values: Sequence[float]) -> list[int]:
    """Return the places of groups, the lowest score first."""
    return sorted(range(len(values)), key=lambda place: (values[place], place))


def kept_count(size: SiteSize, removed: int, multiple: int) -> int:
    """Return how many groups are kept, a `multiple` of channels of each expert, if `removed` of all should be.

    Where a site may be left in some numbers of groups alone, the next larger one. Where whole experts are removed, all
    groups of as many as are left, and at least `fewest`.
    """
    if size.by_expert:
        experts = -(-(len(size.groups) - removed) // size.per_expert)
        return min(size.experts, max(size.fewest, experts)) * size.per_expert
    multiple = math.lcm(multiple // math.gcd(multiple, size.channels), size.multiple)
    groups = size.per_expert
    count = groups - removed // size.experts
    kept = min(groups, max(multiple, -(-count // multiple) * multiple))
    kept = next((allowed for allowed in size.counts if allowed >= kept), groups) if size.counts else kept
    return kept * size.experts


def kept_groups(size: SiteSize, order: Sequence[int], removed: int, multiple: int) -> tuple[int, ...]:
    """Return the groups to keep, a `multiple` of channels and as many in every expert, if `removed` should be.

    `order`: the places of all groups; the first ones of each expert are removed first. Where whole experts are removed,
    the first ones of all: they are ordered expert by expert.
    """
    kept_in_all = kept_count(size, removed, multiple)
    if size.by_expert:
        return tuple(size.groups[place] for place in sorted(order[len(order) - kept_in_all :]))
    per_expert, count = size.per_expert, kept_in_all // size.experts
    rank = {place: i for i, place in enumerate(order)}
    kept: list[int] = []
    for start in range(0, size.experts * per_expert, per_expert):
        kept += sorted(range(start, start + per_expert), key=rank.__getitem__, reverse=True)[:count]
    return tuple(size.groups[place] for place in sorted(kept))


def by_experts(problem: Problem) -> Problem:
    """Return the problem in which mixtures lose whole experts: all groups of one have the mean of their scores.

    Raises UsageError for a model without experts that can be removed.
    """
    sizes = tuple(replace(s, by_expert=s.expert is not None and bool(s.groups)) for s in problem.anatomy.sites)
    mixtures = {size.site: size for size in sizes if size.by_expert}
    if not mixtures:
        raise UsageError(
            f"This model has no experts that can be removed. Leave {option('set', {'experts': True})} out, "
            f"and take a metric of channel groups, such as {option('metric', 'flap')}."
        )
    scores = problem.group_scores
    if scores is not None:
        means = {
            site: [mean for mean in _means(values, mixtures[site].experts) for _ in range(mixtures[site].per_expert)]
            for site, values in scores.items()
            if site in mixtures
        }
        scores = {**scores, **means}
    return replace(problem, anatomy=replace(problem.anatomy, sites=sizes), group_scores=scores)


def _means(values: Sequence[float], parts: int) -> list[float]:
    """Return the means of as many equal parts."""
    each = len(values) // parts
    return [math.fsum(values[part * each : (part + 1) * each]) / each for part in range(parts)]


# -- how many losses, without measuring any --------------------------------------------------------------------------


def count_moves(problem: Problem) -> tuple[int, int]:
    """Return (n, r): how many moves there are, and about how many of them a plan needs to meet the budgets."""
    costs = [problem.cost(move) for move in single_moves(problem)]
    needed = [0]
    for number, target in enumerate(problem.targets):
        counted = [cost[number] for cost in costs if cost[number]]
        needed.append(math.ceil(target * len(counted) / (sum(counted) or 1)))
    return len(costs), min(len(costs), max(needed))


def count_swap_losses(problem: Problem, limit: int = SWAP_LIMIT) -> int:
    """Return about how many losses `improve_by_swaps` requests: two rounds, of which the second improves nothing."""
    n, r = count_moves(problem)
    pairs = r * (n - r) + 1
    return 1 + 2 * (1 + n + (min(limit, pairs) if limit else pairs))


def count_single_losses(problem: Problem) -> int:
    """Return how many losses a ranking of single moves requests: none where a metric scores them."""
    return 0 if problem.scores is not None else 1 + len(single_moves(problem))


def single_scores(problem: Problem) -> Generator[MeasureRequest, list[Loss], dict[Move, float]]:
    """Return a score for each single move: the metric's, or else the rise of the loss by that move alone."""
    moves = single_moves(problem)
    scores = move_scores(problem, moves)
    if scores is not None:
        return scores
    unpruned, *losses = yield MeasureRequest((Plan(), *(Plan().without(*move) for move in moves)))
    return {move: loss.mean - unpruned.mean for move, loss in zip(moves, losses, strict=True)}


from billhook.methods.search import (  # noqa: E402, F401 - they register themselves above
    beam,
    contiguous,
    evolve,
    exhaustive,
    greedy,
    ilp,
    joint,
    oneshot,
    rank_channels,
    swap,
    two_stage,
)
