"""An integer program that selects at the least price and meets all budgets (HiGHS)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

Bound = tuple[Sequence[int], int]  # the weight of each choice, and the limit of the selected weights


def cheapest_selections(
    prices: Sequence[float], costs: Sequence[Sequence[int]], needed: Sequence[Fraction], bounds: Sequence[Bound]
) -> Iterator[list[int]]:  # fmt: skip
    """Yield the selection of the least price that meets `needed` within `bounds`, then the next best ones.

    `costs`: for each choice, what it adds to each budget. The solver's feasibility has a tolerance, so the caller
    checks whether a selection meets the budgets; if not, no part of it does, and the next one contains another choice.

    Source: Huangfu and Hall 2018, HiGHS.
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
    scale = max(map(abs, prices), default=0.0) or 1.0
    while True:
        model.minimize(sum(x * (price / scale) for x, price in zip(binaries, prices, strict=True)))
        if model.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return
        selected = [i for i, x in enumerate(binaries) if model.val(x) > 0.5]
        yield selected
        others = [x for i, x in enumerate(binaries) if i not in selected]
        if not others:
            return
        model.addConstr(sum(others) >= 1)
