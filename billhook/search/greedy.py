"""Remove the best, measure again."""

from __future__ import annotations

from billhook.plan import Ask, Plan, Problem
from billhook.search import Search, search


@search
def greedy(problem: Problem) -> Search:
    """Remove the site whose removal leaves the lowest loss, re-measure all that are left, until the budget is met.

    n + (n-1) + … losses, n(n+1)/2 - r(r+1)/2 of them when r of n sites are left.

    Source: Zhang et al. 2024, FinerCut (arXiv 2405.18218). Deviations: no protected front unless asked for; the loss
    is KL(teacher || student) by default; the search ends at the budget.
    """
    plan, path = Plan(), []
    while not problem.met(plan):
        plans = tuple(plan.without(*move) for move in problem.moves(plan))
        losses = yield Ask(plans, best=2)
        full = [(loss.mean, i) for i, loss in enumerate(losses) if not loss.bound]
        plan = plans[min(full)[1]]
        path.append(plan)
    return path
