"""The path of a finished pruning, stop by stop, with what the store measured at each: losses, held-out text, sizes."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

from billhook.core.anatomy import ModelSizes
from billhook.core.plan import Plan, Site
from billhook.core.results.measured import Estimate, EvalResult, Score, Step
from billhook.core.results.run import RunResult, SiteLoss
from billhook.core.statistics import exp_capped, mean_interval, paired_difference


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Perplexity of a plan on the held-out text of the run, student over teacher. `repaired`: after a recovery."""

    ratio: Estimate
    repaired: bool


@dataclass(frozen=True, slots=True)
class Stop:
    """The plan after so many `steps`, its sizes, and its loss on calibration tokens.

    `loss`: None before the first step of a loss that is not 0 there; `interval`: None where the store holds no loss
    per document. `shares`: of the teacher's parameters, bytes …, that are gone.
    """

    steps: int
    plan: Plan
    step: Step | None
    sizes: ModelSizes
    shares: Mapping[str, float]
    loss: float | None
    interval: Estimate | None
    held_out: tuple[HeldOut, ...]


@dataclass(frozen=True, slots=True)
class NextRemoval:
    """One more site: how much the loss rises with it, paired by document, and what it saves.

    `after`: how many steps of the path had been taken when that was measured; `alone`: from the unpruned model.
    """

    site: Site
    change: Estimate
    parameters: int
    ns_per_token: int
    after: int

    @property
    def price(self) -> float:
        """Nats per parameter."""
        return self.change.value / self.parameters


class Measured:
    """What a store holds of the plans of one finished pruning: losses on its calibration tokens, and held-out text."""

    def __init__(self, db: sqlite3.Connection, result: RunResult) -> None:
        self._db, self.result = db, result
        self._key = (result.model.fingerprint, result.data.calibration.hash, result.loss)
        found = db.execute(
            "SELECT DISTINCT dtype FROM losses WHERE model = ? AND tokens = ? AND loss = ?", self._key
        ).fetchall()
        own = [dtype for (dtype,) in found if str(dtype).startswith(result.model.compute_dtype)]
        self._dtype = own[0] if own else ""

    def loss(self, plan: Plan) -> EvalResult | None:
        """The loss of a plan by document; None where it was not measured in full."""
        row = self._db.execute(
            "SELECT sums, counts FROM losses WHERE model = ? AND tokens = ? AND loss = ? AND dtype = ? "
            "AND treatment = '' AND plan = ?",
            (*self._key, self._dtype, plan.key()),
        ).fetchone()
        if row is None:
            return None
        sums, counts = json.loads(row["sums"]), json.loads(row["counts"])
        return EvalResult(self._key[2], self._key[1], tuple(sums), tuple(counts), tuple(range(len(sums))))

    def held_out(self, plan: Plan) -> tuple[HeldOut, ...]:
        """Perplexity of a plan on held-out text, in pairs with the teacher's."""
        tokens = self.result.data.evaluation.hash
        before = self.evaluations(self.result.already_removed, tokens) or self.evaluations(Plan(), tokens)
        teacher = next((found for dtype, found in before.items() if "repaired" not in dtype), None)
        if teacher is None or not plan:
            return ()
        return tuple(
            HeldOut(paired_difference(teacher, found).mapped(exp_capped), ", repaired " in dtype)
            for dtype, found in self.evaluations(plan, tokens).items()
            if found.counts == teacher.counts
        )

    def evaluations(self, plan: Plan, tokens: str) -> dict[str, EvalResult]:
        """Perplexity of a plan on the tokens of a hash, by compute dtype and repair."""
        rows = self._db.execute(
            "SELECT dtype, sums, counts, clusters FROM evaluations WHERE model = ? AND plan = ? "
            "AND name = 'perplexity' AND tokens = ? ORDER BY dtype",
            (self._key[0], plan.key(), tokens),
        ).fetchall()
        return {
            str(dtype): EvalResult("perplexity", tokens, *(tuple(json.loads(text)) for text in lists))
            for dtype, *lists in rows
        }


def stops_of(measured: Measured) -> list[Stop]:
    """The unpruned model, and the plan after every step; the last one is that of the run."""
    result = measured.result
    plans = list(accumulate(result.steps, _after, initial=Plan()))
    if plans[-1] != result.plan:  # exchanges came after the last step, or a plan was given
        plans.append(result.plan)
    steps: list[Step | None] = [None, *result.steps, None]
    return [_stop(measured, number, plan, steps[number]) for number, plan in enumerate(plans)]


def _after(plan: Plan, step: Step) -> Plan:
    return plan.combined_with(Plan(frozenset(step.sites), frozenset(step.narrowed)))


def _stop(measured: Measured, number: int, plan: Plan, step: Step | None) -> Stop:
    anatomy = measured.result.anatomy
    whole, sizes, found = anatomy.sizes(), anatomy.sizes(plan), measured.loss(plan)
    names = ("parameters", "bytes", "kv_bytes_per_token", "flops_per_token", "ns_per_token")
    shares = {name: 1 - getattr(sizes, name) / getattr(whole, name) for name in names if getattr(whole, name)}
    loss = step.loss if step else found.mean if found else None
    return Stop(
        *(number, plan, step, sizes, shares, loss, mean_interval(found) if found else None, measured.held_out(plan)),
    )


def enriched(db: sqlite3.Connection, measured: Measured) -> RunResult:
    """The result with what else the store knows of its sites: the loss without each alone, and their times."""
    result = measured.result
    times = {} if any(size.ns_per_token for size in result.anatomy.sites) else _site_times(db, result)
    sites = tuple(
        replace(size, ns_per_token=times.get(str(size.site), size.ns_per_token)) for size in result.anatomy.sites
    )
    found = {site: measured.loss(Plan(frozenset({site}))) for site in result.anatomy.sites_present()}
    tokens = result.data.calibration.tokens
    alone = tuple(
        SiteLoss(site, loss.mean, Score.of(loss.sums, loss.counts).se, tokens)
        for site, loss in found.items() if loss is not None
    )  # fmt: skip
    return replace(result, anatomy=replace(result.anatomy, sites=sites), alone=alone or result.alone)


def _site_times(db: sqlite3.Connection, result: RunResult) -> dict[str, int]:
    """Nanoseconds of a decoding step that each site takes; empty where they were not measured."""
    rows = db.execute("SELECT of, value FROM facts WHERE model = ? AND what = 'ns'", (result.model.fingerprint,))
    for asked, value in rows.fetchall():
        if str(json.loads(asked).get("dtype", "")).startswith(result.model.compute_dtype):
            return {str(site): int(ns) for site, ns in json.loads(value).items()}
    return {}


def next_removal(measured: Measured, stops: list[Stop]) -> NextRemoval | None:
    """The site that costs the fewest nats per parameter as one more removal, from the latest stop that knows any.

    None where no removal beyond the path was measured.
    """
    final = stops[-1].plan
    touched = final.removed | {narrow.site for narrow in final.narrowed}
    for stop in stops[:0:-1] if not final.narrowed else []:  # a search of widths measures no site on top
        before = measured.loss(stop.plan)
        sizes = [size for size in measured.result.anatomy.sites if size.site not in touched]
        found = [
            NextRemoval(size.site, paired_difference(before, loss), size.parameters, size.ns_per_token, stop.steps)
            for size in (sizes if before else [])
            if before and (loss := measured.loss(stop.plan.without(size.site))) is not None
            if loss.counts == before.counts
        ]
        if found:
            return min(found, key=lambda each: each.price)
    return None
