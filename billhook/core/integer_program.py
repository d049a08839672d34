"""An integer program that selects at the least price and meets all budgets (HiGHS)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from types import MappingProxyType

Bound = tuple[Sequence[int], int]  # the weight of each choice, and the limit of the selected weights


def cheapest_selections(
    prices: Sequence[float],
    costs: Sequence[Sequence[int]],
    needed: Sequence[Fraction],
    bounds: Sequence[Bound],
    pairs: Mapping[tuple[int, int], float] = MappingProxyType({}),
) -> Iterator[list[int]]:
    """Yield the selection of the least price that meets `needed` within `bounds`, then the next best ones.

    `costs`: for each choice, what it adds to each budget. `pairs`: what two choices cost together beyond their prices.
    The product of each pair is a variable of its own, which is exact for choices of 0 and 1. The solver's feasibility
    has a tolerance, so the caller checks whether a selection meets the budgets; if not, no part of it does, and the
    next one contains another choice.

    Source: Huangfu and Hall 2018, HiGHS; McCormick 1976, for the products.
    """
    import highspy

    model = highspy.Highs()
    model.silent()
    model.setOptionValue("mip_rel_gap", 0.0)
    model.setOptionValue("mip_abs_gap", 0.0)
    model.setOptionValue("threads", 1)
    binaries = [model.addBinary() for _ in prices]
    for number, least in enumerate(needed):
        values = [cost[number] for cost in costs]
        unit = math.gcd(*values) or 1  # small whole numbers, so that the tolerance decides nothing
        model.addConstr(sum(x * (c // unit) for x, c in zip(binaries, values, strict=True)) >= math.ceil(least / unit))
    for counts, most in bounds:
        model.addConstr(sum(x * c for x, c in zip(binaries, counts, strict=True)) <= most)
    products = [(model.addVariable(0, 1), price, binaries[i], binaries[j]) for (i, j), price in pairs.items() if price]
    for both, price, x, y in products:  # the solver itself holds it to the side where it costs less
        for bound in (both >= x + y - 1,) if price > 0 else (both <= x, both <= y):
            model.addConstr(bound)
    terms = [*zip(binaries, prices, strict=True), *((both, price) for both, price, _, _ in products)]
    scale = max((abs(price) for _, price in terms), default=0.0) or 1.0
    while True:
        model.minimize(sum(x * (price / scale) for x, price in terms))
        if model.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return
        selected = [i for i, x in enumerate(binaries) if model.val(x) > 0.5]
        yield selected
        others = [x for i, x in enumerate(binaries) if i not in selected]
        if not others:
            return
        model.addConstr(sum(others) >= 1)
