"""An integer programme over things that may be chosen: the least price that meets every budget (HiGHS)."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

from billhook.core.errors import MissingExtra

Bound = tuple[Sequence[int], int]  # how much each choice counts, and the most that all chosen ones may


def cheapest_selections(
    name: str,
    prices: Sequence[float],
    costs: Sequence[Sequence[int]],
    needed: Sequence[Fraction],
    bounds: Sequence[Bound],
) -> Iterator[list[int]]:
    """The choices of the least total price that meet `needed` and keep within `bounds`, then the next best others.

    `costs`: of each choice, what it is worth to each budget. Coefficients are exact and the solver's feasibility has a
    tolerance, so the caller looks whether a selection suffices; where it does not, its parts do not either, and what
    comes next holds something else. Ends if nothing is left. Raises MissingExtra, naming the search `name`.

    Source: Huangfu and Hall 2018, HiGHS.
    """
    if importlib.util.find_spec("highspy") is None:
        raise MissingExtra(f"The search {name}", "solve")
    import highspy

    model = highspy.Highs()
    model.silent()
    model.setOptionValue("mip_rel_gap", 0.0)
    model.setOptionValue("mip_abs_gap", 0.0)
    model.setOptionValue("threads", 1)
    chosen = [model.addBinary() for _ in prices]
    for number, least in enumerate(needed):
        worth = [cost[number] for cost in costs]
        unit = math.gcd(*worth) or 1  # small whole numbers, so that the tolerance decides nothing
        model.addConstr(sum(x * (c // unit) for x, c in zip(chosen, worth, strict=True)) >= math.ceil(least / unit))
    for counts, most in bounds:
        model.addConstr(sum(x * c for x, c in zip(chosen, counts, strict=True)) <= most)
    scale = max(map(abs, prices), default=0.0) or 1.0
    while True:
        model.minimize(sum(x * (price / scale) for x, price in zip(chosen, prices, strict=True)))
        if model.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return
        found = [i for i, x in enumerate(chosen) if model.val(x) > 0.5]
        yield found
        others = [x for i, x in enumerate(chosen) if i not in found]
        if not others:
            return
        model.addConstr(sum(others) >= 1)
