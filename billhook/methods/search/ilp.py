"""Integer programming over additive scores."""

from __future__ import annotations

from collections.abc import Mapping

from billhook.core.integer_program import Bound, cheapest_selections
from billhook.core.plan import PARTS, Plan
from billhook.core.problem import Move, Problem
from billhook.methods import search as shared
from billhook.methods.search import Search, search


def _losses(problem: Problem, *, polish: bool = True) -> int:
    """Return about how many: every move alone, unless a metric scores them, and two rounds of exchanges."""
    return shared.count_single_losses(problem) + (shared.count_swap_losses(problem) if polish else 0)


@search(losses=_losses)
def ilp(problem: Problem, *, polish: bool = True) -> Search:
    """Choose what to remove by an integer programme over additive scores (HiGHS), then by measured exchanges.

    The scores are a metric's, or the rises of the loss by removing each site alone. The programme meets every
    budget, several at once too, at the least sum of scores and without redundant removals. `polish`: exchange sites
    afterwards as the search swap does.

    Formula: min Σ x_s · score(s), subject to Σ x_s · cost_b(s) ≥ what budget b needs, one of each part kept, x binary.
    Cost: n losses, or none besides the metric's; with `polish` those of swap after its start.

    Source: Bercovich et al. 2024, Puzzle (arXiv 2411.19146), mixed-integer programming over replace-one-block scores;
    Huangfu and Hall 2018, HiGHS. Deviations: sites are kept or removed, nothing in between; the exchanges are ours.
    """
    scores = yield from shared.single_scores(problem)
    plan = _cheapest(problem, scores)
    plan = shared.drop_redundant(problem, plan, sorted(problem.removed_moves(plan), key=lambda move: -scores[move]))
    if polish:
        plan, _ = yield from shared.improve_by_swaps(problem, plan)
    return [plan]


def _cheapest(problem: Problem, scores: Mapping[Move, float]) -> Plan:
    """Return the plan of the least total score that meets every budget and keeps one site of each part.

    A score below 0 must not make a plan remove more than the budgets need. So every move also pays for the budget that
    it frees, at the rate of the best gain; plans that free the same amount pay the same.
    """
    moves = list(scores)
    worth = {move: float(problem.relative_cost(move)) for move in moves}
    gain = max(0.0, *(-score / worth[move] for move, score in scores.items()))
    prices = [score + gain * worth[move] for move, score in scores.items()]
    present = problem.anatomy.sites_present()
    bounds: list[Bound] = []
    for part in PARTS:
        counts = [sum(site.part == part for site in move) for move in moves]
        bounds.append((counts, sum(site.part == part for site in present) - 1))
    selections = cheapest_selections(prices, [problem.cost(move) for move in moves], problem.targets, bounds)
    plans = (Plan(frozenset(site for i in chosen for site in moves[i])) for chosen in selections)
    return next(plan for plan in plans if problem.is_met(plan))
