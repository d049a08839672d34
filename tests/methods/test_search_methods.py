"""What each search is for: optima by brute force, planted pairs and traps, and the rules of the papers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import combinations, pairwise
from math import ceil, comb, inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import allowed, anatomy_of, ends, groups_of, plain, solvable, worth
from test_search import (
    COUNTED,
    SHOWN,
    UNEVEN,
    Score,
    additive,
    crooked,
    executor,
    problem_of,
    run,
    stretches,
    tangled,
    walked,
)

from billhook.core.anatomy import GroupSize
from billhook.core.budget import parse_budgets
from billhook.core.errors import BudgetError, PlanError, UsageError
from billhook.core.plan import PARTS, MeasureRequest, Plan, Site
from billhook.core.problem import Move, Problem
from billhook.methods.search import SCREENING_TOKENS, SEARCHES, estimate_losses, narrows


def asked(log: list[MeasureRequest]) -> list[Plan]:
    return [plan for ask in log for plan in ask.plans]


def scored(problem: Problem, scores: Mapping[object, float]) -> Problem:
    return Problem(problem.anatomy, problem.budgets, problem.protected, problem.seed, scores)  # type: ignore[arg-type]


def exchanged(problem: Problem, plan: Plan) -> list[Plan]:
    """Every plan that one exchange leads to: a group comes back, another goes or none. By hand."""
    back = [group for group in groups_of(problem) if set(group) <= plan.removed]
    gone = [group for group in groups_of(problem) if not set(group) & plan.removed]
    found = [Plan(plan.removed - set(g) | set(h)) for g in back for h in [(), *gone]]
    return [p for p in found if allowed(problem, p) and problem.is_met(p)]


# --- one-shot ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "protected"), SHOWN)
def test_oneshot_asks_once_for_every_single_move(budget: str, protected: str) -> None:
    problem, log = problem_of(budget, protected), list[MeasureRequest]()
    run("oneshot", problem, tangled(0), log)
    found = [plan for plan in asked(log) if plan != Plan()]
    assert found == [Plan().without(*move) for move in problem.moves(Plan())]
    assert len(asked(log)) <= len(found) + 1  # and the dense model, at most


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("weigh", [True, False])
def test_oneshot_counts_the_loss_per_parameter_where_parameters_are_counted(seed: int, weigh: bool) -> None:
    problem, score = problem_of("20params", blocks=7), additive(seed)
    sizes = {size.site: size.parameters if weigh else 1 for size in problem.anatomy.sites}
    ranked = sorted(sizes, key=lambda site: score(Plan().without(site)) / sizes[site])
    path = run("oneshot", problem, score, weigh=weigh)
    assert [plan.removed for plan in path] == [set(ranked[: i + 1]) for i in range(len(path))]


@pytest.mark.parametrize("seed", range(3))
def test_oneshot_weighs_two_budgets_by_what_each_needs(seed: int) -> None:
    problem, score = problem_of("30params,6kv", blocks=7), additive(seed)  # attention 4 params and 2 kv, mlp 9 and 0
    value = {s: 4 / 30 + 2 / 6 if s.part == "attention" else 9 / 30 for s in problem.anatomy.sites_present()}
    first = run("oneshot", problem, score)[0].sites()[0]
    assert first == min(value, key=lambda site: score(Plan().without(site)) / value[site])


@pytest.mark.parametrize(("budget", "protected"), SHOWN)
@pytest.mark.parametrize("weigh", [True, False])
def test_oneshot_ranks_by_a_metric_without_a_loss(budget: str, protected: str, weigh: bool) -> None:
    problem, score, log = problem_of(budget, protected), additive(8), list[MeasureRequest]()
    blocks = {move[0].block if problem.whole_blocks else move[0]: move for move in problem.moves(Plan())}
    scores = {key: score(Plan(frozenset(move))) for key, move in blocks.items()}
    assert run("oneshot", scored(problem, scores), crooked(1), log, weigh=weigh) == run(
        "oneshot", problem, score, weigh=weigh
    )
    assert log == []


@pytest.mark.parametrize("search", ["oneshot", "ilp"])
def test_a_metric_without_the_scores_that_a_budget_needs_is_refused(search: str) -> None:
    runs = {(0, 1): 0.5, (1, 2): 0.1}
    sites = {Site(b, "attention"): 0.5 for b in range(5)}
    cases = [
        ("3sites", runs, r"no score for attention\.0, and this budget removes sites\..*cosine.*search='contiguous'"),
        ("3sites", sites, r"no score for mlp\.0, and this budget removes sites"),
        ("2blocks", sites, r"no score for block 0, and this budget removes blocks"),
    ]
    for budget, scores, message in cases:
        with pytest.raises(UsageError, match=message):
            run(search, scored(problem_of(budget), scores), additive(0))


# --- greedy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_greedy_asks_for_all_that_are_left_round_by_round(rounds: int) -> None:
    problem, log = problem_of(f"{rounds}sites", blocks=rounds + 1), list[MeasureRequest]()
    path = run("greedy", problem, tangled(0), log)
    n, r = len(problem.anatomy.sites), len(problem.anatomy.sites) - rounds
    sizes = [sum(plan != Plan() for plan in ask.plans) for ask in log]
    assert [size for size in sizes if size] == list(range(n, r, -1))
    assert sum(sizes) == n * (n + 1) // 2 - r * (r + 1) // 2
    assert len(path) == rounds


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("make", [tangled, crooked])
@pytest.mark.parametrize("budget", ["25params", "20params,3attention"])
def test_greedy_takes_the_smallest_rise_per_unit_that_is_still_needed(seed: int, make: object, budget: str) -> None:
    problem, score = problem_of(budget, blocks=7), make(seed)  # type: ignore[operator]
    plan = Plan()
    for after in run("greedy", problem, score):
        prices = {}
        for move in problem.moves(plan):
            rise, freed = score(plan.without(*move)) - score(plan), 0.0
            for budgeted in problem.budgets:
                had, gets = (worth(problem.anatomy, budgeted.unit, p) for p in (plan, plan.without(*move)))
                freed += (min(gets, budgeted.amount) - min(had, budgeted.amount)) / budgeted.amount
            prices[move] = rise / freed if rise > 0 else rise * freed
        (gone,) = after.removed - plan.removed
        assert prices[gone,] == pytest.approx(min(prices.values()))
        plan = after


@pytest.mark.parametrize(("budget", "protected"), COUNTED)
def test_greedy_takes_the_best_of_every_round(budget: str, protected: str) -> None:
    problem, score = problem_of(budget, protected), crooked(9)
    path = run("greedy", problem, score)
    for before, after in zip([Plan(), *path], path, strict=False):
        assert after == min((before.without(*move) for move in problem.moves(before)), key=score)


@pytest.mark.parametrize(("budget", "protected"), UNEVEN)
def test_unweighed_greedy_takes_the_lowest_loss_whatever_the_sizes(budget: str, protected: str) -> None:
    differs = 0
    for seed in range(8):
        problem, score = problem_of(budget, protected), tangled(seed)
        path = run("greedy", problem, score, weigh=False)
        for before, after in zip([Plan(), *path], path, strict=False):
            assert after == min((before.without(*move) for move in problem.moves(before)), key=score)
        differs += path != run("greedy", problem, score)
    assert differs or problem.whole_blocks  # blocks are alike


@pytest.mark.parametrize(("front", "blocks"), [(0.4, 8), (0.4, 32), (0.25, 7), (0.3, 10)])
def test_the_front_stays_until_as_many_others_are_gone(front: float, blocks: int) -> None:
    n = 2 * blocks
    last, until = int(n * front / 2), int(n * front)
    problem, log = problem_of(f"{until + 3}sites", blocks=blocks), list[MeasureRequest]()
    cheap = additive(3)
    path = run("greedy", problem, lambda p: cheap(p) + 9 * sum(s.block > last for s in p.sites()), log, front=front)
    gone = [next(iter(after.removed - before.removed)) for before, after in zip([Plan(), *path], path, strict=False)]
    assert all(site.block > last for site in gone[: until + 1])
    assert all(site.block <= last for site in gone[until + 1 :])  # the front is cheaper here, and back in play
    assert len(gone) == until + 3
    early = [plan for plan in asked(log) if len(plan.removed) <= until + 1]
    assert not [site for plan in early for site in plan.sites() if site.block <= last]
    assert {site for plan in early for site in plan.removed} == {
        s for s in problem.anatomy.sites_present() if s.block > last
    }


def test_a_front_that_leaves_nothing_to_remove_gives_way() -> None:
    path = run("greedy", problem_of("6sites", blocks=4), additive(0), front=0.9)
    assert len(path) == 6


@pytest.mark.parametrize(("early", "latter"), [(0, 0), (1, 1), (2, 0), (0, 3)])
@pytest.mark.parametrize("budget", ["3sites", "2blocks", "25params"])
def test_barriers_keep_the_first_and_last_blocks(early: int, latter: int, budget: str) -> None:
    problem, log, last = problem_of(budget, blocks=7), list[MeasureRequest](), 7 - latter
    path = run("greedy", problem, tangled(2), log, early_barrier=early, latter_barrier=latter)
    assert problem.is_met(path[-1])
    expected = {s for s in problem.anatomy.sites_present() if early <= s.block < last}
    assert {site for plan in asked(log) for site in plan.removed} == expected


def test_barriers_that_leave_too_little_are_refused() -> None:
    with pytest.raises(BudgetError, match=r"4blocks cannot be met: it asks for 4 blocks, and at most 3 blocks"):
        run("greedy", problem_of("4blocks"), tangled(2), early_barrier=1, latter_barrier=1)


@pytest.mark.parametrize("search", ["oneshot", "greedy"])
@pytest.mark.parametrize(("parts", "part"), [("mha", "attention"), ("mlp", "mlp")])
@pytest.mark.parametrize("budget", ["3sites", "12params"])
def test_parts_let_only_one_kind_go(search: str, parts: str, part: str, budget: str) -> None:
    problem, log = problem_of(budget, "2"), list[MeasureRequest]()
    path = run(search, problem, tangled(3), log, parts=parts)
    gone = {site for plan in [*path, *asked(log)] for site in plan.removed}
    assert gone == {s for s in problem.anatomy.sites_present() if s.part == part and s not in problem.protected}
    assert run(search, problem, tangled(3), parts="mix") == run(search, problem, tangled(3))


@pytest.mark.parametrize(
    ("budget", "parts"), [("2blocks", "mha"), ("2mlp", "mha"), ("40%kv", "mlp"), ("6sites", "mlp")]
)
def test_parts_that_cannot_meet_the_budget_are_refused(budget: str, parts: str) -> None:
    with pytest.raises(BudgetError, match="cannot be met"):
        run("greedy", problem_of(budget), tangled(3), parts=parts)


# --- pairs and traps ---------------------------------------------------------------------------------------------

A, B, C = Site(1, "mlp"), Site(2, "attention"), Site(3, "mlp")
ALL_BUT_RUNS = sorted(n for n in SEARCHES if n != "contiguous" and not narrows(n))


def pair(plan: Plan) -> float:
    """A and B stand in for each other: each is cheap alone."""
    prices = {A: 0.1, B: 0.15, C: 0.2}
    return sum(prices.get(s, 1.0) for s in plan.sites()) + 5.0 * ({A, B} <= plan.removed)


def trap(plan: Plan) -> float:
    """A is the cheapest alone, but does not go with anything: the best two are B and C."""
    prices = {A: 0.1, B: 0.2, C: 0.2}
    return sum(prices.get(s, 1.0) for s in plan.sites()) + 2.0 * (A in plan.removed and len(plan.removed) > 1)


@pytest.mark.parametrize("search", ALL_BUT_RUNS)
def test_two_sites_that_stand_in_for_each_other_fool_who_ranks_once(search: str) -> None:
    problem = problem_of("2sites")
    best = min(walked(problem), key=pair)
    assert best.removed == {A, C}
    assert run(search, problem, pair)[-1] == (Plan(frozenset({A, B})) if search == "oneshot" else best)


def test_additive_scores_alone_fall_for_the_pair() -> None:
    assert run("ilp", problem_of("2sites"), pair, polish=False)[-1].removed == {A, B}
    log: list[MeasureRequest] = []
    assert run("ilp", problem_of("2sites"), pair, log, polish=False, interactions=3)[-1].removed == {A, C}
    assert {plan.removed for plan in asked(log) if len(plan.removed) > 1} == {
        frozenset(two) for two in combinations((A, B, C), 2)
    }


@pytest.mark.parametrize("search", ALL_BUT_RUNS)
def test_a_wrong_first_choice_is_mended_by_exchanges_only(search: str) -> None:
    problem = problem_of("2sites")
    found = run(search, problem, trap)[-1]
    assert min(ends(problem), key=trap).removed == {B, C}
    assert (found.removed == {B, C}) == (search not in ("greedy", "oneshot"))


@pytest.mark.parametrize("width", [1, 2, 3])
def test_a_beam_sees_past_the_trap_when_it_is_wide_enough(width: int) -> None:
    found = run("beam", problem_of("2sites"), trap, width=width)[-1]
    assert (found.removed == {B, C}) == (width > 1)


# --- swap --------------------------------------------------------------------------------------------------------


@given(problem=solvable(), seed=st.integers(0, 2**32 - 1), make=st.sampled_from([tangled, crooked]))
@settings(max_examples=60)
def test_swap_ends_where_no_single_exchange_helps(problem: Problem, seed: int, make: object) -> None:
    score = make(seed)  # type: ignore[operator]
    first, last = run("greedy", problem, score)[-1], run("swap", problem, score, tried=0)[-1]
    assert score(last) <= min(map(score, exchanged(problem, last)), default=score(last)) + 1e-9
    assert score(last) <= score(first)


@pytest.mark.parametrize("start", sorted(n for n in SEARCHES if n != "swap" and not narrows(n)))
def test_swap_begins_where_another_search_ends(start: str) -> None:
    for budget in ("3sites", "2attention", "25params"):
        problem, score = problem_of(budget), crooked(5)
        last = run("swap", problem, score, start=start)[-1]
        assert score(last) <= min(score(run(start, problem, score)[-1]), *map(score, exchanged(problem, last)))


def test_swap_gives_nothing_back_that_lowers_the_loss() -> None:
    small = Site(0, "mlp")
    anatomy = anatomy_of({site: 5 if site == small else 10 for site in plain(3).sites_present()}, 3)
    problem = Problem(anatomy, parse_budgets("10params"))  # small is not needed: each of the others is enough

    def score(plan: Plan) -> float:
        return sum(1.0 if s != small else -0.5 for s in plan.sites()) + 3

    first, last = run("greedy", problem, score)[-1], run("swap", problem, score)[-1]
    assert small in first.removed
    assert score(last) <= score(first) == 3.5


@pytest.mark.parametrize("make", [tangled, crooked])
def test_the_path_of_swap_is_greedys_without_what_came_back_and_then_what_went_instead(make: object) -> None:
    exchanged_some = False
    for seed in range(12):
        problem, score = problem_of("5sites"), make(seed)  # type: ignore[operator]
        path, found = run("greedy", problem, score), run("swap", problem, score)
        order = [next(iter(after.removed - before.removed)) for before, after in pairwise([Plan(), *path])]
        kept = [site for site in order if site in found[-1].removed]
        fresh = sorted(found[-1].removed - set(kept))
        assert found == [Plan(frozenset([*kept, *fresh][:n])) for n in range(1, 6)]
        exchanged_some |= found[-1] != path[-1]
    assert exchanged_some


@pytest.mark.parametrize("name", [name for name in SEARCHES if name != "two_stage"])  # which needs both parts
@pytest.mark.parametrize(("budget", "part"), [("40%kv", "attention"), ("2attention", "attention"), ("50%mlp", "mlp")])
def test_a_search_removes_only_what_the_budget_counts(name: str, budget: str, part: str) -> None:
    """Also where the loss falls with every other site; searches of channel groups leave them as wide as they are."""
    anatomy = plain(5, attention=40, mlp=40)
    cost = {part: GroupSize(10, 21, kv, 50) for part, kv in (("attention", 2), ("mlp", 0))}
    sites = (
        replace(
            size,
            groups=(0, 1, 2, 3),
            group=cost[size.site.part],
            kv_bytes_per_token=4 * cost[size.site.part].kv_bytes_per_token,
        )
        for size in anatomy.sites
    )
    anatomy = replace(anatomy, sites=tuple(sites))
    scores = {size.site: [float(g) for g in range(len(size.groups))] for size in anatomy.sites}
    groups = scores if narrows(name) else None
    problem = Problem(anatomy, parse_budgets(budget), seed=3, group_scores=groups).check()

    def falling(plan: Plan) -> float:
        lost = [
            *(size for size, _ in anatomy.lost(plan)),
            *(size for size in anatomy.sites if size.site in plan.removed),
        ]
        return 50 + sum(1 if size.site.part == part else -3 for size in lost)

    log: list[MeasureRequest] = []
    path = run(name, problem, falling, log)
    assert problem.is_met(path[-1])
    for plan in [*path, *asked(log)]:
        assert {site.part for site in plan.removed} | {each.site.part for each in plan.narrowed} <= {part}
        assert "kv" in budget or not plan.narrowed, "no budget in sites counts a channel group"


def test_a_metric_of_whole_runs_is_refused_where_the_budget_counts_a_part() -> None:
    with pytest.raises(UsageError, match=r"40%kv does not count mlp\.0\. Count in blocks or params"):
        run("contiguous", scored(problem_of("40%kv"), {(0, 1): 0.5}), additive(0))


def test_swap_tries_the_exchanges_that_look_best() -> None:
    problem, score = problem_of("3sites"), additive(4)
    every, few = list[MeasureRequest](), list[MeasureRequest]()
    best = run("swap", problem, score, every, tried=0)[-1]
    assert run("swap", problem, score, few, tried=2)[-1] == best
    assert few[-1].plans == every[-1].plans[:3], "the plan as it is, and the two likeliest"


def test_swap_measures_halves_first_and_the_likeliest_exchanges_before_others() -> None:
    problem, score, log = problem_of("3sites"), additive(4), list[MeasureRequest]()
    greedy = len(asked(run_log("greedy", problem, score)))
    run("swap", problem, score, log)
    alone, halves, pairs = [ask for ask in log if sum(len(a.plans) for a in log[: log.index(ask)]) >= greedy]
    assert len(alone.plans) == 1, "what an exchange must beat"
    n, r = 10, 3
    assert len(halves.plans) == 1 + n
    assert pairs.full_results == 1
    assert len(pairs.plans) == 1 + r * (n - r)
    assert pairs.expected is not None
    assert (halves.tokens, pairs.tokens) == (SCREENING_TOKENS, None)
    assert pairs.expected[0] == -inf, "the plan as it is takes part in any race"
    assert list(pairs.expected[1:]) == sorted(pairs.expected[1:])
    few = dict(zip(halves.plans, (loss.mean for loss in executor(score)(halves)), strict=True))
    now = pairs.plans[0]
    for plan, hint in zip(pairs.plans[1:], pairs.expected[1:], strict=True):
        (back,), (gone,) = now.removed - plan.removed, plan.removed - now.removed
        assert hint == pytest.approx(few[Plan(now.removed - {back})] + few[now.without(gone)] - 2 * few[now])


def run_log(search: str, problem: Problem, score: Score) -> list[MeasureRequest]:
    log: list[MeasureRequest] = []
    run(search, problem, score, log)
    return log


# --- beam and exhaustive -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "protected"), COUNTED)
def test_a_beam_of_one_is_greedy_and_a_wide_one_is_exhaustive(budget: str, protected: str) -> None:
    problem, score = problem_of(budget, protected), crooked(2)
    assert run("beam", problem, score, width=1) == run("greedy", problem, score)
    assert run("beam", problem, score, width=500)[-1] == run("exhaustive", problem, score)[-1]


@pytest.mark.parametrize("width", [2, 5])
def test_a_beam_extends_no_more_plans_than_it_keeps(width: int) -> None:
    problem, log = problem_of("4sites", blocks=6), list[MeasureRequest]()
    run("beam", problem, tangled(1), log, width=width)
    assert [len(ask.plans) for ask in log][:2] == [1, 12]
    assert all(width * (12 - i) >= len(ask.plans) > 12 - i for i, ask in enumerate(log[2:], 1))
    assert all(ask.full_results == width for ask in log[1:])


def test_a_beam_pays_for_no_more_than_is_needed() -> None:
    large = Site(0, "mlp")  # worth eight others, of which two are enough
    anatomy = anatomy_of({site: 40 if site == large else 5 for site in plain(4).sites_present()}, 4)
    problem = Problem(anatomy, parse_budgets("10params"))
    found = run("beam", problem, lambda p: sum(2.0 if s == large else 0.4 for s in p.sites()), width=1)[-1]
    assert len(found.removed - {large}) == 2


@pytest.mark.parametrize("budget", ["3sites", "2blocks", "3attention", "14params", "2mlp,3kv", "25%flops,20%ms"])
def test_exhaustive_is_the_minimum_of_sixteen_sites(budget: str) -> None:
    problem, log = problem_of(budget, "last1", blocks=8), list[MeasureRequest]()
    for seed in range(3):
        best = min(ends_of_size(problem, 5), key=tangled(seed))
        assert run("exhaustive", problem, tangled(seed), log)[-1] == best


def ends_of_size(problem: Problem, most: int) -> list[Plan]:
    """Of the plans that meet the budgets, those of at most `most` groups: with prices above 0 the best is there."""
    groups = [g for g in groups_of(problem) if not set(g) & problem.protected]
    chosen = [some for k in range(most + 1) for some in combinations(groups, k)]
    plans = [Plan(frozenset(s for group in some for s in group)) for some in chosen]
    found = [plan for plan in plans if allowed(problem, plan) and problem.is_met(plan)]
    assert any(len(problem.removed_moves(plan)) < most for plan in found)
    return found


@given(problem=solvable())
@settings(max_examples=60)
def test_exhaustive_measures_all_plans_without_anything_to_spare(problem: Problem) -> None:
    log: list[MeasureRequest] = []
    run("exhaustive", problem, tangled(1), log)
    every = ends(problem)
    spare = {
        p for p in every if any(Plan(p.removed - set(g)) in every for g in groups_of(problem) if set(g) <= p.removed)
    }
    assert sorted(map(str, asked(log))) == sorted(map(str, set(every) - spare))


def test_exhaustive_refuses_what_would_take_too_long_before_it_measures() -> None:
    problem, log = problem_of("4sites", blocks=6), list[MeasureRequest]()
    plans = comb(12, 4)
    with pytest.raises(UsageError, match=rf"more than {plans - 1} plans.*set={{'most': {10 * (plans - 1)}}}.*swap"):
        run("exhaustive", problem, additive(0), log, most=plans - 1)
    assert log == []
    assert len(run("exhaustive", problem, additive(0), log, most=plans)) == 1


# --- solve -------------------------------------------------------------------------------------------------------


@given(problem=solvable(), data=st.data())
@settings(max_examples=150)
def test_the_programme_finds_the_least_sum_of_scores(problem: Problem, data: st.DataObject) -> None:
    groups = groups_of(problem)
    prices = data.draw(st.lists(st.integers(0, 300), min_size=len(groups), max_size=len(groups)))
    of = {group: number / 64 for group, number in zip(groups, prices, strict=True)}
    total = lambda plan: sum(of[g] for g in groups if set(g) <= plan.removed)  # noqa: E731
    found = run("ilp", scored(problem, keyed(problem, of)), additive(0), polish=False)[-1]
    assert found in ends(problem)
    assert total(found) == pytest.approx(min(map(total, ends(problem))), abs=1e-9)
    assert not [g for g in groups if set(g) <= found.removed and problem.is_met(Plan(found.removed - set(g)))]


def keyed(problem: Problem, of: Mapping[Move, float]) -> dict[object, float]:
    return {move[0].block if problem.whole_blocks else move[0]: value for move, value in of.items()}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", ["3sites", "2attention", "2blocks"])
def test_the_programme_takes_what_gains_most_and_no_more_than_needed(seed: int, budget: str) -> None:
    problem, prices = problem_of(budget), additive(seed)
    of = {move: prices(Plan(frozenset(move))) - 3 for move in groups_of(problem)}  # nearly all below 0
    found = run("ilp", scored(problem, keyed(problem, of)), additive(0), polish=False)[-1]
    assert sorted(problem.removed_moves(found)) == sorted(sorted(of, key=lambda move: of[move])[: int(budget[0])])


@pytest.mark.parametrize("seed", range(40))
def test_the_programme_meets_budgets_that_it_misses_by_less_than_its_tolerance(seed: int) -> None:
    draw = additive(seed)
    sites = plain(5).sites_present()
    sizes = {site: int(10**9 * draw(Plan(frozenset({site})))) + 1 for site in sites}
    score = additive(seed + 1000)
    cheapest = min(combinations(sites[:6], 3), key=lambda some: score(Plan(frozenset(some))))
    problem = Problem(anatomy_of(sizes, 5), parse_budgets(f"{sum(sizes[s] for s in cheapest) + 1}params")).check()
    found = run("ilp", problem, score, polish=False)[-1]
    assert problem.is_met(found)
    assert score(found) == pytest.approx(min(map(score, ends(problem))))


@pytest.mark.parametrize(
    ("budget", "protected", "make"),
    [(*shown, make) for make in (additive, tangled) for shown in [*SHOWN, ("40%sites", "")]]
    + [(*shown, crooked) for shown in COUNTED],  # of uneven moves, the programme also minds how much it removes
)
def test_the_programme_of_pairs_is_the_minimum_of_a_loss_of_pairs(
    budget: str, protected: str, make: Callable[[int], Score]
) -> None:
    problem, score = problem_of(budget, protected), make(2)
    found = run("ilp", problem, score, polish=False, interactions=40)[-1]
    spare = [
        p for p in ends(problem) if any(problem.is_met(Plan(p.removed - set(g))) for g in problem.removed_moves(p))
    ]
    assert found in set(ends(problem)) - set(spare)
    assert score(found) == pytest.approx(min(map(score, set(ends(problem)) - set(spare))), abs=1e-6)


@pytest.mark.parametrize("interactions", [2, 4, 40])
@pytest.mark.parametrize(("budget", "protected"), SHOWN)
def test_pairs_that_do_not_act_together_change_no_plan(budget: str, protected: str, interactions: int) -> None:
    problem, score = problem_of(budget, protected), additive(4)
    alone = run("ilp", problem, score, polish=False)
    assert run("ilp", problem, score, polish=False, interactions=interactions) == alone


def test_a_move_without_pairs_is_charged_the_mean_of_those_that_were_measured() -> None:
    sites = plain(4).sites_present()
    alone = {site: 1 + i / 8 for i, site in enumerate(sites)}

    def repelling(plan: Plan) -> float:
        return sum(alone[s] for s in plan.sites()) + 10 * comb(len(plan.removed), 2)

    found = run("ilp", problem_of("4sites", blocks=4), repelling, polish=False, interactions=4)[-1]
    assert list(found.sites()) == list(sites[:4])  # and not those whose pairs are not known


def test_interactions_are_refused_before_anything_is_measured() -> None:
    log: list[MeasureRequest] = []
    for wrong in (-1, 1, 41):
        with pytest.raises(
            UsageError, match=rf"interactions=0 or 2 to 40 moves, not {wrong}\..*set={{'interactions': 40"
        ):
            run("ilp", problem_of("2sites"), additive(0), log, interactions=wrong)
        with pytest.raises(UsageError):
            estimate_losses("ilp", problem_of("2sites"), interactions=wrong)
    ranked = scored(problem_of("2sites"), dict.fromkeys(plain(5).sites_present(), 0.5))
    with pytest.raises(UsageError, match="do not add to the scores of a metric"):
        run("ilp", ranked, additive(0), log, interactions=4)
    assert log == []


@pytest.mark.parametrize("interactions", [2, 5, 40])
def test_the_losses_of_pairs_are_counted_before(interactions: int) -> None:
    problem, log = problem_of("3sites"), list[MeasureRequest]()
    run("ilp", problem, tangled(0), log, polish=False, interactions=interactions)
    expected = estimate_losses("ilp", problem, polish=False, interactions=interactions)
    assert len(asked(log)) == len(set(asked(log))) == expected


def test_polish_starts_from_the_programme_and_ends_where_no_exchange_helps() -> None:
    for seed in range(5):
        problem, score = problem_of("25%params,40%kv"), crooked(seed)
        rough, fine = (run("ilp", problem, score, polish=polish)[-1] for polish in (False, True))
        assert score(fine) <= min(score(rough), *map(score, exchanged(problem, fine)))


# --- span --------------------------------------------------------------------------------------------------------


@given(problem=solvable(), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_span_is_the_best_run_when_more_never_helps(problem: Problem, seed: int) -> None:
    runs = stretches(problem)
    if runs:
        assert run("contiguous", problem, tangled(seed)) == [min(runs, key=tangled(seed))]


def test_span_takes_the_lowest_run_of_a_metric_without_a_loss() -> None:
    problem, log = problem_of("2blocks"), list[MeasureRequest]()
    scores = {(0, 1): 0.5, (1, 2): 0.2, (2, 3): 0.1, (3, 4): 0.3, (0, 4): 0.0}
    assert run("contiguous", scored(problem, scores), additive(0), log)[-1].blocks() == [2, 3]
    assert log == []
    with pytest.raises(UsageError, match=r"The search contiguous needs a metric of runs.*metric='angular_span'"):
        run("contiguous", scored(problem, {Site(0, "mlp"): 1.0}), additive(0))


@pytest.mark.parametrize(
    ("budget", "protected", "keep_last", "blocks"),
    [("2blocks", "", 0, [4, 5]), ("2blocks", "", 1, [3, 4]), ("3sites", "", 0, [4, 5]), ("2blocks", "4", 0, [2, 3])],
)
def test_the_last_run_needs_no_loss(budget: str, protected: str, keep_last: int, blocks: list[int]) -> None:
    problem, log = problem_of(budget, protected, blocks=6), list[MeasureRequest]()
    assert run("contiguous", problem, additive(0), log, run="last", keep_last=keep_last)[-1].blocks() == blocks
    assert log == []


def test_the_last_run_is_no_longer_than_the_budget_needs() -> None:
    anatomy = anatomy_of({site: 15 if site.block == 3 else 4 for site in plain(4).sites_present()}, 4)
    assert run("contiguous", Problem(anatomy, parse_budgets("20params")), additive(0), run="last")[-1].blocks() == [3]


# --- evolve ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anatomy", ["even", "uneven"])
@pytest.mark.parametrize("budget", ["4sites", "25params", "50%kv"])
def test_a_fixed_split_keeps_the_numbers_of_attention_and_mlp(anatomy: str, budget: str) -> None:
    parameters = {s: 4 + (s.block if anatomy == "uneven" else 0) for s in plain(6).sites_present()}
    problem = Problem(anatomy_of(parameters, 6), parse_budgets(budget), seed=3).check()
    start, log = run("greedy", problem, crooked(3))[-1], list[MeasureRequest]()
    begun = len(run_log("greedy", problem, crooked(3)))
    found = run("evolve", problem, crooked(3), log, split="fixed", generations=20)[-1]
    count = lambda plan: sorted(s.part for s in plan.sites())  # noqa: E731
    assert all(count(plan) == count(start) for plan in [found, *asked(log[begun:])])
    assert len(set(asked(log[begun:]))) > 3
    free: list[MeasureRequest] = []
    run("evolve", problem, crooked(3), free, generations=20)
    assert budget == "50%kv" or any(count(plan) != count(start) for plan in asked(free[begun:]))


@pytest.mark.parametrize("tokens", [512, 7])
def test_evolve_selects_on_few_tokens_first_and_decides_on_all(tokens: int) -> None:
    problem, log, score = problem_of("4sites"), list[MeasureRequest](), crooked(1)
    start = "mlp.0,mlp.1,mlp.2,mlp.3"
    found = run("evolve", problem, score, log, start=start, tokens=tokens, generations=9, offspring=6, survivors=2)[-1]
    assert {ask.tokens for ask in log} == {tokens, None}
    parent = Plan.parse(start.split(","))
    for ask in log:
        if ask.tokens:
            assert ask.full_results == 2
            assert 2 < len(ask.plans) <= 6
            assert parent not in ask.plans
        else:
            assert ask.full_results == 1
            assert ask.plans[0] == parent
            assert len(ask.plans) <= 3
            parent = min(ask.plans, key=score)
    assert found == parent
    assert score(found) < score(Plan.parse(start.split(",")))


@pytest.mark.parametrize(("k", "blocks"), [(3, 5), (4, 6), (7, 8)])
def test_no_number_of_generations_is_the_published_one(k: int, blocks: int) -> None:
    log: list[MeasureRequest] = []
    some = ",".join(f"{PARTS[i % 2]}.{i // 2}" for i in range(k))
    run("evolve", problem_of(f"{k}sites", blocks=blocks), additive(1), log, start=some, generations=0, offspring=16)
    assert sum(ask.tokens is None for ask in log) == ceil(k * (2 * blocks - k) / 1.5)


@given(problem=solvable(), seed=st.integers(0, 99), start=st.sampled_from(["greedy", "random", "oneshot"]))
@settings(max_examples=60)
def test_mutants_meet_the_budgets_with_nothing_to_spare(problem: Problem, seed: int, start: str) -> None:
    score, log = crooked(seed), list[MeasureRequest]()
    begun = 0 if start == "random" else len(run_log(start, problem, score))
    found = run("evolve", problem, score, log, start=start)[-1]
    first = Plan() if start == "random" else run(start, problem, score)[-1]
    for plan in {*asked(log[begun:]), found} - {first}:
        assert problem.is_met(plan)
        assert not [g for g in problem.removed_moves(plan) if problem.is_met(Plan(plan.removed - set(g)))]
    assert start == "random" or score(found) <= score(first)


def test_a_random_start_is_the_best_of_64_and_follows_the_seed() -> None:
    logs = [list[MeasureRequest]() for _ in range(3)]
    for log, seed in zip(logs, (0, 0, 1), strict=True):
        run("evolve", problem_of("5sites", blocks=8, seed=seed), tangled(0), log, start="random", tokens=99)
    assert logs[0] == logs[1] != logs[2]
    first = logs[0][0]
    assert first.tokens == 99
    assert 50 < len(first.plans) <= 64
    assert {site for plan in first.plans for site in plan.removed} == set(plain(8).sites_present())


def test_a_start_by_sites_must_be_a_plan_that_meets_the_budget() -> None:
    problem = problem_of("3sites", "mlp.4")
    cases = [
        ("mlp.0,mlp.1", UsageError, r"'mlp\.0,mlp\.1' does not meet the budget\. Name more sites"),
        ("mlp.0,mlp.1,mlp.4", PlanError, r"removes mlp\.4, which protect= keeps"),
        ("mlp.0,mlp.1,mlp.9", PlanError, r"no mlp\.9"),
        ("mlp.0,mlp.1,mpl.2", PlanError, r"Did you mean mlp\.2"),
    ]
    for start, error, message in cases:
        with pytest.raises(error, match=message):
            run("evolve", problem, additive(0), start=start)


def test_what_a_start_removes_beyond_the_budget_comes_back() -> None:
    problem, score = problem_of("2attention"), additive(0)
    found = run("evolve", problem, score, start="mlp.0,attention.0,attention.1", generations=60, offspring=8)[-1]
    assert found == min(ends(problem), key=score)
