"""What a budget would cost and save before anything is run, from what the store has measured of a model."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from billhook.core.outlook.loss_curve import LossForecast, LossPoint, forecast
from billhook.core.outlook.machines import Machine
from billhook.core.outlook.roofline import USABLE, Resources, Workload, resources
from billhook.core.results.run import RunResult
from billhook.dashboard.listing import Figures, Listed
from billhook.dashboard.measured import Stop

SE95 = 2 * 1.96  # standard errors between the ends of an interval
OWN = ("remove", "plan", "within", "about", "export", "target", "seed", "stock")  # what runs of one curve may differ in
UNITS = {
    "parameters": "% of the parameters", "sites": "sites", "bytes": "% of the bytes on disk",
    "kv_bytes_per_token": "% of the KV cache", "flops_per_token": "% of the FLOPs per token",
    "ns_per_token": "% of the time of a decoding step",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Curve:
    """Runs of one recipe at several sizes: `points` for a forecast, with the run of each."""

    points: tuple[LossPoint, ...]
    runs: tuple[str, ...]
    teacher: float  # perplexity


def curve_of(db: sqlite3.Connection, runs: Sequence[Listed], chosen: Listed) -> Curve:
    """The finished runs of the same teacher, held-out text and recipe as the chosen one; sizes aside."""
    assert chosen.figures is not None
    recipes = {run: _recipe(text) for run, text in db.execute("SELECT id, recipe FROM runs WHERE result IS NOT NULL")}
    own, points, names = recipes[chosen.id], [], []
    for run in runs:
        found = run.figures
        if found is None or found.perplexity is None or recipes.get(run.id) != own or not same_text(found, chosen):
            continue
        if point := point_of(found):
            points.append(point)
            names.append(run.id)
    teacher = chosen.figures.perplexity.teacher if chosen.figures.perplexity else math.nan
    return Curve(tuple(points), tuple(names), teacher)


def _recipe(text: str) -> str:
    value = json.loads(text)
    return json.dumps({name: each for name, each in value.items() if name not in OWN}, sort_keys=True)


def same_text(found: Figures, chosen: Listed) -> bool:
    """Whether a run was measured on the held-out text of the chosen one, and of the same teacher."""
    own = chosen.figures
    return own is not None and (found.fingerprint, found.held_out) == (own.fingerprint, own.held_out)


def point_of(found: Figures) -> LossPoint | None:
    """A finished run as a point of a curve; None where it lost nothing, or its perplexity is not known."""
    left, quality = found.left("parameters"), found.perplexity
    if left is None or quality is None or not 0 < quality.ratio.value < math.inf:
        return None
    ratio = quality.ratio
    wide = math.log(ratio.high / ratio.low) if ratio.low > 0 and ratio.high < math.inf else 0.0
    return LossPoint(1 - left, math.log(ratio.value), wide / SE95)


def predicted(curve: Curve, share: float) -> LossForecast | None:
    """Nats at a share of the parameters; None where nothing was measured that lost anything, or for no removal."""
    if not 0 < share < 1 or not any(point.share > 0 and point.nats > 0 for point in curve.points):
        return None
    return forecast(curve.points, share)


# -- a budget in any unit: along the path of a run, and on beyond its end ----------------------------------------------


def amounts(stops: Sequence[Stop], unit: str) -> list[float]:
    """How much of a unit is gone at every stop: sites, or percent."""
    if unit == "sites":
        return [float(len(stop.plan.removed)) for stop in stops]
    return [100 * stop.shares.get(unit, 0.0) for stop in stops]


def share_at(stops: Sequence[Stop], unit: str, amount: float) -> float | None:
    """The share of the parameters that is gone where so much of a unit is; None where the path takes none of it."""
    at = amounts(stops, unit)
    if at[-1] <= 0:
        return None
    shares = [stop.shares["parameters"] for stop in stops]
    return _between(at, shares, amount)


def _between(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """Linear between points; beyond the last one, on the line from the origin through it."""
    for (a, b), (u, v) in pairwise(zip(xs, ys, strict=True)):
        if a <= x <= u and u > a:
            return b + (v - b) * (x - a) / (u - a)
    return ys[-1] * x / xs[-1]


@dataclass(frozen=True, slots=True)
class Needs:
    """What a model needs of a machine, and the best rates there. `exact`: of a plan of the path, not in between."""

    weight_bytes: float
    kv_cache_bytes: float
    decode_seconds: float
    prefill_seconds: float
    fits: bool
    largest_batch: float | None
    exact: bool


def needs_at(
    result: RunResult, stops: Sequence[Stop], share: float, machine: Machine, workload: Workload
) -> tuple[Resources, Needs]:
    """The teacher's needs, and those where a share of the parameters is gone: between the plans of the path, linear."""
    teacher = resources(result.anatomy, machine, workload)
    shares = [stop.shares["parameters"] for stop in stops]
    last = len(stops) - 1
    number = next((i for i in range(1, len(stops)) if shares[i - 1] <= share <= shares[i]), last)
    low, high = (stops[number - 1], stops[number]) if share <= shares[-1] else (stops[0], stops[-1])
    a, b = (resources(result.anatomy, machine, workload, stop.plan) for stop in (low, high))
    span = high.shares["parameters"] - low.shares["parameters"]
    part = (share - low.shares["parameters"]) / span if span else 1.0

    def mixed(name: str) -> float:
        first, second = getattr(a, name), getattr(b, name)
        return float(first + (second - first) * part)

    weights, cache = mixed("weight_bytes"), mixed("kv_cache_bytes")
    room = USABLE * machine.memory_bytes - weights
    return teacher, Needs(
        weights, cache, mixed("decode_seconds"), mixed("prefill_seconds"), room >= cache,
        None if a.largest_batch is None or b.largest_batch is None else math.floor(max(0.0, mixed("largest_batch"))),
        math.isclose(part, 1.0) or math.isclose(part, 0.0, abs_tol=1e-12),
    )  # fmt: skip
