"""The best factors of a weight for what a text gives it, by the covariance of its outputs; ranks under one budget."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from billhook.models.factors.student import largest_rank

K = TypeVar("K", bound=Hashable)
RIDGE = 1e-6  # of the mean square of an input: what the text does not say is ordered by the weight
STEPS = 200  # of a search for the price of a parameter, by halves


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Principal directions of the outputs y = W x of a linear map, without its bias, over a text.

    `energies` [directions]: the sum of squares of y along each, descending, in float64; `directions` [outputs,
    directions], orthonormal.
    """

    energies: torch.Tensor
    directions: torch.Tensor

    def factors(self, weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (up [outputs, rank], down [rank, inputs]); up · down is the best matrix of that rank on the text."""
        up = self.directions[:, :rank]
        return up, up.T @ weight


def spectrum(weight: torch.Tensor, gram: torch.Tensor) -> Spectrum:
    """Return the spectrum of the outputs of `weight` [outputs, inputs]; gram [inputs, inputs] = Σ x xᵀ; float64.

    The directions are eigenvectors of W G Wᵀ, which are the left singular vectors of W G^½: no matrix of rank r is
    nearer to W on the text than its projection on the first r (Eckart and Young 1936).
    """
    whitened = _whitened(weight, gram)
    if weight.shape[0] <= weight.shape[1]:
        values, vectors = torch.linalg.eigh(whitened @ whitened.T)
    else:
        values, right = torch.linalg.eigh(whitened.T @ whitened)
        vectors = whitened @ right / values.clamp(min=1e-300).sqrt()
    return Spectrum(values.flip(0).clamp(min=0), vectors.flip(1))


def output_energies(weight: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Return the energies of `spectrum` alone, in a quarter of its time."""
    whitened = _whitened(weight, gram)
    smaller = whitened @ whitened.T if weight.shape[0] <= weight.shape[1] else whitened.T @ whitened
    values: torch.Tensor = torch.linalg.eigvalsh(smaller)
    return values.flip(0).clamp(min=0)


def _whitened(weight: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Return W L, L Lᵀ = gram with its ridge: [outputs, inputs]."""
    gram = gram.clone()
    gram.diagonal().add_(RIDGE * float(gram.diagonal().mean()) or 1.0)
    root: torch.Tensor = torch.linalg.cholesky(gram)
    return weight @ root


@dataclass(frozen=True, eq=False)
class _Curve:
    """What a linear map may be: costs in parameters, and shares of its output's energy lost; whole last."""

    costs: np.ndarray
    losses: np.ndarray


def _curve(outputs: int, inputs: int, energies: torch.Tensor) -> _Curve:
    most, values = largest_rank(outputs, inputs), energies.cpu().numpy()
    total = float(values.sum()) or 1.0
    tails = values[::-1].cumsum()[::-1] / total  # from each direction on
    costs = np.append(np.arange(1, most + 1) * (outputs + inputs), outputs * inputs)
    return _Curve(costs, np.append(tails[1 : most + 1], 0.0))


def most_saved(sizes: Mapping[K, tuple[int, int]]) -> int:
    """Return how many parameters factors of rank 1 save, of maps of (outputs, inputs)."""
    return sum(max(0, outputs * inputs - outputs - inputs) for outputs, inputs in sizes.values())


def ranks_by_energy(
    sizes: Mapping[K, tuple[int, int]], energies: Mapping[K, torch.Tensor], needed: int
) -> dict[K, int]:
    """Return the ranks that save at least `needed` parameters; what is left out stays whole.

    The sum over all maps of the share of the output's energy that is lost is small: each map takes what is best at one
    price of a parameter, the lowest that meets the budget. What that saves too much is given back, each time where the
    share falls most per parameter. `needed`: at most `most_saved`.
    """
    curves = {key: _curve(*size, energies[key]) for key, size in sizes.items() if largest_rank(*size)}
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


def lost_share(energies: torch.Tensor, rank: int) -> float:
    """Return the share of the energies beyond the first `rank`; 0 of an output that is always zero."""
    total = float(energies.sum())
    share = float(energies[rank:].sum()) / total if total else 0.0
    return share if math.isfinite(share) else 0.0
