"""Rank once, remove in order."""

from __future__ import annotations

from billhook.core.plan import MeasureRequest, Plan
from billhook.core.problem import Problem
from billhook.methods.search import Search, cost_per_unit, move_scores, restricted, search, single_moves, singles_asked


def _losses(problem: Problem, *, weigh: bool = True, parts: str = "mix") -> int:
    """Every move alone, or none where a metric scores them."""
    return singles_asked(restricted(problem, parts))


@search(losses=_losses)
def oneshot(problem: Problem, *, weigh: bool = True, parts: str = "mix") -> Search:
    """Rank all sites by a metric, or by the loss of removing each alone, then remove in that order.

    Blind to how removals act together. Where sites differ in what they are
    worth in the budget's unit (parameters), the rank is the score per unit, unless `weigh=False`. `parts`: mix, mha or
    mlp, what may go.

    Formula: the sites of the lowest score, or L(s) - L(nothing), divided by what s is worth, until the budget is met.
    Cost: n losses for n sites, or none besides the metric's.

    Source: Kim et al. 2024, Shortened LLaMA (arXiv 2402.02834), one-shot removal of blocks by perplexity; Men et al.
    2024, ShortGPT (arXiv 2403.03853), by block influence; Siddiqui et al. 2024, A deeper look at depth pruning of LLMs
    (arXiv 2407.16286), the same for sublayers. Deviation: the papers do not weigh by size.
    """
    problem = restricted(problem, parts)
    moves = single_moves(problem)
    scores = move_scores(problem, moves)
    if scores is None:
        losses = yield MeasureRequest((Plan(), *(Plan().without(*move) for move in moves)))
        scores = {move: loss.mean - losses[0].mean for move, loss in zip(moves, losses[1:], strict=True)}
    prices = {
        move: cost_per_unit(score, problem.relative_cost(move)) if weigh else score for move, score in scores.items()
    }
    plan, path = Plan(), []
    while not problem.is_met(plan):
        plan = plan.without(*min(problem.moves(plan), key=lambda move: prices[move]))
        path.append(plan)
    return path
