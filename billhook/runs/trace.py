"""How a search went: its steps with their gaps, a summary, and the regret of racing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from billhook.core.plan import MeasureRequest, Plan, Site
from billhook.core.results.measured import Loss, Step, paired_gap
from billhook.engine.probe import Probe


def search_summary(probe: Probe) -> dict[str, Any]:
    """What a report says of the search so far: mode, how its candidates were decided, how the work was arranged."""
    tally = sum(probe.tally, Counter())
    decided = {kind: tally[kind] for kind in ("full", "bound", "raced", "skipped")}
    mode = "exact" if probe.fast is None else "fast"
    return {"mode": mode, "decided": decided, "layout": str(probe.layout), "audit": None,
            "site_evaluations": round(probe.site_evaluations, 1)}  # fmt: skip


def with_words(summary: dict[str, Any]) -> dict[str, Any]:
    """The same with a sentence `summary`, empty where there was nothing to decide."""
    return summary | {"told": _in_words(summary) if sum(summary["decided"].values()) else ""}


def _in_words(summary: dict[str, Any]) -> str:
    decided = summary["decided"]
    words = {
        "full": "measured in full",
        "bound": "dropped as soon as they were certain to lose",
        "raced": "dropped as significantly worse",
        "skipped": "not measured, by the ranking of the rounds before",
    }
    parts = [f"{decided[kind]:,} {text}" for kind, text in words.items() if decided[kind]]
    sentence = f"{summary['mode'].capitalize()} search, {sum(decided.values()):,} candidates: {', '.join(parts)}. "
    sentence += f"Measured {summary['layout']}."
    if summary["audit"] is not None:
        missed = [row for row in summary["audit"] if row["regret"] > 0]
        worst = max((row["regret"] for row in summary["audit"]), default=0.0)
        sentence += f" Audit: {len(missed)} of {len(summary['audit'])} rounds missed the best candidate"
        sentence += f", by at most {worst:.3g} per token." if missed else "."
    return sentence


def measure_regret(
    rounds: Iterable[tuple[MeasureRequest, list[Loss]]], measure: Callable[[MeasureRequest], list[Loss]]
) -> list[dict[str, Any]]:
    """Every round of a search again, exactly: what it chose, what was best, and the regret per token.

    `regret`: loss of the chosen candidate minus that of the best one, with its standard error over documents.
    """
    told = []
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
        told.append({"chosen": chosen.to_list(), "best": best.to_list(), "regret": regret, "regret_se": error})
    return told


def _lowest(plans: tuple[Plan, ...], losses: list[Loss]) -> Plan:
    return min((loss.mean, i, plan) for i, (plan, loss) in enumerate(zip(plans, losses, strict=True))
               if not loss.bound)[2]  # fmt: skip


Cost = Callable[[frozenset[Site]], object]
Round = tuple[tuple[Plan, ...], list[Loss]]  # the plans of one Ask and their losses


def removal_trace(path: list[Plan], rounds: list[Round], on_path: list[Loss], cost: Cost = len) -> list[Step]:
    """The path of a search as removals, each with its loss and the gap to the plan that came second.

    Rivals are worth the same (`cost`): a gap between a small and a large site says nothing about noise. The rivals of
    a step are the plans measured in the same round that extend the same predecessor; where a ranking of
    single removals decided (one-shot), they are the single removals that were still to come.
    """
    told: list[Step] = []
    previous = Plan()
    for plan, loss in zip(path, on_path, strict=True):
        gap, error = _gap(previous, plan, rounds, cost)
        went = tuple(sorted(plan.removed - previous.removed)), tuple(sorted(plan.narrowed - previous.narrowed))
        told.append(Step(went[0], loss.mean, gap, error, went[1]))
        previous = plan
    return told


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
