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
        alike: dict[float, list[Plan]] = {}  # of moves that are worth the same, only the best two matter
        for move in problem.moves(plan):
            worth = min(problem.cost(move), problem.missing(plan))
            alike.setdefault(worth, []).append(plan.without(*move))
        if len(alike) > 1 and now is None:
            now = (yield Ask((plan,)))[0].mean
        best: tuple[float, float, Plan] | None = None  # price, loss, plan
        for worth, plans in alike.items():
            losses = yield Ask(tuple(plans), best=2)
            loss, i = min((loss.mean, i) for i, loss in enumerate(losses) if not loss.bound)
            cost = price(loss - now, worth) if now is not None else loss
            if best is None or cost < best[0]:
                best = cost, loss, plans[i]
        assert best is not None, "a problem that can be met has a move"
        now, plan = best[1], best[2]
        path.append(plan)
    return path
