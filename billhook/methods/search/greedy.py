"""Greedy search: remove the cheapest site, measure again."""

from __future__ import annotations

from fractions import Fraction

from billhook.core.plan import MeasureRequest, Plan
from billhook.core.problem import Move, Problem
from billhook.core.results.measured import Loss
from billhook.methods.search import Search, cost_per_unit, count_moves, restricted, search


def _losses(
    problem: Problem, *, weigh: bool = True, parts: str = "mix", front: float = 0.0, early_barrier: int = 0,
    latter_barrier: int = 0,
) -> int:  # fmt: skip
    """Return about how many: n + (n-1) + … for as many rounds as removals, fewer while the front is kept."""
    problem = restricted(problem, parts, early_barrier, latter_barrier)
    n, r = count_moves(problem)
    uneven = weigh and len({problem.relative_cost(move) for move in problem.moves(Plan())}) > 1
    kept = n - len(_free_moves(problem, Plan(), front))
    early = int(len(problem.anatomy.sites) * front) + 1 if front else 0  # rounds in which the front is kept
    return int(uneven) + sum(max(1, n - i - (kept if i < early else 0)) for i in range(r))


@search(losses=_losses)
def greedy(
    problem: Problem, *, weigh: bool = True, parts: str = "mix", front: float = 0.0, early_barrier: int = 0,
    latter_barrier: int = 0,
) -> Search:  # fmt: skip
    """Remove the site that costs least, measure all the others again, until the budget is met.

    Where all moves free the same in the budget's unit, the cheapest is the one that leaves the lowest loss. Where they
    do not (parameters), it is the one with the smallest rise of the loss per unit that is still needed; with
    `weigh=False` the lowest loss, whatever the sizes. `front`: this share of the sites, from the first on, is kept
    until as many others are removed (FinerCut's 0.4). `early_barrier`, `latter_barrier`: first and last blocks to keep
    (SLEB's 1 and 1). `parts`: mix, mha or mlp, which sites may be removed (BlockPruner).

    Formula: argmin over sites s of (L(R ∪ s) - L(R)) / min(worth of s, what is needed), again and again.
    Cost: n + (n-1) + … losses, n(n+1)/2 - r(r+1)/2 of them when r of n sites are left; about half a forward pass each,
    most of them dropped early.

    Source: Zhang et al. 2024, FinerCut (arXiv 2405.18218); for blocks Song et al. 2024, SLEB (arXiv 2402.09025); by
    perplexity Zhong et al. 2024, BlockPruner (arXiv 2406.10594). Deviations: no protected front unless asked for; the
    loss is KL(teacher || student) by default; the search ends at the budget; sizes count where the budget counts them.
    """
    problem = restricted(problem, parts, early_barrier, latter_barrier)
    plan, path = Plan(), []
    now: Loss | None = None  # of `plan`; needed only where sizes differ
    last_worth = Fraction(0)  # of the last move: moves of the same worth are measured first
    while not problem.is_met(plan):
        by_worth: dict[Fraction, list[Plan]] = {}  # of moves of the same worth, only the best two matter
        for move in _free_moves(problem, plan, front):
            worth = problem.marginal_value(move, plan) if weigh else Fraction(1)
            by_worth.setdefault(worth, []).append(plan.without(*move))
        if len(by_worth) > 1 and now is None:
            now = (yield MeasureRequest((plan,)))[0]
        best: tuple[float, Loss, Plan] | None = None  # cost, loss, plan
        for worth in sorted(by_worth, key=lambda worth: (worth != last_worth, -worth)):
            plans = tuple(by_worth[worth])
            ceiling = None if best is None or now is None else _ceiling(now, best[0], worth)
            losses = yield MeasureRequest(plans, full_results=2, ceiling=ceiling)
            for loss, after in zip(losses, plans, strict=True):
                cost = loss.mean if now is None else cost_per_unit(loss.mean - now.mean, worth)
                if not loss.bound and (best is None or cost < best[0]):
                    best, last_worth = (cost, loss, after), worth
        assert best is not None, "a problem that can be met has a move"
        now, plan = best[1], best[2]
        path.append(plan)
    return path


def _ceiling(now: Loss, best: float, worth: Fraction) -> tuple[float, ...]:
    """Return the nats of each document at which a move of this `worth` costs as much as `best`."""
    rise = best * float(worth) if best > 0 else best / float(worth)
    return tuple(total + rise * count for total, count in zip(now.sums, now.counts, strict=True))


def _free_moves(problem: Problem, plan: Plan, front: float) -> list[Move]:
    """Return the moves, without those in the front of the model while it is protected and others remain."""
    moves, sites = problem.moves(plan), len(problem.anatomy.sites)
    if not front or len(plan.removed) > int(sites * front):
        return moves
    return [move for move in moves if move[0].block > int(sites * front / 2)] or moves
