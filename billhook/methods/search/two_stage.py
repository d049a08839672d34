"""Width, then depth: neurons by a metric, then whole attentions by measured losses."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from billhook.core.errors import BudgetError, UsageError, option
from billhook.core.plan import KeptGroups, MeasureRequest, Plan, Site
from billhook.core.problem import Problem
from billhook.methods.search import Search, ascending, kept_groups, lowest_full, search

STEPS = 2**16  # shares of the width that are told apart


def _losses(problem: Problem, *, alpha: float = 1.5, tokens: int = 2048, multiple: int = 1) -> int:
    """Return how many: one for each attention that is left, in each round. Raises what the search raises."""
    scores = {size.site: range(len(size.groups)) for size in problem.anatomy.sites}
    rounds, _ = _stages(_checked(problem, alpha, tokens, multiple), scores, alpha, multiple)
    left = len(_attentions(problem))
    return sum(left - done for done in range(rounds))


@search(losses=_losses, channel_groups=True, whole_sites=True)
def two_stage(problem: Problem, *, alpha: float = 1.5, tokens: int = 2048, multiple: int = 1) -> Search:
    """Narrow all mlps by the same share, then remove the attentions that cost least, one by one.

    How many attentions are removed follows from the budget: few at a small one. The mlps lose what the attentions leave
    of it, each its groups of the lowest score; then every attention is tried on the narrower model, the one with the
    lowest loss is removed, and all the others are tried again. `alpha`: larger removes more attentions; `tokens`: of
    the calibration, for the attentions' losses; `multiple`: as for `rank_channels`.

    Formula: round(n · s^(P_mlp / (alpha · P_attention))) of n attentions; s the share of the budget among all sites, P
    what the mlps and the attentions are worth in its unit
    Cost: n + (n - 1) + … losses on `tokens`, one for each attention that is left in each round; the metric's.

    Source: Sandri et al. 2025, 2SSP (arXiv 2501.17771). Deviations: where mlps alone cannot give the rest, one more
    attention is removed; s counts what attentions and MLPs hold, in any unit.
    """
    problem = _checked(problem, alpha, tokens, multiple)
    assert problem.group_scores is not None
    rounds, plan = _stages(problem, problem.group_scores, alpha, multiple)
    path = [plan] if plan.narrowed else []
    for _ in range(rounds):
        plans = tuple(plan.without(site) for site in _attentions(problem) if site not in plan.removed)
        plan = lowest_full(plans, (yield MeasureRequest(plans, full_results=1, tokens=tokens)))[1]
        path.append(plan)
    return path


def _checked(problem: Problem, alpha: float, tokens: int, multiple: int) -> Problem:
    """Return the problem. Raises UsageError for unusable options, BudgetError for a budget that is not divisible."""
    if problem.group_scores is None:
        raise UsageError(
            f"The search two_stage ranks neurons. Name a metric of groups: {option('metric', 'activation')}."
        )
    if not alpha > 0 or tokens < 1 or multiple < 1:
        raise UsageError(f"alpha={alpha:g}, tokens={tokens}, multiple={multiple}: each must be above 0.")
    parts = {size.site.part for size in problem.anatomy.sites if any(problem.cost((size.site,)))}
    divisible = len(problem.budgets) == 1 and not problem.whole_blocks
    if not divisible or len(parts) < 2 or not _attentions(problem):
        raise BudgetError(
            "The search two_stage divides one budget between mlps and attentions. Count in params, bytes or flops, and "
            "leave some attention unprotected."
        )
    return problem


def _attentions(problem: Problem) -> list[Site]:
    """Return the attentions that are not protected."""
    return [s.site for s in problem.anatomy.sites if s.site.part == "attention" and s.site not in problem.protected]


def _stages(problem: Problem, scores: Mapping[Site, Sequence[float]], alpha: float, multiple: int) -> tuple[int, Plan]:
    """Return how many attentions are removed, and the plan of narrower mlps that suffices with any so many."""
    worth = {size.site: problem.cost((size.site,))[0] for size in problem.anatomy.sites}
    mlps = sum(cost for site, cost in worth.items() if site.part == "mlp")
    attentions = sum(worth.values()) - mlps
    free = sorted(_attentions(problem), key=lambda site: (worth[site], site))
    most = len(free) - (len(free) == sum(site.part == "attention" for site in worth))
    share = min(1.0, float(problem.targets[0] / (mlps + attentions)))
    wanted = round(sum(site.part == "attention" for site in worth) * share ** (mlps / (alpha * attentions)))
    ranked = {site: ascending(values) for site, values in scores.items() if site.part == "mlp"}

    def narrower(step: int) -> Plan:
        narrowed = set()
        for size in problem.anatomy.sites:
            if size.site in ranked and size.groups and size.site not in problem.protected:
                kept = kept_groups(size, ranked[size.site], len(size.groups) * step // STEPS, multiple)
                narrowed |= {KeptGroups(size.site, kept)} if len(kept) < len(size.groups) else set()
        return Plan(frozenset(), frozenset(narrowed))

    for rounds in range(min(wanted, most), most + 1):
        steps = range(STEPS + 1)
        cheapest = free[:rounds]
        step = bisect_left(steps, True, key=lambda at: problem.is_met(narrower(at).without(*cheapest)))
        if step < len(steps):
            return rounds, narrower(step)
    raise BudgetError(
        f"{problem.budgets[0]} cannot be met by narrower mlps and fewer attentions, of which one and all protected "
        "sites are kept. Ask for less, or protect less."
    )
