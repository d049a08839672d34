"""Rank once, remove in order."""

from __future__ import annotations

from billhook.plan import Ask, Plan, Problem
from billhook.search import Search, price, search


@search
def oneshot(problem: Problem) -> Search:
    """Rank all sites by the loss of removing each alone, then remove in that order.

    n losses for n sites. Blind to how removals act together. Where sites differ in what they are worth in the
    budget's unit (parameters), the rank is the loss per unit. Deviation: the papers do not weigh by size.

    Source: Kim et al. 2024, Shortened LLaMA (arXiv 2402.02834), one-shot removal of blocks by perplexity; Siddiqui
    et al. 2024, A deeper look at depth pruning of LLMs (arXiv 2407.16286), the same for sublayers.
    """
    moves = problem.moves(Plan())
    losses = yield Ask((Plan(), *(Plan().without(*move) for move in moves)))
    dense = losses[0].mean
    prices = {m: price(loss.mean - dense, problem.cost(m)) for m, loss in zip(moves, losses[1:], strict=True)}
    plan, path = Plan(), []
    while not problem.met(plan):
        plan = plan.without(*min(problem.moves(plan), key=lambda move: prices[move]))
        path.append(plan)
    return path
