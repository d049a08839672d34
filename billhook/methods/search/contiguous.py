"""One run of blocks."""

from __future__ import annotations

from billhook.core.errors import BudgetError, UsageError, option
from billhook.core.plan import MeasureRequest, Plan
from billhook.core.problem import Problem
from billhook.methods.search import Search, lowest_full, search


def _losses(problem: Problem, *, run: str = "best", keep_last: int = 0) -> int:
    """Return one loss for each start of a run; none where a metric scores runs, or with `run=last`."""
    runs = _runs(problem, run, keep_last)
    return 0 if run == "last" or problem.scores is not None else len(runs)


@search(losses=_losses)
def contiguous(problem: Problem, *, run: str = "best", keep_last: int = 0) -> Search:
    """Remove one contiguous run of whole blocks: the best by a metric of runs, or by the loss.

    `run=last`: the last blocks, except `keep_last` of them; hard to beat once the model is trained again. Of a block,
    only the sites that a budget counts are removed: the attention for a budget in kv.

    Formula: argmin over starts l of the score of the run, or of L, for the shortest run from l that meets the budget.
    Cost: none besides the metric's (angular_span: one pass); without a metric a loss for every start.

    Source: Gromov et al. 2024, The unreasonable ineffectiveness of the deeper layers (arXiv 2403.17887); the last
    blocks: Lu et al. 2024, Reassessing layer pruning in LLMs (arXiv 2411.15558).
    """
    runs = _runs(problem, run, keep_last)
    if run == "last":
        return [runs[max(runs, key=lambda ends: (ends[1], ends[0]))]]
    scores = problem.scores or {}
    if all(ends in scores for ends in runs):
        return [runs[min(runs, key=lambda ends: (scores[ends], ends))]]
    if scores:
        raise UsageError(
            f"The search contiguous needs a metric of runs, or none. Type {option('metric', 'angular_span')}."
        )
    plans = tuple(runs.values())
    return [lowest_full(plans, (yield MeasureRequest(plans, full_results=2)))[1]]


def _runs(problem: Problem, run: str, keep_last: int) -> dict[tuple[int, int], Plan]:
    """Return the shortest run of blocks from each start that meets the budget. Raises BudgetError without any."""
    if run not in ("best", "last"):
        raise UsageError(f"run={run!r} is neither best nor last. Write one of them.")
    if problem.uncounted and problem.scores is not None and run != "last":
        raise UsageError(
            f"The metric scores runs of whole blocks, of which {', '.join(map(str, problem.budgets))} does not count "
            f"{min(problem.uncounted)}. Count in blocks or params, or leave {option('metric')} out."
        )
    alive = problem.anatomy.sites_present()
    blocks = sorted({site.block for site in alive})
    counted = [site for site in alive if site not in problem.uncounted]
    runs: dict[tuple[int, int], Plan] = {}
    for start in range(len(blocks)):
        for end in range(start, len(blocks) - keep_last):
            plan = Plan(frozenset(site for site in counted if site.block in blocks[start : end + 1]))
            if problem.is_met(plan):
                if problem.is_valid(plan):
                    runs[blocks[start], blocks[end]] = plan
                break
    if not runs:
        raise BudgetError(
            "No single run of blocks meets the budget and keeps the protected sites. Try the search greedy."
        )
    return runs
