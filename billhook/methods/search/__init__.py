"""Searches: generators that yield Asks, are sent their losses and return the path of plans to the answer.

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
from billhook.core.errors import UsageError
from billhook.core.plan import MeasureRequest, Plan, Site
from billhook.core.problem import Move, Problem
from billhook.core.registry import RegistryWithFacts
from billhook.core.results.measured import Loss

Search = Generator[MeasureRequest, list[Loss], list[Plan]]
F = TypeVar("F", bound=Callable[..., Search])
EXHAUSTIVE_LIMIT = 1024  # tokens, for what only decides where to look first
SWAP_LIMIT = 64  # exchanges a round, of the hundreds that there are in a model of 60 sites
Count = Callable[..., int]  # (problem, options of the search) -> about how many losses it asks for; at once


@dataclass(frozen=True, slots=True)
class SearchFacts:
    """What a search states of itself in its decorator.

    `losses`: about how many losses it asks for, or at most, by a closed form over the problem and options of the same
    names; it measures nothing, and asks of the problem's scores only whether there are any. A search without it has
    progress without an end. `channel_groups`: it narrows sites too, and takes metrics of channel groups.
    """

    losses: Count | None = None
    channel_groups: bool = False


SEARCHES: RegistryWithFacts[Callable[..., Search], SearchFacts] = RegistryWithFacts("search", unstated=SearchFacts())


@overload
def search(function: F, /) -> F:
    """Add a function that states nothing."""


@overload
def search(*, losses: Count | None = ..., channel_groups: bool = ...) -> Callable[[F], F]:
    """Return the decorator that adds a function with what it states."""


def search(
    function: F | None = None, /, *, losses: Count | None = None, channel_groups: bool = False
) -> F | Callable[[F], F]:
    """Add a search under its own name, with its facts: see SearchFacts."""

    def add(given: F) -> F:
        SEARCHES.add_with(SearchFacts(losses, channel_groups))(given)
        return given

    return add if function is None else add(function)


def narrows(name: str) -> bool:
    """Return whether a search narrows sites, and takes metrics of channel groups. Raises UnknownName."""
    return SEARCHES.facts(name).channel_groups


def estimate_losses(name: str, problem: Problem, **options: Any) -> int | None:
    """About how many losses a search asks for on a problem; None where it does not say.

    Raises what the search raises for options that it refuses.
    """
    count = SEARCHES.facts(name).losses
    return None if count is None else count(problem, **options)


def drive(steps: Search, measure: Callable[[MeasureRequest], list[Loss]]) -> list[Plan]:
    """Run a search: measure each Ask it yields, send the losses back, return its path."""
    try:
        ask = next(steps)
        while True:
            ask = steps.send(measure(ask))
    except StopIteration as end:
        path: list[Plan] = end.value
        return path


# -- what several searches do ---------------------------------------------------------------------------------------


def cost_per_unit(rise: float, worth: float | Fraction) -> float:
    """What a move costs per unit of the budget that it frees: the rise of the loss, divided by what it is worth.

    A removal that lowers the loss is the better, the more it frees. Lower goes first.
    """
    return rise / float(worth) if rise > 0 else rise * float(worth)


def lowest_full(plans: Sequence[Plan], losses: Sequence[Loss]) -> tuple[float, Plan]:
    """The lowest loss that is known in full, and its plan; of equal ones the first."""
    found = [(loss.mean, i) for i, loss in enumerate(losses) if not loss.bound]
    loss, i = min(found)
    return loss, plans[i]


def restricted(problem: Problem, parts: str, early: int = 0, latter: int = 0) -> Problem:
    """The problem with fewer moves: `parts` mix, mha or mlp; the first `early` and the last `latter` blocks stay.

    Raises UsageError for another word, BudgetError if the budget cannot be met so.
    """
    kept = {"mix": (), "mha": ("mlp",), "mlp": ("attention",)}.get(parts)
    if kept is None:
        raise UsageError(f"parts={parts!r} is none of mix, mha and mlp.")
    alive, blocks = problem.anatomy.sites_present(), problem.anatomy.blocks
    stay = {s for s in alive if s.part in kept or s.block < early or s.block >= blocks - latter}
    return replace(problem, protected=problem.protected | stay).check() if stay else problem


def single_moves(problem: Problem) -> list[Move]:
    """Every group that may go, alone: what rankings are made of."""
    return problem.moves(Plan())


def move_scores(problem: Problem, moves: Sequence[Move]) -> dict[Move, float] | None:
    """What a metric says of each move, a block by its own score; None where there is no metric.

    Raises UsageError if the metric scores no such things.
    """
    if problem.scores is None:
        return None
    keys: dict[Move, Site | int] = {move: move[0].block if problem.whole_blocks else move[0] for move in moves}
    if missing := [key for key in keys.values() if key not in problem.scores]:
        one, all_ = (f"block {missing[0]}", "blocks") if problem.whole_blocks else (missing[0], "sites")
        raise UsageError(
            f"The metric gives no score for {one}, and this budget removes {all_}. Take another metric, such as "
            "cosine, or the search span for a metric of runs."
        )
    return {move: problem.scores[key] for move, key in keys.items()}


def improve_by_swaps(
    problem: Problem, plan: Plan, tried: int = SWAP_LIMIT
) -> Generator[MeasureRequest, list[Loss], tuple[Plan, float]]:
    """The best single exchange (one group comes back, another goes), again and again until none helps.

    The plan that is reached, and its loss. What only comes back counts too, where the budgets stay met. Of all
    exchanges the `tried` (0: all) that look best by what each half does alone, on few tokens, are held against the plan
    as it is, and most of them are dropped early.
    """
    groups = problem.groups()
    now = (yield MeasureRequest((plan,)))[0].mean
    while True:
        outside = [g for g in groups if not set(g) & plan.removed and problem.is_valid(Plan(frozenset(g)))]
        less = {g: Plan(plan.removed - set(g)) for g in problem.removed_moves(plan)}
        more = {h: p for h in outside if problem.is_valid(p := plan.without(*h))}
        pairs: dict[Plan, tuple[Move, Move | None]] = {p: (g, None) for g, p in less.items() if problem.is_met(p)}
        for g, without in less.items():
            pairs |= {p: (g, h) for h in outside if problem.is_met(p := without.without(*h)) and problem.is_valid(p)}
        halves = (plan, *less.values(), *more.values())
        few = {
            p: loss.mean
            for p, loss in zip(halves, (yield MeasureRequest(halves, tokens=EXHAUSTIVE_LIMIT)), strict=True)
        }
        gain = {g: few[p] - few[plan] for g, p in less.items()}
        rise = {h: few[p] - few[plan] for h, p in more.items()}
        hopeful = sorted(pairs, key=lambda p: (_expected(pairs[p], gain, rise), p.key()))
        hopeful = hopeful[:tried] if tried else hopeful
        plans = (plan, *hopeful)
        hints = (-math.inf, *(_expected(pairs[p], gain, rise) for p in hopeful))
        loss, best = lowest_full(plans, (yield MeasureRequest(plans, full_results=1, expected=hints)))
        if best == plan or loss >= now:
            return plan, now
        now, plan = loss, best


def _expected(pair: tuple[Move, Move | None], gain: dict[Move, float], rise: dict[Move, float]) -> float:
    """How much an exchange is likely to add to the loss, if its halves did not act together."""
    back, gone = pair
    return gain[back] + (rise.get(gone, 0.0) if gone is not None else 0.0)


def drop_redundant(problem: Problem, plan: Plan, order: Sequence[Move]) -> Plan:
    """A plan that meets the budgets without what it need not remove: groups come back in `order` while they may."""
    for group in order:
        back = Plan(plan.removed - set(group))
        if set(group) <= plan.removed and problem.is_met(back):
            plan = back
    return plan


def ascending(values: Sequence[float]) -> list[int]:
    """Places of groups, the lowest score first."""
    return sorted(range(len(values)), key=lambda place: (values[place], place))


def kept_count(size: SiteSize, going: int, multiple: int) -> int:
    """How many groups of each expert stay, a `multiple` of channels, where `going` of all should go."""
    multiple = math.lcm(multiple // math.gcd(multiple, size.channels), size.multiple)
    each = len(size.groups) // size.experts
    count = each - going // size.experts
    return min(each, max(multiple, -(-count // multiple) * multiple))


def kept_groups(size: SiteSize, order: Sequence[int], going: int, multiple: int) -> tuple[int, ...]:
    """The groups that stay, a `multiple` of channels, as many of every expert, where `going` of all should go.

    `order`: the places of all groups; the first ones of each expert go first.
    """
    each, count = len(size.groups) // size.experts, kept_count(size, going, multiple)
    rank = {place: i for i, place in enumerate(order)}
    stay: list[int] = []
    for expert in range(size.experts):
        mine = range(expert * each, (expert + 1) * each)
        stay += sorted(mine, key=rank.__getitem__, reverse=True)[:count]
    return tuple(size.groups[place] for place in sorted(stay))


# -- how many losses, without measuring any --------------------------------------------------------------------------


def removals(problem: Problem) -> tuple[int, int]:
    """(n, r): how many moves there are, and about how many of them a plan that meets the budgets takes."""
    costs = [problem.cost(move) for move in single_moves(problem)]
    wanted = [0]
    for number, needed in enumerate(problem.targets):
        counted = [cost[number] for cost in costs if cost[number]]
        wanted.append(math.ceil(needed * len(counted) / (sum(counted) or 1)))
    return len(costs), min(len(costs), max(wanted))


def exchanges_asked(problem: Problem, tried: int = SWAP_LIMIT) -> int:
    """About how many losses `improve_by_swaps` asks for: two rounds, of which the second finds nothing better."""
    n, r = removals(problem)
    pairs = r * (n - r) + 1
    return 1 + 2 * (1 + n + (min(tried, pairs) if tried else pairs))


def singles_asked(problem: Problem) -> int:
    """How many losses a ranking of single moves takes: none where a metric scores them."""
    return 0 if problem.scores is not None else 1 + len(single_moves(problem))


from billhook.methods.search import (  # noqa: E402, F401 - they file themselves in the registry above
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
)
