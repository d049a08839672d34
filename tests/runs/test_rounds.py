"""Pruning and training in turn: budgets of rounds, nested plans, averaged scores, resuming, and what is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import billhook
from billhook.core.errors import BudgetError, PlanError, UsageError
from billhook.core.events import Event, ignore_events
from billhook.core.plan import Plan, Site
from billhook.core.results.run import RunResult
from billhook.engine.probe import Probe
from billhook.methods.metrics import GROUP_METRICS
from billhook.methods.recover import Round
from billhook.methods.search import drive
from billhook.methods.search.rank_channels import rank_channels
from billhook.models.load import Teacher, student_as_teacher
from billhook.models.repair import NO_REPAIR, Repair
from billhook.models.surgery import apply
from billhook.runs.choose_plan import RoundPlanner
from billhook.runs.job import RunContext
from billhook.runs.prepare import problem_of, tokens_for
from billhook.runs.recipe import parse_recipe
from billhook.runs.store import Store

SHORT: dict[str, Any] = {"tokens": 256, "length": 32, "eval_tokens": 256, "eval_length": 32, "recover_tokens": 640,
                         "recover_length": 32, "self_share": 0, "proof": "loss"}  # fmt: skip
APT: dict[str, Any] = {"search": "rank_channels", "metric": "apt", "recover": "apt", "remove": "20%params"}
TRAINED = {"rounds": 3, "batch": 6, "rate": 0.003, "rank": 2}
TRAINED_STEPS = 3  # of a round on so few texts


def nested(outer: Plan, inner: Plan) -> bool:
    """Whether `outer` removes all that `inner` does."""
    left = {kept.site: set(kept.groups) for kept in inner.narrowed}
    narrowed = all(set(kept.groups) <= left[kept.site] for kept in outer.narrowed if kept.site in left)
    sites = outer.removed | {kept.site for kept in outer.narrowed}
    return inner.removed <= outer.removed and narrowed and left.keys() <= sites


@pytest.fixture
def planner(text: Path, tmp_path: Path) -> Callable[..., RoundPlanner]:
    """planner(folder, **recipe): what plans the rounds of a run."""

    def of(folder: Path, **asked: Any) -> RoundPlanner:
        recipe = parse_recipe({"model": str(folder), "data": str(text), **SHORT, **APT, **asked})
        teacher, store = billhook.load(folder), Store(tmp_path / "rounds.db")
        job = RunContext(recipe, store, store.new_run("prune", {}, {}, "out"), tmp_path, ignore_events, {})
        return RoundPlanner(job, teacher, tokens_for(recipe, teacher, ignore_events)[0])

    return of


def noisy(teacher: Teacher, plan: Plan, seed: int) -> Repair:
    """New weights of the last block's attention, as a training might leave them."""
    student, draw = apply(teacher, plan), torch.Generator().manual_seed(seed)
    name = "model.layers.3.self_attn.q_proj.weight"
    weight = dict(student.named_parameters())[name]
    return Repair({name: weight + 0.2 * torch.randn(weight.shape, generator=draw)})


def run_of(planner: RoundPlanner, rounds: int, beta: float) -> list[tuple[Plan, Repair, dict[tuple[Site, int], float]]]:
    """Play the rounds; each with the plan and repair that it began with, and the averages."""
    played, plan, repair = [], Plan(), NO_REPAIR
    for number in range(1, rounds + 1):
        begun = plan, repair
        plan = planner(Round(number, rounds, beta, *begun))
        repair = noisy(planner.teacher, plan, number)
        played.append((*begun, planner.averages))
    return played


def scores_of(planner: RoundPlanner, plan: Plan, repair: Repair) -> dict[tuple[Site, int], float]:
    """The metric on a student, by group."""
    student = student_as_teacher(planner.teacher, apply(planner.teacher, plan, repair=repair))
    values = GROUP_METRICS["apt"](Probe(student, planner.calibration, "kl"))
    sizes = {size.site: size.groups for size in student.anatomy.sites}
    return {(site, n): float(x) for site, xs in values.items() for n, x in zip(sizes[site], xs, strict=True)}


