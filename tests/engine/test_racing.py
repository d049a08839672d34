"""Which pieces are measured: exact search finds the best two and proves it; racing keeps clear winners."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from billhook.engine.racing import (
    Decision,
    Piece,
    PieceRequest,
    Selection,
    SelectionTask,
    Sums,
    Tolerance,
    measure_all,
    measure_best,
    race,
    tolerance_of,
)

Table = list[list[list[float]]]  # [plan][group][document]


def run(choice: Selection, full: Table, share: float = 1.0) -> tuple[list[Decision], list[tuple[str, Piece]]]:
    """Answer a choice from a table; other pieces are `share` of the full ones. Gives verdicts and what was asked."""
    asked: list[tuple[str, Piece]] = []
    try:
        want = next(choice)
        while True:
            asked += [(want.quality, piece) for piece in want.pieces]
            factor = 1.0 if want.quality == "full" else share
            told: dict[Piece, Sums] = {(p, g): tuple(factor * x for x in full[p][g]) for p, g in want.pieces}
            want = choice.send(told)
    except StopIteration as end:
        return end.value, asked


def ballot(full: Table, best: int = 2, wave: int = 1) -> SelectionTask:
    groups = len(full[0])
    return SelectionTask(len(full), best, tuple(reversed(range(groups))), tuple(10 for _ in range(groups)), wave)


def table(draw: random.Random, plans: int, groups: int, documents: int = 1) -> Table:
    scales = [draw.lognormvariate(0, 1) for _ in range(plans)]
    return [[[scale * draw.gammavariate(4, 0.25) for _ in range(documents)] for _ in range(groups)] for scale in scales]


def total(plan: list[list[float]]) -> float:
    return math.fsum(x for group in plan for x in group)


@settings(max_examples=200)
@given(st.integers(0, 10**9), st.integers(1, 9), st.integers(1, 6), st.integers(1, 3), st.integers(1, 300),
       st.sampled_from([None, 0.3, 0.97, 1.0, 1.2]))  # fmt: skip
def test_exact_gives_the_best_in_full_whatever_the_bound(
    seed: int, plans: int, groups: int, best: int, wave: int, share: float | None
) -> None:
    """Bounds of fewer bits may exceed the losses by the rounding."""
    full = table(random.Random(seed), plans, groups)
    task = replace(ballot(full, best, wave), rounding=max(0.0, (share or 1.0) - 1.0))
    verdicts, asked = run(measure_best(task, bounds=share is not None), full, share or 1.0)
    order = sorted(range(plans), key=lambda p: total(full[p]))
    assert all(verdicts[p] == "full" for p in order[:best])
    measured = {piece for quality, piece in asked if quality == "full"}
    for plan, verdict in enumerate(verdicts):
        if verdict == "full":
            assert {(plan, g) for g in range(groups)} <= measured
        else:
            # What was seen of it, and nothing else, already exceeds the loss of the last that was wanted.
            seen = {}
            for quality, (p, g) in asked:
                if p == plan:
                    value = math.fsum(full[p][g])
                    seen[g] = max(seen.get(g, 0.0), value if quality == "full" else value * (share or 1.0))
            assert math.fsum(seen.values()) > total(full[order[best - 1]])


@settings(max_examples=200)
@given(st.integers(0, 10**9), st.integers(1, 9), st.integers(1, 6), st.floats(0.3, 3), st.sampled_from([None, 0.9]))
def test_under_a_ceiling_only_what_is_below_it_matters(
    seed: int, plans: int, groups: int, height: float, share: float | None
) -> None:
    """Of the plans below the ceiling the two best are in full; the others may be, but what is dropped is proven out."""
    draw = random.Random(seed)
    full = table(draw, plans, groups)
    ceiling = {g: (height * draw.uniform(0.5, 1.5),) for g in range(groups)}
    most = math.fsum(x for each in ceiling.values() for x in each)
    verdicts, asked = run(
        measure_best(replace(ballot(full), ceiling=ceiling), bounds=share is not None), full, share or 1.0
    )
    order = sorted(range(plans), key=lambda p: total(full[p]))
    assert all(verdicts[p] == "full" for p in order[:2] if total(full[p]) < most)
    limit = min(most, total(full[order[1]]) if plans > 1 else math.inf)
    for plan, verdict in enumerate(verdicts):
        if verdict != "full":
            assert total(full[plan]) > limit * (1 - 1e-9)
    _, asked_plain = run(measure_best(ballot(full), bounds=share is not None), full, share or 1.0)
    if most < total(full[order[0]]) / 3:
        assert len(asked) <= len(asked_plain)


def test_a_race_under_a_ceiling_drops_whatever_is_far_above_it() -> None:
    """Ten plans that are alike: without a ceiling the four that lead are never dropped."""
    full = [[[1.0 + 0.01 * p + 0.001 * g] for g in range(12)] for p in range(10)]
    low = {g: (0.5 + 0.001 * (g % 3),) for g in range(12)}
    verdicts, asked = run(race(replace(ballot(full), ceiling=low), range(10), 0.05, bounds=True), full)
    assert set(verdicts) == {"raced"}
    assert not [piece for quality, piece in asked if quality == "full"]
    high = {g: (2.0 + 0.001 * (g % 3),) for g in range(12)}
    open_verdicts, _ = run(race(replace(ballot(full), ceiling=high), range(10), 0.05, bounds=True), full)
    assert open_verdicts == run(race(ballot(full), range(10), 0.05, bounds=True), full)[0]


def test_exact_measures_less_than_everything_and_asks_nothing_twice() -> None:
    full = table(random.Random(1), 40, 16)
    _, asked = run(measure_best(ballot(full), bounds=True), full, 0.97)
    assert len(asked) == len(set(asked))
    assert sum(quality != "full" for quality, _ in asked) < 0.6 * 40 * 16
    assert sum(quality == "full" for quality, _ in asked) < 0.3 * 40 * 16
    verdicts, asked = run(measure_all(ballot(full)), full)
    assert verdicts == ["full"] * 40
    assert len(asked) == 40 * 16


def test_exact_takes_the_groups_in_the_order_given() -> None:
    full = table(random.Random(2), 3, 5)
    _, asked = run(measure_best(ballot(full), bounds=True), full)
    groups = [g for quality, (_, g) in asked if quality != "full"]
    assert groups == sorted(groups, reverse=True)


def noisy(draw: random.Random, plans: int, groups: int, gap: float) -> Table:
    """Documents that differ much, plans that differ by `gap` and a little noise: what pairing is for."""
    hard = [[draw.lognormvariate(0, 1) for _ in range(2)] for _ in range(groups)]
    return [[[h + gap * p + draw.gauss(0, 0.02) for h in documents] for documents in hard] for p in range(plans)]


def test_racing_drops_what_is_clearly_worse_early() -> None:
    full = noisy(random.Random(3), 10, 16, 0.5)
    verdicts, asked = run(race(ballot(full), range(10), 0.05, bounds=True), full)
    assert verdicts == ["full", "full", "bound", "bound", *["raced"] * 6], "the four that lead are never dropped"
    cheap = [piece for quality, piece in asked if quality != "full"]
    assert len(cheap) < 4 * 16 + 6 * 4, "after two groups, that is four documents, hardly any other is left"


def test_racing_looks_at_the_shortlist_only() -> None:
    full = noisy(random.Random(4), 9, 8, 0.5)
    verdicts, asked = run(race(ballot(full), [2, 4, 5, 6, 8], 0.05, bounds=True), full)
    assert verdicts == ["skipped", "skipped", "full", "skipped", "full", "bound", "bound", "skipped", "raced"]
    assert {p for _, (p, _) in asked} == {2, 4, 5, 6, 8}


def test_a_higher_risk_drops_more_of_what_is_as_good() -> None:
    """Six plans alike but for noise: how many of those that are not among the four leaders are dropped?"""
    dropped = {}
    for risk in (0.001, 0.05, 0.3):
        draw, count = random.Random(5), 0
        for _ in range(200):
            verdicts, _ = run(race(ballot(noisy(draw, 6, 4, 0.0), best=1), range(6), risk, bounds=False),
                              noisy(draw, 6, 4, 0.0))  # fmt: skip
            count += verdicts.count("raced")
        dropped[risk] = count
    assert 0 <= dropped[0.001] < dropped[0.05] < dropped[0.3] <= 2 * 200


def counted(choice: Callable[[], Selection], full: Table) -> int:
    return len(run(choice(), full)[1])


def test_a_higher_risk_costs_less() -> None:
    full = noisy(random.Random(6), 12, 16, 0.02)
    careful, bold = (counted(lambda r=r: race(ballot(full), range(12), r, bounds=False), full) for r in (0.001, 0.3))
    assert bold < careful


def test_tolerance_of_float32_is_that_of_the_head_and_coarser_ones_grow_with_the_sites() -> None:
    assert tolerance_of(2.0**-23, 200) == Tolerance()
    for epsilon in (2.0**-7, 2.0**-10):  # bfloat16, float16
        few, many = tolerance_of(epsilon, 16), tolerance_of(epsilon, 64)
        assert many.relative == 2 * few.relative == 4 * epsilon
        assert many.absolute == 4 * few.absolute == many.relative**2


def test_a_bound_within_the_rounding_above_its_loss_does_not_exclude_the_best() -> None:
    """The best plan's bound is 2% above its loss, and above the loss of the second."""
    full, factors = {0: 1.0, 1: 1.01}, {0: 1.02, 1: 0.99}

    def decided(tolerance: Tolerance) -> list[Decision]:
        choice = measure_best(replace(ballot([[[1.0]] * 4] * 2, 1, 1000), tolerance=tolerance), bounds=True)
        request: PieceRequest = next(choice)
        try:
            while True:
                of = {p: full[p] * (1.0 if request.quality == "full" else factors[p]) for p in full}
                request = choice.send({(p, g): (of[p],) for p, g in request.pieces})
        except StopIteration as end:
            return list(end.value)

    assert decided(Tolerance()) == ["bound", "full"]
    assert decided(tolerance_of(2.0**-7, 64)) == ["full", "full"]
