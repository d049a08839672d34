"""Least squares for repairs: solved in float64, with the ridge that validation tokens choose."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from billhook.models.device import float64_place, free_memory, to_float64

RIDGES = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 30.0)  # shares of the diagonal of XᵀX
MOMENT_TOKENS_AT_A_TIME = 8192
HELD_AT_ONCE = 6  # moments of two sets and their sum, a ridge, its factor and a solution
DIRECTIONS = 64  # of the outputs, at random, by which ridges are compared: a solve of all takes ten times as long
EMPTY = 1e-14  # share of the mean diagonal: below, an input is almost zero


@dataclass(frozen=True, slots=True)
class Fit:
    """A linear map, `matrix` [outputs, inputs] in float32.

    `ridge`: a share of the diagonal. `remaining_error`: share of the squared error that remains on validation tokens
    after a fit on the others; above 1 the map does harm.
    """

    matrix: torch.Tensor
    ridge: float
    remaining_error: float


class Moments:
    """XᵀX, XᵀY and the square of Y, summed over weighted tokens in float64."""

    def __init__(
        self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, known: torch.Tensor | None = None
    ) -> None:
        """x [tokens, inputs], y [tokens, outputs], weight [tokens], all in float32. `known`: XᵀX, not summed again."""
        place = _place(x.device, x.shape[1] * (x.shape[1] + y.shape[1]))
        options = {"dtype": torch.float64, "device": place}
        self.xx = torch.zeros(x.shape[1], x.shape[1], **options) if known is None else known  # type: ignore[call-overload]
        self.xy = torch.zeros(x.shape[1], y.shape[1], **options)  # type: ignore[call-overload]
        self.yy = 0.0
        for a, b, w in zip(*(t.split(MOMENT_TOKENS_AT_A_TIME) for t in (x, y, weight)), strict=True):
            root = w.sqrt()[:, None]
            a, b = a * root, b * root
            if known is None:
                self.xx += (a.T @ a).to(place)
            self.xy += (a.T @ b).to(place)
            self.yy += float(to_float64(b).square().sum())

    def solve(self, ridge: float) -> torch.Tensor:
        """Return argmin over B of |Y - X B|² + ridge · Σ_i |x_i|² |b_i|²: [inputs, outputs].

        x_i is a column of X, b_i its row of B: the units of an input do not matter.
        """
        whole = self.xx.clone()
        least = EMPTY * float(self.xx.diagonal().mean())
        whole.diagonal().mul_(1 + ridge).clamp_(min=max(least, 1e-300))
        factor, failed = torch.linalg.cholesky_ex(whole)
        if failed:
            on_cpu = whole.cpu(), self.xy.cpu()  # a GPU's driver solves matrices of full rank alone
            solution: torch.Tensor = torch.linalg.lstsq(*on_cpu, driver="gelsd").solution
            return solution.to(whole.device)
        return torch.cholesky_solve(self.xy, factor)

    def error(self, b: torch.Tensor) -> float:
        """Return |Y - X B|²."""
        return self.yy - 2 * float((b * self.xy).sum()) + float(((self.xx @ b) * b).sum())


def _place(device: torch.device, elements: int) -> torch.device:
    """Return where moments of so many elements are held: on the device if it has room for all that a fit holds."""
    place = float64_place(device)
    fits = place.type == "cpu" or HELD_AT_ONCE * 8 * elements <= free_memory(place)
    return place if fits else torch.device("cpu")


def ridge_fit(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, validation: torch.Tensor) -> Fit:
    """Fit x to y on all tokens, with the ridge of the least error on the `validation` tokens ([tokens], bool).

    The search for the ridge starts in the middle of `RIDGES` and moves to a better neighbour until there is none.
    Errors are those along `DIRECTIONS` random directions of the outputs: about the same share of the whole for every
    ridge.
    """
    y, weight, validation = y.to(x.device), weight.to(x.device), validation.to(x.device)
    some = y @ _directions(y.shape[1]).to(y)
    seen, unseen = (Moments(x[part], some[part], weight[part]) for part in (~validation, validation))
    if not unseen.yy:
        return Fit(torch.zeros(y.shape[1], x.shape[1], device=x.device), 0.0, 1.0)

    @cache
    def error(place: int) -> float:
        return unseen.error(seen.solve(RIDGES[place]))

    place, places = len(RIDGES) // 2, range(len(RIDGES))
    while (best := min(places[max(0, place - 1) : place + 2], key=error)) != place:
        place = best
    matrix = Moments(x, y, weight, known=seen.xx + unseen.xx).solve(RIDGES[place])
    return Fit(matrix.T.to(x.device, torch.float32), RIDGES[place], error(place) / unseen.yy)


@cache
def _directions(outputs: int) -> torch.Tensor:
    """Return orthonormal directions [outputs, at most DIRECTIONS] in float64: all of them, or some at random."""
    if outputs <= DIRECTIONS:
        return torch.eye(outputs, dtype=torch.float64)
    draw = torch.randn(outputs, DIRECTIONS, dtype=torch.float64, generator=torch.Generator().manual_seed(outputs))
    found: torch.Tensor = torch.linalg.qr(draw).Q
    return found
