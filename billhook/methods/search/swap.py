"""Swap search: greedy, then exchanges."""

from __future__ import annotations

from billhook.core.plan import Plan
from billhook.core.problem import Problem
from billhook.methods import search as shared
from billhook.methods.search import SEARCHES, SWAP_LIMIT, Search, search


def _losses(problem: Problem, *, start: str = "greedy", tried: int = SWAP_LIMIT) -> int:
    """Return about how many: those of `start`, and two rounds of exchanges."""
    return (shared.estimate_losses(start, problem) or 0) + shared.count_swap_losses(problem, tried)


@search(losses=_losses)
def swap(problem: Problem, *, start: str = "greedy", tried: int = SWAP_LIMIT) -> Search:
    """Begin where another search ends, then exchange single sites while an exchange lowers the loss.

    `start`: the search to begin with. `tried`: how many exchanges to measure in each round, those whose halves alone
    raise the loss least; with 0 all are measured, and no single exchange can improve the result. Exchanges restore
    pairs of sites whose removals only matter together.

    Formula: argmin over pairs (i in R, j not in R) of L(R - i + j), until that is no lower than L(R).
    Cost: those of `start`; then, for r sites removed and s kept, r + s losses on 1,024 tokens and `tried` of the r·s
    exchanges in each round, nearly all of which are dropped early.

    Source: local search by 1-exchanges, Nemhauser, Wolsey and Fisher 1978, for sets of one size; for layers ours.
    """
    path = yield from SEARCHES[start](problem)
    plan, _ = yield from shared.improve_by_swaps(problem, path[-1], tried)
    return _in_order(problem, path, plan)


def _in_order(problem: Problem, path: list[Plan], plan: Plan) -> list[Plan]:
    """Return a path to `plan`: the moves of the old path in its order, then those made by exchanges.

    Returns the plan alone where that is not a path: where a beginning of it meets the budgets already.
    """
    if plan == path[-1]:
        return path
    when = {site: step for step, reached in reversed(list(enumerate(path))) for site in reached.removed}
    order = sorted(problem.removed_moves(plan), key=lambda move: max(when.get(site, len(path)) for site in move))
    steps = [Plan()]
    while steps[-1] != plan:
        free = set(problem.moves(steps[-1])) if not problem.is_met(steps[-1]) else set()
        move = next((move for move in order if move in free and not steps[-1].removed & set(move)), None)
        if move is None:
            return [plan]
        steps.append(steps[-1].without(*move))
    return steps[1:]
