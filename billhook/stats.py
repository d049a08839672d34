"""How A beats B is decided: paired bootstraps that resample texts, not tokens. numpy only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from billhook.records import EvalResult, Interval, Score

Floats = NDArray[np.float64]
FEW_CLUSTERS = 50  # below, even the best interval covers less than it says
RESAMPLES = 10_000
CHUNK = 500  # resamples at a time: 500 × clusters numbers in memory


def exp(nats: float) -> float:
    """exp, with a finite answer for a model that is broken beyond what a float holds."""
    return math.exp(min(nats, 700.0))


def paired_difference(a: EvalResult, b: EvalResult, seed: int = 0, level: float = 0.95) -> Interval:
    """Mean of b - a per token, in nats, with a BCa interval (95% by default) over the texts of the items.

    The token-weighted mean is a ratio of two sums over texts; both are resampled together (Efron 1987, BCa; the
    acceleration from the jackknife). Where all items come from one text, items are resampled instead. Below 50
    clusters the interval is marked unreliable. Raises ValueError if the two results are not over the same items.
    """
    if (a.tokens, a.counts) != (b.tokens, b.counts):
        raise ValueError("These two results are not over the same items, so they cannot be paired.")
    change = np.asarray(b.sums) - np.asarray(a.sums)
    return _clustered(change, np.asarray(a.counts, np.float64), a.clusters, seed, level)


def mean_interval(result: EvalResult, seed: int = 0) -> Interval:
    """Mean of one result per token, in nats, with its interval over texts as in `paired_difference`."""
    return _clustered(np.asarray(result.sums), np.asarray(result.counts, np.float64), result.clusters, seed)


def paired_ratio(a: Sequence[float], b: Sequence[float], seed: int = 0) -> Interval:
    """Mean of b / mean of a over the same items, with a BCa interval over the items, each pair resampled together.

    With 1 for every a it is the mean of b.
    """
    if len(a) != len(b):
        raise ValueError("These two are not over the same items, so they cannot be paired.")
    return _clustered(np.asarray(b, np.float64), np.asarray(a, np.float64), tuple(range(len(a))), seed)


def share_interval(count: int, n: int) -> tuple[float, float]:
    """The 95% interval of a share of n independent outcomes: Wilson's, which has a width at 0 and 1 too."""
    z = NormalDist().inv_cdf(0.975)
    centre = (count + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(count * (n - count) / n + z * z / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def by_cluster(values: Floats, weight: Floats, clusters: Sequence[int]) -> tuple[Floats, Floats]:
    """Sums of `values` [items], and of their weights, over the items of each text; of a single one, item by item."""
    groups = np.unique(np.asarray(clusters), return_inverse=True)[1]
    if int(groups.max()) == 0:
        groups = np.arange(len(values))
    return np.bincount(groups, values).astype(np.float64), np.bincount(groups, weight).astype(np.float64)


def _clustered(values: Floats, weight: Floats, clusters: Sequence[int], seed: int, level: float = 0.95) -> Interval:
    sums, counts = by_cluster(values, weight, clusters)
    single_text = len(set(clusters)) == 1
    low, high = bca(sums, counts, seed, level)
    n = len(sums)
    reliable = n >= FEW_CLUSTERS and not single_text
    note = "" if reliable else _few(n, single_text)
    return Interval(float(sums.sum() / counts.sum()), low, high, len(values), n, reliable, note)


def _few(n: int, single_text: bool) -> str:
    what = "documents of one text" if single_text else "texts"
    return f"Few documents: the interval rests on {n} {what}, and is to be relied on from {FEW_CLUSTERS} texts on."


def bca(
    sums: Floats, counts: Floats, seed: int, level: float = 0.95, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Bias-corrected and accelerated interval for sum(sums)/sum(counts); `sums`, `counts`: [clusters]."""
    n = len(sums)
    centre = sums.sum() / counts.sum()
    if n < 2 or np.allclose(sums / counts, centre, rtol=0, atol=1e-15):
        return (float(centre), float(centre)) if n > 1 else (float("-inf"), float("inf"))
    random, pieces = np.random.default_rng(seed), []
    for start in range(0, resamples, CHUNK):
        draws = random.multinomial(n, np.full(n, 1 / n), size=min(CHUNK, resamples - start))  # [chunk, clusters]
        pieces.append((draws @ sums) / (draws @ counts))
    replicas = np.sort(np.concatenate(pieces))
    left_out = (sums.sum() - sums) / (counts.sum() - counts)
    spread = left_out.mean() - left_out
    power = (spread**2).sum() ** 1.5  # 0 where the texts differ by rounding errors only
    acceleration = (spread**3).sum() / (6 * power) if power else 0.0
    normal = NormalDist()
    near = 1e-9 * (replicas[-1] - replicas[0])  # a replica that drew every text once ties, up to rounding
    below = ((replicas < centre - near).sum() + (replicas <= centre + near).sum()) / (2 * resamples)
    bias = normal.inv_cdf(min(max(float(below), 1 / resamples), 1 - 1 / resamples))
    ends = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        z = bias + normal.inv_cdf(tail)
        ends.append(float(np.quantile(replicas, normal.cdf(bias + z / (1 - acceleration * z)))))
    return ends[0], ends[1]


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
