"""Uniform widths: what the stock shape cannot hold is refused before anything is read or measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

import billhook
from billhook.core.anatomy import Anatomy, GroupSize, SiteSize, Unassigned
from billhook.core.budget import parse_budgets
from billhook.core.errors import BudgetError, PlanError, UsageError
from billhook.core.plan import Site
from billhook.core.problem import Problem
from billhook.methods.search import SEARCHES, drive
from billhook.models.load import load
from billhook.runs.prepare import validate
from billhook.runs.recipe import parse_recipe

EVEN: dict[str, Any] = {"search": "rank_channels", "metric": "group_magnitude", "uniform": True}


def coarse(mlp: int = 10) -> Anatomy:
    """Four blocks; attentions of 2 KV groups, mlps of `mlp` neurons."""
    sites = tuple(
        SiteSize(Site(b, part), n * 10, 0, kv * n, 0, 0, tuple(range(n)), GroupSize(10, 0, kv, 0))
        for b in range(4)
        for part, n, kv in (("attention", 2, 1), ("mlp", mlp, 0))
    )
    return Anatomy("llama", 4, sites, Unassigned(0, 0, 0))


@pytest.mark.parametrize("share", range(5, 100, 5))
@pytest.mark.parametrize("multiple", [1, 4])
def test_uniform_widths_never_remove_a_site(share: int, multiple: int) -> None:
    """What one group of each attention and `multiple` neurons of each mlp leave over is out of reach."""
    anatomy = coarse()
    scores = {size.site: [float(g) for g in range(len(size.groups))] for size in anatomy.sites}
    problem = Problem(anatomy, parse_budgets(f"{share}%params"), group_scores=scores)
    kept = 4 * (10 * (1 if multiple == 1 else 2) + 10 * multiple)
    if share / 100 * 480 > 480 - kept:
        with pytest.raises(BudgetError, match="cannot be met by channel groups alone"):
            drive(SEARCHES["rank_channels"](problem, uniform=True, multiple=multiple), lambda ask: [])
        return
    plan = drive(SEARCHES["rank_channels"](problem, uniform=True, multiple=multiple), lambda ask: [])[-1]
    assert not plan.removed
    assert problem.is_met(plan)
    for part in ("attention", "mlp"):
        assert len({len(each.groups) for each in plan.narrowed if each.site.part == part}) <= 1


@pytest.mark.parametrize("protected", [{Site(0, "mlp")}, {Site(b, "attention") for b in range(3)}])
def test_uniform_widths_are_those_of_the_sites_that_are_not_protected(protected: set[Site]) -> None:
    """As LLM-Pruner leaves the first and the last blocks whole."""
    scores = {size.site: [0.0] * len(size.groups) for size in coarse().sites}
    problem = Problem(coarse(), parse_budgets("10%"), frozenset(protected), group_scores=scores)
    plan = drive(SEARCHES["rank_channels"](problem, uniform=True), lambda ask: [])[-1]
    assert not plan.removed
    for part in ("attention", "mlp"):
        free = {size.site for size in coarse().sites if size.site.part == part} - protected
        kept = {each.site: len(each.groups) for each in plan.narrowed if each.site.part == part}
        assert set(kept) in (free, set())
        assert len(set(kept.values())) <= 1


def heads(folder: Path, kind: str = "llama") -> Path:
    """Eight heads, each a group of its own; of a width of 32, three quarters of which is no multiple of six."""
    return tiny.saved(folder, kind, num_attention_heads=8, num_key_value_heads=8, hidden_size=32, head_dim=4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"remove": "25%kv"}, r"a llama has none with 6 groups of attention.0, .*parts"),
        ({"remove": "90%"}, "cannot be met"),
    ],
)
def test_a_shape_that_the_type_refuses_is_refused_at_once(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    teacher = load(heads(tmp_path / "model"))
    with pytest.raises(UsageError, match=words):
        validate(parse_recipe({**EVEN, **options}), teacher)
    assert validate(parse_recipe({**EVEN, "remove": "50%kv"}), teacher) is None


@pytest.mark.parametrize("variant", ["gpt2", "falcon_new", "olmo2", "stablelm"])
def test_types_that_share_the_width_out_take_mlps_alone(checkpoint: Any, variant: str) -> None:
    teacher = load(checkpoint(variant))
    with pytest.raises(PlanError, match="narrow the mlps alone"):
        validate(parse_recipe({**EVEN, "remove": "50%flops"}), teacher)
    assert validate(parse_recipe({**EVEN, "remove": "10%", "set": {"parts": "mlp"}}), teacher) is None


@pytest.mark.parametrize("search", ["joint", "rank_channels"])
def test_uneven_widths_of_the_stock_shape_are_refused_before_the_model_is_calibrated(
    model: Path, tmp_path: Path, search: str
) -> None:
    seen: list[str] = []
    with pytest.raises(PlanError, match=r"The export stock has no place for sites of different widths"):
        billhook.prune(
            str(model), remove="20%", search=search, metric="taylor_mix", stock=True, out=tmp_path / "out",
            store=tmp_path / "runs.db", watch=lambda event: seen.append(event.stage),
        )  # fmt: skip
    assert "calibrate" not in seen


def test_heads_that_the_type_refuses_get_a_type_of_their_own(tmp_path: Path) -> None:
    """Six of eight heads load back, which the stock config would refuse."""
    teacher = load(heads(tmp_path / "model"))
    plan = billhook.Plan.parse([f"attention.{b}[0-5]" for b in range(4)])
    student = billhook.apply(teacher, plan)
    assert student.config.model_type == "billhook-llama"
    billhook.save(student, None, plan, tmp_path / "out", teacher=teacher)
    assert load(tmp_path / "out").anatomy.total("parameters") == teacher.anatomy.total("parameters", plan)
