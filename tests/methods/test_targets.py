"""Targets: what software that serves models can express, and searches that keep to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from test_search import additive, problem_of, run

import billhook
from billhook.core.errors import PlanError
from billhook.core.events import Event
from billhook.core.plan import KeptGroups, Plan, Site
from billhook.methods.export.serving import STOCK_TYPE, fit
from billhook.methods.export.targets import Form, limited, limits, narrower, student_shape
from billhook.methods.search import kept_count
from billhook.models.load import Teacher, load
from billhook.models.repair import Patch, Repair
from billhook.models.surgery import apply
from billhook.runs import prepare
from billhook.runs.recipe import parse_recipe

Folder = Callable[[str], Path]
PLANS = ("attention.1,mlp.1", "mlp.1", "attention.2", "attention.0,mlp.0,mlp.3")


def alike(teacher: Teacher, part: str, keep: int, without: int | None = None) -> Plan:
    """A plan that keeps the first `keep` groups of every site of a part; block `without` is removed."""
    sites = [size for size in teacher.anatomy.sites if size.site.part == part and size.site.block != without]
    gone = [Site(without, "attention"), Site(without, "mlp")] if without is not None else []
    return Plan(frozenset(gone), frozenset(KeptGroups(size.site, size.groups[:keep]) for size in sites))


@pytest.mark.parametrize("variant", ["llama", "qwen3", "gemma3_text", "phi3", "gpt2", "falcon", "gpt_neox", "mistral"])
def test_the_stock_form_takes_what_surgery_leaves_in_the_stock_type(variant: str, checkpoint: Folder) -> None:
    """The rule that looks at a plan agrees with the model that is made of it."""
    teacher = load(checkpoint(variant))
    plans = [Plan.parse(names.split(",")) for names in PLANS]
    plans += [alike(teacher, "mlp", 32), alike(teacher, "mlp", 32, without=2), alike(teacher, "attention", 1)]
    plans.append(Plan(frozenset(), frozenset(list(alike(teacher, "mlp", 32).narrowed)[:2])))
    seen = set()
    for plan in plans:
        stock = not apply(teacher, plan).config.model_type.startswith("billhook-")
        fault = STOCK_TYPE.fault(student_shape(teacher, plan))
        assert (fault is None) == stock, (plan, fault)
        seen.add(stock)
    assert seen == {True, False}


def test_an_earlier_pruning_counts(checkpoint: Folder, tmp_path: Path) -> None:
    teacher = load(checkpoint("llama"))
    plans = [Plan.parse(["mlp.1"]), alike(teacher, "mlp", 32), Plan.parse(["mlp.2", "attention.2"])]
    for number, plan in enumerate(plans):
        folder = tmp_path / str(number)
        billhook.save(apply(teacher, plan), teacher.tokenizer, plan, folder, teacher=teacher)
        before, after = student_shape(teacher, plan), student_shape(load(folder), Plan())
        assert (before.single, before.mlps, before.attentions) == (after.single, after.mlps, after.attentions)


def test_patches_and_biases_have_no_place_in_a_stock_type(checkpoint: Folder) -> None:
    teacher, plan = load(checkpoint("llama")), Plan.parse(["mlp.1", "attention.1"])
    patched = Repair(patches={Site(1, "mlp"): Patch(bias=torch.ones(32))})
    assert "what a repair puts" in str(STOCK_TYPE.fault(student_shape(teacher, plan, patched)))
    biased = Repair(biases={Site(2, "mlp"): torch.ones(32)})
    assert "a bias of the output of mlp.2" in str(STOCK_TYPE.fault(student_shape(teacher, plan, biased)))
    assert STOCK_TYPE.fault(student_shape(teacher, plan)) is None


def test_of_several_targets_what_all_can_express_holds() -> None:
    one = Form("a", "removed", "any", "alike", mlp_step=32, attention_counts=lambda config: (1, 2, 4))
    two = Form("b", "zeros", "alike", "any", inserts=False, mlp_step=48, attention_counts=lambda config: (2, 3, 4))
    both = narrower(one, two)
    assert (both.sites, both.mlp_widths, both.attention_widths, both.inserts) == ("zeros", "alike", "alike", False)
    assert both.mlp_step == 96
    assert both.attention_counts(None) == (2, 4)
    assert narrower(one, Form()).attention_counts(None) == (1, 2, 4)
    only_gpt2 = Form("c", architectures=("gpt2",))
    assert limits([[one], [only_gpt2]], "llama", None) is None
    found = limits([[only_gpt2, two]], "llama", None)
    assert found is not None
    assert (found.sites, found.inserts, found.mlp_step) == ("zeros", False, 48), "the form for gpt2 does not count"


def test_sglang_gets_blocks_of_one_number_of_kv_heads(checkpoint: Folder) -> None:
    teacher = load(checkpoint("llama"))
    for names, told in (
        ("attention.2,mlp.1[0-19]", None),
        ("attention.0", "a first block without its attention; keep attention.0"),
        ("attention.0,mlp.0,attention.1", "a first block without its attention; keep attention.1"),
        ("attention.1[0]", "a width of its own for attentions"),
    ):
        plan = Plan.parse(names.split(","))
        fault = fit("sglang", student_shape(teacher, plan))[1]
        assert (fault is None) if told is None else told in str(fault)
        assert fit("vllm", student_shape(teacher, plan))[1] is None
    recipe = parse_recipe({"model": teacher.name, "remove": "2sites", "target": "sglang"})
    assert prepare.problem_of(recipe, teacher, teacher.anatomy, recipe.budgets).protected == {Site(0, "attention")}


@pytest.mark.parametrize("name", ["greedy", "swap", "beam", "evolve", "exhaustive"])
def test_a_target_of_whole_blocks_gets_the_best_whole_blocks(name: str) -> None:
    """Against all sets of blocks, for a budget that counts parameters."""
    problem = replace(problem_of("35%", "0", blocks=6), blocks_only=True).check()
    score = additive(3)
    found = run(name, problem, score)[-1]
    assert {site.block for site in found.removed} == set(found.blocks())
    blocks = [b for b in range(6) if b != 0]
    sets = [Plan(frozenset(Site(b, part) for b in chosen for part in ("attention", "mlp")))
            for n in range(1, 6) for chosen in combinations(blocks, n)]  # fmt: skip
    best = min((plan for plan in sets if problem.is_met(plan)), key=score)
    assert score(found) == pytest.approx(score(best))


def test_a_search_leaves_attentions_in_the_numbers_that_a_target_takes(checkpoint: Folder) -> None:
    teacher = load(checkpoint("gpt2"))  # four KV groups each
    form = Form(mlp_widths="none", attention_counts=lambda config: (1, 2, 4))
    anatomy = limited(teacher.anatomy, form, teacher.model.config)
    sizes = {size.site: size for size in anatomy.sites}
    assert sizes[Site(0, "mlp")].groups == ()
    assert [kept_count(sizes[Site(0, "attention")], removed, 1) for removed in range(4)] == [4, 4, 2, 1]
    stepped = limited(teacher.anatomy, Form(mlp_step=20), teacher.model.config)
    mlp = next(size for size in stepped.sites if size.site.part == "mlp")
    assert kept_count(mlp, len(mlp.groups) - 30, 1) % 20 == 0


def test_a_plan_that_a_target_cannot_express_is_refused_at_once(model: Path, tmp_path: Path) -> None:
    told: list[Event] = []
    where = {"target": "stock", "out": tmp_path / "out", "store": tmp_path / "s.db", "watch": told.append}
    with pytest.raises(PlanError, match="stock has no place for mlps of different widths"):
        billhook.prune(model, plan="mlp.2[0-30]", **where)
    with pytest.raises(PlanError, match="no place for the constants of mean"):
        billhook.prune(model, plan="mlp.2", recover="mean", **where)
    assert "measure" not in {event.stage for event in told}
    assert not (tmp_path / "out").exists()
