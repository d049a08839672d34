"""Each choice of a plan against the best other one, on text that no round has seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import billhook
from billhook.core.anatomy import Anatomy
from billhook.core.budget import parse_budgets
from billhook.core.plan import MeasureRequest, Plan, Site
from billhook.core.problem import Problem
from billhook.core.results.measured import Loss
from billhook.core.results.run import Exchange, Influence
from billhook.data.token_sets import truncate
from billhook.engine.probe import Probe
from billhook.methods.search.ladders import part_at
from billhook.models.load import load
from billhook.report.run.search_words import search_in_words
from billhook.report.run.sites import facts_of_sites
from billhook.runs import choose_plan
from billhook.runs.trace import exchanges

ASKED: dict[str, Any] = {
    "tokens": 256, "length": 32, "self_share": 0.0, "eval_tokens": 256, "eval_length": 32, "loss": "kl",
}  # fmt: skip


@pytest.fixture(scope="module")
def anatomy(model: Path) -> Anatomy:
    return load(model).anatomy


def made_up(rises: dict[str, float], whole: float = 0.0) -> tuple[MeasureRequest, list[Loss]]:
    plans = (Plan(), *(Plan.parse([name]) for name in rises))
    return MeasureRequest(plans), [Loss("nll", (10 * (whole + rise),), (10,)) for rise in (0.0, *rises.values())]


def test_the_best_other_choice_by_brute_force(anatomy: Anatomy) -> None:
    """Of all plans that lack one choice and hold one more, by rises of single sites."""
    sites = [size.site for size in anatomy.sites]
    rises = {str(site): 1.0 + (7 * i) % 5 + i / 100 for i, site in enumerate(sites)}
    problem = Problem(anatomy, parse_budgets("3sites"))
    plan = Plan(frozenset(sites[1:4]))
    found = exchanges(problem, plan, [made_up(rises, whole=2.5)])
    assert {site for site, _ in found.values()} == plan.removed
    for there, (site, other) in found.items():
        others = [each for each in sites if each not in plan.removed]
        valid = {each: plan.removed - {site} | {each} for each in others}
        best = min((rises[str(each)], each) for each in others if problem.is_valid(Plan(frozenset(valid[each]))))[1]
        assert (other, there.removed) == (best, valid[best])


def test_a_choice_is_all_that_a_site_loses(anatomy: Anatomy) -> None:
    """A narrower site is whole again, and another one, narrower already, loses more. What is protected stays."""
    last = next(len(size.groups) for size in anatomy.sites if size.site == Site(1, "mlp")) - 1
    narrower, less, more = f"mlp.1[0-{last - 2}]", f"mlp.2[0-{last - 2}]", f"mlp.2[0-{last - 4}]"
    rises = {narrower: 0.1, less: 0.3, more: 0.4, f"mlp.3[0-{last - 2}]": 0.25}
    plan = Plan.parse([narrower, less])
    problem = Problem(anatomy, parse_budgets("1params"))
    problem = replace(problem, budgets=parse_budgets(f"{problem.removed_cost(plan)[0]}params"))
    found = exchanges(problem, plan, [made_up(rises)])
    changed = {site: (other, part_at(there, other)) for there, (site, other) in found.items()}
    assert changed[Site(1, "mlp")] == (Site(2, "mlp"), Plan.parse([more])), "rises by 0.1, and not by 0.25"
    kept = exchanges(replace(problem, protected=frozenset({Site(2, "mlp")})), plan, [made_up(rises)])
    assert {site for site, _ in kept.values()} == {Site(1, "mlp")}
    assert all(other == Site(3, "mlp") for _, other in kept.values())


def test_documents_that_a_dropped_plan_was_not_measured_on_do_not_count(anatomy: Anatomy) -> None:
    """Of two documents the second alone was measured of mlp.2: its rise is 0.4, and not 0.2."""
    plans = (Plan.parse(["mlp.1"]), Plan.parse(["mlp.2"]), Plan.parse(["mlp.3"]))
    losses = [Loss("kl", sums, (10, 10), bound=True) for sums in ((1.0, 1.0), (0.0, 4.0), (3.0, 3.0))]
    problem = Problem(anatomy, parse_budgets("1sites"))
    found = exchanges(problem, plans[0], [(MeasureRequest(plans), losses)])
    assert list(found) == [plans[2]]


def test_gaps_are_those_of_a_probe_on_unseen_text(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Any] = []
    ask = choose_plan._influence

    def listened(job: Any, probe: Any, found: Any, more: Any) -> Any:
        heard.append((exchanges(*found), found[1], more()))
        return ask(job, probe, found, more)

    monkeypatch.setattr(choose_plan, "_influence", listened)
    result = billhook.prune(
        model, data=text, out=tmp_path / "out", store=tmp_path / "store.db", remove="2sites", search="greedy",
        finalists=4, **ASKED,
    )  # fmt: skip
    influence = result.search.influence
    assert influence is not None
    (others, plan, unseen), gaps = heard[0], {each.site: each.gap for each in influence.exchanges}
    assert plan == result.plan
    assert gaps.keys() == plan.removed
    assert not set(unseen.digests) & {digest for digest in result.seen if digest not in unseen.digests}
    mine = Probe(load(model), truncate(unseen, unseen.tokens // 2), "kl")
    own, *losses = mine.losses([plan, *others])
    for loss, (site, _) in zip(losses, others.values(), strict=True):
        assert gaps[site] == pytest.approx(loss.mean - own.mean, abs=0.05 * own.mean)
    words = search_in_words(result.search)
    assert f"Each of 2 choices was held against the best other one on {influence.data.tokens:,} tokens" in words


def test_what_other_text_would_take_stands_beside_the_site(model: Path, text: Path, tmp_path: Path) -> None:
    result = billhook.prune(
        model, data=text, out=tmp_path / "out", store=tmp_path / "store.db", remove="2sites", search="greedy",
        finalists=0, **ASKED,
    )  # fmt: skip
    assert result.search.influence is None, "text that no round has seen judges nothing here"
    first, second = sorted(result.plan.removed)
    rival = Exchange(first, Site(3, "mlp"), -0.5, 0.1), Exchange(second, Site(3, "mlp"), 0.5, 0.1)
    told = replace(result.search, influence=Influence(rival, result.data.calibration))
    why = {each.site: each.why for each in facts_of_sites(replace(result, search=told))}
    assert "unseen text takes mlp.3 instead, 0.500 ± 0.196 lower" in why[first]
    assert "unseen" not in why[second]
    assert "1 would be made otherwise there, 1 of them beyond noise" in search_in_words(told)
