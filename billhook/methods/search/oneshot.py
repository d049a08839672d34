"""One-shot search: rank once, remove in order."""

from __future__ import annotations

from billhook.core.plan import Plan
from billhook.core.problem import Problem
from billhook.methods.search import Search, cost_per_unit, count_single_losses, restricted, search, single_scores


def _losses(problem: Problem, *, weigh: bool = True, parts: str = "mix") -> int:
    """Return one loss for each move, or none where a metric scores them."""
    return count_single_losses(restricted(problem, parts))


@search(losses=_losses)
def oneshot(problem: Problem, *, weigh: bool = True, parts: str = "mix") -> Search:
    """Rank all sites by a metric, or by the loss of removing each alone, then remove in that order.

    The ranking does not see how removals interact. Where sites free unequal amounts in the budget's unit (parameters),
    the rank is the score per unit, unless `weigh=False`. `parts`: mix, mha or mlp, which sites may be removed.

    Formula: the sites of the lowest score, or L(s) - L(nothing), divided by what s is worth, until the budget is met.
    Cost: n losses for n sites, or none besides the metric's.

    Source: Kim et al. 2024, Shortened LLaMA (arXiv 2402.02834), one-shot removal of blocks by perplexity; Men et al.
    2024, ShortGPT (arXiv 2403.03853), by block influence; Siddiqui et al. 2024, A deeper look at depth pruning of LLMs
    (arXiv 2407.16286), the same for sublayers. Deviation: the papers do not weigh by size.
    """
    problem = restricted(problem, parts)
    costs = yield from single_scores(problem)
    if weigh:
        costs = {move: cost_per_unit(score, problem.relative_cost(move)) for move, score in costs.items()}
    plan, path = Plan(), []
    while not problem.is_met(plan):
        plan = plan.without(*min(problem.moves(plan), key=costs.__getitem__))
        path.append(plan)
    return path
