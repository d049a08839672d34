"""Tests and verdicts: published examples, scipy's results, and their size, coverage and power by simulation."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from billhook.core.margin import Margin
from billhook.core.results.measured import Estimate, EvalResult
from billhook.core.significance import (
    Pair,
    bootstrap_p,
    classify_pair,
    compare_pair,
    holm,
    items_needed,
    mcnemar,
    power,
)
from billhook.core.statistics import bootstrap_t, effective_items, mean_interval, paired_difference
from billhook.report.numbers import reliability_note


def right(outcomes: list[int], clusters: list[int] | None = None) -> EvalResult:
    n = len(outcomes)
    return EvalResult("acc", "t", tuple(map(float, outcomes)), (1,) * n, tuple(clusters or range(n)))


def nats(values: list[float], counts: list[int] | None = None) -> EvalResult:
    counts = counts or [1] * len(values)
    return EvalResult("perplexity", "t", tuple(values), tuple(counts), tuple(range(len(values))))


# -- p-values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [
        (1, 7, 0.039),  # Bentur et al. 2009, as worked out by Fagerland et al. 2013
        (0, 0, 1.0),
        (5, 5, 1.0),
        (0, 5, 1 / 32),
    ],
)
def test_mcnemar_gives_published_values(gained: int, lost: int, p: float) -> None:
    assert mcnemar(gained, lost) == pytest.approx(p, abs=5e-4)
    assert mcnemar(lost, gained) == mcnemar(gained, lost)


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_the_binomial_test_less_half_of_what_was_seen(gained: int, lost: int) -> None:
    n = gained + lost
    exact = scipy.stats.binomtest(gained, n, 0.5).pvalue if n else 1.0
    seen = scipy.stats.binom.pmf(gained, n, 0.5)
    expected = exact - seen if gained != lost else 1.0
    assert mcnemar(gained, lost) == pytest.approx(expected, abs=1e-9)


def test_holm_gives_a_worked_example_and_keeps_the_order() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.7]) == [0.7]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_holm_is_scipys_definition_step_by_step(values: list[float]) -> None:
    """Reject in order of p while p <= alpha / (tests that are left): the adjusted p is where that begins."""
    told = holm(values)
    for alpha in (0.01, 0.05, 0.3):
        rejected = set[int]()
        for rank, i in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
            if values[i] > alpha / (len(values) - rank):
                break
            rejected.add(i)
        assert {i for i, p in enumerate(told) if p <= alpha} == rejected


def test_a_bootstrap_p_is_that_of_a_t_test_where_the_data_are_normal() -> None:
    draw = np.random.default_rng(3)
    for by in (0.0, 0.1, 0.2, 0.3):
        a, b = draw.normal(0, 1, 300), draw.normal(by, 1, 300)
        p = bootstrap_p(nats(a.tolist()), nats(b.tolist()))
        assert p == pytest.approx(scipy.stats.ttest_rel(b, a).pvalue, abs=0.02)
    same = nats(a.tolist())
    assert bootstrap_p(same, same) == 1.0
    assert bootstrap_p(same, replace(same, sums=tuple(x + 1 for x in same.sums))) < 0.001
    assert bootstrap_p(nats([1.0]), nats([2.0])) == 1.0, "one document tells nothing"


# -- by simulation ---------------------------------------------------------------------------------------------------


def documents(draw: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Changes and token counts of documents as texts have them: lengths log-normal, changes skewed and noisier where
    documents are short. The true mean change per token is 0.1."""
    counts = np.exp(draw.normal(5, 0.7, n)).clip(16, 1024).round()
    change = 0.1 + (draw.exponential(1, n) - 1) * 0.3 + draw.normal(0, 2, n) / np.sqrt(counts)
    return change * counts, counts


@pytest.mark.parametrize("n", [50, 120])
def test_nominal_95_percent_intervals_cover_93_to_97(n: int) -> None:
    draw, sets, missed = np.random.default_rng(n), 1000, 0
    for seed in range(sets):
        sums, counts = documents(draw, n)
        low, high = bootstrap_t(sums, counts, seed, resamples=1000)
        missed += not low <= 0.1 <= high
    assert 0.925 <= 1 - missed / sets <= 0.97  # 93 to 97, give or take what 1,000 sets leave open


