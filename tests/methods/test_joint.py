"""Depth and width in one search: optima by brute force, and what a model does not need."""

from __future__ import annotations

import itertools
import math
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from test_channel_groups import documents

import billhook
from billhook.cli.progress import event_words
from billhook.core.anatomy import Anatomy, GroupSize, SiteSize, Unassigned
from billhook.core.budget import Budget, parse_budgets
from billhook.core.errors import BudgetError, UsageError
from billhook.core.events import Event
from billhook.core.plan import KeptGroups, MeasureRequest, Part, Plan, Site
from billhook.core.problem import Problem
from billhook.core.results.measured import Loss
from billhook.engine.probe import Probe
from billhook.methods.metrics import GROUP_METRICS
from billhook.methods.search import SEARCHES, drive, estimate_losses, kept_groups, restricted
from billhook.methods.search.rank_channels import ranked_plan
from billhook.models.load import load
from billhook.runs.executor import Executor
from billhook.runs.recipe import Recipe
from billhook.runs.search import tell_shares
from billhook.runs.store import Store

Folder = Callable[[str], Path]


def both(budget: str) -> Problem:
    """Three blocks, attentions of 2 KV groups, mlps of 4 neurons, 10 and 20 parameters a group and 5 of its own."""
    sizes = []
    for block, (part, groups, each) in itertools.product(range(3), (("attention", 2, 10), ("mlp", 4, 20))):
        kv = 4 if part == "attention" else 0
        group = GroupSize(each, 4 * each, kv, 2 * each)
        total = groups * each + 5
        site = Site(block, cast(Part, part))
        sizes.append(SiteSize(site, total, 4 * total, groups * kv, 2 * total, 0, tuple(range(groups)), group))
    anatomy = Anatomy("llama", 3, tuple(sizes), Unassigned(30, 120, 60))
    scores = {size.site: [float(g) for g in range(len(size.groups))] for size in sizes}
    return Problem(anatomy, parse_budgets(budget), group_scores=scores)


