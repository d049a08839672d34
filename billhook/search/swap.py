"""Greedy, then exchanges."""

from __future__ import annotations

from billhook.plan import Plan
from billhook.problem import Problem
from billhook.search import SEARCHES, Search, exchanges, search


@search
def swap(problem: Problem, *, start: str = "greedy") -> Search:
    """Begin as another search ends, then exchange single sites as long as one exchange lowers the loss.

    `start`: the search to begin with. Nothing is left that one exchange would improve; what is lost with two removals
    that only matter together comes back.

    Formula: argmin over pairs (i in R, j not in R) of L(R - i + j), until that is no lower than L(R).
    Cost: those of `start`; then, for r sites removed and s left, r + s losses on 1,024 tokens and r·s exchanges a
    round, nearly all of which are dropped early.

    Source: local search by 1-exchanges, Nemhauser, Wolsey and Fisher 1978, for sets of one size; for layers ours.
    """
    path = yield from SEARCHES[start](problem)
    plan, _ = yield from exchanges(problem, path[-1])
    return _in_order(path, plan)


def _in_order(path: list[Plan], plan: Plan) -> list[Plan]:
    """A path to `plan`: what the old path removed and the plan does too, in that order, then what came in exchange."""
    told, before = [Plan()], Plan()
    for after in path:
        told.append(told[-1].without(*((after.removed - before.removed) & plan.removed)))
        before = after
    return [p for p, earlier in zip([*told[1:], plan], told, strict=True) if p != earlier]
