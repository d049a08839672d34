"""Losses, their paired differences, and the steps of a path: against direct computation and brute force."""

from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from billhook.core.plan import PARTS, Plan, Site
from billhook.core.results.json_form import decode, encode
from billhook.core.results.measured import Loss, Step, paired_gap
from billhook.runs.trace import Round, removal_trace

SITES = [Site(b, p) for b in range(3) for p in PARTS]


@st.composite
def losses(draw: st.DrawFn, least: int = 1) -> tuple[Loss, Loss]:
    """Two losses over the same documents of uneven length."""
    counts = draw(st.lists(st.integers(1, 50), min_size=least, max_size=8))
    values = st.floats(-50, 50, allow_nan=False)
    a, b = (tuple(draw(values) * count for count in counts) for _ in range(2))
    return Loss("kl", a, tuple(counts)), Loss("kl", b, tuple(counts))


def measured(plan: Plan, seed: int, bound: bool = False) -> Loss:
    """A loss that depends on the plan and the seed only: three documents."""
    rng = np.random.default_rng([seed, int(plan.key(), 16)])
    return Loss("kl", tuple(rng.uniform(1, 2, 3) * (3, 5, 9)), (3, 5, 9), bound)


def played(path: list[Plan], rounds: list[tuple[Plan, ...]], seed: int) -> list[Step]:
    told: list[Round] = [(plans, [measured(plan, seed) for plan in plans]) for plans in rounds]
    return removal_trace(path, told, [measured(plan, seed) for plan in path])


# --- losses ------------------------------------------------------------------------------------------------------


@given(losses())
def test_the_mean_weighs_documents_by_their_tokens(pair: tuple[Loss, Loss]) -> None:
    loss, _ = pair
    tokens = np.repeat(loss.per_document(), loss.counts)  # every token of a document at its document's mean
    assert loss.mean == pytest.approx(tokens.mean(), abs=1e-9)
    assert loss.per_document() == pytest.approx(np.divide(loss.sums, loss.counts), abs=1e-12)
    assert min(loss.per_document()) - 1e-9 <= loss.mean <= max(loss.per_document()) + 1e-9


@given(losses(least=2))
def test_a_difference_is_a_ratio_estimate_over_documents(pair: tuple[Loss, Loss]) -> None:
    a, b = pair
    gap, error = paired_gap(a, b)
    count, change = np.array(a.counts, float), np.subtract(a.sums, b.sums)
    assert gap == pytest.approx(np.average(change / count, weights=count), abs=1e-9)
    residual = change - gap * count
    assert error == pytest.approx(np.sqrt(residual.var(ddof=1) / len(count)) / count.mean(), rel=1e-6, abs=1e-9)


def test_with_documents_of_one_length_the_error_is_that_of_a_plain_mean() -> None:
    rng = np.random.default_rng(5)
    x, y = rng.normal(2, 1, 11), rng.normal(3, 2, 11)
    _, error = paired_gap(Loss("kl", tuple(x * 7), (7,) * 11), Loss("kl", tuple(y * 7), (7,) * 11))
    assert error == pytest.approx((x - y).std(ddof=1) / np.sqrt(11))


@given(losses(least=2), st.floats(-9, 9), st.floats(-9, 9))
def test_a_difference_moves_with_a_and_against_b(pair: tuple[Loss, Loss], up: float, both: float) -> None:
    a, b = pair

    def shifted(loss: Loss, by: float) -> Loss:
        return Loss(loss.name, tuple(s + by * c for s, c in zip(loss.sums, loss.counts, strict=True)), loss.counts)

    gap, error = paired_gap(a, b)
    moved = paired_gap(shifted(a, up + both), shifted(b, both))
    assert moved == pytest.approx((gap + up, error), abs=1e-7)
    assert paired_gap(b, a) == pytest.approx((-gap, error), abs=1e-9)
    assert paired_gap(a, a) == (0, 0)


@given(losses())
def test_one_document_has_no_error(pair: tuple[Loss, Loss]) -> None:
    a, b = (Loss(loss.name, loss.sums[:1], loss.counts[:1]) for loss in pair)
    assert paired_gap(a, b) == (pytest.approx(a.mean - b.mean, abs=1e-9), None)


