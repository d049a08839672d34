"""Forecasts, rooflines, ends of searches and costs: planted laws, identities, brute force."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_runs import an_anatomy, near

from billhook.core.anatomy import SiteSize
from billhook.core.errors import UnknownName, UsageError
from billhook.core.outlook import loss_curve, search_end
from billhook.core.outlook.costs import (
    DAY,
    HOUR,
    Figure,
    Prices,
    lost_per_saved,
    model_cost,
    payback_hours,
    saved_share,
)
from billhook.core.outlook.loss_curve import LossPoint, PastErrors, forecast, past_errors
from billhook.core.outlook.machines import Machine, machine, machines
from billhook.core.outlook.roofline import USABLE, Workload, resources, shrunk
from billhook.core.outlook.search_end import SearchPoint, SearchTrace
from billhook.core.plan import Plan, Site

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FAST = Machine("fast", 10**9, 1e9, 1e15, 100.0, "made")  # whose arithmetic costs nothing
SLOW = Machine("slow", 10**9, 1e15, 1e9, None, "made")  # whose memory costs nothing


# -- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "power"), [(5.0, 1.0), (8.0, 1.5), (0.3, 0.8)])
def test_a_planted_power_law_is_recovered(scale: float, power: float) -> None:
    points = [LossPoint(x, scale * x**power) for x in np.linspace(0.02, 0.15, 9)]
    for share in (0.05, 0.2, 0.3):
        told = forecast(points, share)
        assert told.value == pytest.approx(scale * share**power, rel=0.1)
        assert told.low <= scale * share**power <= told.high


def test_forecasts_do_not_depend_on_order_or_unit() -> None:
    points = [LossPoint(0.1, 0.4), LossPoint(0.2, 1.0), LossPoint(0.05, 0.15)]
    told = forecast(points, 0.3)
    assert forecast(points[::-1], 0.3) == told
    scaled = forecast([LossPoint(p.share, 7 * p.nats) for p in points], 0.3)
    assert (scaled.low, scaled.value, scaled.high) == pytest.approx([7 * x for x in (told.low, told.value, told.high)])


def test_a_measured_size_is_forecast_as_it_was_measured() -> None:
    told = forecast([LossPoint(0.1, 0.4), LossPoint(0.2, 1.0)], 0.2)
    assert told.value == pytest.approx(1.0, rel=1e-3)
    noisy = forecast([LossPoint(0.1, 0.4, 0.02), LossPoint(0.2, 1.0, 0.5)], 0.2)
    assert noisy.high / noisy.low > told.high / told.low


def test_more_sizes_and_shorter_ways_make_narrower_spreads() -> None:
    def wide(points: list[LossPoint], share: float) -> float:
        return loss_curve._predict(points, share)[1]

    line = [LossPoint(x, 4 * x) for x in (0.05, 0.1, 0.15, 0.2)]
    assert wide(line, 0.25) < wide(line, 0.3) < wide(line, 0.5)
    assert wide(line, 0.3) < wide(line[-1:], 0.3)


def test_a_prediction_is_the_mixture_of_gaussians_over_all_strayings() -> None:
    """Each of several sets at once, against one straying after the other, by the density of a normal distribution."""
    points = [LossPoint(0.05, 0.1, 0.01), LossPoint(0.1, 0.4), LossPoint(0.2, 1.0, 0.2), LossPoint(0.33, 1.3, 0.1)]
    sets, share = [points[:3], points[1:], points[::2] + points[1:2]], 0.27
    means, deviations = loss_curve._predict_each(sets, share)
    for given_, mean, deviation in zip(sets, means, deviations, strict=True):
        at = np.log([*(p.share for p in given_), share])
        at -= at.min()
        y = np.log([p.nats for p in given_]) - loss_curve.EXPONENT * at[:-1]
        steps = np.diff(np.eye(3), axis=0)
        found = []
        for wander in loss_curve.WANDERS:
            cov = loss_curve.VAGUE + loss_curve.EXPONENT_SD**2 * np.outer(at, at)
            cov += wander**2 * np.minimum.outer(at, at)
            inside = cov[:3, :3] + np.diag([(p.se / p.nats) ** 2 + loss_curve.EXACT for p in given_])
            inverse, apart = np.linalg.inv(inside), np.linalg.inv(steps @ inside @ steps.T)
            fit = math.log(np.linalg.det(apart)) - (steps @ y) @ apart @ (steps @ y)
            prior = -((math.log(wander / loss_curve.WANDER) / loss_curve.WANDER_SPREAD) ** 2)
            found.append((cov[3, :3] @ inverse @ y, cov[3, 3] - cov[3, :3] @ inverse @ cov[:3, 3], (prior + fit) / 2))
        centres, variances, logs = np.array(found).T
        weight = np.exp(logs - logs.max()) / np.exp(logs - logs.max()).sum()
        middle = weight @ centres
        assert mean == pytest.approx(middle + loss_curve.EXPONENT * at[3], rel=1e-6)
        assert deviation**2 == pytest.approx(weight @ (variances + (centres - middle) ** 2), rel=1e-4)


def test_intervals_cover_at_the_stated_rate() -> None:
    """Curves that stray at random: calibrated on some, the intervals of others hold as often as they say."""
    random = np.random.default_rng(3)
    shares = np.array([0.05, 0.1, 0.2, 0.3])

    def curve() -> list[LossPoint]:
        walk = np.cumsum(random.normal(0, 0.35, 4) * np.sqrt(np.diff(np.log(shares), prepend=math.log(0.04))))
        logs = math.log(4) + random.normal(1.2, 0.2) * np.log(shares) + walk
        return [LossPoint(float(x), float(np.exp(y))) for x, y in zip(shares, logs, strict=True)]

    past = past_errors([curve() for _ in range(40)], "simulation")
    new = [curve() for _ in range(120)]
    for level in (0.5, 0.9):
        told = [(forecast(points[:-1], points[-1].share, past, level), points[-1].nats) for points in new]
        assert np.mean([each.low <= nats <= each.high for each, nats in told]) == pytest.approx(level, abs=0.1)


def test_what_forecasts_refuse() -> None:
    with pytest.raises(UsageError, match=r"nothing to forecast from\. Measure one, with remove='10%'"):
        forecast([LossPoint(0.1, -0.01), LossPoint(0.0, 0.0)], 0.2)
    with pytest.raises(UsageError, match=r"between 0 and 1, and 1.2 is not. Write 0.2"):
        forecast([LossPoint(0.1, 0.1)], 1.2)


def test_every_size_is_left_out_in_every_place() -> None:
    points = [LossPoint(x, x) for x in (0.1, 0.2, 0.4)]
    past = past_errors([points, points[:1]], "here")
    assert past.curves == 1
    assert {place: len(past.errors[place]) for place in loss_curve.PLACES} == {"beyond": 4, "between": 1, "below": 4}
    both = past.combined_with(PastErrors(dict.fromkeys(loss_curve.PLACES, ()), 0, "nowhere"))
    assert (both.errors, both.curves, both.source) == (past.errors, 1, "here")


def test_the_shipped_files_are_what_the_benchmarks_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import forecasts
    import gains

    recipes = forecasts.curves()
    assert forecasts.SHIPPED.read_text() == forecasts.write_errors(recipes)
    assert gains.SHIPPED.read_text() == gains.shipped()
    rows = forecasts.coverage(recipes)
    held, n = sum(int(str(row["held"])) for row in rows), sum(int(str(row["n"])) for row in rows)
    assert held / n >= 0.9, "90% of held-out sizes inside their 90% intervals"
    for name in ("forecasts", "gains"):
        sys.modules.pop(name)


# -- machines and rooflines -------------------------------------------------------------------------------------------


def test_every_machine_is_whole_and_found_by_name() -> None:
    for name, row in machines().items():
        assert machine(name) is row
        assert row.source
        assert row.memory_bytes >= 10**9
        assert row.bandwidth < row.flops, "no machine reads a byte per FLOP"
        assert row.watts is None or 1 <= row.watts <= 2000
    assert machine("RTX 4090:12GB") == replace(machine("rtx-4090"), memory_bytes=12 * 10**9)
    with pytest.raises(UnknownName, match="Did you mean 'h100-sxm'"):
        machine("h100-smx")
    for text, words in (("m4:lots", "Write it in GB"), ("here", "--here|here=")):
        with pytest.raises(UsageError, match=words):
            machine(text)
    assert machine("here", FAST) is FAST


@given(st.integers(1, 512), st.integers(1, 64), st.sampled_from([0.5, 1.0, 2.0, 4.0]))
def test_a_roofline_scales_with_its_machine(context: int, batch: int, each: float) -> None:
    anatomy, work = an_anatomy(), Workload(context, batch, 64, each)
    told = resources(anatomy, FAST, work)
    twice = resources(anatomy, replace(FAST, bandwidth=2 * FAST.bandwidth), work)
    assert told.decode_bound == twice.decode_bound == "memory"
    assert twice.decode_seconds == pytest.approx(told.decode_seconds / 2)
    read = anatomy.total("flops_per_token") / 2 * each + 640 * context * batch
    assert told.decode_seconds == pytest.approx(read / FAST.bandwidth)
    assert told.joules_per_token == pytest.approx(100 * told.decode_seconds / batch)
    slow = resources(anatomy, SLOW, work)
    faster = resources(anatomy, replace(SLOW, flops=2 * SLOW.flops), work)
    assert slow.decode_bound == slow.prefill_bound == "compute"
    assert slow.decode_seconds == pytest.approx(2 * faster.decode_seconds)
    assert slow.decode_seconds == pytest.approx(batch * anatomy.total("flops_per_token") / SLOW.flops)
    assert slow.prefill_tokens_per_s >= slow.decode_tokens_per_s * (1 - 1e-9), "the head is computed once a prompt"


@pytest.mark.parametrize("context", [1, 100, 5000])
@pytest.mark.parametrize("memory", [10**6, 2 * 10**6, 10**8])
def test_the_largest_batch_is_the_last_that_fits(context: int, memory: int) -> None:
    anatomy, small = an_anatomy(), replace(FAST, memory_bytes=memory)
    largest = resources(anatomy, small, Workload(context)).largest_batch
    assert largest is not None
    fits = [resources(anatomy, small, Workload(context, batch)).fits for batch in range(1, min(largest, 2000) + 2)]
    assert all(fits[:largest])
    assert largest >= 2000 or not fits[largest]
    weights, cache = anatomy.total("bytes"), 640 * context
    assert largest == max(0, math.floor((USABLE * memory - weights) / cache))


def test_calls_add_to_every_step_and_a_plan_takes_its_own() -> None:
    anatomy, called = an_anatomy(), replace(FAST, call_seconds=0.001)
    plan = Plan(frozenset(Site(b, "attention") for b in range(5)))
    whole, left = resources(anatomy, called), resources(anatomy, called, plan=plan)
    assert whole.decode_seconds - resources(anatomy, FAST).decode_seconds == pytest.approx(0.020)
    assert left.decode_seconds - resources(anatomy, FAST, plan=plan).decode_seconds == pytest.approx(0.015)
    assert left.weight_bytes == anatomy.total("bytes", plan)
    assert left.kv_cache_bytes * 2 == whole.kv_cache_bytes


def test_experts_are_read_as_often_as_tokens_pick_them() -> None:
    """Of 8 experts a token takes 2: so many weights are read as a brute-force draw reads, on average."""
    anatomy = an_anatomy(blocks=1)
    mlp = SiteSize(Site(0, "mlp"), 8000, 32000, 0, 2 * 2000, groups=tuple(range(8)), experts=8)
    moe = replace(anatomy, sites=(anatomy.sites[0], mlp))
    rest = moe.total("flops_per_token") / 2 - 2000
    random = np.random.default_rng(0)
    for batch in (1, 3, 50):
        draws = [len({int(e) for _ in range(batch) for e in random.choice(8, 2, replace=False)}) for _ in range(2000)]
        work = Workload(1, batch, bytes_per_parameter=1.0, kv_bytes=0.0)
        read = resources(moe, FAST, work).decode_seconds * FAST.bandwidth
        assert read == pytest.approx(rest + 1000 * np.mean(draws), rel=0.03)


def test_a_size_that_is_taken_evenly_is_that_size() -> None:
    anatomy = an_anatomy()
    for share in (0.1, 0.3, 0.6):
        small = shrunk(anatomy, share)
        assert small.total("parameters") == pytest.approx((1 - share) * anatomy.total("parameters"), rel=1e-3)
        assert small.rest == anatomy.rest


# -- searches ---------------------------------------------------------------------------------------------------------


def a_trace(seconds: float, wobble: float = 0.0, power: float = 1.0, name: str = "greedy") -> SearchTrace:
    """A search of 50 rounds, the cost of which changes with a power of how far it is."""
    random = np.random.default_rng(int(seconds))
    at = np.linspace(0, 1, 51) ** power * seconds
    at[1:-1] *= 1 + wobble * random.uniform(-1, 1, 49)
    points = tuple(SearchPoint(float(t), i / 50, i / 50) for i, t in enumerate(np.sort(at)))
    return SearchTrace(
        name,
        (f"{name} exact sites [] m 20%", f"{name} exact sites [] m", f"{name} exact sites", f"{name} sites"),
        points,
        seconds=seconds,
    )


def until(trace: SearchTrace, share: float) -> SearchTrace:
    assert trace.seconds is not None
    end = share * trace.seconds
    return replace(trace, points=tuple(p for p in trace.points if p.seconds <= end), seconds=None)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("seconds", [40.0, 4000.0])
def test_the_end_of_a_search_is_that_of_searches_that_went_alike(power: float, seconds: float) -> None:
    earlier = [a_trace(100.0 + i, 0.05, power) for i in range(4)]
    told = search_end.search_end(until(a_trace(seconds, 0.05, power), 1 / 3), earlier)
    assert told is not None
    assert told.seconds == pytest.approx(seconds, rel=0.2)
    assert told.low is not None
    assert told.high is not None
    assert told.low <= told.seconds <= told.high
    assert (told.traces, told.source) == (4, "this store")
    assert told.left == pytest.approx(told.seconds - told.elapsed)


def test_the_most_like_searches_are_taken_and_shipped_ones_are_better_than_none() -> None:
    now = until(a_trace(300.0), 0.5)
    other = replace(a_trace(100.0, power=3.0), about=("else", "other", "greedy exact sites", "greedy sites"))
    same = search_end.search_end(now, [other, a_trace(100.0)])
    assert same is not None
    assert (same.traces, same.errors) == (1, 0)
    assert same.low is None
    assert same.seconds == pytest.approx(300.0, rel=0.02)
    shipped = search_end.search_end(now)
    assert shipped is not None
    assert shipped.source == "searches that Billhook ships"
    assert search_end.search_end(replace(now, search="mine", about=("a", "b", "c", "d"))) is None
    assert search_end.search_end(until(a_trace(300.0), 0.001), [a_trace(100.0)]) is None


# -- costs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [None, 10**5, 3 * 10**6])
@pytest.mark.parametrize("times", [1.05, 1.5, 3.0])
def test_the_payback_is_that_of_counting_hours(times: float, tokens: int | None) -> None:
    """Hour by hour: what the teacher would have cost less what student and its making cost, until it is above 0."""
    making, price, rate = 7200.0, 0.5, 20.0
    prices = Prices(price, "an hour", tokens)
    teacher = model_cost("teacher", Figure(rate), prices)
    student = model_cost(
        "s", Figure(rate * times), prices, teacher=teacher, speedup=Figure(times), making_seconds=making
    )
    each_hour = rate * HOUR if tokens is None else tokens / 24
    spent = making / HOUR * price
    saved_an_hour = (each_hour / rate - each_hour / (rate * times)) / HOUR * price
    hours = 0
    while hours * saved_an_hour < spent:
        hours += 1
    assert student.payback_hours is not None
    assert hours - 1 < student.payback_hours.value <= hours
    assert teacher.per_million.value == pytest.approx(1e6 / rate / HOUR * price)
    assert student.saved is not None
    assert student.saved.value == pytest.approx(1 - student.per_million.value / teacher.per_million.value)
    if tokens is not None:
        assert teacher.per_day is not None
        assert student.per_day is not None
        assert student.saved_per_day is not None
        assert student.saved_per_day.value == pytest.approx(teacher.per_day.value - student.per_day.value)
        assert teacher.machines == math.ceil(tokens / (rate * DAY))


def test_intervals_are_carried_to_every_figure() -> None:
    slower = Figure.of(near(1.0, 0.1), "timings")  # from slower to faster
    saved = saved_share(slower)
    assert (saved.low, saved.high) == pytest.approx((1 - 1 / 0.9, 1 - 1 / 1.1))
    back = payback_hours(3600.0, saved)
    assert back.value == back.high == math.inf
    assert back.low == pytest.approx(11.0)
    lost = lost_per_saved(Figure(1.1, 1.05, 1.2, "r"), Figure(0.2, 0.1, 0.25, "s"))
    assert (lost.value, lost.low, lost.high) == pytest.approx((0.5, 0.2, 2.0))
    assert lost_per_saved(Figure(1.1), Figure(0.2)).low is None
