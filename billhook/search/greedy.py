"""Remove the best, measure again."""

from __future__ import annotations

from billhook.plan import Ask, Plan, Problem
from billhook.search import Search, price, search


@search
def greedy(problem: Problem) -> Search:
    """Remove the site that costs least, re-measure all that are left, until the budget is met.

    n + (n-1) + … losses, n(n+1)/2 - r(r+1)/2 of them when r of n sites are left. Where all moves are worth the same in
    the budget's unit, the cheapest is the one that leaves the lowest loss; where they are not (parameters), the one
    with the smallest rise of the loss per unit that is still needed.

    Source: Zhang et al. 2024, FinerCut (arXiv 2405.18218). Deviations: no protected front unless asked for; the loss
    is KL(teacher || student) by default; the search ends at the budget; sizes count where the budget counts them.
    """
    plan, path = Plan(), []
    now: float | None = None  # the loss of `plan`; needed only where sizes differ
    while not problem.met(plan):
        moves = problem.moves(plan)
        plans = tuple(plan.without(*move) for move in moves)
        worth = [min(problem.cost(move), problem.missing(plan)) for move in moves]
        if len(set(worth)) == 1:
            losses = yield Ask(plans, best=2)
            best = min((loss.mean, i) for i, loss in enumerate(losses) if not loss.bound)[1]
        else:
            if now is None:
                now = (yield Ask((plan,)))[0].mean
            losses = yield Ask(plans)
            best = min((price(loss.mean - now, worth[i]), i) for i, loss in enumerate(losses))[1]
        plan, now = plans[best], losses[best].mean
        path.append(plan)
    return path
