"""Whether B is better than A, as good or worse, over the same items: p-values, verdicts, and what is still missing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

from billhook.core.results.measured import Estimate, EvalResult
from billhook.core.statistics import (
    CHUNK_RESAMPLES,
    LOSS_EVALUATIONS,
    RESAMPLES,
    by_cluster,
    is_binary,
    paired_difference,
    ratio_error,
    zero_difference,
)

LEVEL = 0.95
Verdict = Literal["better", "equivalent", "worse", "undecided"]


@dataclass(frozen=True, slots=True)
class Pair:
    """A and B over the same items. `change`: mean of B minus A, 95%; `interval90`: the same, 90%; `p`: of no change.

    `gained`, `lost`: items that only B, and that only A has right; None where outcomes are not 0 and 1.
    """

    change: Estimate
    interval90: Estimate
    p: float
    gained: int | None
    lost: int | None
    sign: int  # 1 where more is better, -1 where less is


def compare_pair(a: EvalResult, b: EvalResult, seed: int = 0, *, same: bool = False) -> Pair:
    """Compare two results over the same items, of one model if it is the `same`. Raises ValueError if they are not.

    p is McNemar's mid-p where outcomes are 0 and 1, in which copies of an item count once; else that of a studentised
    bootstrap over texts.
    """
    change = zero_difference(a) if same else paired_difference(a, b, seed)
    near = change if same else paired_difference(a, b, seed, level=2 * LEVEL - 1)
    sign = -1 if a.name in LOSS_EVALUATIONS else 1
    if not (is_binary(a) and is_binary(b)):
        return Pair(change, near, bootstrap_p(a, b, seed), None, None, sign)
    gained = sum(y > x for x, y in zip(a.sums, b.sums, strict=True))
    lost = sum(y < x for x, y in zip(a.sums, b.sums, strict=True))
    texts = np.bincount(np.unique(a.clusters, return_inverse=True)[1], np.asarray(b.sums) - np.asarray(a.sums))
    p = mcnemar(int((texts > 0).sum()), int((texts < 0).sum()))
    return Pair(change, near, p, gained, lost, sign)


def mcnemar(gained: int, lost: int) -> float:
    """The two-sided mid-p of McNemar's test: as many items gained as lost?

    Source: Fagerland, Lydersen and Laake 2013, BMC Medical Research Methodology 13:91.
    """
    n, fewer = gained + lost, min(gained, lost)
    ways = [math.comb(n, k) for k in range(fewer + 1)]
    return float((2 * sum(ways) - ways[-1]) / 2**n)


def bootstrap_p(a: EvalResult, b: EvalResult, seed: int = 0) -> float:
    """Two-sided p that the mean of b - a per token is 0: how often a resampled mean is as many errors from its own.

    Source: the studentised bootstrap, Efron and Tibshirani 1993, chapter 16; the error of a ratio of sums over texts.
    """
    sums, counts = by_cluster(np.asarray(b.sums) - np.asarray(a.sums), np.asarray(a.counts, np.float64), a.clusters)
    n = len(sums)
    if n < 2:
        return 1.0
    centre = float(sums.sum() / counts.sum())
    error = ratio_error(np.ones(n)[None], sums, counts)[0]
    if error <= 1e-12 * max(1.0, abs(centre)):
        return 1.0 if abs(centre) < 1e-12 else 1 / (RESAMPLES + 1)
    random, beyond = np.random.default_rng(seed), 0
    for start in range(0, RESAMPLES, CHUNK_RESAMPLES):
        size = min(CHUNK_RESAMPLES, RESAMPLES - start)
        draws = random.multinomial(n, np.full(n, 1 / n), size=size).astype(np.float64)
        means, errors = (draws @ sums) / (draws @ counts), ratio_error(draws, sums, counts)
        beyond += int((np.abs(means - centre) * error >= abs(centre) * errors).sum())
    return (1 + beyond) / (RESAMPLES + 1)


def holm(values: Sequence[float]) -> list[float]:
    """p-values of several tests, adjusted so that the chance of any false one stays what each says.

    Source: Holm 1979, Scandinavian Journal of Statistics 6.
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    told, worst = [0.0] * len(values), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, (len(values) - rank) * values[i])
        told[i] = min(1.0, worst)
    return told


def classify_pair(pair: Pair, limit: float, p: float) -> Verdict:
    """What a pair says. `limit`: how much less is as good, in the units of `change`; `p`: adjusted for other tests.

    Better: B gains, p < 5%. Equivalent: the 90% interval is within the limit on both sides, which is two one-sided
    tests at 5% (Schuirmann 1987). Worse: B loses, p < 5%, and is not equivalent. Else undecided.
    """
    gain = pair.sign * pair.change.value
    if p < 1 - LEVEL and gain > 0:
        return "better"
    if -limit < pair.interval90.low and pair.interval90.high < limit:
        return "equivalent"
    return "worse" if p < 1 - LEVEL and gain < 0 else "undecided"


def items_needed(pair: Pair, limit: float) -> int | None:
    """About how many more items of the same kind would decide it, if the change stays what it is; None if none would.

    The width of an interval falls with the root of the number of items.
    """
    change, n = abs(pair.change.value), pair.change.n
    wide, near = ((x.high - x.low) / 2 for x in (pair.change, pair.interval90))
    if not math.isfinite(wide) or wide == 0:
        return None
    factors = [wide / change] if change > 0 else []
    factors += [near / (limit - change)] if limit > change else []
    if not factors:
        return None
    return max(0, math.ceil(n * min(factors) ** 2) - n)


def power(items: int, drop: float, discordant: float, level: float = LEVEL) -> float:
    """About how often the paired test finds a true drop: `discordant`, the share of items on which the two differ.

    Source: the normal approximation of McNemar's test, Connor 1987, Biometrics 43.
    """
    normal = NormalDist()
    wide = normal.inv_cdf((1 + level) / 2) * math.sqrt(discordant)
    return normal.cdf((drop * math.sqrt(items) - wide) / math.sqrt(discordant - drop**2))
