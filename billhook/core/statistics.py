"""How sure a mean or a difference is: bootstraps that resample texts, not tokens, and score intervals. numpy only."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from billhook.core.results.measured import Estimate, EvalResult, Reason, Score

Floats = NDArray[np.float64]
FEW_CLUSTERS = 50  # below, even the best interval covers less than it says
TOO_FEW = 10  # texts that a bootstrap says nothing about: Student's t instead
Unit = Literal["text", "item"]  # what is resampled, as a reader is told
LOSS_EVALUATIONS = ("perplexity",)  # evaluations of which less is better
RESAMPLES = 10_000
CHUNK_RESAMPLES = 500  # resamples at a time: 500 × clusters numbers in memory


def exp_capped(nats: float) -> float:
    """exp, with a finite answer for a model that is broken beyond what a float holds."""
    return math.exp(min(nats, 700.0))


def paired_difference(a: EvalResult, b: EvalResult, seed: int = 0, level: float = 0.95) -> Estimate:
    """Mean of b - a per token, in nats, with its interval (95% by default) over the texts of the items.

    A studentised bootstrap of texts (`bootstrap_t`); where all items come from one text, items are resampled instead.
    Of outcomes of 0 and 1, the interval of Agresti and Min 2005 (Statistics in Medicine 24): Wald's, after half an item
    was added to each cell of the table, which has a width where no item differs. Copies of an item count by
    `effective_items`. Below 50 clusters the interval is marked unreliable. Raises ValueError if the two results are not
    over the same items.
    """
    if (a.tokens, a.counts) != (b.tokens, b.counts):
        raise ValueError("These two results are not over the same items, so they cannot be paired.")
    change = np.asarray(b.sums) - np.asarray(a.sums)
    if is_binary(a) and is_binary(b):
        n = effective_items(a)
        gained, lost = (n * int(differs.sum()) / len(change) + 0.5 for differs in (change > 0, change < 0))
        centre = (gained - lost) / (n + 2)
        half = _z(level) * math.sqrt(gained + lost - (gained - lost) ** 2 / (n + 2)) / (n + 2)
        ends = centre - half, centre + half
        return _interval(float(change.mean()), ends, len(change), len(set(a.clusters)), unit="item")
    return _clustered(change, np.asarray(a.counts, np.float64), a.clusters, seed, level, unit=_unit(a))


def zero_difference(a: EvalResult) -> Estimate:
    """What a model differs from itself on these items: nothing, whatever their number."""
    clusters = len(set(a.clusters))
    many = clusters if clusters > 1 else len(a.sums)
    return _interval(0.0, (0.0, 0.0), len(a.sums), many, single_text=clusters == 1, unit=_unit(a))


def mean_interval(result: EvalResult, seed: int = 0) -> Estimate:
    """Mean of one result per token, in nats, with its interval over texts as in `paired_difference`.

    Of outcomes of 0 and 1 Wilson's, in which copies of an item count by `effective_items`.
    """
    if is_binary(result):
        n = effective_items(result)
        items, texts = len(result.sums), len(set(result.clusters))
        return _interval(result.mean, wilson_interval(n * sum(result.sums) / items, n), items, texts, unit="item")
    counts = np.asarray(result.counts, np.float64)
    return _clustered(np.asarray(result.sums), counts, result.clusters, seed, unit=_unit(result))


def is_binary(result: EvalResult) -> bool:
    """Whether outcomes are 0 and 1, of several items."""
    several = len(result.clusters) > 1
    return (
        several and result.name not in LOSS_EVALUATIONS and set(result.sums) <= {0.0, 1.0} and set(result.counts) == {1}
    )


def effective_items(result: EvalResult) -> float:
    """How many independent items those of a result are worth, where those of one text say the same.

    Their number squared, over the sum of the squares of how many each text has: all of them where none is a copy.

    Source: Kish 1965, Survey Sampling, the effective size of a sample of unequal weights.
    """
    sizes = Counter(result.clusters).values()
    return sum(sizes) ** 2 / sum(size**2 for size in sizes)


def _unit(result: EvalResult) -> Unit:
    """What was counted: items of a task, which count 1 each, or texts, whose documents count their tokens."""
    return "text" if result.name in LOSS_EVALUATIONS or set(result.counts) != {1} else "item"


def paired_ratio(a: Sequence[float], b: Sequence[float], seed: int = 0) -> Estimate:
    """Mean of b / mean of a over the same items, with its interval over the items, each pair resampled together.

    With 1 for every a it is the mean of b.
    """
    if len(a) != len(b):
        raise ValueError("These two are not over the same items, so they cannot be paired.")
    return _clustered(np.asarray(b, np.float64), np.asarray(a, np.float64), tuple(range(len(a))), seed, unit="item")


def wilson_interval(count: float, n: float) -> tuple[float, float]:
    """The 95% interval of a share of n independent outcomes: Wilson's, which has a width at 0 and 1 too."""
    z = _z(0.95)
    centre = (count + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(count * (n - count) / n + z * z / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def _z(level: float) -> float:
    return NormalDist().inv_cdf((1 + level) / 2)


def by_cluster(values: Floats, weight: Floats, clusters: Sequence[int]) -> tuple[Floats, Floats]:
    """Sums of `values` [items], and of their weights, over the items of each text; of a single one, item by item."""
    groups = np.unique(np.asarray(clusters), return_inverse=True)[1]
    if int(groups.max()) == 0:
        groups = np.arange(len(values))
    return np.bincount(groups, values).astype(np.float64), np.bincount(groups, weight).astype(np.float64)


def _clustered(
    values: Floats, weight: Floats, clusters: Sequence[int], seed: int, level: float = 0.95, *, unit: Unit
) -> Estimate:
    sums, counts = by_cluster(values, weight, clusters)
    ends = bootstrap_t(sums, counts, seed, level)
    single = len(set(clusters)) == 1
    return _interval(float(sums.sum() / counts.sum()), ends, len(values), len(sums), single_text=single, unit=unit)


def _interval(
    value: float, ends: tuple[float, float], n: int, clusters: int, *, single_text: bool = False, unit: Unit
) -> Estimate:
    reliable = clusters >= FEW_CLUSTERS and not single_text
    reason: Reason = "few_items" if unit == "item" else "one_text" if single_text else "few_texts"
    return Estimate(value, *ends, n, clusters, reliable, "" if reliable else reason)


def bootstrap_t(
    sums: Floats, counts: Floats, seed: int, level: float = 0.95, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Estimate of sum(sums)/sum(counts) by the studentised bootstrap; `sums`, `counts`: [clusters].

    Sums and counts are resampled together, and each ratio is held against its own standard error. Of fewer than 10
    clusters that says nothing: then the interval is Student's.

    Source: Efron and Tibshirani 1993, chapter 12; the error of a ratio of sums by its linearisation.
    """
    n = len(sums)
    centre = float(sums.sum() / counts.sum())
    if n < 2:
        return -math.inf, math.inf
    apart = sums - centre * counts  # exact where texts differ by rounding only
    if np.allclose(apart / counts, 0, atol=1e-12 * max(1.0, abs(centre))):
        return centre, centre
    error = float(ratio_error(np.ones((1, n)), apart, counts)[0])
    if n < TOO_FEW:
        half = student_quantile((1 + level) / 2, n - 1) * error
        return centre - half, centre + half
    random, pieces = np.random.default_rng(seed), []
    for start in range(0, resamples, CHUNK_RESAMPLES):
        draws = random.multinomial(n, np.full(n, 1 / n), size=min(CHUNK_RESAMPLES, resamples - start)).astype(
            np.float64
        )
        errors = ratio_error(draws, apart, counts)
        some = errors > 1e-9 * error  # a draw of equal texts alone has no error of its own
        pieces.append(((draws @ apart) / (draws @ counts))[some] / errors[some])
    low, high = np.quantile(np.concatenate(pieces), ((1 - level) / 2, (1 + level) / 2))
    return centre - float(high) * error, centre - float(low) * error


def ratio_error(draws: Floats, sums: Floats, counts: Floats) -> Floats:
    """Standard error of the ratio of each draw: draws [resamples, texts], how often each text was drawn."""
    n, total = draws.shape[1], draws @ counts
    ratio = (draws @ sums) / total
    squares = draws @ sums**2 - 2 * ratio * (draws @ (sums * counts)) + ratio**2 * (draws @ counts**2)
    return np.asarray(np.sqrt(n / (n - 1) * squares.clip(min=0.0)) / total, dtype=np.float64)


def median_interval(values: tuple[float, ...] | Floats) -> tuple[float, float, float]:
    """Median and the order statistics that enclose it with at least 95% confidence where the count allows it.

    Fewer than 6 values cannot: then the interval is their whole range.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    n = len(ordered)
    # P(fewer than k+1 of n fall below the median) <= 2.5%, by the binomial distribution
    tail, k, ways = 0, -1, 1  # in whole numbers, of 2**n: 0.5**n is 0 for n > 1074
    while (tail + ways) * 40 <= 2**n:
        tail += ways
        k += 1
        ways = ways * (n - k) // (k + 1)
    k = max(k, 0)
    return float(np.median(ordered)), float(ordered[k]), float(ordered[n - 1 - k])


def student_quantile(p: float, degrees: int) -> float:
    """The p-quantile of Student's t with so many degrees of freedom, 0.5 <= p < 1.

    Source: the distribution function in closed form for whole degrees, Abramowitz and Stegun 1964, 26.7.3 and 26.7.4.
    """
    low, high = 0.0, 1.0
    while _student(high, degrees) < p:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _student(middle, degrees) < p else (low, middle)
    return high


def _student(t: float, degrees: int) -> float:
    """P(T <= t) for t >= 0."""
    angle = math.atan2(t, math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = total = (cosine if odd else 1.0) if degrees > 1 else 0.0
    for k in range(2 + odd, degrees, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    central = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return 0.5 + central / 2


def score_interval(score: Score) -> tuple[float | None, float | None]:
    """The 95% interval of a metric's score: by Student's t where its degrees of freedom are few, else by the normal."""
    if score.se is None:
        return None, None
    wide = NormalDist().inv_cdf(0.975) if score.degrees is None else student_quantile(0.975, score.degrees)
    return score.value - wide * score.se, score.value + wide * score.se


def ranks(values: Sequence[float]) -> Floats:
    """Rank of each value from 0; equal ones share their mean rank."""
    _, which, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts + 1) / 2
    return np.asarray(middle[which], dtype=np.float64)


def correlation(a: Floats, b: Floats) -> float:
    """Pearson's correlation; of ranks it is Spearman's. Of constant values 0."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def knee(shares: Sequence[float], losses: Sequence[float]) -> int | None:
    """Where a curve of losses over what is removed bends most: the point farthest below the line between its ends.

    None where it does not bend upwards, or there are fewer than three points.

    Source: Satopää et al. 2011, Finding a "kneedle" in a haystack.
    """
    if len(shares) < 3 or shares[-1] <= shares[0] or losses[-1] <= losses[0]:
        return None
    wide, tall = shares[-1] - shares[0], losses[-1] - losses[0]
    below = [(x - shares[0]) / wide - (y - losses[0]) / tall for x, y in zip(shares, losses, strict=True)]
    best = max(range(len(below)), key=lambda i: below[i])
    return best if below[best] > 0 else None
