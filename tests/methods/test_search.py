"""The contract of every search, run over the registry with a fake executor: no torch, no model."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from inspect import signature
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import ends, plain, solvable

from billhook.core.budget import UNITS, parse_budgets
from billhook.core.errors import BudgetError, UnknownName, UsageError
from billhook.core.plan import PARTS, MeasureRequest, Plan
from billhook.core.problem import Problem, parse_protection
from billhook.core.registry import Registry
from billhook.core.results.measured import Loss
from billhook.methods.search import SEARCHES, drive, estimate_losses, narrows

Measure = Callable[[MeasureRequest], list[Loss]]
Score = Callable[[Plan], float]
Key = tuple[Plan, int | None]  # what is measured: a plan, on so many tokens
COUNTED = [("25%sites", ""), ("3sites", "0,mlp.2"), ("2attention", "attention.1"), ("3mlp", ""), ("50%mlp", "mlp.0-1"),
           ("2blocks", ""), ("30%blocks", "1"), ("1block", "attention.3"), ("40%kv", ""), ("5kv", "4")]  # fmt: skip
UNEVEN = [("25%", ""), ("20params", "3"), ("50bytes", "first1"), ("30%flops", ""), ("6ms", "mlp.1"), ("20%ms", ""),
          ("25%params,40%kv", ""), ("2blocks,30%ms", "0"), ("2mlp,5kv", ""), ("3sites,20params", "last1")]  # fmt: skip
SHOWN = COUNTED + UNEVEN
RUNS = {"contiguous"}  # removes one run of whole blocks: there may be none, and the best run is no optimum
SMALL: dict[str, dict[str, object]] = {"evolve": {"generations": 6, "offspring": 6}}  # of what takes long


def problem_of(budget: str, protected: str = "", blocks: int = 5, seed: int = 0) -> Problem:
    anatomy = plain(blocks, attention=4, mlp=9)
    return Problem(anatomy, parse_budgets(budget), parse_protection(protected, anatomy), seed).check()


def additive(seed: int) -> Score:
    """Every site has its own price, and removals do not act together."""
    prices = np.random.default_rng(seed).exponential(1, (200, 2))
    return lambda plan: float(sum(prices[s.block, PARTS.index(s.part)] for s in plan.sites()))


def tangled(seed: int) -> Score:
    """Removals act together in pairs; the dense model has a loss too, as with NLL."""
    return _paired(seed, additive(seed), np.random.default_rng(seed).exponential(0.5, (400, 400)))


def crooked(seed: int) -> Score:
    """Removals act together in pairs, and some of them lower the loss."""
    rng = np.random.default_rng(seed)
    alone = rng.normal(0.3, 1, (200, 2))
    score = _paired(seed, lambda p: float(sum(alone[s.block, PARTS.index(s.part)] for s in p.sites())),
                    rng.normal(0, 0.5, (400, 400)))  # fmt: skip
    return lambda plan: score(plan) + 50


def _paired(seed: int, alone: Score, pairs: np.ndarray) -> Score:
    def score(plan: Plan) -> float:
        at = [2 * s.block + PARTS.index(s.part) for s in plan.sites()]
        return 2 + alone(plan) + sum(float(pairs[i, j]) for i, j in combinations(at, 2))

    return score


def constant(plan: Plan) -> float:
    """Everything is a tie."""
    return 1.0


def executor(score: Score, log: list[MeasureRequest] | None = None, bounds: bool = False) -> Measure:
    """Measures by `score`, over three documents. With `bounds`, all but the `best`, and what is
    not wanted, come back as lower bounds.

    On few tokens another order comes out than on all.
    """

    def measure(ask: MeasureRequest) -> list[Loss]:
        if log is not None:
            log.append(ask)
        values = [score(plan) + (int(plan.key()[:4], 16) / 2**14 if ask.tokens else 0) for plan in ask.plans]
        limit = (
            sorted(values)[ask.full_results - 1]
            if bounds and ask.full_results and ask.full_results <= len(values)
            else float("inf")
        )
        limit = min(limit, sum(ask.ceiling) / 18) if bounds and ask.ceiling else limit
        return [_loss(value) if value <= limit else _loss(value / 9, bound=True) for value in values]

    return measure


def _loss(value: float, bound: bool = False) -> Loss:
    return Loss("kl", tuple(value * count for count in (4, 5, 9)), (4, 5, 9), bound)


def run(
    name: str,
    problem: Problem,
    score: Score,
    log: list[MeasureRequest] | None = None,
    bounds: bool = False,
    **options: object,
) -> list[Plan]:
    return drive(SEARCHES[name](problem, **SMALL.get(name, {}) | options), executor(score, log, bounds))


def stretches(problem: Problem) -> list[Plan]:
    """Every run of neighbouring blocks that meets the budgets, by brute force; of each what the budgets count."""
    blocks = sorted({s.block for s in problem.anatomy.sites_present()})
    alive = [s for s in problem.anatomy.sites_present() if s not in problem.uncounted]
    chosen = [blocks[i:j] for i in range(len(blocks)) for j in range(i + 1, len(blocks) + 1)]
    plans = [Plan(frozenset(s for s in alive if s.block in some)) for some in chosen]
    return [plan for plan in plans if problem.is_met(plan) and problem.is_valid(plan)]


def walked(problem: Problem) -> Iterator[Plan]:
    """Every plan that can be reached by moves and ends where the budgets are met."""
    seen, ahead = {Plan()}, [Plan()]
    while ahead:
        plan = ahead.pop()
        if problem.is_met(plan):
            yield plan
            continue
        following = {plan.without(*move) for move in problem.moves(plan)} - seen
        seen |= following
        ahead += sorted(following, key=Plan.key)


OF_SITES = [name for name in SEARCHES if not narrows(name)]


@pytest.fixture(params=OF_SITES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# --- the contract ------------------------------------------------------------------------------------------------


@given(problem=solvable(), seed=st.integers(0, 2**32 - 1), bounds=st.booleans())
@settings(max_examples=50)
@pytest.mark.parametrize("name", OF_SITES)
def test_budgets_that_can_be_met_are_met(name: str, problem: Problem, seed: int, bounds: bool) -> None:
    log: list[MeasureRequest] = []
    if name in RUNS and not stretches(problem):
        with pytest.raises(BudgetError, match=r"No single run of blocks.*Try the search greedy"):
            run(name, problem.check(), crooked(seed), log, bounds)
        return
    path = run(name, problem.check(), crooked(seed), log, bounds)
    for plan in [*path, *(plan for ask in log for plan in ask.plans)]:
        problem.anatomy.check(plan, problem.protected)
    assert problem.is_met(path[-1])
    assert not any(problem.is_met(plan) for plan in path[:-1])


def test_every_unit_is_among_the_shown_budgets() -> None:
    assert {budget.unit for text, _ in SHOWN for budget in parse_budgets(text)} == set(UNITS)


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
def test_an_ask_holds_different_legal_plans_and_as_many_hints(name: str, budget: str, protected: str) -> None:
    problem, log = problem_of(budget, protected), list[MeasureRequest]()
    run(name, problem, tangled(2), log)
    for ask in log:
        assert len(set(ask.plans)) == len(ask.plans) > 0
        assert ask.full_results is None or ask.full_results >= 1
        assert ask.expected is None or len(ask.expected) == len(ask.plans)
        for plan in ask.plans:
            problem.anatomy.check(plan, problem.protected)


@pytest.mark.parametrize("seed", [0, 7])
def test_a_search_repeats_itself_under_its_seed(name: str, seed: int) -> None:
    problem, logs = problem_of("4sites", "0", seed=seed), ([], [])
    first, second = (run(name, problem, tangled(seed), log) for log in logs)
    assert first == second
    assert logs[0] == logs[1]


def answers() -> list[str]:
    """What every search finds for the shown problems, in words."""
    shown = [(name, problem_of(*case)) for name in OF_SITES for case in SHOWN]
    return [str(run(name, problem, score)[-1]) for name, problem in shown for score in (crooked(4), constant)]


def test_a_search_repeats_itself_in_another_process() -> None:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "77"}
    command = [sys.executable, "-c", "import test_search; print(*test_search.answers(), sep='\\n')"]
    printed = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
    assert printed.split() == answers()


@pytest.mark.parametrize(("budget", "protected"), SHOWN)
@pytest.mark.parametrize("score", [tangled(3), constant], ids=["tangled", "ties"])
def test_the_order_in_which_sites_are_listed_does_not_matter(
    name: str, budget: str, protected: str, score: Score
) -> None:
    problem = problem_of(budget, protected)
    sizes = list(problem.anatomy.sites)
    random.Random(5).shuffle(sizes)
    shuffled = replace(problem, anatomy=replace(problem.anatomy, sites=tuple(sizes)))
    assert run(name, problem, score) == run(name, shuffled, score)


@pytest.mark.parametrize(("budget", "protected"), COUNTED)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [name for name in OF_SITES if name not in RUNS])
def test_where_removals_do_not_act_together_the_optimum_is_found(
    name: str, budget: str, protected: str, seed: int
) -> None:
    problem, score = problem_of(budget, protected), additive(seed)
    assert run(name, problem, score)[-1] == min(ends(problem), key=score)


@pytest.mark.parametrize(("budget", "protected"), SHOWN)
def test_bounds_for_all_but_the_best_lead_the_same_way(name: str, budget: str, protected: str) -> None:
    problem = problem_of(budget, protected)
    for seed in range(3):
        assert run(name, problem, crooked(seed), bounds=True) == run(name, problem, crooked(seed))


@pytest.mark.parametrize(("budget", "protected"), SHOWN)
def test_the_loss_of_the_whole_model_changes_nothing(name: str, budget: str, protected: str) -> None:
    problem, score = problem_of(budget, protected), crooked(8)
    assert run(name, problem, lambda plan: score(plan) - score(Plan())) == run(name, problem, score)


class Killed(Exception):
    """The run ended here."""


def remembering(score: Score, stored: dict[Key, list[Loss]], limit: int) -> Measure:
    """Measures what is not in `stored`, `limit` plans at most."""
    measure, fresh = executor(score), 0

    def remembered(ask: MeasureRequest) -> list[Loss]:
        nonlocal fresh
        for plan in ask.plans:
            if (plan, ask.tokens) not in stored:
                if fresh == limit:
                    raise Killed
                fresh += 1
                stored[plan, ask.tokens] = measure(replace(ask, plans=(plan,), expected=None))
        return [stored[plan, ask.tokens][0] for plan in ask.plans]

    return remembered


ABOUT = {"beam": 2.0, "greedy": 1.5, "oneshot": 1.0, "ilp": 3.0, "contiguous": 1.0, "swap": 3.0}  # to either side
AT_MOST = {"evolve": 1.1, "exhaustive": 1.0}  # what is asked for, as a multiple of what was expected


@pytest.mark.parametrize("make", [additive, tangled, crooked])
def test_every_search_of_sites_says_about_how_many_losses_it_asks_for(name: str, make: Callable[[int], Score]) -> None:
    told = []
    for budget, protected in SHOWN:
        for blocks in (5, 7):
            problem, log = problem_of(budget, protected, blocks), list[MeasureRequest]()
            try:
                run(name, problem, make(3), log)
            except BudgetError:
                continue  # no run of blocks
            true = len({(plan, ask.tokens) for ask in log for plan in ask.plans})
            told.append((estimate_losses(name, problem, **SMALL.get(name, {})) or 0, true))
    assert len(told) > 20
    if name in ABOUT:
        assert all(true / ABOUT[name] <= expected <= true * ABOUT[name] for expected, true in told), told
    else:
        assert all(true <= AT_MOST[name] * expected for expected, true in told), told


def test_a_metric_needs_no_losses_to_rank_sites() -> None:
    problem = replace(problem_of("3sites"), scores={})
    assert [estimate_losses(name, problem) for name in ("oneshot", "contiguous")] == [0, 0]
    assert estimate_losses("ilp", problem, polish=False) == 0


def test_losses_are_counted_of_what_a_search_would_refuse_as_it_refuses_it() -> None:
    with pytest.raises(BudgetError, match="cannot be met"):
        estimate_losses("greedy", problem_of("6sites"), parts="mlp")
    with pytest.raises(UsageError, match="neither best nor last"):
        estimate_losses("contiguous", problem_of("2blocks"), run="first")


@pytest.mark.parametrize("budget", ["4sites", "25%params,40%kv"])
def test_a_killed_search_resumes_by_running_again(name: str, budget: str) -> None:
    problem, score = problem_of(budget), tangled(6)
    whole: dict[Key, list[Loss]] = {}
    path = drive(SEARCHES[name](problem), remembering(score, whole, 10**9))
    for killed_after in (1, len(whole) // 2, len(whole) - 1):
        stored: dict[Key, list[Loss]] = {}
        with pytest.raises(Killed):
            drive(SEARCHES[name](problem), remembering(score, stored, killed_after))
        left = len(whole) - len(stored)
        assert drive(SEARCHES[name](problem), remembering(score, stored, left)) == path
        assert stored.keys() == whole.keys()


WORDS = [(n, p.name, p.default) for n in SEARCHES for p in signature(SEARCHES[n]).parameters.values()
         if isinstance(p.default, str)]  # fmt: skip


@pytest.mark.parametrize(("name", "option", "usual"), WORDS)
def test_an_unknown_word_says_what_is_allowed(name: str, option: str, usual: str) -> None:
    with pytest.raises(UsageError) as caught:
        run(name, problem_of("3sites"), tangled(0), **{option: "gibberish"})
    assert "'gibberish'" in str(caught.value)
    assert usual in str(caught.value)


def test_every_option_that_takes_words_is_tried() -> None:
    assert {(name, option) for name, option, _ in WORDS} >= {
        ("greedy", "parts"), ("oneshot", "parts"), ("swap", "start"), ("evolve", "start"), ("evolve", "split"),
        ("contiguous", "run"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("beam", {"width": 0}, "width=0 keeps no plan. Write 1 or more"),
        ("evolve", {"offspring": 0}, "offspring=0, survivors=2: a generation needs 1 of each"),
        ("evolve", {"survivors": 0}, "survivors=0"),
    ],
)
def test_a_number_that_leaves_nothing_is_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(name, problem_of("3sites"), tangled(0), **options)


# --- the registry ------------------------------------------------------------------------------------------------


def test_settle_returns_the_path_of_a_search_that_asks_for_nothing() -> None:
    def silent_search() -> Iterator[MeasureRequest]:
        return [Plan()]
        yield

    assert drive(silent_search(), executor(additive(0))) == [Plan()]  # type: ignore[arg-type]


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
