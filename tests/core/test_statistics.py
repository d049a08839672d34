"""Intervals: their symmetries, their coverage in simulation, and the binomial definition of the median's."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import accumulate
from statistics import NormalDist

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from billhook.core.results.measured import EvalResult, Score
from billhook.core.statistics import (
    FEW_CLUSTERS,
    bootstrap_t,
    correlation,
    mean_interval,
    median_interval,
    paired_difference,
    ranks,
    score_interval,
    student_quantile,
    zero_difference,
)
from billhook.report.numbers import reliability_note


def results(texts: int, seed: int, per_text: int = 3, shuffle: bool = True) -> tuple[EvalResult, EvalResult]:
    """Two paired results over `texts` texts with odd, uneven names and lengths."""
    rng = np.random.default_rng(seed)
    clusters = np.repeat(rng.choice(10_000, texts, replace=False), per_text)
    if shuffle:
        clusters = rng.permutation(clusters)
    counts = rng.integers(5, 200, len(clusters))
    means = rng.gamma(9, 0.3, len(clusters))
    a = EvalResult("perplexity", "t", tuple(means * counts), tuple(counts.tolist()), tuple(clusters.tolist()))
    change = rng.normal(0.1, 0.4, len(clusters)) + 0.2 * np.sin(clusters)
    return a, replace(a, sums=tuple((means + change) * counts))


def shifted(result: EvalResult, by: float) -> EvalResult:
    return replace(result, sums=tuple(s + by * c for s, c in zip(result.sums, result.counts, strict=True)))


def test_few_items_are_called_items_and_few_texts_texts() -> None:
    right = EvalResult("acc", "t", (1.0, 0.0) * 20, (1,) * 40, tuple(range(40)))
    wrong = replace(right, sums=(0.0,) * 40)
    partly = replace(right, sums=(0.5, 0.25) * 20)  # no outcomes of 0 and 1: a bootstrap
    for note in (
        reliability_note(mean_interval(right)), reliability_note(paired_difference(right, wrong)),
        reliability_note(zero_difference(right)),
        reliability_note(mean_interval(partly)), reliability_note(paired_difference(right, partly)),
    ):  # fmt: skip
        assert note == "Few items: the interval rests on 40 items, and is to be relied on from 50 items on."
    a, b = results(31, 0)
    for note in (
        reliability_note(mean_interval(a)),
        reliability_note(paired_difference(a, b)),
        reliability_note(zero_difference(a)),
    ):
        assert note == "Few documents: the interval rests on 31 texts, and is to be relied on from 50 texts on."
    alone, _ = results(1, 0)
    assert "3 documents of one text" in reliability_note(mean_interval(alone))


# --- paired differences ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("texts", [1, 2, 7, 31])
def test_the_value_is_the_difference_of_the_means_and_lies_within(texts: int) -> None:
    a, b = results(texts, seed=texts)
    found = paired_difference(a, b)
    assert found.value == pytest.approx(b.mean - a.mean)
    assert found.low < found.value < found.high
    assert found.n == len(a.sums)


@pytest.mark.parametrize("texts", [1, 2, 7, 31])
def test_swapping_the_two_turns_the_interval_round(texts: int) -> None:
    a, b = results(texts, seed=40 + texts)
    one, other = paired_difference(a, b, seed=9), paired_difference(b, a, seed=9)
    assert (other.value, other.low, other.high) == pytest.approx((-one.value, -one.high, -one.low), abs=1e-9)


@given(st.floats(-5, 5), st.floats(-5, 5), st.sampled_from([1, 2, 9]))
@settings(max_examples=15)
def test_a_shift_of_b_moves_the_interval_and_one_of_both_does_not(by: float, both: float, texts: int) -> None:
    a, b = results(texts, seed=3)
    still, moved = paired_difference(a, b), paired_difference(shifted(a, both), shifted(b, both + by))
    expected = (still.value + by, still.low + by, still.high + by)
    assert (moved.value, moved.low, moved.high) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("texts", [1, 2, 30])
def test_identical_results_differ_by_exactly_nothing(texts: int) -> None:
    a, _ = results(texts, seed=1)
    found = paired_difference(a, a)
    assert (found.value, found.low, found.high) == (0, 0, 0)


@pytest.mark.parametrize("seed", range(40))
def test_a_constant_difference_has_no_width(seed: int) -> None:
    """Also where rounding makes the texts differ in the last digit: found by chance, a division of 0 by 0."""
    a, _ = results(2 + seed % 5, seed)
    by = float(np.random.default_rng(seed).uniform(-9, 9))
    found = paired_difference(a, shifted(a, by))
    assert (found.value, found.low, found.high) == pytest.approx((by, by, by), abs=1e-9)


def test_results_over_other_items_are_refused() -> None:
    a, b = results(4, seed=2)
    longer = replace(b, counts=(b.counts[0] + 1, *b.counts[1:]))
    for other in (replace(b, tokens="u"), longer, replace(b, sums=b.sums[1:], counts=b.counts[1:])):
        with pytest.raises(ValueError, match="not over the same items"):
            paired_difference(a, other)


def test_the_order_and_the_names_of_items_do_not_matter() -> None:
    a, b = results(12, seed=6)
    order = np.random.default_rng(0).permutation(len(a.sums))

    def reordered(result: EvalResult) -> EvalResult:
        sums, counts, clusters = (tuple(np.array(v)[order].tolist()) for v in (result.sums, result.counts, a.clusters))
        return replace(result, sums=sums, counts=counts, clusters=tuple(c + 17 for c in clusters))

    one, other = paired_difference(a, b, seed=4), paired_difference(reordered(a), reordered(b), seed=4)
    assert (one.value, one.low, one.high) == pytest.approx((other.value, other.low, other.high), abs=1e-9)
    assert paired_difference(a, b, seed=4) == one != paired_difference(a, b, seed=5)


@pytest.mark.parametrize("texts", [2, FEW_CLUSTERS - 1, FEW_CLUSTERS, FEW_CLUSTERS + 7])
def test_reliability_counts_texts_and_not_items(texts: int) -> None:
    found = paired_difference(*results(texts, seed=8, per_text=5))
    assert (found.clusters, found.n) == (texts, 5 * texts)
    assert found.reliable == (texts >= FEW_CLUSTERS) == (reliability_note(found) == "")
    assert found.reliable or f"{texts} texts" in reliability_note(found)


def test_items_of_one_text_are_resampled_but_never_called_reliable() -> None:
    one = results(1, seed=5, per_text=60)
    own = tuple(replace(result, clusters=tuple(range(60))) for result in one)
    found, apart = paired_difference(*one), paired_difference(*own)
    assert (found.low, found.high) == (apart.low, apart.high)
    assert apart.reliable
    assert not found.reliable
    assert "60 documents of one text" in reliability_note(found)


def test_a_single_item_tells_nothing() -> None:
    found = paired_difference(*results(1, seed=5, per_text=1))
    assert (found.low, found.high, found.reliable) == (-math.inf, math.inf, False)


def test_texts_that_move_together_widen_the_interval() -> None:
    """50 items a text that all change alike hold no more than one item: the width must not shrink by sqrt(50)."""
    rng = np.random.default_rng(12)
    change = rng.normal(0, 1, 40)

    def width(per_text: int) -> float:
        counts, clusters = (10,) * 40 * per_text, tuple(np.repeat(np.arange(40), per_text).tolist())
        a = EvalResult("perplexity", "t", (0.0,) * len(counts), counts, clusters)
        found = paired_difference(a, replace(a, sums=tuple(10 * np.repeat(change, per_text))))
        return found.high - found.low

    assert width(50) == pytest.approx(width(1), rel=1e-6)


@pytest.mark.parametrize("texts", [1, 7, 31])
def test_the_interval_of_a_mean_is_that_of_its_difference_to_nothing(texts: int) -> None:
    _, b = results(texts, seed=texts)
    nothing = replace(b, sums=(0.0,) * len(b.sums))
    assert mean_interval(b, seed=2) == paired_difference(nothing, b, seed=2)
    assert mean_interval(b).value == pytest.approx(b.mean)


# --- the studentised bootstrap -------------------------------------------------------------------------------------


def test_it_covers_the_truth_as_often_as_it_says() -> None:
    """Exponential changes a token times uneven lengths, independent of them, so that the true ratio is their mean."""
    rng, sets, missed_low, missed_high = np.random.default_rng(2024), 300, 0, 0
    for seed in range(sets):
        counts = rng.integers(20, 200, 50).astype(float)
        low, high = bootstrap_t((rng.exponential(1, 50) - 0.7) * counts, counts, seed, resamples=1_000)
        missed_low += high < 0.3
        missed_high += low > 0.3
    assert 0.92 <= 1 - (missed_low + missed_high) / sets <= 0.98
    assert max(missed_low, missed_high) < 0.06 * sets  # and errs on both sides


def test_it_agrees_with_the_normal_interval_where_there_is_no_skew() -> None:
    normal = np.random.default_rng(1).normal(0.2, 1, 200)
    values = np.concatenate([normal, 0.4 - normal])  # symmetric about 0.2
    low, high = bootstrap_t(values, np.ones(400), seed=3)
    half = 1.96 * values.std(ddof=1) / 20
    assert (low, high) == pytest.approx((0.2 - half, 0.2 + half), abs=0.06 * half)


@pytest.mark.parametrize("sign", [1, -1])
def test_it_follows_its_definition_where_the_data_lean(sign: int) -> None:
    """Each resample's mean, in its own standard errors, from other resamples: chapter 12 of Efron and Tibshirani."""
    values = sign * np.random.default_rng(7).exponential(1, 60)
    picks = np.random.default_rng(1).choice(values, (100_000, 60))
    errors = picks.std(1, ddof=1) / math.sqrt(60)
    low, high = np.quantile((picks.mean(1) - values.mean()) / errors, (0.025, 0.975))
    error = values.std(ddof=1) / math.sqrt(60)
    expected = values.mean() - high * error, values.mean() - low * error
    assert bootstrap_t(values, np.ones(60), seed=0, resamples=100_000) == pytest.approx(expected, abs=0.08 * error)
    percentiles = np.quantile(picks.mean(1), (0.025, 0.975))
    assert np.min(sign * (np.array(expected) - percentiles)) > 0.1 * error, "plain percentiles are too low"