# -- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "asked"), [
    ("llama", {}), ("llama", {"uniform": True}), ("llama", {"remove": "25%kv,8%params", "multiple": 4}),
    ("qwen3", {"remove": "4000params"}), ("llama", {"metric": "wanda_sp"}), ("llama", {"protect": "first1,mlp.3"}),
])  # fmt: skip
def test_every_round_meets_its_budget_and_removes_what_the_last_one_did(
    variant: str, asked: dict[str, Any], planner: Callable[..., RoundPlanner], tmp_path: Path
) -> None:
    """As little as the search can: without its last step a round misses its budget. Both models have grouped heads."""
    planning = planner(tiny.with_tokenizer(tmp_path / "model", variant), **asked)
    recipe, anatomy = planning.job.recipe, planning.teacher.anatomy
    run_of(planning, 4, 0.5)
    plans = planning.plans
    assert len(plans) == 4
    for number, (before, plan) in enumerate(zip([Plan(), *plans], plans, strict=False), 1):
        assert nested(plan, before), (before, plan)
        share = 1 - Fraction(4 - number, 4) ** 3
        met = [budget.removed_cost(anatomy, plan) >= share * budget.target(anatomy) for budget in recipe.budgets]
        assert all(met), number
        if plan != before:
            assert not all(b.removed_cost(anatomy, before) >= share * b.target(anatomy) for b in recipe.budgets)
    problem = problem_of(recipe, planning.teacher, anatomy, recipe.budgets)
    assert problem.is_met(plans[-1])
    assert anatomy.check(plans[-1], problem.protected) == plans[-1]
    if recipe.uniform:
        assert {len(kept.groups) for kept in plans[-1].narrowed if kept.site.part == "mlp"} != set()
        assert all(len({len(k.groups) for k in plan.narrowed if k.site.part == "mlp"}) <= 1 for plan in plans)


def test_without_an_average_each_round_counts_what_its_own_student_says(
    planner: Callable[..., RoundPlanner], model: Path
) -> None:
    """And the plan of one round at the whole budget is that of the search alone."""
    planning = planner(model)
    for (plan, repair, averages), after in zip(run_of(planning, 3, 0.0), planning.plans, strict=True):
        now = scores_of(planning, plan, repair)
        assert averages == pytest.approx(now, rel=1e-6)
        gone = {(kept.site, n) for kept in after.narrowed for n in range(64)} - {
            (kept.site, n) for kept in after.narrowed for n in kept.groups
        }
        lost = [score for unit, score in now.items() if unit in gone or unit[0] in after.removed]
        stays = [score for unit, score in now.items() if not (unit in gone or unit[0] in after.removed)]
        assert max(lost, default=0.0) <= min(stays)
    recipe, teacher = planning.job.recipe, planning.teacher
    alone = planner(model)(Round(1, 1, 0.0, Plan(), NO_REPAIR))
    scores = GROUP_METRICS["apt"](Probe(teacher, planning.calibration, "kl"))
    problem = replace(
        problem_of(recipe, teacher, teacher.anatomy, recipe.budgets),
        group_scores={site: tuple(values.tolist()) for site, values in scores.items()},
    )
    (expected,) = drive(rank_channels(problem), lambda request: [])
    assert alone == expected


def test_the_average_is_that_of_the_paper(planner: Callable[..., RoundPlanner], model: Path) -> None:
    """From 0: a round weighs (1 - beta) times beta for each later one; of groups that are still there."""
    planning, beta = planner(model), 0.85
    played = run_of(planning, 3, beta)
    said = [scores_of(planning, plan, repair) for plan, repair, _ in played]
    last = played[-1][2]
    assert last.keys() == said[-1].keys() < said[0].keys()
    for unit, value in last.items():
        expected = sum((1 - beta) * beta ** (2 - k) * scores[unit] for k, scores in enumerate(said))
        assert value == pytest.approx(expected, rel=1e-6)
    planning(Round(1, 3, beta, Plan(), NO_REPAIR))
    assert planning.averages == pytest.approx({unit: (1 - beta) * score for unit, score in said[0].items()})
    assert len(planning.plans) == 1, "a first round begins anew"


