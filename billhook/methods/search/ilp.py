"""Additive scores and an integer programme."""

from __future__ import annotations

from collections.abc import Mapping

from billhook.core.integer_program import Bound, cheapest_selections
from billhook.core.plan import PARTS, MeasureRequest, Plan
from billhook.core.problem import Move, Problem
from billhook.methods.search import (
    Search,
    drop_redundant,
    exchanges_asked,
    improve_by_swaps,
    move_scores,
    search,
    single_moves,
    singles_asked,
)


def _losses(problem: Problem, *, polish: bool = True) -> int:
    """About: every move alone, unless a metric scores them, and two rounds of exchanges."""
    return singles_asked(problem) + (exchanges_asked(problem) if polish else 0)


@search(losses=_losses)
def ilp(problem: Problem, *, polish: bool = True) -> Search:
    """Choose what goes by an integer programme over additive scores (HiGHS), then by measured exchanges.

    The scores are a metric's, or the rises of the loss by removing each site alone. The programme meets every
    budget, several at once too, at the least sum of scores, and removes nothing to spare. `polish`: exchange sites
    afterwards as the search swap does.

    Formula: min Σ x_s · score(s), subject to Σ x_s · cost_b(s) ≥ what budget b needs, one of each part kept, x binary.
    Cost: n losses, or none besides the metric's; with `polish` those of swap after its start.

    Source: Bercovich et al. 2024, Puzzle (arXiv 2411.19146), mixed-integer programming over replace-one-block scores;
    Huangfu and Hall 2018, HiGHS. Deviations: sites are kept or removed, nothing in between; the exchanges are ours.
    """
    moves = single_moves(problem)
    scores = move_scores(problem, moves)
    if scores is None:
        losses = yield MeasureRequest((Plan(), *(Plan().without(*move) for move in moves)))
        scores = {move: loss.mean - losses[0].mean for move, loss in zip(moves, losses[1:], strict=True)}
    plan = _programme(problem, scores)
    plan = drop_redundant(problem, plan, sorted(problem.removed_moves(plan), key=lambda move: -scores[move]))
    if polish:
        plan, _ = yield from improve_by_swaps(problem, plan)
    return [plan]


def _programme(problem: Problem, scores: Mapping[Move, float]) -> Plan:
    """The moves of the least total score that meet every budget and leave one of each part.

    What a removal seems to gain is no reason to remove more than is needed: where scores are below 0, whatever a plan
    frees costs as much as the best of them gains with it, which is the same for all plans that free the same.
    """
    moves = list(scores)
    worth = {move: float(problem.relative_cost(move)) for move in moves}
    gain = max(0.0, *(-score / worth[move] for move, score in scores.items()))
    prices = [score + gain * worth[move] for move, score in scores.items()]
    alive = problem.anatomy.sites_present()
    bounds: list[Bound] = []
    for part in PARTS:
        counts = [sum(site.part == part for site in move) for move in moves]
        bounds.append((counts, sum(site.part == part for site in alive) - 1))
    selections = cheapest_selections("ilp", prices, [problem.cost(move) for move in moves], problem.targets, bounds)
    plans = (Plan(frozenset(site for i in chosen for site in moves[i])) for chosen in selections)
    return next(plan for plan in plans if problem.is_met(plan))
