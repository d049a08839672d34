"""Models in which it is known what can go: every metric and search finds it, or fails where theory says it must."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_probe import documents

from billhook.core.budget import parse_budgets
from billhook.core.errors import UsageError
from billhook.core.plan import Plan, Site
from billhook.core.problem import Problem
from billhook.core.results.measured import Loss, paired_gap
from billhook.data.token_sets import TokenSet
from billhook.engine.probe import Probe
from billhook.methods.metrics import METRICS
from billhook.methods.search import SEARCHES, drive, narrows
from billhook.models.load import Teacher, load
from billhook.runs.executor import Executor

BY_TASK = {"loo_task", "shapley_task"}
OPTIONS: dict[str, dict[str, Any]] = {
    "shapley_nll": {"pairs": 3},
    "shapley_kl": {"pairs": 3},
    "present_absent": {"draws": 200},
}
NOISY = {"present_absent"}  # whose values hold the noise of all other sites


@cache
def tokens() -> TokenSet:
    return documents(12)


def planted(folder: Path, change: Callable[[Any], None], **overrides: Any) -> Teacher:
    """A tiny gpt2, whose sublayers have biases, changed in some weights."""
    model = tiny.build("gpt2", **overrides)
    with torch.no_grad():
        change(model.transformer.h)
    model.save_pretrained(folder)
    return load(folder)


def constant(linear: Any, value: float | torch.Tensor) -> None:
    linear.weight.zero_()
    linear.bias.copy_(torch.as_tensor(value).expand_as(linear.bias))


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    """attention.2 adds nothing."""
    return planted(tmp_path_factory.mktemp("idle"), lambda blocks: constant(blocks[2].attn.c_proj, 0.0))


@pytest.fixture(scope="module")
def cancelling(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    """attention.3 adds a vector that mlp.3 takes away: each alone ruins the model, both together cost nothing."""
    vector = 30 * torch.randn(32, generator=torch.Generator().manual_seed(0))

    def change(blocks: Any) -> None:
        constant(blocks[3].attn.c_proj, vector)
        constant(blocks[3].mlp.c_proj, -vector)

    return planted(tmp_path_factory.mktemp("cancelling"), change)


def searched(name: str, teacher: Teacher, budget: str, **options: Any) -> tuple[Plan, float]:
    probe = Probe(teacher, tokens(), "kl")
    problem = Problem(teacher.anatomy, parse_budgets(budget)).check()
    plan = drive(SEARCHES[name](problem, **options), Executor(probe))[-1]
    return plan, probe.losses([plan])[0].mean


@pytest.mark.parametrize("name", sorted(set(METRICS) - BY_TASK - NOISY - {"angular_span", "magnitude"}))
def test_a_site_that_adds_nothing_scores_nothing(name: str, idle: Teacher) -> None:
    scores = METRICS[name](Probe(idle, tokens(), "kl"), **OPTIONS.get(name, {}))
    values = {unit: score.value for unit, score in scores.items() if isinstance(unit, Site)}
    if name == "loo_ppl":  # no difference, but the perplexity itself
        dense = Probe(idle, tokens(), "nll").losses([Plan()])[0].mean
        assert values[Site(2, "attention")] == pytest.approx(math.exp(dense), rel=1e-5)
        return
    assert values[Site(2, "attention")] == pytest.approx(0, abs=2e-5)
    if "nll" in name:  # against the data, and not the teacher, a removal may well help
        assert min(values.values()) < 0
    else:
        assert min(values, key=lambda site: values[site]) == Site(2, "attention"), values


def test_magnitude_sees_what_is_zero_and_not_what_it_does(idle: Teacher) -> None:
    """Half of the weights of the idle site are zero, the others as large as anywhere."""
    scores = METRICS["magnitude"](Probe(idle, tokens(), "kl"))
    assert scores[Site(2, "attention")].value < min(scores[Site(b, "attention")].value for b in (0, 1, 3))
    assert scores[Site(2, "attention")].value > 0


@pytest.mark.parametrize("name", sorted(n for n in SEARCHES if n != "contiguous" and not narrows(n)))
def test_every_search_removes_the_site_that_adds_nothing(name: str, idle: Teacher) -> None:
    plan, loss = searched(name, idle, "1sites")
    assert plan == Plan.parse(["attention.2"])
    assert loss == pytest.approx(0, abs=1e-6)


def test_sites_that_cancel_each_other_are_found_by_who_looks_at_both(cancelling: Teacher) -> None:
    """Who moves one site at a time must miss the pair; blocks, runs, mutations of two and all plans find it."""
    pair = Plan.parse(["attention.3", "mlp.3"])
    for name, budget, options in (
        ("exhaustive", "2sites", {}),
        ("evolve", "2sites", {"generations": 40, "tokens": 64}),
        ("greedy", "1blocks", {}),
        ("oneshot", "1blocks", {}),
        ("contiguous", "1blocks", {}),
    ):
        plan, loss = searched(name, cancelling, budget, **options)
        assert plan == pair, name
        assert loss == pytest.approx(0, abs=1e-6)
    for name in ("oneshot", "greedy"):
        plan, loss = searched(name, cancelling, "2sites")
        assert not plan.removed & pair.removed, name
        assert loss > 0.01


def test_what_is_removed_block_by_block_is_not_what_its_sites_say(cancelling: Teacher) -> None:
    scores = METRICS["loo_kl"](Probe(cancelling, tokens(), "nll"))
    assert scores[3].value == pytest.approx(0, abs=1e-6)
    assert min(scores[Site(3, "attention")].value, scores[Site(3, "mlp")].value) > 0.5


# -- ablations ------------------------------------------------------------------------------------------------------


def every_unit(teacher: Teacher) -> dict[Site | int, Plan]:
    alive = teacher.anatomy.sites_present()
    sites: dict[Site | int, Plan] = {site: Plan(frozenset([site])) for site in alive}
    return sites | {b: Plan(frozenset(s for s in alive if s.block == b)) for b in teacher.positions}


@pytest.mark.parametrize(
    ("name", "loss"), [("loo_nll", "nll"), ("loo_kl", "kl"), ("loo_js", "js"), ("loo_logits", "norm")]
)
def test_leaving_one_out_is_the_rise_of_the_loss(name: str, loss: str, checkpoint: Callable[[str], Path]) -> None:
    for variant in ("llama", "phi"):
        teacher = load(checkpoint(variant))
        units = every_unit(teacher)
        dense, *losses = Probe(teacher, tokens(), loss).losses([Plan(), *units.values()])
        scores = METRICS[name](Probe(teacher, tokens(), "kl"))
        assert scores.keys() == units.keys()
        for unit, measured in zip(units, losses, strict=True):
            assert (scores[unit].value, scores[unit].se) == pytest.approx(paired_gap(measured, dense), rel=1e-6)


def test_leaving_one_out_by_perplexity_ranks_as_by_likelihood(checkpoint: Callable[[str], Path]) -> None:
    teacher = load(checkpoint("llama"))
    nll, ppl = (METRICS[name](Probe(teacher, tokens(), "kl")) for name in ("loo_nll", "loo_ppl"))
    dense = Probe(teacher, tokens(), "nll").losses([Plan()])[0].mean
    for unit, score in nll.items():
        assert ppl[unit].value == pytest.approx(math.exp(dense + score.value), rel=1e-6)
        assert score.se is not None
        assert ppl[unit].se == pytest.approx(ppl[unit].value * score.se, rel=1e-5)


def test_metrics_of_a_task_want_a_task(checkpoint: Callable[[str], Path]) -> None:
    for name in BY_TASK:
        with pytest.raises(UsageError, match="loss='task:FILE'"):
            METRICS[name](Probe(load(checkpoint("llama")), tokens(), "kl"))


# -- coalitions -----------------------------------------------------------------------------------------------------


class Game:
    """A probe of a game that is known: v of a plan instead of a loss."""

    def __init__(self, teacher: Teacher, value: Callable[[Plan], float]) -> None:
        self.teacher, self.value, self.loss = teacher, value, "kl"

    def with_objective(self, loss: str) -> Game:
        return self

    def losses(self, plans: list[Plan]) -> list[Loss]:
        return [Loss("kl", (self.value(plan),), (1,)) for plan in plans]


def exact_shapley(teacher: Teacher, value: Callable[[Plan], float]) -> dict[Site, float]:
    sites = teacher.anatomy.sites_present()
    n, found = len(sites), dict.fromkeys(sites, 0.0)
    for site in sites:
        others = [s for s in sites if s != site]
        for k in range(n):
            weight = 1 / (n * math.comb(n - 1, k))
            for coalition in combinations(others, k):
                before = Plan(frozenset(coalition))
                found[site] += weight * (value(before.without(site)) - value(before))
    return found


def tangled(plan: Plan) -> float:
    """Sites with prices of their own, two that only matter together, and one that helps another."""
    gone = {str(site) for site in plan.removed}
    value = sum(0.1 * (s.block + 1) * (2 if s.part == "mlp" else 1) for s in plan.removed)
    return value + 3.0 * ({"attention.1", "mlp.1"} <= gone) - 0.3 * ({"mlp.0", "mlp.2"} <= gone)


def test_shapley_values_are_the_exact_ones_within_their_interval(checkpoint: Callable[[str], Path]) -> None:
    teacher = load(checkpoint("llama"))
    exact = exact_shapley(teacher, tangled)
    scores = METRICS["shapley_kl"](Game(teacher, tangled), pairs=200, seed=1)  # type: ignore[arg-type]
    for site, value in exact.items():
        score = scores[site]
        assert score.se is not None
        assert abs(score.value - value) <= max(4 * score.se, 1e-9), site
    free = [site for site in exact if str(site) not in ("attention.1", "mlp.1", "mlp.0", "mlp.2")]
    assert all(scores[site].se == pytest.approx(0, abs=1e-9) for site in free), "nothing varies for the others"
    assert scores[1].value == pytest.approx(scores[Site(1, "attention")].value + scores[Site(1, "mlp")].value)


def test_two_pairs_of_orders_share_what_they_agree_on(checkpoint: Callable[[str], Path]) -> None:
    teacher = load(checkpoint("llama"))
    for seed in range(3):
        scores = METRICS["shapley_kl"](Game(teacher, tangled), pairs=2, seed=seed)  # type: ignore[arg-type]
        total = tangled(Plan(frozenset(teacher.anatomy.sites_present())))
        assert sum(s.value for unit, s in scores.items() if isinstance(unit, Site)) == pytest.approx(total)


@pytest.mark.parametrize("players", ["sites", "blocks"])
def test_shapley_values_sum_to_what_is_lost_when_everything_goes(
    players: str, checkpoint: Callable[[str], Path]
) -> None:
    teacher = load(checkpoint("llama"))
    for name, loss in (("shapley_kl", "kl"), ("shapley_nll", "nll")):
        dense, nothing = Probe(teacher, tokens(), loss).losses(
            [Plan(), Plan(frozenset(teacher.anatomy.sites_present()))]
        )
        scores = METRICS[name](Probe(teacher, tokens(), "kl"), pairs=2, players=players)
        parts = [score.value for unit, score in scores.items() if isinstance(unit, Site) == (players == "sites")]
        assert sum(parts) == pytest.approx(nothing.mean - dense.mean, rel=1e-4)


def test_present_minus_absent_is_not_shapley_but_agrees_where_nothing_acts_together(
    checkpoint: Callable[[str], Path],
) -> None:
    teacher = load(checkpoint("llama"))

    def additive(plan: Plan) -> float:
        return sum(0.1 * (s.block + 1) * (2 if s.part == "mlp" else 1) for s in plan.removed)

    scores = METRICS["present_absent"](Game(teacher, additive), draws=4000)  # type: ignore[arg-type]
    for site in teacher.anatomy.sites_present():
        score = scores[site]
        assert score.se is not None
        assert abs(score.value - additive(Plan(frozenset([site])))) < 4 * score.se
    alone = {s: tangled(Plan(frozenset([s]))) for s in teacher.anatomy.sites_present()}
    half = METRICS["present_absent"](Game(teacher, tangled), draws=4000, keep=0.5)  # type: ignore[arg-type]
    pair = Site(1, "attention")
    assert half[pair].value == pytest.approx(alone[pair] + 1.5, abs=0.2), "half of the coalitions lack its partner"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("shapley_kl", {"pairs": 1}, "at least 2 pairs"),
        ("shapley_kl", {"players": "heads"}, "neither sites nor blocks"),
        ("present_absent", {"keep": 1.0}, "a share of the sites between 0 and 1"),
        ("present_absent", {"draws": 3}, "leave too few"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    name: str, options: dict[str, Any], message: str, checkpoint: Callable[[str], Path]
) -> None:
    with pytest.raises(UsageError, match=message):
        METRICS[name](Probe(load(checkpoint("llama")), tokens(), "kl"), **options)