# -- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_in_rounds_ends_with_the_last_plan_and_what_was_trained(model: Path, text: Path, tmp_path: Path) -> None:
    told: list[Event] = []
    result = billhook.prune(
        model, recipe="apt", data=str(text), **SHORT, remove="20%params", recover_set=TRAINED | {"loss": "kl"},
        out=tmp_path / "out", store=tmp_path / "b.db", watch=told.append,
    )  # fmt: skip
    rounds = [event for event in told if event.stage == "search" and "round" in event.values]
    assert [event.done for event in rounds] == [1, 2, 3]
    assert all(event.values["removed_params"] >= (1 - (1 - k / 3) ** 3) * float(event.values["target_params"]) - 1
               for k, event in enumerate(rounds, 1))  # fmt: skip
    trained = [event.total for event in told if event.values.get("objective") == "kl" and event.stage == "recover"]
    assert len(trained) == 3 * trained[0]  # type: ignore[operator]
    path, plan = [], Plan()
    for step in result.steps:
        plan = plan.combined_with(Plan(frozenset(step.sites), frozenset(step.narrowed)))
        path.append(plan)
    assert path[-1] == result.plan
    assert all(nested(b, a) for a, b in pairwise(path))
    assert [each.recovery for each in result.recoveries] == ["apt"]
    assert result.recoveries[0].seconds > 0
    again = billhook.load(tmp_path / "out")
    assert again.anatomy.total("parameters") == result.sizes.student.parameters
    assert result.sizes.student.parameters == billhook.load(model).anatomy.total("parameters", result.plan)
    untrained = {name: value for name, value in SHORT.items() if not name.startswith("recover")}
    plain = billhook.prune(
        model, plan=str(result.plan), data=str(text), **untrained, out=tmp_path / "plain", store=tmp_path / "b.db"
    )
    assert result.recoveries[0].on["held-out"].before == pytest.approx(plain.perplexity.student, rel=1e-4)
    assert result.perplexity.student == pytest.approx(result.recoveries[0].on["held-out"].after, rel=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.db", "out", "plain"]


@pytest.fixture(scope="module")
def whole(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """What nobody kills."""
    home = tmp_path_factory.mktemp("whole")
    asked = {**SHORT, **APT, "recover_set": TRAINED, "data": str(text)}
    return billhook.prune(model, **asked, out=home / "out", store=home / "b.db")


@pytest.mark.parametrize("at", ["trains 2", "scores 3", "ends"])
def test_a_killed_run_in_rounds_goes_on(at: str, whole: RunResult, model: Path, text: Path, tmp_path: Path) -> None:
    asked = {**SHORT, **APT, "recover_set": TRAINED, "data": str(text)}
    seen = Counter[str]()
    killed = False

    def watch(event: Event) -> None:
        nonlocal killed
        seen["rounds"] += "round" in event.values and event.stage == "search"
        seen["scores"] += event.stage == "score"
        seen["steps"] += event.values.get("objective") == "kl" and event.stage == "recover"
        seen["proofs"] += event.stage == "evaluate"
        now = {"trains 2": seen["rounds"] == 2 and event.done == 3 and event.stage == "recover",
               "scores 3": seen["scores"] == 3, "ends": seen["proofs"] > 0}[at]  # fmt: skip
        if now and not killed:
            killed = True
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        with pytest.raises(KeyboardInterrupt):
            billhook.prune(model, **asked, out="out", store="b.db", watch=watch)
        assert killed
        before = Counter(seen)
        result = billhook.resume(store="b.db", watch=watch)
        assert not list(tmp_path.glob(".out*"))
    assert result.plan == whole.plan
    assert seen["scores"] <= 4, "a score is stored"
    if at == "ends":
        assert seen["steps"] == before["steps"]
        assert seen["scores"] == 3
    rows = tiny.tokens(2, 12)
    with torch.no_grad():
        sides = [billhook.load(folder).model(rows).logits for folder in (whole.out, tmp_path / "out")]
    torch.testing.assert_close(sides[0], sides[1], rtol=1e-4, atol=1e-4)


def test_a_round_without_memory_begins_again_with_less(
    whole: RunResult, model: Path, text: Path, tmp_path: Path
) -> None:
    """Out of memory in the second round: the first one is not trained again, and the plans are the same."""
    steps: list[int] = []

    def watch(event: Event) -> None:
        steps.extend([event.done] if event.values.get("objective") == "kl" and event.stage == "recover" else [])
        if len(steps) == TRAINED_STEPS + 1:
            steps.append(0)
            raise torch.OutOfMemoryError("none is free")

    asked = {**SHORT, **APT, "recover_set": TRAINED, "data": str(text)}
    result = billhook.prune(model, **asked, out=tmp_path / "out", store=tmp_path / "b.db", watch=watch)
    assert result.plan == whole.plan
    assert len(steps) == 3 * TRAINED_STEPS + 2
    assert [step.narrowed for step in result.steps] == [step.narrowed for step in whole.steps]
    assert result.perplexity.student == pytest.approx(whole.perplexity.student, rel=1e-4)


def test_with_a_plan_or_another_search_it_trains_what_was_found(model: Path, text: Path, tmp_path: Path) -> None:
    for name, asked in {"plan": {"plan": "mlp.1"}, "greedy": {"remove": "1sites", "search": "greedy"}}.items():
        told: list[Event] = []
        result = billhook.prune(
            model, data=str(text), **{**SHORT, **({"self_share": 0.0} if "plan" in asked else {})}, **asked,
            recover="mean,apt", recover_set=TRAINED, out=tmp_path / name, store=tmp_path / "b.db", watch=told.append,
        )  # fmt: skip
        assert [each.recovery for each in result.recoveries] == ["mean", "apt"]
        assert not any("round" in event.values for event in told if event.stage == "search")
        assert len(result.plan.removed) == 1
        assert not result.plan.narrowed


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "error", "words"), [
    ({"remove": "95%params"}, BudgetError, "cannot be met"),
    ({"remove": "20%ms"}, UsageError, "apt prunes in rounds, and .* asks for time, .* Write a share"),
    ({"recover": "bias,apt"}, UsageError, "bias cannot come before it. Write .*apt,bias"),
    ({"recover_set": {"apt.rounds": 0}}, UsageError, "apt takes rounds and rank from 1"),
    ({"recover_set": {"apt.rate": 0.0}}, UsageError, "a rate above 0"),
    ({"stock": True}, PlanError, "The export stock has no place for sites of different widths"),
])  # fmt: skip
def test_what_cannot_be_done_is_said_before_anything_is_trained(
    asked: dict[str, Any], error: type[Exception], words: str, model: Path, text: Path, tmp_path: Path
) -> None:
    told: list[Event] = []
    with pytest.raises(error, match=words):
        billhook.prune(
            model, data=str(text), **{**SHORT, **APT, **asked}, out=tmp_path / "out", store=tmp_path / "b.db",
            watch=told.append,
        )  # fmt: skip
    assert not {event.stage for event in told} & {"score", "recover"}
    assert [path.name for path in tmp_path.iterdir()] == ["b.db"]


def test_a_model_of_experts_alone_has_no_groups_for_the_metric(text: Path, tmp_path: Path) -> None:
    """Its attentions are few, and the metric has no scores of experts."""
    folder = tiny.with_tokenizer(tmp_path / "mixture", "qwen3_moe")
    with pytest.raises(BudgetError, match="cannot be met by channel groups alone"):
        billhook.prune(
            folder, data=str(text), **{**SHORT, **APT, "remove": "40%params"}, out=tmp_path / "out",
            store=tmp_path / "b.db",
        )  # fmt: skip
