"""How much can go? The largest step of a search within the margins, chosen on some texts and proved on others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from billhook.data import TokenSet
from billhook.loading import Teacher
from billhook.margin import Margin, MarginCheck
from billhook.plan import Plan
from billhook.proof import RunContext, environment, evaluate_plans
from billhook.records import Event
from billhook.searching import choose_plan, tokens_for, validation_and_test


@dataclass(frozen=True)
class MarginTrial:
    """One step of a path on the validation items of every margin."""

    step: int
    kept: tuple[MarginCheck, ...]

    @property
    def within(self) -> bool:
        return all(kept.within for kept in self.kept)


def find_threshold(
    job: RunContext, teacher: Teacher, steps: Sequence[Mapping[str, Any]], margins: Sequence[Margin]
) -> dict[str, Any]:
    """The last of `steps` within every margin on validation items, found by bisection, and its proof on test items.

    `steps`: as a result holds them; without any the search of the recipe makes some. Assumes that what goes later costs
    more, so that the steps within the margins come first. The test items are looked at once, for the plan that was
    chosen, whatever they say.
    """
    calibration, held_out = tokens_for(job.recipe, teacher, job.watch, job)
    steps = list(steps) or [step.to_json() for step in choose_plan(job, teacher, calibration).steps]
    path = [Plan()]
    for step in steps:
        path.append(path[-1].combined_with(Plan.parse([*step["sites"], *step.get("narrowed", ())])))
    sets = {margin: validation_and_test(job.recipe, margin, teacher, held_out) for margin in margins}
    trials = {
        0: MarginTrial(0, tuple(_check_plan(job, teacher, margin, sets[margin][0], Plan()) for margin in margins))
    }
    low, high = 0, len(path)
    while high - low > 1:
        middle = (low + high) // 2
        job.watch(
            Event("threshold", len(trials), math.ceil(math.log2(len(steps))) + 1, f"{middle} of {len(path)} steps")
        )
        kept = tuple(_check_plan(job, teacher, margin, sets[margin][0], path[middle]) for margin in margins)
        trials[middle] = MarginTrial(middle, kept)
        low, high = (middle, high) if trials[middle].within else (low, middle)
    chosen = path[low]
    proved = [_check_plan(job, teacher, margin, sets[margin][1], chosen) for margin in margins] if low else []
    everything = teacher.anatomy.total("parameters")
    sizes = [1 - teacher.anatomy.total("parameters", plan) / everything for plan in path]
    return {
        "removed": chosen.names(),
        "narrowed": chosen.narrowed_names(),
        "step": low,  # how many of the steps are taken
        "steps": len(steps),
        "share": sizes[low],
        "confirmed": all(kept.within for kept in proved) if low else None,
        "margins": [str(margin) for margin in margins],
        "test": [_check_json(kept, margin) for kept, margin in zip(proved, margins, strict=False)],
        "trials": [
            {"step": n, "share": sizes[n], "within": trial.within,
             "of": [_check_json(kept, margin) for kept, margin in zip(trial.kept, margins, strict=True)]}
            for n, trial in sorted(trials.items())
        ],
        "data": {str(margin): {"validation": a.describe(), "test": b.describe()} for margin, (a, b) in sets.items()},
        "shares": sizes,
        "losses": [step["loss"] for step in steps],
        "loss": job.recipe.loss,
        "knee": knee(sizes[1:], [step["loss"] for step in steps]),
        "model": teacher.name,
        "fingerprint": teacher.fingerprint,
        "environment": asdict(environment(str(teacher.device))),
    }  # fmt: skip


def _check_plan(job: RunContext, teacher: Teacher, margin: Margin, tokens: TokenSet, plan: Plan) -> MarginCheck:
    dense, student = evaluate_plans(job, teacher, [Plan(), plan], tokens, margin.kind)
    return margin.check(dense, student, job.recipe.seed, same=not plan)


def _check_json(kept: MarginCheck, margin: Margin) -> dict[str, Any]:
    lost = kept.in_units(margin.kind)
    return {
        "margin": str(margin), "lost": lost.value, "low": lost.low, "high": lost.high, "limit": float(margin.amount),
        "within": kept.within, "n": lost.n, "reliable": lost.reliable, "note": lost.note,
    }  # fmt: skip


def knee(shares: Sequence[float], losses: Sequence[float]) -> int | None:
    """Where a curve of losses over what is gone bends most: the point farthest below the line between its ends.

    None where it does not bend upwards, or there are fewer than three points.

    Source: Satopää et al. 2011, Finding a "kneedle" in a haystack.
    """
    if len(shares) < 3 or shares[-1] <= shares[0] or losses[-1] <= losses[0]:
        return None
    wide, tall = shares[-1] - shares[0], losses[-1] - losses[0]
    below = [(x - shares[0]) / wide - (y - losses[0]) / tall for x, y in zip(shares, losses, strict=True)]
    best = max(range(len(below)), key=lambda i: below[i])
    return best if below[best] > 0 else None
