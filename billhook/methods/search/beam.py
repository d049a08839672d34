"""Beam search: greedy with several plans kept in each round."""

from __future__ import annotations

import math
from fractions import Fraction

from billhook.core.errors import UsageError
from billhook.core.plan import MeasureRequest, Plan
from billhook.core.problem import Problem
from billhook.methods.search import Search, cost_per_unit, count_moves, search


def _losses(problem: Problem, *, width: int = 4) -> int:
    """Return about how many: at most `width` plans in each round, each with all its moves; none is requested twice."""
    n, r = count_moves(problem)
    return 1 + sum(min(min(width, math.comb(n, i)) * (n - i), math.comb(n, i + 1)) for i in range(r))


@search(losses=_losses)
def beam(problem: Problem, *, width: int = 4) -> Search:
    """Keep the `width` best plans of each round, extend each by every move, until all kept plans meet the budget.

    Plans of one round are ranked by the rise of the loss per share of the budget that they free. Of the plans that
    meet the budget, the one with the lowest loss wins.

    Formula: of all plans of a round the `width` with the lowest (L(R) - L(nothing)) / share of the budget freed.
    Cost: about `width` times the losses of greedy.

    Source: beam search, Lowerre 1976, over the moves of FinerCut (arXiv 2405.18218); for layers ours.
    """
    if width < 1:
        raise UsageError(f"width={width} keeps no plan. Write 1 or more; width=1 is greedy.")
    unpruned = (yield MeasureRequest((Plan(),)))[0].mean
    kept, parents = [Plan()], dict[Plan, Plan]()
    finished: dict[Plan, float] = {}
    while kept:
        by_freed: dict[Fraction, list[Plan]] = {}
        for plan in kept:
            for move in problem.moves(plan):
                after = plan.without(*move)
                if parents.setdefault(after, plan) == plan:
                    by_freed.setdefault(_freed(problem, after), []).append(after)
        ranked: list[tuple[float, str, Plan, float]] = []
        for freed, plans in by_freed.items():
            losses = yield MeasureRequest(tuple(plans), full_results=width)
            full = [(plan, loss.mean) for plan, loss in zip(plans, losses, strict=True) if not loss.bound]
            ranked += [(cost_per_unit(loss - unpruned, freed), plan.key(), plan, loss) for plan, loss in full]
        best = sorted(ranked, key=lambda row: row[:2])[:width]
        finished |= {plan: loss for _, _, plan, loss in best if problem.is_met(plan)}
        kept = [plan for _, _, plan, _ in best if not problem.is_met(plan)]
    plan = min(finished, key=lambda plan: (finished[plan], plan.key()))
    path = [plan]
    while parents[path[0]].removed:
        path.insert(0, parents[path[0]])
    return path


def _freed(problem: Problem, plan: Plan) -> Fraction:
    """Return the share of each budget's target that a plan frees, summed over the budgets."""
    pairs = zip(problem.removed_cost(plan), problem.targets, strict=True)
    return sum((min(Fraction(cost), target) / target for cost, target in pairs), Fraction(0))
