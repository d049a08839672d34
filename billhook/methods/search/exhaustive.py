"""All plans, for small models."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import accumulate

from billhook.core.errors import UsageError, option
from billhook.core.plan import MeasureRequest, Plan
from billhook.core.problem import Move, Problem
from billhook.methods.search import Search, lowest_full, search


def most_minimal(problem: Problem) -> int:
    """At most how many plans meet the budgets with nothing to spare: none of them holds another, so that they are no
    more than the subsets of one size, between the fewest removals that may do and the most that are needed (LYM)."""
    costs = [problem.cost(g) for g in problem.groups() if not set(g) & problem.protected]
    fewest, most = 0, 0
    for number, needed in enumerate(problem.targets):
        each = sorted(cost[number] for cost in costs if cost[number])
        fewest = max(fewest, _how_many(each[::-1], needed))
        most += min(len(each), _how_many(each, needed))
    return max(math.comb(len(costs), k) for k in range(fewest, min(len(costs), most) + 1))


def _how_many(costs: Sequence[int], needed: Fraction) -> int:
    """How many of the first costs are enough."""
    return next((i for i, spent in enumerate(accumulate(costs), 1) if spent >= needed), len(costs))


def _losses(problem: Problem, *, most: int = 20_000) -> int:
    """At most: all plans of one size; more than `most` are refused."""
    return min(most, most_minimal(problem))


@search(losses=_losses)
def exhaustive(problem: Problem, *, most: int = 20_000) -> Search:
    """Measure every plan that meets the budget and removes nothing that it need not; the optimum.

    Refused where there are more than `most`.

    Formula: argmin of L over all minimal plans that meet the budget.
    Cost: n choose k losses to remove k of n sites, most of them dropped early.

    Source: enumeration; as the yardstick of other searches, ours.
    """
    groups = [g for g in problem.groups() if not set(g) & problem.protected]
    plans: list[Plan] = []
    for plan in _minimal(problem, groups, Plan()):
        plans.append(plan)
        if len(plans) > most:
            raise UsageError(
                f"The search exhaustive would measure more than {most:,} plans. Protect more, remove less, raise it "
                f"with {option('set', {'most': 10 * most})}, or take the search swap."
            )
    return [lowest_full(plans, (yield MeasureRequest(tuple(plans), full_results=2)))[1]]


def _minimal(problem: Problem, groups: list[Move], plan: Plan) -> Iterator[Plan]:
    """The legal plans that extend `plan` by some of `groups`, meet the budgets, and do so with nothing to spare."""
    if problem.is_met(plan):
        gone = [g for g in problem.groups() if set(g) <= plan.removed]
        if not any(problem.is_met(Plan(plan.removed - set(g))) for g in gone):
            yield plan
        return
    for i, group in enumerate(groups):
        after = plan.without(*group)
        rest = frozenset(site for later in groups[i + 1 :] for site in later)
        if problem.is_valid(after) and problem.is_met(Plan(after.removed | rest)):
            yield from _minimal(problem, groups[i + 1 :], after)