# --- steps -------------------------------------------------------------------------------------------------------


@given(st.permutations(SITES), st.integers(1, 4), st.integers(0, 99))
def test_a_greedy_step_tells_the_gap_to_the_best_of_its_round(order: list[Site], length: int, seed: int) -> None:
    path = [Plan(frozenset(order[: i + 1])) for i in range(length)]
    starts = [Plan(), *path[:-1]]
    rounds = [tuple(start.without(s) for s in SITES if s not in start.removed) for start in starts]
    for start, plan, site, step in zip(starts, path, order, played(path, rounds, seed), strict=False):
        rivals = [measured(start.without(s), seed) for s in SITES if s not in plan.removed]
        second = min(rivals, key=lambda loss: loss.mean)
        assert step.sites == (site,)
        assert step.loss == measured(plan, seed).mean
        assert (step.gap, step.gap_se) == paired_gap(second, measured(plan, seed))


@given(st.integers(1, 4), st.integers(0, 99), st.booleans())
def test_a_one_shot_step_tells_the_gap_to_the_next_in_the_ranking(length: int, seed: int, with_dense: bool) -> None:
    order = sorted(SITES, key=lambda s: measured(Plan().without(s), seed).mean)
    path = [Plan(frozenset(order[: i + 1])) for i in range(length)]
    asked = tuple(Plan().without(s) for s in SITES) + ((Plan(),) if with_dense else ())
    for i, step in enumerate(played(path, [asked], seed)):
        alone, following = (measured(Plan().without(s), seed) for s in order[i : i + 2])
        assert step.sites == (order[i],)
        assert step.loss == measured(path[i], seed).mean
        assert (step.gap, step.gap_se) == paired_gap(following, alone)
        assert step.gap is not None
        assert step.gap >= 0


def test_blocks_go_as_one_step() -> None:
    blocks = [tuple(Site(b, p) for p in PARTS) for b in range(3)]
    asked = tuple(Plan().without(*block) for block in blocks)
    (step,) = played([asked[1]], [asked], seed=4)
    second = min((measured(asked[i], 4) for i in (0, 2)), key=lambda loss: loss.mean)
    assert step.sites == blocks[1]
    assert (step.gap, step.gap_se) == paired_gap(second, measured(asked[1], 4))


def test_bounds_are_no_rivals() -> None:
    plans = tuple(Plan().without(s) for s in SITES)
    for bounded in combinations(range(1, len(plans)), 3):
        told = [measured(plan, 8, bound=i in bounded) for i, plan in enumerate(plans)]
        (step,) = removal_trace([plans[0]], [(plans, told)], [told[0]])
        full = [told[i] for i in range(1, len(plans)) if i not in bounded]
        assert step.gap == paired_gap(min(full, key=lambda loss: loss.mean), told[0])[0]


def test_without_a_rival_there_is_no_gap() -> None:
    alone, rival = Plan().without(SITES[0]), Plan().without(SITES[1])
    assert removal_trace([alone], [], [measured(alone, 1)])[0].gap is None
    assert removal_trace([alone], [((alone,), [measured(alone, 1)])], [measured(alone, 1)])[0].gap is None
    told = [measured(alone, 1), measured(rival, 1, bound=True)]
    assert removal_trace([alone], [((alone, rival), told)], [told[0]])[0].gap is None


def test_a_step_survives_json() -> None:
    plan = Plan.parse(["attention.3", "mlp.3", "mlp.1[0-5 7]"])
    step = Step(tuple(plan.sites()), 0.25, None, None, tuple(plan.narrowed))
    read = json.loads(json.dumps(encode(step)))
    assert decode(Step, json.loads(json.dumps(read))) == step
    assert Plan.parse(["mlp.1[0-2]"]).combined_with(Plan.parse([*read.pop("sites"), *read.pop("narrowed")])) == plan
    assert read == {"loss": step.loss, "gap": None, "gap_se": None, "loss_se": None}