def every_plan(problem: Problem, levels: int) -> Iterator[Plan]:
    """All combinations of what may be left of the sites, in the order of their groups."""
    choices = []
    for size in problem.anatomy.sites:
        left = {size.groups[len(size.groups) * step // levels :] for step in range(levels)}
        narrower = [Plan(frozenset(), frozenset({KeptGroups(size.site, kept)})) for kept in left if kept != size.groups]
        choices.append([Plan(), *narrower, Plan(frozenset({size.site}))])
    for some in itertools.product(*choices):
        removed = frozenset(site for plan in some for site in plan.removed)
        yield Plan(removed, frozenset(narrow for plan in some for narrow in plan.narrowed))


def dear(problem: Problem, seed: int) -> Callable[[Plan], float]:
    """A loss that adds up over sites, each of its own price and curvature; what is removed costs half as much more."""
    draw = random.Random(seed)
    prices = {size.site: (draw.uniform(0.1, 1), draw.uniform(1, 3)) for size in problem.anatomy.sites}

    def loss(plan: Plan) -> float:
        gone = {size.site: lost.parameters / size.parameters for size, lost in problem.anatomy.lost(plan)}
        gone |= dict.fromkeys(plan.removed, 1.5)
        return sum(prices[site][0] * share ** prices[site][1] for site, share in gone.items())

    return loss


def found_by(problem: Problem, loss: Callable[[Plan], float], **options: Any) -> Plan:
    def measure(ask: MeasureRequest) -> list[Loss]:
        return [Loss("kl", (loss(plan),), (1,)) for plan in ask.plans]

    (plan,) = drive(SEARCHES["joint"](problem, **options), measure)
    assert problem.anatomy.check(plan) == plan
    assert problem.is_met(plan)
    return plan


@pytest.mark.parametrize("budget", ["20%params", "45%params", "30%kv", "25%params,30%kv", "2sites"])
@pytest.mark.parametrize("seed", range(3))
def test_joint_finds_the_optimum_of_losses_that_add_up(budget: str, seed: int) -> None:
    problem = both(budget)
    loss = dear(problem, seed)
    plan = found_by(problem, loss, levels=4)
    legal = [each for each in every_plan(problem, 4) if problem.is_met(each) and problem.is_valid(each)]
    assert loss(plan) == pytest.approx(min(map(loss, legal)))


def test_every_expert_loses_its_own_lowest_groups() -> None:
    size = SiteSize(Site(0, "mlp"), 0, 0, 0, 0, groups=tuple(range(8)), experts=2)
    order = [3, 2, 1, 0, 7, 5, 6, 4]  # all of the first expert is worth less than any of the second
    assert kept_groups(size, order, 4, 1) == (0, 1, 4, 6)
    assert kept_groups(size, order, 2, 1) == (0, 1, 2, 4, 5, 6)


@pytest.mark.parametrize("heads", [True, False])
def test_groups_of_an_attention_go_in_the_order_of_their_losses_alone(heads: bool) -> None:
    """The metric of `both` removes group 0 first, which here is the one that matters."""
    problem, asked = both("40%kv"), Counter[Plan]()
    worth = (1.0, 0.1)

    def loss(plan: Plan) -> float:
        asked[plan] += 1
        lost = [worth[g] for narrow in plan.narrowed for g in range(2) if g not in narrow.groups]
        return sum(lost) + 2 * len(plan.removed) + 0.1 * len(plan.narrowed)

    plan = found_by(problem, loss, levels=4, heads=heads, rounds=0)
    kept = {narrow.groups for narrow in plan.narrowed if narrow.site.part == "attention"}
    assert kept == {(0,) if heads else (1,)}
    alone = [each for each in asked if len(each.narrowed) == 1 and not each.removed]
    attentions = [narrow for each in alone for narrow in each.narrowed if narrow.site.part == "attention"]
    assert len(attentions) == (6 if heads else 3), "each group of the three attentions, or the rung of each"


def test_attentions_of_many_groups_are_ordered_by_the_metric() -> None:
    problem = both("20%params")
    sizes = [replace(size, groups=tuple(range(9))) if size.site.part == "attention" else size
             for size in problem.anatomy.sites]  # fmt: skip
    scores = {size.site: [float(g) for g in range(len(size.groups))] for size in sizes}
    many = replace(problem, anatomy=replace(problem.anatomy, sites=tuple(sizes)), group_scores=scores)
    seen: set[Plan] = set()

    def loss(plan: Plan) -> float:
        seen.add(plan)
        return len(plan.removed) + sum(1 / len(narrow.groups) for narrow in plan.narrowed)

    found_by(many, loss, levels=4, rounds=0)
    kept = [narrow.groups for plan in seen for narrow in plan.narrowed if narrow.site.part == "attention"]
    assert all(groups == tuple(range(9 - len(groups), 9)) for groups in kept)


@pytest.mark.parametrize("seed", range(5))
def test_joint_ends_where_no_single_step_helps(seed: int) -> None:
    """Losses that do not add up: two sites next to each other are worth more than their sum."""
    problem = both("30%params")
    alone = dear(problem, seed)

    def loss(plan: Plan) -> float:
        touched = plan.removed | {narrow.site for narrow in plan.narrowed}
        pairs = sum({Site(b, "mlp"), Site(b + 1, "attention")} <= touched for b in range(2))
        return alone(plan) + 0.4 * pairs

    plan = found_by(problem, loss, levels=4)
    alone_best = found_by(problem, alone, levels=4)
    assert loss(plan) <= loss(alone_best)
    widths = {size.site: len(size.groups) for size in problem.anatomy.sites}
    mine = _left(plan, widths)
    for other in every_plan(problem, 4):
        if problem.is_met(other) and problem.is_valid(other):
            theirs = _left(other, widths)
            steps = [abs(mine[site] - theirs[site]) for site in mine]
            assert sum(steps) > 1 or loss(other) >= loss(plan)


@pytest.mark.parametrize("seed", range(6))
def test_joint_is_no_worse_than_the_search_that_it_begins_with(seed: int) -> None:
    """Sites that became narrower seem cheap alone and are dear together, so that all narrow is a bad place to begin."""
    problem = both("45%params")
    alone, draw = dear(problem, seed), random.Random(seed)
    pairs = {
        frozenset(pair): draw.uniform(0, 0.5) for pair in itertools.combinations(problem.anatomy.sites_present(), 2)
    }

    def loss(plan: Plan) -> float:
        together = sum(price for pair, price in pairs.items() if pair <= plan.removed)
        return alone(plan) + together + 0.4 * len(plan.narrowed) ** 2

    def measure(ask: MeasureRequest) -> list[Loss]:
        return [Loss("kl", (loss(plan),), (1,)) for plan in ask.plans]

    depth = drive(SEARCHES["swap"](problem), measure)[-1]
    found = {start: loss(found_by(problem, loss, levels=4, rounds=1, start=start)) for start in ("none", "swap")}
    assert found["swap"] <= loss(depth)
    assert found["swap"] <= found["none"]
    assert seed or found["swap"] < found["none"]


@pytest.mark.parametrize("ends", [False, True])
def test_joint_begins_with_the_same_share_of_every_site_where_that_is_best(ends: bool) -> None:
    """Sites are dear where they lose more than others do; in some models those at the ends are dear at once."""
    sizes = itertools.product(range(8), (("attention", 8, 10), ("mlp", 16, 20)))
    sites = tuple(
        SiteSize(Site(b, cast(Part, part)), n * each, 0, 0, 0, 0, tuple(range(n)), GroupSize(each, 0, 0, 0))
        for b, (part, n, each) in sizes
    )
    scores = {size.site: [float(g) for g in range(len(size.groups))] for size in sites}
    problem = Problem(Anatomy("llama", 8, sites, Unassigned(0, 0, 0)), parse_budgets("12%params"), group_scores=scores)

    def loss(plan: Plan) -> float:
        lost = {size.site: each.parameters / size.parameters for size, each in problem.anatomy.lost(plan)}
        lost |= dict.fromkeys(plan.removed, 1.0)
        shares = [lost.get(size.site, 0.0) for size in sites if not ends or 4 <= size.site.block < 6]
        outside = sum(share for site, share in lost.items() if ends and not 4 <= site.block < 6)
        return max(shares) - min(shares) + sum(share**2 for share in shares) / 100 + 10 * outside

    some = restricted(problem, "mix", 4, 2) if ends else problem
    even = ranked_plan(some, 1, uniform=True)
    assert len({size.site.block for size, _ in problem.anatomy.lost(even)}) == (2 if ends else 8)
    assert found_by(problem, loss, start="none", rounds=0) == even


def test_joint_narrows_where_whole_sites_cannot_go() -> None:
    problem = both("20%params")
    attentions = frozenset(site for site in problem.anatomy.sites_present() if site.part == "attention")
    some = replace(problem, protected=attentions, budgets=parse_budgets("48%params"))
    plan = found_by(some, dear(some, 0), levels=4)
    assert plan.narrowed
    with pytest.raises(BudgetError):
        replace(some, group_scores=None).check()


def _left(plan: Plan, widths: Mapping[Site, int]) -> dict[Site, int]:
    """How many groups of each site are left."""
    left = dict(widths) | dict.fromkeys(plan.removed, 0)
    return left | {narrow.site: len(narrow.groups) for narrow in plan.narrowed}


def test_joint_takes_what_the_model_does_not_need(checkpoint: Folder) -> None:
    """An mlp that is multiplied by zero goes as a whole; neurons that are go in the others."""
    teacher = load(checkpoint("llama"))
    dead = teacher.block(1).mlp.down_proj.weight
    others = [teacher.block(b).mlp.down_proj.weight for b in (0, 2, 3)]
    with torch.no_grad():
        dead.zero_()
        for weight in others:
            weight[:, :12] = 0
    probe = Probe(teacher, documents(), "kl")
    scores = {site: tuple(values.tolist()) for site, values in GROUP_METRICS["flap"](probe, standardise=False).items()}
    free = sum(weight.shape[1] for weight in (dead,)) + 3 * 12
    share = free * 3 * 32 / teacher.anatomy.total("parameters")
    problem = Problem(teacher.anatomy, (Budget.parse(f"{math.floor(share * 100)}%params"),), group_scores=scores)
    (plan,) = drive(SEARCHES["joint"](problem, levels=4), Executor(probe))
    assert problem.is_met(plan)
    assert probe.losses([plan])[0].mean == pytest.approx(0, abs=1e-6)
    assert Site(1, "mlp") in plan.removed


def test_progress_tells_how_much_is_gone_of_narrower_sites_too(model: Path, text: Path, tmp_path: Path) -> None:
    seen: list[Event] = []
    store, options = tmp_path / "runs.db", {"tokens": 240, "length": 24, "eval_tokens": 512, "eval_length": 24}
    found = billhook.prune(
        str(model), recipe="billhook-joint", remove="20%params", data=str(text), out=tmp_path / "out",
        store=store, watch=seen.append, set={"levels": 3, "start": "none"}, **options,
    )  # fmt: skip
    notes = [event_words(event.stage, event.values) for event in seen if event.stage == "search"]
    told_of = r"[1-9][\d,]* of [\d,]+ params removed(, now changing widths)?, lowest kl"
    assert any(re.match(told_of, note) for note in notes), notes
    phases = [str(event.values.get("phase", "")) for event in seen if event.stage == "search"]
    assert list(dict.fromkeys(phases)) == ["alone", "", "changes"]
    gone = [event.values["removed_params"] for event in seen if event.values.get("phase") == "changes"]
    assert all(gone), "what is removed does not fall back to nothing"
    with closing(Store(store)) as opened:
        told = [event_words(e.stage, e.values) for e in opened.events(found.run) if e.stage == "round"]
    words = r"(nothing|(, |(attention|mlp)\.\d+( keeps [\d,]+)?)+): [\d.]+"
    assert told
    assert all(re.fullmatch(words, note) for note in told), told


@pytest.mark.parametrize("start", ["swap", "none"])
@pytest.mark.parametrize("seed", range(3))
def test_joint_says_at_most_how_many_losses_it_asks_for(seed: int, start: str) -> None:
    problem, asked = both("30%params"), set[tuple[Plan, int | None]]()
    worth = dear(problem, seed)

    def measure(ask: MeasureRequest) -> list[Loss]:
        asked.update((plan, ask.tokens) for plan in ask.plans)
        return [Loss("", (worth(plan),), (1,)) for plan in ask.plans]

    options: dict[str, Any] = {"start": start, "levels": 4, "rounds": 2}
    drive(SEARCHES["joint"](problem, **options), measure)
    most = estimate_losses("joint", replace(problem, group_scores={}), **options)
    assert most is not None
    assert len(asked) <= most <= 3 * len(asked)
    assert estimate_losses("rank_channels", problem) == 0


def test_losses_of_a_large_model_are_counted_at_once() -> None:
    """80 blocks with 28,672 neurons each: a random search for the total of a progress bar took minutes."""
    sizes = []
    for block, (part, groups, each) in itertools.product(
        range(80), (("attention", 8, 18_874_368), ("mlp", 28_672, 24_576))
    ):
        group = GroupSize(each, 2 * each, 4096 if part == "attention" else 0, 2 * each)
        site = Site(block, cast(Part, part))
        total = groups * each
        sizes.append(
            SiteSize(site, total, 2 * total, 8 * group.kv_bytes_per_token, 2 * total, 0, tuple(range(groups)), group)
        )
    problem = Problem(
        Anatomy("llama", 80, tuple(sizes), Unassigned(10**9, 2 * 10**9, 10**9)),
        parse_budgets("20%params"),
        group_scores={},
    )
    start = time.process_time()
    most = estimate_losses("joint", problem)
    assert time.process_time() - start < 0.25  # measured: 0.02 s
    assert most is not None
    assert 5_000 < most < 50_000


def test_what_joint_cannot_do_is_said() -> None:
    with pytest.raises(UsageError, match="metric='cfsp'"):
        found_by(replace(both("20%params"), group_scores=None), lambda plan: 0.0)
    with pytest.raises(BudgetError, match="no use for a budget in blocks"):
        found_by(both("1block"), lambda plan: 0.0)
    with pytest.raises(UsageError, match="both must be 1 or more"):
        found_by(both("20%params"), lambda plan: 0.0, levels=0)


@pytest.mark.parametrize("elsewhere", [0, 100, 700, 10**6])
@pytest.mark.parametrize("unit", ["", "bytes", "flops"])
def test_a_share_of_a_model_whose_sites_hold_little_is_told_with_the_smaller_one(elsewhere: int, unit: str) -> None:
    problem = both(f"10%{unit}")
    anatomy = replace(problem.anatomy, rest=Unassigned(elsewhere, 4 * elsewhere, 2 * elsewhere))
    heard: list[Event] = []
    tell_shares(Recipe(model="m", remove=f"10%{unit}"), anatomy, heard.append)
    held = sum(size.parameters for size in anatomy.sites)
    share = 10 * (held + elsewhere) / held  # percent of what sites hold
    assert len(heard) == (15 < share <= 100)
    for event in heard:
        assert event.values["of_sites"] == pytest.approx(share)
        smaller = Problem(anatomy, parse_budgets(f"{event.values['smaller']:.9f}%{unit}"))
        alone = Problem(replace(anatomy, rest=Unassigned(0, 0, 0)), problem.budgets)
        assert float(smaller.targets[0]) == pytest.approx(float(alone.targets[0]))


# -- width, then depth ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["10%params", "30%params", "55%params", "60%params", "40%flops", "2sites"])
@pytest.mark.parametrize("alpha", [0.5, 1.5, 20.0])
def test_two_stages_are_one_width_and_then_greedy_attentions(budget: str, alpha: float) -> None:
    problem = both(budget)
    loss = dear(problem, 5)
    asked: list[MeasureRequest] = []

    def measure(ask: MeasureRequest) -> list[Loss]:
        asked.append(ask)
        return [Loss("nll", (loss(plan),), (1,)) for plan in ask.plans]

    path = drive(SEARCHES["two_stage"](problem, alpha=alpha, tokens=7), measure)
    plan = path[-1]
    assert problem.anatomy.check(plan) == plan
    assert problem.is_met(plan)
    assert {site.part for site in plan.removed} <= {"attention"}
    assert {(each.site.part, each.groups) for each in plan.narrowed} <= {("mlp", tuple(range(n, 4))) for n in (1, 2, 3)}
    assert len({each.groups for each in plan.narrowed}) == (1 if plan.narrowed else 0), "all alike, the lowest go first"
    assert len(plan.narrowed) in (0, 3)
    expected = Plan(frozenset(), plan.narrowed)
    for ask in asked:
        left = [Site(b, "attention") for b in range(3) if Site(b, "attention") not in expected.removed]
        assert set(ask.plans) == {expected.without(site) for site in left}
        assert ask.tokens == 7
        expected = min(ask.plans, key=loss)
    assert expected == plan
    assert estimate_losses("two_stage", problem, alpha=alpha) == sum(len(ask.plans) for ask in asked)
    if plan.narrowed:  # one neuron more in each would be too much
        first = min(min(each.groups) for each in plan.narrowed) - 1
        wider = {KeptGroups(each.site, tuple(range(first, 4))) for each in plan.narrowed} if first else set()
        assert not problem.is_met(Plan(plan.removed, frozenset(wider)))


@pytest.mark.parametrize(
    ("share", "alpha", "attentions"), [(0.25, 1.5, 2), (0.375, 1.5, 4), (0.5, 1.5, 8), (0.5, 3.0, 15)]
)
def test_how_many_attentions_go_is_the_rule_of_2ssp(share: float, alpha: float, attentions: int) -> None:
    """Mlps of three times the size, as in models of grouped queries: 30 · s^(3 / alpha)."""
    sizes = []
    for block, (part, groups) in itertools.product(range(30), (("attention", 1), ("mlp", 300))):
        site, group = Site(block, cast(Part, part)), GroupSize(100 if part == "attention" else 1, 1, 0, 1)
        sizes.append(SiteSize(site, group.parameters * groups, 1, 0, 1, 0, tuple(range(groups)), group))
    problem = Problem(Anatomy("llama", 30, tuple(sizes), Unassigned(0, 0, 0)), parse_budgets(f"{100 * share}%params"))
    problem = replace(problem, group_scores={s.site: [0.0] * len(s.groups) for s in sizes})
    plan = drive(
        SEARCHES["two_stage"](problem, alpha=alpha), lambda ask: [Loss("nll", (1.0,), (1,)) for _ in ask.plans]
    )[-1]
    assert len(plan.removed) == attentions
    assert problem.removed_cost(plan)[0] - float(problem.targets[0]) < 30


def test_two_stages_say_what_they_cannot_do() -> None:
    for budget in ("2blocks", "40%kv", "20%params,20%flops"):
        with pytest.raises(BudgetError, match="divides one budget between mlps and attentions"):
            drive(SEARCHES["two_stage"](both(budget)), lambda ask: [])
    with pytest.raises(BudgetError, match="cannot be met by narrower mlps and fewer attentions"):
        drive(SEARCHES["two_stage"](both("89%params")), lambda ask: [])
    with pytest.raises(UsageError, match="alpha=0, tokens=2048"):
        drive(SEARCHES["two_stage"](both("20%params"), alpha=0.0), lambda ask: [])
    with pytest.raises(UsageError, match="Name a metric of groups"):
        drive(SEARCHES["two_stage"](replace(both("20%params"), group_scores=None)), lambda ask: [])
