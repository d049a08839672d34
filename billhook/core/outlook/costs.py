"""What serving a model costs, what a smaller one saves, and when that has paid for making it. Plain arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from billhook.core.results.measured import Estimate

MILLION = 10**6
HOUR, DAY = 3600.0, 86400.0
KWH = 3.6e6  # joules


@dataclass(frozen=True, slots=True)
class Figure:
    """A number with its 95% interval, where a measurement has one, and its source. An end may be infinite."""

    value: float
    low: float | None = None
    high: float | None = None
    source: str = ""

    @staticmethod
    def of(estimate: Estimate, source: str) -> Figure:
        """Return a measured value."""
        return Figure(estimate.value, estimate.low, estimate.high, source)

    def mapped(self, function: Callable[[float], float]) -> Figure:
        """Return a monotone function of the number, rising or falling."""
        if self.low is None or self.high is None:
            return Figure(function(self.value), None, None, self.source)
        ends = sorted(map(function, (self.low, self.high)))
        return Figure(function(self.value), ends[0], ends[1], self.source)


@dataclass(frozen=True, slots=True)
class Prices:
    """What an hour of the machine costs, in a currency of the user's, and the tokens that are decoded each day.

    `basis`: how the hour was priced; `tokens_per_day`: None where the user did not say. `per_kwh`: the price of a kWh,
    where costs are those of the energy that was measured; then the hour is one of the teacher.
    """

    per_hour: float
    basis: str
    tokens_per_day: float | None = None
    per_kwh: float | None = None


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What one model costs. `rate`: tokens decoded per second; `per_million`: of a million tokens.

    - `saved`: the share of the teacher's cost that it saves; None of the teacher itself.
    - `per_day`, `machines`: at the tokens of a day; `saved_per_day`: against the teacher.
    - `payback_hours`: of serving, after which the savings have paid for making it; infinite where it saves nothing.
    - `ratio`: its perplexity over the teacher's; `lost_per_saved`: percent of perplexity per percent of cost saved.
    - `bytes`: of its weights.
    """

    label: str
    rate: Figure
    per_million: Figure
    bytes: int | None = None
    saved: Figure | None = None
    per_day: Figure | None = None
    saved_per_day: Figure | None = None
    machines: int | None = None
    payback_hours: Figure | None = None
    ratio: Figure | None = None
    lost_per_saved: Figure | None = None


def cost_per_million(rate: Figure, per_hour: float) -> Figure:
    """Return what a million tokens cost at so many a second."""
    return rate.mapped(lambda tokens: per_hour / HOUR / tokens * MILLION)


@dataclass(frozen=True, slots=True)
class EnergyCost:
    """What the measured energy of a model costs: of a million tokens; `saved`: the share of the teacher's."""

    per_million: Figure
    saved: Figure | None = None

    @staticmethod
    def of(joules: Figure, per_kwh: float, ratio: Figure | None = None) -> EnergyCost:
        """Return the cost of so many joules per token; `ratio`: to the teacher's."""
        cost = joules.mapped(lambda each: each * MILLION / KWH * per_kwh)
        return EnergyCost(cost, None if ratio is None else ratio.mapped(lambda times: 1 - times))


def saved_share(speedup: Figure) -> Figure:
    """Return the share of the cost that a model saves which is so many times faster."""
    return speedup.mapped(lambda times: 1 - 1 / times)


def payback_hours(making_seconds: float, saved: Figure, load: Figure | None = None) -> Figure:
    """Return the hours after which the machine hours that are saved outweigh those of making the student.

    `saved`: the share of the hours; `load`: hours a day that the teacher would serve, 24 by default. A price falls out:
    both are hours of the same machine. Where nothing is saved the answer is infinite.
    """
    busy = 1.0 if load is None else load.value / (DAY / HOUR)
    hours = making_seconds / HOUR / busy

    def after(share: float) -> float:
        return hours / share if share > 0 else math.inf

    return saved.mapped(after)


def lost_per_saved(ratio: Figure, saved: Figure) -> Figure:
    """Return the percent of perplexity that is lost for each percent of the cost saved; infinite where none is.

    The interval takes the worst and the best ends of both, so that it holds at least as often as they do together.
    """

    def quotient(times: float, share: float) -> float:
        return (times - 1) / share if share > 0 else math.inf

    value = quotient(ratio.value, saved.value)
    if None in (ratio.low, ratio.high, saved.low, saved.high):
        return Figure(value, None, None, f"{ratio.source}; {saved.source}")
    ends = [quotient(r, s) for r in (ratio.low, ratio.high) for s in (saved.low, saved.high)]  # type: ignore[arg-type]
    return Figure(value, min(ends), max(ends), f"{ratio.source}; {saved.source}")


def model_cost(
    label: str, rate: Figure, prices: Prices, *, bytes_: int | None = None, teacher: ModelCost | None = None,
    speedup: Figure | None = None, making_seconds: float | None = None, ratio: Figure | None = None,
    energy: EnergyCost | None = None,
) -> ModelCost:  # fmt: skip
    """Return what a model costs, and against its `teacher` what it saves.

    `speedup`: how many times faster it is than the teacher, measured in pairs. `making_seconds`: of search and
    recovery. `ratio`: of perplexities. `energy`: what is paid instead of the hours that it takes.
    """
    per_million = cost_per_million(rate, prices.per_hour) if energy is None else energy.per_million
    day = prices.tokens_per_day
    per_day = None if day is None else per_million.mapped(lambda cost: cost * day / MILLION)
    machines = None if day is None else math.ceil(day / (rate.value * DAY))
    if teacher is None or speedup is None:
        return ModelCost(label, rate, per_million, bytes_, None, per_day, None, machines, None, ratio)
    saved = saved_share(speedup) if energy is None or energy.saved is None else energy.saved
    load = None if day is None else teacher.rate.mapped(lambda tokens: day / tokens / HOUR)
    whole = None if teacher.per_day is None else teacher.per_day.value
    return ModelCost(
        label, rate, per_million, bytes_, saved, per_day,
        None if whole is None else saved.mapped(lambda share: share * whole), machines,
        None if making_seconds is None else payback_hours(making_seconds, saved, load), ratio,
        None if ratio is None else lost_per_saved(ratio, saved),
    )  # fmt: skip
