"""The contract of every search, run over the registry with a fake executor: no torch, no model."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import plain, solvable

from billhook.budget import UNITS, Budget
from billhook.errors import UnknownName
from billhook.plan import PARTS, Anatomy, Ask, Plan, Site
from billhook.problem import Problem, protection
from billhook.records import Loss
from billhook.registry import Registry
from billhook.search import SEARCHES, settle

Measure = Callable[[Ask], list[Loss]]
Score = Callable[[Plan], float]
SHOWN = [("25%sites", ""), ("3sites", "0,mlp.2"), ("2attention", "attention.1"), ("3mlp", ""), ("50%mlp", "mlp.0-1"),
         ("2blocks", ""), ("30%blocks", "1"), ("1block", "attention.3"), ("25%", ""), ("20params", "3")]  # fmt: skip
COUNTED = [case for case in SHOWN if Budget.parse(case[0]).unit != "params"]


def problem_of(budget: str, protected: str = "", blocks: int = 5, seed: int = 0) -> Problem:
    anatomy = plain(blocks, attention=4, mlp=9)
    return Problem(anatomy, Budget.parse(budget), protection(protected, anatomy), seed).check()


def additive(seed: int) -> Score:
    """Every site has its own price, and removals do not act together."""
    prices = np.random.default_rng(seed).exponential(1, (200, 2))
    return lambda plan: float(sum(prices[s.block, PARTS.index(s.part)] for s in plan.sites()))


def tangled(seed: int) -> Score:
    """Removals act together in pairs; the dense model has a loss too, as with NLL."""
    rng, alone = np.random.default_rng(seed), additive(seed)
    pairs = rng.exponential(0.5, (400, 400))

    def score(plan: Plan) -> float:
        at = [2 * s.block + PARTS.index(s.part) for s in plan.sites()]
        return 2 + alone(plan) + sum(float(pairs[i, j]) for i, j in combinations(at, 2))

    return score


def executor(score: Score, log: list[Ask] | None = None, bounds: bool = False) -> Measure:
    """Measures by `score`, over three documents. With `bounds`, all but the `best` come back as lower bounds."""

    def measure(ask: Ask) -> list[Loss]:
        if log is not None:
            log.append(ask)
        values = [score(plan) for plan in ask.plans]
        limit = sorted(values)[ask.best - 1] if bounds and ask.best and ask.best <= len(values) else float("inf")
        return [_loss(value) if value <= limit else _loss(value / 9, bound=True) for value in values]

    return measure


def _loss(value: float, bound: bool = False) -> Loss:
    return Loss("kl", tuple(value * count for count in (4, 5, 9)), (4, 5, 9), bound)


def run(name: str, problem: Problem, score: Score, log: list[Ask] | None = None, bounds: bool = False) -> list[Plan]:
    return settle(SEARCHES[name](problem), executor(score, log, bounds))


def walked(problem: Problem) -> Iterator[Plan]:
    """Every plan that can be reached by moves and ends where the budget is met."""
    seen, ahead = {Plan()}, [Plan()]
    while ahead:
        plan = ahead.pop()
        if problem.met(plan):
            yield plan
            continue
        following = {plan.without(*move) for move in problem.moves(plan)} - seen
        seen |= following
        ahead += sorted(following, key=Plan.key)


@pytest.fixture(params=list(SEARCHES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# --- the contract ------------------------------------------------------------------------------------------------


@given(problem=solvable(), seed=st.integers(0, 2**32 - 1), bounds=st.booleans())
@settings(deadline=None)
@pytest.mark.parametrize("name", list(SEARCHES))
def test_a_budget_that_can_be_met_is_met(name: str, problem: Problem, seed: int, bounds: bool) -> None:
    log: list[Ask] = []
    path = run(name, problem.check(), tangled(seed), log, bounds)
    for plan in [*path, *(plan for ask in log for plan in ask.plans)]:
        problem.anatomy.check(plan, problem.protected)
    assert problem.met(path[-1])
    assert not any(problem.met(plan) for plan in path[:-1])


def test_every_unit_is_among_the_shown_budgets() -> None:
    assert {Budget.parse(text).unit for text, _ in SHOWN} == set(UNITS)


@pytest.mark.parametrize(("budget", "protected"), SHOWN)
def test_the_path_grows_by_one_move_at_a_time(name: str, budget: str, protected: str) -> None:
    problem = problem_of(budget, protected)
    path = run(name, problem, tangled(1))
    for before, after in zip([Plan(), *path], path, strict=False):
        assert before.removed < after.removed
        if len(path) > 1:  # a search without an order returns its answer alone
            assert after.removed - before.removed in map(set, problem.moves(before))
    assert not path[-1].removed & problem.protected


@pytest.mark.parametrize(("budget", "protected"), SHOWN)
def test_no_plan_is_asked_for_twice_in_one_ask_and_none_breaks_the_anatomy(
    name: str, budget: str, protected: str
) -> None:
    problem, log = problem_of(budget, protected), list[Ask]()
    run(name, problem, tangled(2), log)
    for ask in log:
        assert len(set(ask.plans)) == len(ask.plans) > 0
        for plan in ask.plans:
            problem.anatomy.check(plan, problem.protected)


@pytest.mark.parametrize("seed", [0, 7])
def test_a_search_repeats_itself_under_its_seed(name: str, seed: int) -> None:
    problem, logs = problem_of("4sites", "0", seed=seed), ([], [])
    first, second = (run(name, problem, tangled(seed), log) for log in logs)
    assert first == second
    assert logs[0] == logs[1]


@pytest.mark.parametrize(("budget", "protected"), SHOWN)
def test_the_order_in_which_sites_are_listed_does_not_matter(name: str, budget: str, protected: str) -> None:
    problem = problem_of(budget, protected)
    sizes = list(problem.anatomy.sites)
    random.Random(5).shuffle(sizes)
    listed = Anatomy(problem.anatomy.model_type, problem.anatomy.blocks, tuple(sizes), problem.anatomy.rest)
    shuffled = Problem(listed, problem.budget, problem.protected, problem.seed)
    assert run(name, problem, tangled(3)) == run(name, shuffled, tangled(3))


@pytest.mark.parametrize(("budget", "protected"), COUNTED)
@pytest.mark.parametrize("seed", range(3))
def test_where_removals_do_not_act_together_the_optimum_is_found(
    name: str, budget: str, protected: str, seed: int
) -> None:
    problem, score = problem_of(budget, protected), additive(seed)
    needed = problem.budget.needed(problem.anatomy)
    assert run(name, problem, score)[-1] == min(_brute(problem, int(needed)), key=score)


def _brute(problem: Problem, needed: int) -> list[Plan]:
    """All legal plans that remove exactly `needed` of the unit: no use of Problem.moves."""
    sites, unit = problem.anatomy.alive(), problem.budget.unit
    groups = [tuple(s for s in sites if s.block == b) for b in range(problem.anatomy.blocks)]
    if unit != "blocks":
        groups = [(s,) for s in sites if unit in ("sites", s.part)]
    plans = [Plan(frozenset(s for group in chosen for s in group)) for chosen in combinations(groups, needed)]
    left = {plan: {s.part for s in sites if s not in plan.removed} for plan in plans}
    return [plan for plan in plans if left[plan] == set(PARTS) and not plan.removed & problem.protected]


@pytest.mark.parametrize(("budget", "protected"), SHOWN)
def test_bounds_for_all_but_the_best_lead_the_same_way(name: str, budget: str, protected: str) -> None:
    problem = problem_of(budget, protected)
    for seed in range(4):
        assert run(name, problem, tangled(seed), bounds=True) == run(name, problem, tangled(seed))


def test_a_killed_search_resumes_by_running_again(name: str) -> None:
    problem, stored = problem_of("4sites"), dict[Plan, float]()
    score = tangled(6)

    def remembered(plan: Plan) -> float:
        if len(stored) == 7 and plan not in stored:
            raise KeyboardInterrupt
        return stored.setdefault(plan, score(plan))

    with pytest.raises(KeyboardInterrupt):
        run(name, problem, remembered)
    fresh: list[Plan] = []

    def resumed(plan: Plan) -> float:
        if plan not in stored:
            fresh.append(plan)
        return stored.get(plan, score(plan))

    assert run(name, problem, resumed) == run(name, problem, score)
    assert fresh
    assert not set(fresh) & set(stored)


# --- one-shot and greedy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "protected"), SHOWN)
def test_oneshot_asks_once_for_every_single_move(budget: str, protected: str) -> None:
    problem, log = problem_of(budget, protected), list[Ask]()
    run("oneshot", problem, tangled(0), log)
    asked = [plan for ask in log for plan in ask.plans if plan != Plan()]
    assert asked == [Plan().without(*move) for move in problem.moves(Plan())]
    assert sum(len(ask.plans) for ask in log) <= len(asked) + 1  # and the dense model, at most


@pytest.mark.parametrize("seed", range(4))
def test_oneshot_counts_the_loss_per_parameter_where_parameters_are_counted(seed: int) -> None:
    problem, score = problem_of("20params", blocks=7), additive(seed)
    sizes = {size.site: size.parameters for size in problem.anatomy.sites}
    ranked = sorted(sizes, key=lambda site: score(Plan().without(site)) / sizes[site])
    path = run("oneshot", problem, score)
    assert [plan.removed for plan in path] == [set(ranked[: i + 1]) for i in range(len(path))]


@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_greedy_asks_for_all_that_are_left_round_by_round(rounds: int) -> None:
    problem, log = problem_of(f"{rounds}sites", blocks=rounds + 1), list[Ask]()
    path = run("greedy", problem, tangled(0), log)
    n, r = len(problem.anatomy.sites), len(problem.anatomy.sites) - rounds
    sizes = [sum(plan != Plan() for plan in ask.plans) for ask in log]
    assert [size for size in sizes if size] == list(range(n, r, -1))
    assert sum(sizes) == n * (n + 1) // 2 - r * (r + 1) // 2
    assert len(path) == rounds


@pytest.mark.parametrize("seed", range(6))
def test_greedy_takes_the_smallest_rise_per_parameter_that_is_still_needed(seed: int) -> None:
    problem, score = problem_of("25params", blocks=7), tangled(seed)
    sizes = {size.site: size.parameters for size in problem.anatomy.sites}
    plan, missing = Plan(), 25
    for after in run("greedy", problem, score):
        prices = {}
        for (site,) in problem.moves(plan):
            rise, worth = score(plan.without(site)) - score(plan), min(sizes[site], missing)
            prices[site] = rise / worth if rise > 0 else rise * worth
        (gone,) = after.removed - plan.removed
        assert prices[gone] == min(prices.values())
        plan, missing = after, missing - sizes[gone]
    assert missing <= 0


@pytest.mark.parametrize(("budget", "protected"), COUNTED)
def test_greedy_takes_the_best_of_every_round(budget: str, protected: str) -> None:
    problem, score = problem_of(budget, protected), tangled(9)
    path = run("greedy", problem, score)
    for before, after in zip([Plan(), *path], path, strict=False):
        assert after == min((before.without(*move) for move in problem.moves(before)), key=score)


def test_two_sites_that_stand_in_for_each_other_fool_oneshot_and_not_greedy() -> None:
    first, twin, third = Site(1, "mlp"), Site(2, "attention"), Site(3, "mlp")
    prices = {first: 0.1, twin: 0.15, third: 0.2}

    def score(plan: Plan) -> float:
        return sum(prices.get(s, 1.0) for s in plan.sites()) + 5.0 * ({first, twin} <= plan.removed)

    problem = problem_of("2sites")
    fooled, better = (run(name, problem, score)[-1] for name in ("oneshot", "greedy"))
    assert fooled.removed == {first, twin}
    assert score(better) == min(map(score, walked(problem))) < score(fooled)


# --- the registry ------------------------------------------------------------------------------------------------


def test_settle_returns_the_path_of_a_search_that_asks_for_nothing() -> None:
    def silent_search() -> Iterator[Ask]:
        return [Plan()]
        yield

    assert settle(silent_search(), executor(additive(0))) == [Plan()]  # type: ignore[arg-type]


def test_a_misspelt_search_names_the_nearest_and_all() -> None:
    with pytest.raises(UnknownName) as caught:
        SEARCHES["gredy"]
    assert "'gredy'" in str(caught.value)
    assert "Did you mean 'greedy'?" in str(caught.value)
    assert all(name in str(caught.value) for name in SEARCHES)


def test_two_functions_of_one_name_are_refused_and_one_twice_is_not() -> None:
    registry: Registry[Callable[..., object]] = Registry("toys")

    def toy() -> None:
        """A toy."""

    def other() -> None:
        """Another."""

    other.__name__ = "toy"
    assert registry.add(toy) is registry.add(toy) is registry["toy"]
    assert list(registry) == ["toy"]
    with pytest.raises(ValueError, match=r"Two of the toys are called 'toy'\. Rename one"):
        registry.add(other)