def test_of_few_texts_it_is_students() -> None:
    values = np.random.default_rng(4).normal(1, 2, 6)
    low, high = bootstrap_t(values, np.ones(6), seed=0)
    half = 2.570582 * values.std(ddof=1) / math.sqrt(6)  # t(5), any table of it
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), rel=1e-6)


def test_a_higher_level_gives_a_wider_interval() -> None:
    values = np.random.default_rng(7).exponential(1, 60)
    low, high = bootstrap_t(values, np.ones(60), seed=0)
    wider = bootstrap_t(values, np.ones(60), seed=0, level=0.99)
    assert wider[0] < low < high < wider[1]


@given(st.floats(0.01, 100), st.integers(2, 14))
@settings(max_examples=20)
def test_it_scales_with_its_data(scale: float, n: int) -> None:
    rng = np.random.default_rng(n)
    sums, counts = rng.normal(1, 2, n), rng.integers(1, 9, n).astype(float)
    low, high = bootstrap_t(sums, counts, seed=1, resamples=500)
    assert bootstrap_t(sums * scale, counts, seed=1, resamples=500) == pytest.approx((low * scale, high * scale))
    assert bootstrap_t(sums, counts * scale, seed=1, resamples=500) == pytest.approx((low / scale, high / scale))


# --- right or wrong ------------------------------------------------------------------------------------------------


