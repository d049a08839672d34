"""Bounds that hold at all looks of a series at once, whatever the looks have in common.

A watch asks the same items again and again, so its rounds are not new evidence, and a bound of 95% a round would fail
in some round. Here every look has a share of one chance of error, `ALPHA`, and the shares of all looks sum to one. By
the union bound this holds for any dependence of the looks: equal ones, as under greedy decoding, or noisy ones.

One look is a test by betting on the mean of values between 0 and 1: the e-value is a mixture over bets, and Markov's
inequality bounds how often it is large.

Source: Waudby-Smith and Ramdas 2024, Estimating means of bounded random variables by betting, Journal of the Royal
Statistical Society B 86 (arXiv 2010.09686); Vovk and Wang 2021, E-values: calibration, combination and applications,
Annals of Statistics 49, for the weighted sum of dependent e-values.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from billhook.core.results.measured import EvalResult
from billhook.core.statistics import by_cluster, ratio_error, student_quantile

ALPHA = 0.01  # the chance that a series without change ever raises an alert
SHARES = 2.11  # at least the sum of 1 / (n ln² n) from n = 2
BETS = tuple((k + 0.5) / 50 for k in range(50))  # shares of the capital that the mixture stakes

Bounds = tuple[float, float]
UNBOUNDED: Bounds = (-math.inf, math.inf)


def evidence_needed(look: int, series: int = 1) -> float:
    """Return the log e-value that a look must reach, in nats, so that all looks err with a chance of `ALPHA` at most.

    Arguments:
        look: its number, from 1.
        series: how many things each look holds against a limit; each has an equal share of the chance.
    """
    n = look + 1
    return math.log(series * SHARES * n * math.log(n) ** 2 / ALPHA)


def log_e_value(counts: Mapping[float, int], mean: float) -> float:
    """Return the log of the e-value against a mean of at most `mean`, in nats.

    Arguments:
        counts: how often each value between 0 and 1 was seen, of independent items.
        mean: above 0; at a mean of at most this the expected e-value is at most 1.
    """
    exponents = [sum(n * _log(1 - c + c * y / mean) for y, n in counts.items()) for c in BETS]
    most = max(exponents)
    return most + math.log(math.fsum(math.exp(x - most) for x in exponents) / len(BETS))


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def mean_bounds(counts: Mapping[float, int], needed: float) -> Bounds:
    """Return the lower and the upper bound of the mean of values between 0 and 1.

    Arguments:
        counts: how often each value was seen.
        needed: the log e-value that excludes a mean, from `evidence_needed`.
    """
    mirrored = Counter[float]()
    for value, count in counts.items():
        mirrored[1 - value] += count
    return _lower(counts, needed), 1 - _lower(mirrored, needed)


def _lower(counts: Mapping[float, int], needed: float) -> float:
    """Return the largest mean that is excluded from above: the e-value falls as the mean grows."""
    total = sum(counts.values())
    high = math.fsum(value * count for value, count in counts.items()) / total if total else 0.0
    if high <= 0:
        return 0.0
    low = 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if middle > 0 and log_e_value(counts, middle) >= needed else (low, middle)
    return low


def loss_bounds(losses: Sequence[float], needed: float) -> Bounds:
    """Return bounds of the mean loss of items, each between -1 (gained) and 1 (lost)."""
    low, high = mean_bounds(Counter((1 + loss) / 2 for loss in losses), needed)
    return 2 * low - 1, 2 * high - 1


def item_losses(baseline: EvalResult, now: EvalResult) -> list[float]:
    """Return what each text or item lost of outcomes of 0 and 1, -1 to 1; copies of an item are one.

    Raises ValueError if the two results are not over the same items.
    """
    if baseline.clusters != now.clusters:
        raise ValueError("These two results are not over the same items, so they cannot be paired.")
    sums: dict[int, list[float]] = {}
    for text, before, after in zip(baseline.clusters, baseline.sums, now.sums, strict=True):
        sums.setdefault(text, []).append(before - after)
    return [math.fsum(each) / len(each) for each in sums.values()]


def nats_bounds(baseline: EvalResult, now: EvalResult, needed: float) -> Bounds:
    """Return bounds of the rise in nats per token, by Student's t over texts, which is approximate.

    Nats have no largest value, so that betting does not apply. `needed`: in nats, as a chance of exp(-needed).
    """
    rise = np.asarray(now.sums) - np.asarray(baseline.sums)
    sums, counts = by_cluster(rise, np.asarray(now.counts, np.float64), now.clusters)
    n, centre = len(sums), float(sums.sum() / counts.sum())
    if n < 2:
        return UNBOUNDED
    error = float(ratio_error(np.ones((1, n)), sums - centre * counts, counts)[0])
    half = student_quantile(1 - max(math.exp(-needed), 1e-14), n - 1) * error
    return centre - half, centre + half


def median_bounds(values: Sequence[float], needed: float) -> Bounds:
    """Return bounds of the median of independent values; infinite where too few values can exclude anything."""
    ordered, n = sorted(values), len(values)
    for k in range(n // 2 + 1, n + 1):
        if log_e_value({1.0: k, 0.0: n - k}, 0.5) >= needed:
            return ordered[n - k], ordered[k - 1]
    return UNBOUNDED
