"""How a search will end: its seconds and its loss, from how far it is and from how earlier searches went."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import pairwise
from typing import Any

import yaml

from billhook.core.outlook.loss_curve import LossPoint, forecast
from billhook.core.results.stored import StoredEvent

TRACED = ("search", "round")  # the stages of which a trace is made
EARLY = 0.02  # of the time, before which nothing is said
FEW = 9  # past forecasts, below which their range is the interval
MOST_TRACES = 8  # of a kind that are compared
HALFWAY = 0.5  # a share at which curves of one search stand; only ratios of shares count


@dataclass(frozen=True, slots=True)
class SearchPoint:
    """How far a search is after `seconds`: shares of its losses, `counted`, and of its budget, `met`."""

    seconds: float
    counted: float
    met: float


@dataclass(frozen=True, slots=True)
class RoundLoss:
    """The lowest loss of a round, after `seconds`, of a plan that meets `met` of the budget."""

    seconds: float
    met: float
    loss: float


@dataclass(frozen=True, slots=True)
class SearchTrace:
    """How one search went. `about`: what it was asked, the most telling first; `seconds`: None while it goes on."""

    search: str
    about: tuple[str, ...]
    points: tuple[SearchPoint, ...]
    rounds: tuple[RoundLoss, ...] = ()
    seconds: float | None = None
    source: str = "this store"

    @property
    def loss(self) -> float | None:
        """The last loss of a plan that meets the budget."""
        return next((each.loss for each in reversed(self.rounds) if each.met >= 1), None)


@dataclass(frozen=True, slots=True)
class SearchForecast:
    """When a search will end, and at which loss.

    - `seconds`: of the whole search, with the range of `level` of past forecasts; no range where there are none.
    - `loss`: of its end, on its calibration tokens, in the same way; None while it cannot be said.
    - `traces`: earlier searches of its kind, from `source`; `errors`: past forecasts that made the range.
    """

    elapsed: float
    seconds: float
    low: float | None
    high: float | None
    level: float
    loss: float | None
    loss_low: float | None
    loss_high: float | None
    traces: int
    errors: int
    source: str

    @property
    def left(self) -> float:
        """Seconds that the search still takes."""
        return max(0.0, self.seconds - self.elapsed)


def trace_of(spec: Mapping[str, Any], model: str, events: Iterable[StoredEvent]) -> SearchTrace | None:
    """Return how the search of a run went, from what it was asked and its events; None where it made none.

    `model`: the fingerprint of its model.
    """
    told = [event for event in events if event.stage in TRACED]
    first = next((i for i, event in enumerate(told) if event.stage == "search" and event.total is None), None)
    if first is None or spec.get("search") is None:
        return None
    start, points, rounds = told[first].at, [SearchPoint(0.0, 0.0, 0.0)], list[RoundLoss]()
    ended: float | None = None
    waiting: StoredEvent | None = None  # a round of whole sites: the next request tells how much of the budget is met
    most = 0.0  # that whole sites have met; exchanges that come later have little in common, and lose none of it
    for event in told[first + 1 :]:
        at, values = event.at - start, event.values
        if event.stage == "search" and "seconds" in values:
            ended, most = float(values["seconds"]), 1.0
        if waiting is not None and event.stage == "search":
            most = max(most, _met(values))
            rounds.append(RoundLoss(waiting.at - start, most, float(waiting.values["loss"])))
            waiting = None
        if ended is not None:
            break
        if event.stage == "search":
            points.append(SearchPoint(at, event.done / event.total if event.total else 0.0, _met(values)))
        elif values.get("narrowed"):
            rounds.append(RoundLoss(at, points[-1].met, float(values["loss"])))
        elif values.get("removed"):
            waiting = event
    return SearchTrace(str(spec["search"]), _about(spec, model), tuple(points), tuple(rounds), ended)


def _about(spec: Mapping[str, Any], model: str) -> tuple[str, ...]:
    moves = "blocks" if re.search(r"blocks?\s*$", str(spec.get("remove"))) else "sites"
    kind = f"{spec['search']} {'fast' if spec.get('fast') else 'exact'} {moves}"
    same = f"{kind} {sorted(dict(spec.get('set') or {}).items())} {model}"
    return f"{same} {spec.get('remove')}", same, kind, f"{spec['search']} {moves}"


def _met(values: Mapping[str, Any]) -> float:
    """Return the share of the budget that is met; of several budgets, of the least."""
    units = [name.removeprefix("removed_") for name in values if name.startswith("removed_")]
    shares = [float(values[f"removed_{u}"]) / float(values[f"target_{u}"]) for u in units if values.get(f"target_{u}")]
    return min(1.0, *shares) if shares else 0.0


def search_end(now: SearchTrace, earlier: Iterable[SearchTrace] = (), level: float = 0.9) -> SearchForecast | None:
    """Return how a search that goes on will end; None as long as too little of it is done.

    Its last point is laid on the path that each earlier search of its kind took through losses counted and budget met;
    there that one had spent a share of its time. Those most like it are taken: of the same options and model, else of
    the same search, over sites or over blocks. Billhook ships some, for stores without.
    """
    ended = [trace for trace in earlier if trace.seconds]
    like = _most_like(now, ended) or _most_like(now, shipped_traces())
    if not now.points or not like:
        return None
    share = statistics.median(_time_share(trace, now.points[-1]) for trace in like)
    if share < EARLY:
        return None
    elapsed = now.points[-1].seconds
    errors = _past_errors(like, share)
    low, high = _range(errors, level)
    loss, loss_low, loss_high = _end_loss(now, like, share, level)
    total = elapsed / share
    return SearchForecast(
        elapsed, total, None if low is None else max(elapsed, total * low), None if high is None else total * high,
        level, loss, loss_low, loss_high, len(like), len(errors), like[0].source,
    )  # fmt: skip


@cache
def shipped_traces() -> tuple[SearchTrace, ...]:
    """Searches that Billhook ships, from `searches.yaml`."""
    told = yaml.safe_load(files("billhook.core.outlook").joinpath("searches.yaml").read_text(encoding="utf-8"))
    return tuple(
        SearchTrace(
            row["search"], ("", "", row["kind"], f"{row['search']} {row['kind'].split()[-1]}"),
            tuple(SearchPoint(seconds, counted, met) for seconds, counted, met in row["points"]),
            seconds=row["seconds"], source=told["source"],
        )
        for row in told["searches"]
    )  # fmt: skip


def _most_like(now: SearchTrace, earlier: Sequence[SearchTrace]) -> list[SearchTrace]:
    """Return the last of the traces that share the most telling of what `now` was asked."""
    for place, asked in enumerate(now.about):
        if alike := [trace for trace in earlier if trace.about[place] == asked and len(trace.points) > 1]:
            return alike[-MOST_TRACES:]
    return []


def _time_share(trace: SearchTrace, point: SearchPoint) -> float:
    """Return the share of its time that `trace` had spent where its path comes nearest to `point`."""
    end = SearchPoint(trace.seconds or trace.points[-1].seconds, 1.0, trace.points[-1].met)
    nearest = (math.inf, 0.0)
    for a, b in pairwise((*trace.points, end)):
        across, up = b.counted - a.counted, b.met - a.met
        length = across**2 + up**2
        along = ((point.counted - a.counted) * across + (point.met - a.met) * up) / length if length else 0.0
        along = min(1.0, max(0.0, along))
        gap = math.hypot(a.counted + along * across - point.counted, a.met + along * up - point.met)
        if gap < nearest[0] - 1e-9:
            nearest = gap, a.seconds + along * (b.seconds - a.seconds)
    return min(1.0, nearest[1] / end.seconds) if end.seconds else 0.0


def _past_errors(traces: Sequence[SearchTrace], share: float) -> list[float]:
    """Return true over forecast seconds, had each trace been forecast by each other one after a share of its time."""
    errors = []
    for trace in traces:
        for other in traces:
            if other is not trace and trace.seconds and (then := _at(trace, share)) is not None:
                guess = _time_share(other, then)
                errors += [trace.seconds * guess / then.seconds] if guess > EARLY else []
    return errors


def _at(trace: SearchTrace, share: float) -> SearchPoint | None:
    """Return the last point of a trace within a share of its time."""
    inside = [point for point in trace.points if 0 < point.seconds <= share * (trace.seconds or 0)]
    return inside[-1] if inside else None


def _range(errors: Sequence[float], level: float) -> tuple[float | None, float | None]:
    """Return the factors between which a level of errors lies; of few their range, widened to hold 1."""
    if not errors:
        return None, None
    ranked = sorted(errors)
    out = 0 if len(ranked) < FEW else int((1 - level) / 2 * (len(ranked) + 1))
    return min(1.0, ranked[out]), max(1.0, ranked[-1 - out])


def _end_loss(
    now: SearchTrace, like: Sequence[SearchTrace], share: float, level: float
) -> tuple[float | None, float | None, float | None]:
    """Return the loss at the end, with its range.

    The last loss so far times what it changed by from there on, in earlier searches for the same budget; without such,
    the curve of the rounds so far at the whole budget, corrected by what it would have missed in earlier searches of
    this kind, which is its range.
    """
    full = now.loss
    last = full or next((r.loss for r in reversed(now.rounds) if r.met > 0), None)
    met = 1.0 if full else max((r.met for r in now.rounds), default=0.0)
    twins = [trace for trace in like if trace.about[0] == now.about[0]]
    gains = [gain for trace in twins if (gain := _still_gained(trace, met, share)) is not None]
    if last is not None and (full is not None or gains):
        gain, (low, high) = statistics.median(gains) if gains else 1.0, _range(gains, level)
        return last * gain, None if low is None else last * low, None if high is None else last * high
    value = _curve_end(now.rounds, met)
    if value is None:
        return None, None, None
    past = [(trace.loss, _curve_end(trace.rounds, met)) for trace in like]
    errors = [true / guess for true, guess in past if true is not None and guess]
    low, high = _range(errors, level) if len(errors) > 1 else (None, None)
    centre = value * (statistics.median(errors) if errors else 1.0)
    return centre, None if low is None else value * low, None if high is None else value * high


def _curve_end(rounds: Sequence[RoundLoss], met: float) -> float | None:
    """Return the loss at the whole budget, by the curve of the rounds until a share of it was met; None if too few."""
    points = [LossPoint(HALFWAY * r.met, r.loss) for r in rounds if 0 < r.met <= met and r.met < 1 and r.loss > 0]
    return forecast(points[-MOST_TRACES:], HALFWAY).value if len(points) > 1 else None


def _still_gained(trace: SearchTrace, met: float, share: float) -> float | None:
    """Return the last loss of a trace over the one that it had once as much of its budget was met, or time spent."""
    if met < 1:
        then = [r.loss for r in trace.rounds if r.met >= met][:1]
    else:
        then = [r.loss for r in trace.rounds if r.met >= 1 and r.seconds <= share * (trace.seconds or 0)][-1:]
    return trace.loss / then[0] if trace.loss is not None and then and then[0] > 0 else None