def right(outcomes: list[int], clusters: list[int] | None = None) -> EvalResult:
    n = len(outcomes)
    return EvalResult("acc", "t", tuple(map(float, outcomes)), (1,) * n, tuple(clusters or range(n)))


def test_paired_shares_give_a_published_interval() -> None:
    """Approval of a prime minister, asked of the same 1,600 people twice: −0.06 to −0.02, Agresti 2002, table 10.1."""
    first = right([1] * 794 + [1] * 150 + [0] * 86 + [0] * 570)
    second = right([1] * 794 + [0] * 150 + [1] * 86 + [0] * 570)
    found = paired_difference(first, second)
    assert (found.value, round(found.low, 2), round(found.high, 2)) == (pytest.approx(-0.04), -0.06, -0.02)


@pytest.mark.parametrize("n", [20, 400])
def test_no_difference_that_was_seen_is_none_that_is_proved(n: int) -> None:
    same = right([1, 0] * (n // 2))
    found = paired_difference(same, same)
    assert found.value == 0
    assert found.low == -found.high != 0
    assert found.high < 3 / n, "about as wide as the rule of three"
    assert (zero_difference(same).low, zero_difference(same).high) == (0, 0), "a model does not differ from itself"


@pytest.mark.parametrize(("count", "n"), [(0, 60), (3, 60), (41, 80), (200, 200)])
def test_the_interval_of_a_share_is_wilsons(count: int, n: int) -> None:
    found = mean_interval(right([1] * count + [0] * (n - count)))
    expected = scipy.stats.binomtest(count, n).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize(
    ("n", "lost", "gained"), [(50, 0.1, 0.1), (50, 0.05, 0.02), (120, 0.05, 0.02), (400, 0.2, 0.1)]
)
def test_intervals_of_paired_shares_cover(n: int, lost: float, gained: float) -> None:
    draw, sets, missed = np.random.default_rng(n), 2_000, 0
    for _ in range(sets):
        kinds = draw.choice(3, n, p=[lost, gained, 1 - lost - gained])
        found = paired_difference(right((kinds != 1).astype(int).tolist()), right((kinds != 0).astype(int).tolist()))
        missed += not found.low <= gained - lost <= found.high
    assert 0.93 <= 1 - missed / sets <= 0.99


# --- the median --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [*range(1, 40), 101, 1_000, 2_001])
def test_the_median_is_enclosed_by_the_narrowest_pair_that_the_binomial_allows(n: int) -> None:
    """P(x_(i) <= median < x_(n+1-i)) = 1 - 2 P(Binomial(n, 1/2) < i); the largest i that keeps 95% is asked for."""
    fewer = accumulate(math.comb(n, j) for j in range(n // 2))  # ways to have 0, 0..1, 0..2 … values below the median
    enough = [i for i, ways in enumerate(fewer, start=1) if 2 * ways * 20 <= 2**n]
    rank = max(enough, default=1)
    values = np.random.default_rng(n).permutation(np.arange(1, n + 1) ** 2.0)
    middle, low, high = median_interval(values)
    assert (low, high) == (rank**2, (n + 1 - rank) ** 2)
    assert middle == np.median(values)
    assert bool(enough) == (n >= 6)


def test_the_interval_of_the_median_covers_it_in_simulation() -> None:
    rng = np.random.default_rng(3)
    found = [median_interval(rng.exponential(1, 15)) for _ in range(2_000)]
    covered = np.mean([low <= math.log(2) <= high for _, low, high in found])
    assert 0.945 <= covered <= 0.98  # 96.5% for 15 values


# -- Student's t ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.5, 0.6, 0.9, 0.975, 0.999])
def test_quantiles_of_student_in_closed_form(p: float) -> None:
    """One and two degrees by their formulas, many by the normal distribution."""
    assert student_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), abs=1e-9)
    a = 2 * p - 1
    assert student_quantile(p, 2) == pytest.approx(a * math.sqrt(2 / (1 - a * a)), abs=1e-9)
    assert student_quantile(p, 100_000) == pytest.approx(NormalDist().inv_cdf(p), abs=1e-3)


@pytest.mark.parametrize("degrees", [3, 4, 7, 12, 31])
def test_quantiles_of_student_by_summing_the_density(degrees: int) -> None:
    constant = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)
    x = np.linspace(0, student_quantile(0.95, degrees), 200_001)
    density = constant * (1 + x * x / degrees) ** (-(degrees + 1) / 2)
    assert 0.5 + np.trapezoid(density, x) == pytest.approx(0.95, abs=1e-8)


def test_the_interval_of_a_score_is_wider_where_few_draws_made_it() -> None:
    assert score_interval(Score(1.0)) == (None, None)
    low, high = score_interval(Score(1.0, 0.5))
    assert (low, high) == pytest.approx((1 - 1.959964 * 0.5, 1 + 1.959964 * 0.5), abs=1e-5)
    few = score_interval(Score(1.0, 0.5, 2))
    assert few == pytest.approx((1 - 4.302653 * 0.5, 1 + 4.302653 * 0.5), abs=1e-4)  # t(2), any table of it


@given(st.lists(st.integers(-5, 5), min_size=2, max_size=12))
def test_ranks_are_those_of_sorting_and_ties_share_theirs(values: list[int]) -> None:
    found = ranks([float(v) for v in values])
    for value, rank in zip(values, found, strict=True):
        below, equal = sum(v < value for v in values), sum(v == value for v in values)
        assert rank == below + (equal - 1) / 2
    assert correlation(found, found) == pytest.approx(1.0 if len(set(values)) > 1 else 0.0)
    assert correlation(found, -found) == pytest.approx(-1.0 if len(set(values)) > 1 else 0.0)
