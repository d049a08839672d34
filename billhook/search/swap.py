"""Greedy, then exchanges."""

from __future__ import annotations

from billhook.problem import Problem
from billhook.search import SEARCHES, Search, exchanges, search


@search
def swap(problem: Problem, *, start: str = "greedy") -> Search:
    """Begin as another search ends, then exchange single sites as long as one exchange lowers the loss.

    After the search `start`: of r sites removed and s left, r·s exchanges a round, most of them dropped early, and
    r + s losses in full. Nothing is left that one exchange would improve; what is lost with two removals that only
    matter together comes back.

    Source: local search by 1-exchanges, Nemhauser, Wolsey and Fisher 1978, for sets of one size; for layers ours.
    """
    path = yield from SEARCHES[start](problem)
    plan, _ = yield from exchanges(problem, path[-1])
    return path if plan == path[-1] else [plan]
