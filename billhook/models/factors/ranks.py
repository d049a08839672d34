"""Ranks of factors of several weights under one budget: what each of their directions costs and is worth."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from billhook.models.factors.student import largest_rank

K = TypeVar("K", bound=Hashable)
STEPS = 200  # of a search for the price of a parameter, by halves


@dataclass(frozen=True, eq=False)
class _Curve:
    """What a linear map may be: costs in parameters, and what it loses; whole last."""

    costs: np.ndarray
    losses: np.ndarray


def _curve(outputs: int, inputs: int, losses: torch.Tensor) -> _Curve:
    most, values = largest_rank(outputs, inputs), losses.cpu().numpy()
    tails = values[::-1].cumsum()[::-1]  # from each direction on
    costs = np.append(np.arange(1, most + 1) * (outputs + inputs), outputs * inputs)
    return _Curve(costs, np.append(tails[1 : most + 1], 0.0))


def most_saved(sizes: Mapping[K, tuple[int, int]]) -> int:
    """Return how many parameters factors of rank 1 save, of maps of (outputs, inputs)."""
    return sum(max(0, outputs * inputs - outputs - inputs) for outputs, inputs in sizes.values())


def ranks_by_energy(
    sizes: Mapping[K, tuple[int, int]], energies: Mapping[K, torch.Tensor], needed: int
) -> dict[K, int]:
    """Return the ranks that save at least `needed` parameters and lose the least energy.

    Energies: of each map's outputs by direction. What is small is the sum over maps of the share that is lost.
    """
    shares = {key: values / (float(values.sum()) or 1.0) for key, values in energies.items()}
    return cheapest_ranks(sizes, shares, needed)


def ranks_by_loss(sizes: Mapping[K, tuple[int, int]], changes: Mapping[K, torch.Tensor], needed: int) -> dict[K, int]:
    """Return the ranks that save at least `needed` parameters at the least predicted loss.

    Changes c: of the loss without each direction of a map, in first order (`Spectrum.loss_changes`). What is small is
    the sum of c² over all directions that are left out. A trained model stands near a minimum, where changes by single
    tokens cancel: c is what is left of T of them, and T c² / 2 the loss in second order by the empirical Fisher matrix.

    Source: Abbasi et al. 2026, ZS-SVD (arXiv 2602.02848), for c in whitened coordinates, one order for all maps.
    Deviations: the source removes directions so that the sum of c stays near zero, sign against sign; here squares add.
    """
    return cheapest_ranks(sizes, {key: values.square() for key, values in changes.items()}, needed)


def cheapest_ranks(sizes: Mapping[K, tuple[int, int]], losses: Mapping[K, torch.Tensor], needed: int) -> dict[K, int]:
    """Return the ranks that save at least `needed` parameters at a small loss; what is left out stays whole.

    Arguments:
        sizes: (outputs, inputs) of each map.
        losses: what a map loses with each of its directions, [directions], at least 0; a rank keeps the first.
        needed: at most `most_saved`.

    The losses of all maps add up. Each map takes what is best at one price of a parameter, the lowest that meets the
    budget. What that saves too much is given back, each time where the loss falls most per parameter. A rank of which
    the factors save nothing is not taken: from there on a map is whole.
    """
    curves = {key: _curve(*size, losses[key]) for key, size in sizes.items() if largest_rank(*size)}
    whole = sum(int(curve.costs[-1]) for curve in curves.values())

    def at_price(price: float) -> dict[K, int]:
        return {key: int((c.losses + price * c.costs).argmin()) for key, c in curves.items()}

    def saved(chosen: Mapping[K, int]) -> int:
        return whole - sum(int(curves[key].costs[place]) for key, place in chosen.items())

    low, high = 0.0, 1.0
    while saved(at_price(high)) < needed:
        low, high = high, high * 4
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if saved(at_price(middle)) >= needed else (middle, high)
    chosen = at_price(high)
    spare = saved(chosen) - needed
    while better := _best_step(curves, chosen, spare):
        key, place = better
        spare -= int(curves[key].costs[place] - curves[key].costs[chosen[key]])
        chosen[key] = place
    return {key: place + 1 for key, place in chosen.items() if place + 1 < len(curves[key].costs)}


def _best_step(curves: Mapping[K, _Curve], chosen: Mapping[K, int], spare: int) -> tuple[K, int] | None:
    """Return the map and its next place that lower the loss most per parameter within `spare`; None if none does."""
    best, found = 0.0, None
    for key, curve in curves.items():
        costs, losses = curve.costs[chosen[key] + 1 :], curve.losses[chosen[key] + 1 :]
        fitting = int(np.searchsorted(costs, curve.costs[chosen[key]] + spare, side="right"))
        if fitting:
            rates = (curve.losses[chosen[key]] - losses[:fitting]) / (costs[:fitting] - curve.costs[chosen[key]])
            if rates.max() > best:
                best, found = float(rates.max()), (key, chosen[key] + 1 + int(rates.argmax()))
    return found
