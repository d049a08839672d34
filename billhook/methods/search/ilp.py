"""Integer programming over additive scores, or over scores of single moves and of pairs."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from itertools import combinations

from billhook.core.errors import UsageError, option
from billhook.core.integer_program import Bound, cheapest_selections
from billhook.core.plan import PARTS, MeasureRequest, Plan
from billhook.core.problem import Move, Problem
from billhook.core.results.measured import Loss
from billhook.methods import search as shared
from billhook.methods.search import Search, search

Pairs = dict[tuple[Move, Move], float]  # what two moves lose together beyond what each loses alone
MOST_INTERACTIONS = 40  # moves, 780 pairs: more can take the programme hours


def _losses(problem: Problem, *, polish: bool = True, interactions: int = 0) -> int:
    """Return about how many: every move alone, unless a metric scores them, the pairs, and two rounds of exchanges."""
    _check(problem, interactions)
    pairs = math.comb(min(interactions, len(shared.single_moves(problem))), 2)
    return shared.count_single_losses(problem) + pairs + (shared.count_swap_losses(problem) if polish else 0)


@search(losses=_losses)
def ilp(problem: Problem, *, polish: bool = True, interactions: int = 0) -> Search:
    """Choose what to remove by an integer programme over additive scores (HiGHS), then by measured exchanges.

    The scores are a metric's, or the rises of the loss by removing each site alone. The programme meets every
    budget, several at once too, at the least sum of scores and without redundant removals. `polish`: exchange sites
    afterwards as the search swap does. `interactions` k: measure every pair of the k moves of the lowest score per
    unit of the budget, and minimise the quadratic sum; k at most 40. Where fewer moves than all are paired, a move
    outside is charged the mean pair with each other removal.

    Formula: min Σ x_s · score(s) + Σ x_s x_t · J(s, t), subject to Σ x_s · cost_b(s) ≥ what budget b needs, one of
    each part kept, x binary; J(s, t) = L(without both) - L(without s) - L(without t) + L(unpruned)
    Cost: n losses, or none besides the metric's, and k(k-1)/2; with `polish` those of swap after its start.

    Source: Bercovich et al. 2024, Puzzle (arXiv 2411.19146), mixed-integer programming over replace-one-block scores;
    Jansen et al. 2026, block removal through constrained binary optimization (arXiv 2602.00161), for `interactions`;
    Huangfu and Hall 2018, HiGHS. Deviations: sites are kept or removed, nothing in between; the exchanges are ours;
    pairs are measured, where the paper takes its energies from one forward and backward pass; the programme is solved
    exactly, where it takes an Ising solver.
    """
    _check(problem, interactions)
    scores, pairs = yield from _scores(problem, interactions)
    plan = _cheapest(problem, scores, pairs)
    plan = shared.drop_redundant(problem, plan, sorted(problem.removed_moves(plan), key=lambda move: -scores[move]))
    if polish:
        plan, _ = yield from shared.improve_by_swaps(problem, plan)
    return [plan]


def _check(problem: Problem, interactions: int) -> None:
    """Raise UsageError for a number of interactions that ilp does not take, or a metric beside them."""
    if not 0 <= interactions <= MOST_INTERACTIONS or interactions == 1:
        raise UsageError(
            f"ilp takes interactions=0 or 2 to {MOST_INTERACTIONS} moves, not {interactions}. "
            f"Type {option('set', {'interactions': MOST_INTERACTIONS})}."
        )
    if interactions and problem.scores is not None:
        raise UsageError(
            f"Interactions are rises of the loss, which do not add to the scores of a metric. Leave {option('metric')} "
            f"out, or take {option('set', {'interactions': 0})}."
        )


def _scores(
    problem: Problem, interactions: int
) -> Generator[MeasureRequest, list[Loss], tuple[Mapping[Move, float], Pairs]]:
    """Return the scores of single moves, and of the pairs of as many of them."""
    if not interactions:
        return (yield from shared.single_scores(problem)), {}
    moves = shared.single_moves(problem)
    unpruned, *losses = yield MeasureRequest((Plan(), *(Plan().without(*move) for move in moves)))
    scores = {move: loss.mean - unpruned.mean for move, loss in zip(moves, losses, strict=True)}
    order = sorted(moves, key=lambda move: shared.cost_per_unit(scores[move], problem.relative_cost(move)))
    both = {(a, b): Plan().without(*a, *b) for a, b in combinations(sorted(order[:interactions]), 2)}
    both = {pair: plan for pair, plan in both.items() if problem.is_valid(plan)}
    if not both:
        return scores, {}
    together = yield MeasureRequest(tuple(both.values()), phase="pairs")
    found = {
        (a, b): loss.mean - unpruned.mean - scores[a] - scores[b]
        for (a, b), loss in zip(both, together, strict=True)
    }  # fmt: skip
    typical = math.fsum(found.values()) / len(found) * (shared.count_moves(problem)[1] - 1)
    return scores | {move: scores[move] + typical for move in order[interactions:]}, found


def _cheapest(problem: Problem, scores: Mapping[Move, float], pairs: Pairs) -> Plan:
    """Return the plan of the least total score that meets every budget and keeps one site of each part.

    A score below 0 must not make a plan remove more than the budgets need. So every move also pays for the budget that
    it frees, at the rate of the best gain, alone and in pairs; plans that free the same amount pay the same.
    """
    moves = list(scores)
    place = {move: i for i, move in enumerate(moves)}
    worth = {move: float(problem.relative_cost(move)) for move in moves}
    lowest = dict(scores)
    for (a, b), value in pairs.items():
        lowest[a] += min(0.0, value)
        lowest[b] += min(0.0, value)
    gain = max(0.0, *(-score / worth[move] for move, score in lowest.items()))
    prices = [score + gain * worth[move] for move, score in scores.items()]
    present = problem.anatomy.sites_present()
    bounds: list[Bound] = []
    for part in PARTS:
        counts = [sum(site.part == part for site in move) for move in moves]
        bounds.append((counts, sum(site.part == part for site in present) - 1))
    products = {(place[a], place[b]): value for (a, b), value in pairs.items()}
    selections = cheapest_selections(prices, [problem.cost(m) for m in moves], problem.targets, bounds, products)
    plans = (Plan(frozenset(site for i in chosen for site in moves[i])) for chosen in selections)
    return next(plan for plan in plans if problem.is_met(plan))
