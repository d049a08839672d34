"""Greedy with several plans kept."""

from __future__ import annotations

import math
from fractions import Fraction

from billhook.core.errors import UsageError
from billhook.core.plan import MeasureRequest, Plan
from billhook.core.problem import Problem
from billhook.methods.search import Search, cost_per_unit, removals, search


def _losses(problem: Problem, *, width: int = 4) -> int:
    """About: at most `width` plans of every round, each with all moves that are left to it; none is asked for twice."""
    n, r = removals(problem)
    return 1 + sum(min(min(width, math.comb(n, i)) * (n - i), math.comb(n, i + 1)) for i in range(r))


@search(losses=_losses)
def beam(problem: Problem, *, width: int = 4) -> Search:
    """Keep the `width` best plans of every round, extend each by every move, until all that are kept meet the budget.

    Plans of one round are ranked by the rise of the loss per share of the
    budget that they have freed; of those that meet it the lowest loss wins.

    Formula: of all plans of a round the `width` with the lowest (L(R) - L(nothing)) / share of the budget freed.
    Cost: about `width` times the losses of greedy.

    Source: beam search, Lowerre 1976, over the moves of FinerCut (arXiv 2405.18218); for layers ours.
    """
    if width < 1:
        raise UsageError(f"width={width} keeps no plan. Keep 1 at least; width=1 is greedy.")
    dense = (yield MeasureRequest((Plan(),)))[0].mean
    kept, parents = [Plan()], dict[Plan, Plan]()
    finished: dict[Plan, float] = {}
    while kept:
        alike: dict[Fraction, list[Plan]] = {}
        for plan in kept:
            for move in problem.moves(plan):
                after = plan.without(*move)
                if parents.setdefault(after, plan) == plan:
                    alike.setdefault(_freed(problem, after), []).append(after)
        ranked: list[tuple[float, str, Plan, float]] = []
        for freed, plans in alike.items():
            losses = yield MeasureRequest(tuple(plans), full_results=width)
            full = [(plan, loss.mean) for plan, loss in zip(plans, losses, strict=True) if not loss.bound]
            ranked += [(cost_per_unit(loss - dense, freed), plan.key(), plan, loss) for plan, loss in full]
        best = sorted(ranked, key=lambda row: row[:2])[:width]
        finished |= {plan: loss for _, _, plan, loss in best if problem.is_met(plan)}
        kept = [plan for _, _, plan, _ in best if not problem.is_met(plan)]
    plan = min(finished, key=lambda plan: (finished[plan], plan.key()))
    path = [plan]
    while parents[path[0]].removed:
        path.insert(0, parents[path[0]])
    return path


def _freed(problem: Problem, plan: Plan) -> Fraction:
    """How much of what the budgets need a plan has freed, summed over them."""
    return sum(
        (min(Fraction(s), n) / n for s, n in zip(problem.removed_cost(plan), problem.targets, strict=True)), Fraction(0)
    )
