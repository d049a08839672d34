"""What a budget would cost and save before anything is run, from what the store has measured of a model."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

from billhook.core.outlook.history import MeasuredCurve, history_of
from billhook.core.outlook.loss_curve import LossForecast, PastErrors, forecast, shipped_errors
from billhook.core.outlook.machines import Machine
from billhook.core.outlook.roofline import USABLE, Resources, Workload, resources
from billhook.core.outlook.search_end import SearchForecast, SearchTrace
from billhook.core.results.outlook import MachineReport
from billhook.core.results.run import RunResult
from billhook.dashboard.listing import Figures, Listed
from billhook.dashboard.listing import opened as reading_only
from billhook.dashboard.measured import Stop
from billhook.runs.store import Store
from billhook.studies.outlook.reading import ended_searches, search_forecast

MOST_RUNS = 200  # of one model, the newest, of which forecasts are made
UNITS = {
    "parameters": "% of the parameters", "sites": "sites", "bytes": "% of the bytes on disk",
    "kv_bytes_per_token": "% of the KV cache", "flops_per_token": "% of the FLOPs per token",
    "ns_per_token": "% of the time of a decoding step",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Known:
    """What a forecast rests on: the measured sizes of one recipe on one text, and how wrong past forecasts were."""

    curve: MeasuredCurve
    past: PastErrors


@lru_cache(maxsize=16)
def known_of(store: Path, run: str, states: int) -> Known | None:
    """What the store knows of the recipe, the teacher and the held-out text of a run; None without a perplexity.

    `states`: the number that changes with the states of runs, so that what is known is read anew with a new result.
    """
    with closing(Store(store, read_only=True)) as opened:
        own = opened.run(run)
        fingerprint = own.fingerprints.get("model", "")
        with reading_only(store) as db:
            same = db.execute(
                "SELECT id FROM runs WHERE result IS NOT NULL "
                "AND (json_extract(bound, '$.model') = ? OR kind = 'sweep') "
                f"ORDER BY created DESC LIMIT {MOST_RUNS}",
                (fingerprint,),
            ).fetchall()
        history = history_of([opened.run(each) for (each,) in same], fingerprint)
    curve = next(iter(history.curves_of(own)), None)
    return None if curve is None else Known(curve, history.past(curve).combined_with(shipped_errors()))


def predicted(known: Known, share: float) -> LossForecast | None:
    """Nats at a share of the parameters; None where nothing was measured that lost anything, or for no removal."""
    if not 0 < share < 1 or not any(point.share > 0 and point.nats > 0 for point in known.curve.points):
        return None
    return forecast(known.curve.points, share, known.past)


def end_of_search(store: Path, run: str, states: int) -> SearchForecast | None:
    """When the search of a run will end, and at which loss; None where it does not go on, or has hardly begun."""
    with closing(Store(store, read_only=True)) as opened:
        own = opened.run(run)
        return search_forecast(opened, own, lambda: _ended_searches(store, str(own.spec.get("search")), states))


@lru_cache(maxsize=16)
def _ended_searches(store: Path, search: str, states: int) -> tuple[SearchTrace, ...]:
    """How the newest searches of a kind went. `states`: as of `known_of`."""
    with closing(Store(store, read_only=True)) as opened:
        return tuple(ended_searches(opened, search))


def machine_here(db: sqlite3.Connection) -> Machine | None:
    """The machine that was measured last, of which the store holds the figures."""
    row = db.execute(
        "SELECT result FROM runs WHERE kind = ? AND result IS NOT NULL ORDER BY created DESC", (MachineReport.kind,)
    ).fetchone()
    return None if row is None else MachineReport.from_json(json.loads(row["result"])).machine


def same_text(found: Figures, chosen: Listed) -> bool:
    """Whether a run was measured on the held-out text of the chosen one, and of the same teacher."""
    own = chosen.figures
    return own is not None and (found.fingerprint, found.held_out) == (own.fingerprint, own.held_out)


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
