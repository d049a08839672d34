"""Choice of the pieces to measure for a batch of plans. Pure: generators that request pieces and are sent their sums.

A piece is one plan on one document group, in one of three qualities: `full`, the loss; `bound`, a lower bound of it
that needs less of the head; `sample`, an estimate from a part of the positions. A generator returns how each plan was
decided.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal

from billhook.core.statistics import student_quantile

Quality = Literal["full", "bound", "sample"]
Decision = Literal["full", "bound", "raced", "skipped"]
Piece = tuple[int, int]  # plan, document group
Sums = tuple[float, ...]  # nats of each document of the group
Nats = dict[int, float]  # nats of one plan by group
Selection = Generator["PieceRequest", dict[Piece, Sums], list[Decision]]
LEADERS = 4  # leaders of a race that are never dropped: few documents do not separate plans that are nearly as good
RELATIVE, ABSOLUTE = 1e-5, 1e-6  # rounding in float32 by which a bound may exceed a loss; the second in nats per token
ROUGH = 0.05  # the same where bounds are computed in bfloat16 (measured: 0.01 of a loss, 0.05 of a document's)


@dataclass(frozen=True, slots=True)
class PieceRequest:
    """Pieces to measure next, all at once."""

    quality: Quality
    pieces: list[Piece]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """By how much a bound may exceed a loss: a share of the loss, and nats per token besides."""

    relative: float = RELATIVE
    absolute: float = ABSOLUTE


def tolerance_of(epsilon: float, sites: int) -> Tolerance:
    """Return the rounding of losses whose streams are in a dtype; the head's sums are in float32 whatever that is.

    A stream is rounded after each site, by at most half of `epsilon`, the dtype's gap between 1 and the next number.
    So many independent errors are the root of their number times as large as one. A loss moves by that share of it;
    near zero, where divergences are quadratic in their logits, by its square.
    """
    drift = epsilon / 2 * math.sqrt(sites)
    return Tolerance(max(RELATIVE, drift), max(ABSOLUTE, drift**2))


@dataclass(frozen=True, slots=True)
class SelectionTask:
    """Task of a selection.

    - `plans`, `best`: the number of plans, and how many of them must be known in full.
    - `order`: document groups, the most informative first; `tokens`: of each group by number.
    - `wave`: the least tokens to request at a time.
    - `together`: few large requests are better: each has a cost of its own, such as a pass over a file, or workers
      share the plans.
    - `positive`: losses are never negative.
    - `ceiling`: nats of each document by group; a plan with a larger total is not needed.
    - `abreast`: how many groups in a row of `order` are measured at the same time, each by other workers.
    - `rounding`: share of a loss by which a bound may exceed it, where bounds are computed in fewer bits. A race, whose
      risk is larger, does without.
    - `tolerance`: by which losses of the same piece differ.
    """

    plans: int
    best: int
    order: tuple[int, ...]
    tokens: tuple[int, ...]
    wave: int
    together: bool = False
    positive: bool = True
    ceiling: dict[int, Sums] | None = None
    abreast: int = 1
    rounding: float = 0.0
    tolerance: Tolerance = Tolerance()


def measure_all(task: SelectionTask) -> Selection:
    """Measure all plans in full."""
    yield PieceRequest("full", [(plan, group) for group in task.order for plan in range(task.plans)])
    return ["full"] * task.plans


def measure_best(task: SelectionTask, bounds: bool) -> Selection:
    """Measure the `best` lowest plans in full, and the others until it is proved that they are not among them.

    Losses are never negative, so that a sum over a part of the groups, or over lower bounds, is a lower bound of the
    total: a plan beyond the best-th lowest total is excluded. `bounds`: whether pieces of that quality exist.
    """
    quality: Quality = "bound" if bounds else "full"
    least = 1 / (1 + task.rounding) if bounds else 1.0  # of what is measured a loss is at least so much
    known: list[Nats] = [{} for _ in range(task.plans)]
    full: dict[int, Nats] = {}
    alive = list(range(task.plans))
    left, seen = list(task.order), []
    while left and alive:
        groups = _next_wave(left, len(alive), task)
        sums = yield PieceRequest(quality, [(p, g) for g in groups for p in alive])
        for plan in alive:
            known[plan] |= {g: least * math.fsum(sums[plan, g]) for g in groups}
        seen += groups
        # The most promising plans are finished at once: the others are compared with their totals.
        ranked = sorted(alive, key=lambda p: (_total(known[p]), p))
        rivals = sorted(math.fsum(nats[g] for g in seen) for nats in full.values())
        most = min(rivals[task.best - 1] if len(rivals) >= task.best else math.inf, _ceiling(task, seen))
        yield from _finish([p for p in ranked[: task.best] if _total(known[p]) < least * most], task, full, known)
        limit = _limit(full, task)
        alive = [p for p in ranked if p not in full and _total(known[p]) <= limit]
    yield from _finish(alive, task, full, known)
    return ["full" if plan in full else "bound" for plan in range(task.plans)]


def _total(nats: Nats) -> float:
    return math.fsum(nats.values())


def _finish(
    plans: list[int], task: SelectionTask, full: dict[int, Nats], bounds: Sequence[Nats]
) -> Generator[PieceRequest, dict[Piece, Sums], None]:
    """Measure plans in full, in order, into `full`; only those that by their bounds may still be among the best.

    They are measured all at once, or one by one in two halves: full sums replace bounds, so that the total rises.
    """
    if task.together:
        left = [p for p in plans if not _is_excluded(bounds[p], task, full)]
        sums = yield PieceRequest("full", [(p, g) for g in task.order for p in left])
        full |= {p: {g: math.fsum(sums[p, g]) for g in task.order} for p in left}
        return
    cut = len(task.order) // 2
    for plan in plans:
        nats = dict(bounds[plan])
        for groups in (task.order[:cut], task.order[cut:]):
            if _is_excluded(nats, task, full):
                break
            sums = yield PieceRequest("full", [(plan, g) for g in groups])
            nats |= {g: math.fsum(sums[plan, g]) for g in groups}
        else:
            full[plan] = nats


def _is_excluded(nats: Nats, task: SelectionTask, full: dict[int, Nats]) -> bool:
    """Return whether the known sums prove that a plan is not among the best."""
    return task.positive and _total(nats) > _limit(full, task)


def _limit(full: dict[int, Nats], task: SelectionTask) -> float:
    """Return the total above which a plan is excluded: the best-th lowest one, and a margin for rounding."""
    lowest = sorted(map(_total, full.values()))
    limit = lowest[task.best - 1] if len(lowest) >= task.best else math.inf
    most = min(limit, _ceiling(task, task.order))
    return most * (1 + task.tolerance.relative) + task.tolerance.absolute * sum(task.tokens)


def _ceiling(task: SelectionTask, groups: Sequence[int]) -> float:
    """Return the nats that the ceiling allows over these groups."""
    return math.inf if task.ceiling is None else math.fsum(math.fsum(task.ceiling[g]) for g in groups)


def _next_wave(left: list[int], alive: int, task: SelectionTask) -> list[int]:
    """Pop groups from `left`: as many as give `task.wave` tokens at once, of `abreast` each time."""
    groups: list[int] = []
    while left and (not groups or alive * sum(task.tokens[g] for g in groups) < task.wave):
        groups += left[: task.abreast]
        del left[: task.abreast]
    return groups


def race(task: SelectionTask, shortlist: Sequence[int], risk: float, bounds: bool) -> Selection:
    """Measure the likely best of a shortlist in full, and drop the others as soon as they are significantly worse.

    After 2, 3, 4, 6, 9 … groups, or the next multiple of `abreast`, each plan is compared with the leader, document
    by document. It is dropped if the mean difference exceeds the (1 - risk) quantile of Student's t, times its standard
    error. `risk`: the probability of dropping, at one comparison, a plan that is as good as the leader; the four
    leaders are not dropped. A plan above the ceiling is dropped at a tenth of the risk. `bounds`: whether cheap pieces
    are lower bounds, and not samples.

    Source: racing of Maron and Moore 1994 (Hoeffding races), here with paired differences.
    """
    cheap: Quality = "bound" if bounds else "sample"
    decisions: list[Decision] = ["skipped"] * task.plans
    alive = list(shortlist)
    seen: dict[int, list[float]] = {plan: [] for plan in alive}
    known: list[Nats] = [{} for _ in range(task.plans)]
    taken = 0
    while taken < len(task.order):
        end = max(2, taken + max(1, taken // 2))
        groups = task.order[taken : -(-end // task.abreast) * task.abreast]
        taken += len(groups)
        sums = yield PieceRequest(cheap, [(p, g) for g in groups for p in alive])
        for plan in alive:
            seen[plan] += [x for g in groups for x in sums[plan, g]]
            known[plan] |= {g: math.fsum(sums[plan, g]) for g in groups}
        ranked = sorted(alive, key=lambda p: (math.fsum(seen[p]), p))
        leader = seen[ranked[0]]
        for plan in ranked[max(task.best, LEADERS) :]:
            if _worse([a - b for a, b in zip(seen[plan], leader, strict=True)], risk):
                decisions[plan] = "raced"
        if task.ceiling is not None:
            most = [x for g in task.order[:taken] for x in task.ceiling[g]]
            for plan in ranked:
                if _worse([a - b for a, b in zip(seen[plan], most, strict=True)], risk / 10):
                    decisions[plan] = "raced"
        alive = [p for p in ranked if decisions[p] != "raced"]
        if len(alive) <= task.best:
            break
    full: dict[int, Nats] = {}
    yield from _finish(alive, task, full, known if bounds else [{} for _ in known])
    for plan in alive:
        decisions[plan] = "full" if plan in full else "bound"
    return decisions


def _worse(differences: list[float], risk: float) -> bool:
    """Return whether the mean of paired differences is significantly above 0."""
    n = len(differences)
    if n < 2:
        return False
    error = statistics.stdev(differences) / math.sqrt(n)
    return statistics.fmean(differences) > student_quantile(1 - risk, n - 1) * error