def test_twenty_skewed_documents_are_too_few_and_said_to_be() -> None:
    draw, sets, missed = np.random.default_rng(1), 500, 0
    for _ in range(sets):
        values = np.exp(draw.normal(0, 1.2, 20))
        picks = values[draw.integers(0, 20, (400, 20))].mean(1)
        low, high = np.quantile(picks, (0.025, 0.975))
        missed += not low <= math.exp(0.72) <= high
    assert 0.78 <= 1 - missed / sets <= 0.88, "a percentile interval"
    few = paired_difference(nats([1.0] * 20), nats(draw.normal(2, 1, 20).tolist()))
    assert not few.reliable
    assert reliability_note(few).startswith("Few documents")


def test_tests_are_wrong_one_time_in_twenty() -> None:
    draw, sets = np.random.default_rng(11), 600
    by_bootstrap = by_count = 0
    for seed in range(sets):
        sums, counts = documents(draw, 60)
        values = (sums - 0.1 * counts).tolist()
        tokens = [int(c) for c in counts]
        by_bootstrap += bootstrap_p(nats([0.0] * 60, tokens), nats(values, tokens), seed) < 0.05
        differs = draw.random(400) < 0.1
        gained = int((differs & (draw.random(400) < 0.5)).sum())
        by_count += mcnemar(gained, int(differs.sum()) - gained) < 0.05
    assert 0.025 <= by_bootstrap / sets <= 0.08
    assert 0.025 <= by_count / sets <= 0.075


def test_the_paired_test_has_the_power_that_the_docs_state() -> None:
    """1,000 items, a true drop of 2 points, 7% of the items differ; the unpaired test hears next to nothing."""
    draw, sets, found, alone = np.random.default_rng(2), 1500, 0, 0
    for _ in range(sets):
        lost, gained, both, _ = draw.multinomial(1000, [0.045, 0.025, 0.555, 0.375])
        found += mcnemar(int(gained), int(lost)) < 0.05
        shares = (both + lost) / 1000, (both + gained) / 1000
        middle = sum(shares) / 2
        alone += abs(shares[0] - shares[1]) > 1.96 * math.sqrt(middle * (1 - middle) * 2 / 1000)
    assert power(1000, 0.02, 0.07) == pytest.approx(found / sets, abs=0.05)
    assert 0.6 < found / sets < 0.75
    assert alone / sets < 0.03


# -- verdicts -------------------------------------------------------------------------------------------------------


def a_pair(change: float, half: float, n: int = 400, sign: int = 1) -> Pair:
    wide, near = (Estimate(change, change - h, change + h, n, n, True) for h in (half, half * 1.645 / 1.96))
    return Pair(wide, near, 0.001 if abs(change) > half else 0.5, None, None, sign)


@pytest.mark.parametrize(
    ("change", "half", "sign", "word"),
    [
        (0.05, 0.02, 1, "better"),
        (0.05, 0.02, -1, "worse"),
        (0.0, 0.005, 1, "equivalent"),
        (-0.006, 0.003, 1, "equivalent"),  # less, surely, and too little to matter
        (-0.02, 0.005, 1, "worse"),
        (-0.02, 0.03, 1, "undecided"),
        (0.0, 0.03, 1, "undecided"),
    ],
)
def test_a_verdict_is_what_the_interval_says_of_the_margin(change: float, half: float, sign: int, word: str) -> None:
    pair = a_pair(change, half, sign=sign)
    assert classify_pair(pair, 0.01, pair.p) == word


def test_a_verdict_needs_a_p_that_stands_among_the_other_tests() -> None:
    pair = a_pair(-0.02, 0.005)
    assert classify_pair(pair, 0.01, 0.2) == "undecided"


