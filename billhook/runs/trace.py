"""How a search went: its steps with their gaps, a summary, the regret of racing, and what might have been chosen."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

from billhook.core.plan import MeasureRequest, Plan, Site
from billhook.core.problem import Problem
from billhook.core.results.measured import Loss, Step, loss_se, paired_gap
from billhook.core.results.run import AuditedRound, Decided, SearchSummary, SiteLoss
from billhook.engine.probe import Probe
from billhook.methods.search.ladders import part_at

Rounds = Sequence[tuple[MeasureRequest, list[Loss]]]  # what a search asked, and was told


def search_summary(probe: Probe) -> SearchSummary:
    """How the search went so far: mode, how its candidates were decided, how the work was arranged."""
    tally = sum(probe.tally, Counter())
    decided = Decided(tally["full"], tally["bound"], tally["raced"], tally["skipped"])
    mode: Literal["exact", "fast"] = "exact" if probe.fast is None else "fast"
    return SearchSummary(mode, decided, probe.layout, round(probe.site_evaluations, 1))


def measure_regret(rounds: Rounds, measure: Callable[[MeasureRequest], list[Loss]]) -> list[AuditedRound]:
    """Every round of a search again, exactly: what it chose, what was best, and the regret per token.

    `regret`: loss of the chosen candidate minus that of the best one, with its standard error over documents.
    """
    audited = []
    for ask, losses in rounds:
        if ask.full_results is None or len(ask.plans) <= ask.full_results or all(loss.bound for loss in losses):
            continue
        chosen = _lowest(ask.plans, losses)
        again = measure(MeasureRequest(ask.plans, full_results=ask.full_results, tokens=ask.tokens))
        best = _lowest(ask.plans, again)
        known = dict(zip(ask.plans, losses, strict=True)) | {
            plan: loss for plan, loss in zip(ask.plans, again, strict=True) if not loss.bound
        }
        regret, error = paired_gap(known[chosen], known[best])
        audited.append(AuditedRound(chosen, best, regret, error))
    return audited


def _lowest(plans: tuple[Plan, ...], losses: list[Loss]) -> Plan:
    return min((loss.mean, i, plan) for i, (plan, loss) in enumerate(zip(plans, losses, strict=True))
               if not loss.bound)[2]  # fmt: skip


def losses_alone(rounds: Rounds, *, bounds: bool = False) -> tuple[SiteLoss, ...]:
    """What removing each site alone costs, of the sites that a search measured so; on the most tokens that it took.

    `bounds`: a loss that was not measured in full is a lower bound, and is taken where there is no other.
    """
    found: dict[Site, SiteLoss] = {}
    for ask, losses in rounds:
        for plan, loss in zip(ask.plans, losses, strict=True):
            if len(plan.removed) != 1 or plan.narrowed or not loss.sums or (loss.bound and not bounds):
                continue
            (site,) = plan.removed
            new = SiteLoss(site, loss.mean, None if loss.bound else loss_se(loss), sum(loss.counts), loss.bound)
            if new.loss > 0 and (site not in found or _rank(new) > _rank(found[site])):
                found[site] = new
    return tuple(found[site] for site in sorted(found))


def _rank(alone: SiteLoss) -> tuple[bool, int, float]:
    """The larger, the more is known: a loss before bounds, more tokens, and of bounds the higher."""
    return not alone.at_least, alone.tokens, alone.loss if alone.at_least else 0.0


Cost = Callable[[frozenset[Site]], object]
Round = tuple[tuple[Plan, ...], list[Loss]]  # the plans of one Ask and their losses


def removal_trace(path: list[Plan], rounds: list[Round], on_path: list[Loss], cost: Cost = len) -> list[Step]:
    """The path of a search as removals, each with its loss and the gap to the plan that came second.

    Rivals are worth the same (`cost`): a gap between a small and a large site says nothing about noise. The rivals of
    a step are the plans measured in the same round that extend the same predecessor; where a ranking of
    single removals decided (one-shot), they are the single removals that were still to come.
    """
    steps: list[Step] = []
    previous = Plan()
    for plan, loss in zip(path, on_path, strict=True):
        gap, error = _gap(previous, plan, rounds, cost)
        removed, narrowed = sorted(plan.removed - previous.removed), sorted(plan.narrowed - previous.narrowed)
        steps.append(Step(tuple(removed), loss.mean, gap, error, tuple(narrowed), loss_se(loss)))
        previous = plan
    return steps


def _gap(previous: Plan, plan: Plan, rounds: list[Round], cost: Cost) -> tuple[float | None, float | None]:
    move = plan.removed - previous.removed
    for start in (previous, Plan()):
        chosen = start.without(*move)
        for plans, losses in reversed(rounds):
            full = {p: loss for p, loss in zip(plans, losses, strict=True) if not loss.bound}
            rivals = [
                loss
                for p, loss in full.items()
                if p.removed > start.removed
                and not (p.removed - start.removed) & plan.removed
                and cost(p.removed - start.removed) == cost(move)
            ]
            if chosen in full:
                return paired_gap(min(rivals, key=lambda loss: loss.mean), full[chosen]) if rivals else (None, None)
    return None, None


# -- what might have been chosen ------------------------------------------------------------------------------------


def exchanges(problem: Problem, plan: Plan, rounds: Rounds) -> dict[Plan, tuple[Site, Site]]:
    """The best exchange of each choice of a plan: {the plan after it: (the site that is whole again, the other one)}.

    A choice is what a plan takes of one site, and the other one loses more in its place. Of what a search measured
    at one site alone, that is taken which promises the least rise and meets the budgets.
    """
    rises = _rises_alone(rounds)
    sites = [size.site for size in problem.anatomy.sites if size.site not in problem.protected]
    taken = {site: part_at(plan, site) for site in sites}
    more = sorted(
        (rise - before, site, part)
        for part, rise in rises.items()
        for site in _sites_of(part)
        if (before := 0.0 if not taken.get(site) else rises.get(taken[site])) is not None and part != taken.get(site)
    )
    found: dict[Plan, tuple[Site, Site]] = {}
    for site in (site for site in sites if taken[site]):
        without = _with_part(plan, site, Plan())
        for there, other in ((_with_part(without, other, part), other) for _, other, part in more if other != site):
            if problem.is_met(there) and problem.is_valid(there):
                found[there] = site, other
                break
    return found


def _sites_of(plan: Plan) -> frozenset[Site]:
    return plan.removed | {narrow.site for narrow in plan.narrowed}


def _with_part(plan: Plan, site: Site, part: Plan) -> Plan:
    """The plan with another part at a site."""
    old = part_at(plan, site)
    return Plan((plan.removed - old.removed) | part.removed, (plan.narrowed - old.narrowed) | part.narrowed)


def _rises_alone(rounds: Rounds) -> dict[Plan, float]:
    """How much the loss rises under plans of one site, over what was measured of them; on the most tokens."""
    found: dict[Plan, tuple[int, float]] = {}
    for ask, losses in rounds:
        whole = next((_mean_known(loss) for plan, loss in zip(ask.plans, losses, strict=True) if not plan), 0.0)
        for plan, loss in zip(ask.plans, losses, strict=True):
            tokens = sum(count for count, total in zip(loss.counts, loss.sums, strict=True) if total)
            if len(_sites_of(plan)) == 1 and tokens > found.get(plan, (0, 0.0))[0]:
                found[plan] = tokens, _mean_known(loss) - whole
    return {plan: rise for plan, (_, rise) in found.items()}


def _mean_known(loss: Loss) -> float:
    """The mean over the documents that were measured before a plan was dropped."""
    known = [(total, count) for total, count in zip(loss.sums, loss.counts, strict=True) if total]
    return math.fsum(total for total, _ in known) / max(1, sum(count for _, count in known))
