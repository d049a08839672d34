"""Loss against size: perplexity at budgets that were not measured, from those that were, with intervals that cover."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import combinations
from typing import Literal

import numpy as np
import yaml
from numpy.typing import NDArray

from billhook.core.errors import UsageError, option

Floats = NDArray[np.float64]
Place = Literal["beyond", "between", "below"]  # where a size lies among the measured ones
PLACES: tuple[Place, ...] = ("beyond", "between", "below")

# The prior of a curve in log loss against log share. Among those of like evidence on benchmarks/measured it is the one
# whose intervals cover best where each recipe is forecast by the errors of the others (benchmarks/forecasts.py).
EXPONENT, EXPONENT_SD = 1.2, 0.2
WANDER, WANDER_SPREAD = 0.3, 0.6  # median of how far a curve strays over a factor of e in share; sd of its logarithm
FIELDS = ("share", "nats", "se")  # of a point
WANDERS = np.exp(np.linspace(math.log(0.01), math.log(3), 25))
VAGUE = 1e3  # variance of the level, of which nothing is known
EXACT = 1e-9  # variance of a measurement without error, for the sake of solving
ALIKE = 40  # past forecasts that make an interval: those over the most similar distances, and all as far as the last


@dataclass(frozen=True, slots=True)
class LossPoint:
    """One measured size. `share`: of the parameters that are removed; `nats`: lost per token, against the teacher.

    `se`: standard error of `nats`; 0 where it is not known. The log of a ratio of perplexities is such a loss.
    """

    share: float
    nats: float
    se: float = 0.0


@dataclass(frozen=True, slots=True)
class PastError:
    """By how much a forecast was wrong, over the spread that its curve had promised.

    `distance`: from the nearest measured size, in log share; `several`: whether more than one size was measured.
    """

    distance: float
    several: bool
    error: float


@dataclass(frozen=True, slots=True)
class PastErrors:
    """Errors of past forecasts by place. `curves`: how many they came from."""

    errors: Mapping[Place, tuple[PastError, ...]]
    curves: int
    source: str

    def combined_with(self, other: PastErrors) -> PastErrors:
        """Return the errors of both."""
        both = {place: (*self.errors[place], *other.errors[place]) for place in PLACES}
        sources = [past.source for past in (self, other) if past.curves]
        return PastErrors(both, self.curves + other.curves, " and ".join(sources))


@dataclass(frozen=True, slots=True)
class LossForecast:
    """Nats per token at `share`, with the interval that holds a `level` of such forecasts.

    - `n`: measured sizes that it rests on; `place`: where `share` lies among them.
    - `errors`: past forecasts in that place that made the interval, which are from `source`.
    """

    share: float
    value: float
    low: float
    high: float
    level: float
    n: int
    place: Place
    errors: int
    source: str


def forecast(
    points: Iterable[LossPoint], share: float, past: PastErrors | None = None, level: float = 0.9
) -> LossForecast:
    """Return the loss that a budget of `share` of the parameters will cost, from the sizes that were measured.

    In log loss against log share a curve is a line that strays as a random walk. Its slope and its straying have
    priors; the more sizes were measured, the less these count, so that a power law is found where there is one. The
    interval is as many spreads wide as a `level` of past forecasts needed (split conformal).
    `past`: errors of earlier forecasts; None: those that Billhook ships.
    Points that lost nothing say nothing of a ratio, and are left out. Raises UsageError where none is left.

    Source: Rasmussen and Williams 2006, Gaussian Processes for Machine Learning, 2.7, explicit basis functions; Vovk et
    al. 2005, Algorithmic Learning in a Random World, inductive conformal prediction.
    """
    used = sorted({p for p in points if p.share > 0 and p.nats > 0}, key=lambda p: p.share)
    if not used:
        raise UsageError(
            "No size of this model was measured at which anything is lost, so there is nothing to forecast from. "
            f"Measure one, with {option('remove', '10%')}."
        )
    if not 0 < share < 1:
        raise UsageError(
            f"A forecast is for a share of the parameters between 0 and 1, and {share:g} is not. Write 0.2."
        )
    place, centre, spread = _place(used, share), *_predict(used, share)
    past = shipped_errors() if past is None else past
    errors = _alike(past.errors[place], _distance(used, share), len(used) > 1)
    wide = _quantile(errors, level) * spread
    value, low, high = (math.exp(min(centre + d, 50.0)) for d in (0.0, -wide, wide))
    return LossForecast(share, value, low, high, level, len(used), place, len(errors), past.source)


def past_errors(curves: Iterable[Sequence[LossPoint]], source: str) -> PastErrors:
    """Return the errors that forecasts would have had on measured curves: each size from every smaller set of others.

    Of more than 6 sizes the evenly spaced 6 are taken.
    """
    found: dict[Place, list[PastError]] = {place: [] for place in PLACES}
    count = 0
    for curve in curves:
        used = sorted({p for p in curve if p.share > 0 and p.nats > 0}, key=lambda p: p.share)
        if len(used) > 6:
            used = [used[round(i * (len(used) - 1) / 5)] for i in range(6)]
        count += len(used) > 1
        for left_out in used:
            others = [p for p in used if p.share != left_out.share]
            for size in range(1, len(others) + 1):
                sets = list(combinations(others, size))
                centres, spreads = _predict_each(sets, left_out.share)
                for given, centre, spread in zip(sets, centres, spreads, strict=True):
                    error = abs(math.log(left_out.nats) - centre) / spread
                    found[_place(given, left_out.share)].append(
                        PastError(_distance(given, left_out.share), size > 1, error)
                    )
    return PastErrors({place: tuple(values) for place, values in found.items()}, count, source)


@cache
def shipped_errors() -> PastErrors:
    """Errors of forecasts over the recipes of benchmarks/measured, which Billhook ships."""
    told = yaml.safe_load(files("billhook.core.outlook").joinpath("loss_errors.yaml").read_text(encoding="utf-8"))
    errors = {
        place: tuple(PastError(row["distance"], row["several"], e) for row in told[place] for e in row["errors"])
        for place in PLACES
    }
    return PastErrors(errors, told["curves"], told["source"])


def _place(points: Sequence[LossPoint], share: float) -> Place:
    if share > max(p.share for p in points):
        return "beyond"
    return "below" if share < min(p.share for p in points) else "between"


def _distance(points: Sequence[LossPoint], share: float) -> float:
    return min(abs(math.log(share / p.share)) for p in points)


def _alike(past: Sequence[PastError], distance: float, several: bool) -> list[float]:
    """Return the errors of forecasts over about the same distance; first those from one size, or from several, too."""

    def unlike(each: PastError) -> float:
        return round(abs(math.log((each.distance + 0.01) / (distance + 0.01))), 1) + (each.several != several)

    ranked = sorted(past, key=unlike)
    reach = unlike(ranked[min(ALIKE, len(ranked)) - 1])
    return [each.error for each in ranked if unlike(each) <= reach]


def _quantile(errors: Sequence[float], level: float) -> float:
    """Return the error that the next forecast exceeds with a chance of at most 1 - level."""
    ranked = sorted(errors)
    return ranked[min(len(ranked), math.ceil(level * (len(ranked) + 1))) - 1]


def _predict(points: Sequence[LossPoint], share: float) -> tuple[float, float]:
    """Return mean and standard deviation of log nats at a share, over all ways in which the curve may stray."""
    means, deviations = _predict_each([points], share)
    return means[0], deviations[0]


def _predict_each(sets: Sequence[Sequence[LossPoint]], share: float) -> tuple[list[float], list[float]]:
    """Return the same from each of several sets of equally many points, all at once.

    Of [sets, wanders] Gaussian processes the mean and the variance at the share, and the log evidence of the straying.
    """
    shares, nats, se = (np.array([[getattr(p, name) for p in given] for given in sets]) for name in FIELDS)
    at = np.log(np.column_stack([shares, np.full(len(sets), share)]))  # [sets, points + 1]
    at -= at.min(axis=1, keepdims=True)
    rises = (np.log(nats) - EXPONENT * at[:, :-1])[:, None]  # above the prior's slope
    noise = np.minimum((se / nats) ** 2, 1.0) + EXACT
    before, after = at[:, None, :, None], at[:, None, None, :]
    strays = WANDERS[:, None, None] ** 2 * np.minimum(before, after)
    spread = VAGUE + EXPONENT_SD**2 * before * after + strays
    known = spread[..., :-1, :-1] + noise[:, None, :, None] * np.eye(noise.shape[1])
    towards = spread[..., :-1, -1]
    pull = np.linalg.solve(known, towards[..., None])[..., 0]
    means = (pull * rises).sum(axis=-1)
    variances = np.maximum(spread[..., -1, -1] - (pull * towards).sum(axis=-1), EXACT)
    evidence = -0.5 * (np.log(WANDERS / WANDER) / WANDER_SPREAD) ** 2 - 0.5 * _misfit(known, rises)
    weight = np.exp(evidence - evidence.max(axis=1, keepdims=True))
    weight /= weight.sum(axis=1, keepdims=True)
    mean = (weight * means).sum(axis=1)
    variance = (weight * (variances + (means - mean[:, None]) ** 2)).sum(axis=1)
    return (mean + EXPONENT * at[:, -1]).tolist(), np.sqrt(variance).tolist()


def _misfit(known: Floats, rises: Floats) -> Floats:
    """Return minus twice the log evidence of the differences of `rises`, of which the level is no part.

    known: covariances [sets, wanders, points, points]; rises: [sets, 1, points]
    """
    steps = np.diff(np.eye(known.shape[-1]), axis=0)
    apart, between = rises @ steps.T, steps @ known @ steps.T
    solved = np.linalg.solve(between, np.broadcast_to(apart, between.shape[:-1])[..., None])[..., 0]
    found: Floats = (apart * solved).sum(axis=-1) + np.linalg.slogdet(between)[1]
    return found
