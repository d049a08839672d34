"""Greedy, then exchanges."""

from __future__ import annotations

from billhook.core.plan import Plan
from billhook.core.problem import Problem
from billhook.methods.search import (
    SEARCHES,
    SWAP_LIMIT,
    Search,
    estimate_losses,
    exchanges_asked,
    improve_by_swaps,
    search,
)


def _losses(problem: Problem, *, start: str = "greedy", tried: int = SWAP_LIMIT) -> int:
    """About: those of `start`, and two rounds of exchanges."""
    return (estimate_losses(start, problem) or 0) + exchanges_asked(problem, tried)


@search(losses=_losses)
def swap(problem: Problem, *, start: str = "greedy", tried: int = SWAP_LIMIT) -> Search:
    """Begin as another search ends, then exchange single sites as long as one exchange lowers the loss.

    `start`: the search to begin with. `tried`: how many exchanges a round are measured, those that look best by what
    each half does alone; with 0 all are, and nothing is left that one exchange would improve. What is lost with two
    removals that only matter together comes back.

    Formula: argmin over pairs (i in R, j not in R) of L(R - i + j), until that is no lower than L(R).
    Cost: those of `start`; then, for r sites removed and s left, r + s losses on 1,024 tokens and `tried` of the r·s
    exchanges a round, nearly all of which are dropped early.

    Source: local search by 1-exchanges, Nemhauser, Wolsey and Fisher 1978, for sets of one size; for layers ours.
    """
    path = yield from SEARCHES[start](problem)
    plan, _ = yield from improve_by_swaps(problem, path[-1], tried)
    return _in_order(problem, path, plan)


def _in_order(problem: Problem, path: list[Plan], plan: Plan) -> list[Plan]:
    """A path to `plan`, move by move: what the old path removed too, in its order, then what came in exchange.

    The plan alone, where that is no path: where a beginning of it meets the budgets already.
    """
    if plan == path[-1]:
        return path
    when = {site: step for step, reached in reversed(list(enumerate(path))) for site in reached.removed}
    order = sorted(problem.removed_moves(plan), key=lambda move: max(when.get(site, len(path)) for site in move))
    told = [Plan()]
    while told[-1] != plan:
        free = set(problem.moves(told[-1])) if not problem.is_met(told[-1]) else set()
        move = next((move for move in order if move in free and not told[-1].removed & set(move)), None)
        if move is None:
            return [plan]
        told.append(told[-1].without(*move))
    return told[1:]
