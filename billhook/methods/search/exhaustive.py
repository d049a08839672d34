"""Enumeration of all plans, for small models."""

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
    """Return an upper bound of how many plans meet the budgets without a redundant removal.

    None of them contains another, so that they are at most the subsets of one size (LYM inequality): a size between
    the fewest removals that may be enough and the most that are needed.
    """
    costs = [problem.cost(g) for g in problem.groups() if not set(g) & problem.protected]
    fewest, most = 0, 0
    for number, target in enumerate(problem.targets):
        counted = sorted(cost[number] for cost in costs if cost[number])
        fewest = max(fewest, _count_needed(counted[::-1], target))
        most += min(len(counted), _count_needed(counted, target))
    return max(math.comb(len(costs), k) for k in range(fewest, min(len(costs), most) + 1))


def _count_needed(costs: Sequence[int], target: Fraction) -> int:
    """Return how many of the costs, from the first on, reach the target."""
    return next((i for i, total in enumerate(accumulate(costs), 1) if total >= target), len(costs))


def _losses(problem: Problem, *, most: int = 20_000) -> int:
    """Return at most how many: all plans of one size; more than `most` are refused."""
    return min(most, most_minimal(problem))


@search(losses=_losses)
def exhaustive(problem: Problem, *, most: int = 20_000) -> Search:
    """Measure every plan that meets the budget without a redundant removal, and return the optimum.

    More than `most` plans are refused.

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
    """Yield the valid plans that extend `plan` by moves of `groups`, meet the budgets and have no redundant removal."""
    if problem.is_met(plan):
        if not any(problem.is_met(Plan(plan.removed - set(move))) for move in problem.removed_moves(plan)):
            yield plan
        return
    for i, group in enumerate(groups):
        after = plan.without(*group)
        rest = frozenset(site for later in groups[i + 1 :] for site in later)
        if problem.is_valid(after) and problem.is_met(Plan(after.removed | rest)):
            yield from _minimal(problem, groups[i + 1 :], after)