@given(st.integers(50, 2000), st.floats(0.001, 0.009), st.sampled_from([0.01, 0.02]))
def test_as_many_items_as_are_needed_decide(n: int, change: float, limit: float) -> None:
    pair = a_pair(change, 0.03, n)
    more = items_needed(pair, limit)
    assert more is not None
    shrunk = 0.03 * math.sqrt(n / (n + more))
    after = a_pair(change, shrunk * 0.999, n + more)
    assert classify_pair(after, limit, after.p) in ("better", "equivalent")
    if more > 2:
        before = a_pair(change, 0.03 * math.sqrt(n / (n + more - 2)), n)
        assert classify_pair(before, limit, before.p) == "undecided"
    assert items_needed(a_pair(0.0, 0.03), 0.0) is None


def test_a_pair_counts_what_was_gained_and_lost() -> None:
    a, b = right([1, 1, 1, 0, 0, 1]), right([1, 0, 1, 1, 0, 1])
    pair = compare_pair(a, b)
    assert (pair.gained, pair.lost, pair.p, pair.sign) == (1, 1, 1.0, 1)
    assert pair.change.value == 0.0
    assert compare_pair(nats([1.0, 2.0]), nats([1.5, 2.0])).gained is None
    assert compare_pair(nats([1.0, 2.0]), nats([1.5, 2.0])).sign == -1


def test_items_of_one_source_are_not_counted_as_if_they_were_independent() -> None:
    draw = np.random.default_rng(0)
    flips = draw.random(40) < 0.3
    a, b = [1] * 400, [int(not flips[i // 10]) for i in range(400)]
    clusters = [i // 10 for i in range(400)]
    alone, together = compare_pair(right(a), right(b)), compare_pair(right(a, clusters), right(b, clusters))
    assert alone.p < 1e-9 < 1e-4 < together.p
    assert together.change.high - together.change.low > 2 * (alone.change.high - alone.change.low)


@pytest.mark.parametrize("copies", [1, 2, 7])
def test_copies_of_an_item_say_no_more_than_one(copies: int) -> None:
    """Every item as often as every other: values, intervals, p and verdicts are those of the items once."""
    rng = np.random.default_rng(copies)
    once = right(rng.integers(0, 2, 40).tolist()), right(rng.integers(0, 2, 40).tolist())
    many = tuple(
        replace(each, sums=each.sums * copies, counts=each.counts * copies, clusters=each.clusters * copies)
        for each in once
    )
    for one, more in (
        (mean_interval(once[0]), mean_interval(many[0])),
        (paired_difference(*once), paired_difference(*many)),
    ):
        assert (more.low, more.high, more.value) == pytest.approx((one.low, one.high, one.value), abs=1e-12)
        assert (one.n, more.n, one.clusters, more.clusters) == (40, 40 * copies, 40, 40)
        assert not more.reliable
    alone, pair = compare_pair(*once), compare_pair(*many)
    assert (pair.p, pair.gained, pair.lost) == (alone.p, copies * alone.gained, copies * alone.lost)
    margin = Margin.parse("9pp", any_task=True)
    assert margin.check(*many).within == margin.check(*once).within


def test_a_copied_item_weighs_what_it_weighs_and_proves_nothing() -> None:
    """One item a hundred times, and ten others: worth little more than one item, also where no outcome differs."""
    clusters = (1,) * 100 + tuple(range(2, 12))
    same = EvalResult("acc", "t", (1.0,) * 100 + (0.0,) * 10, (1,) * 110, clusters)
    assert effective_items(same) == pytest.approx(110**2 / (100**2 + 10))
    low, high = mean_interval(same).low, mean_interval(same).high
    assert low < 0.25 < mean_interval(same).value == 100 / 110 < high
    assert paired_difference(same, same).high > 0.3, "no difference that was seen is none that is proved"
    other = replace(same, sums=(0.0,) * 110)
    assert compare_pair(same, other).p == mcnemar(0, 1)
    one = replace(same, clusters=(1,) * 110)
    assert effective_items(one) == 1.0
    assert mean_interval(one).high - mean_interval(one).low > 0.5
