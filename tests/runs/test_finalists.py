"""The last choice of a search, on text that no round has seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import billhook
from billhook.core.errors import RecipeError
from billhook.core.plan import Plan
from billhook.core.results.run import FinalChoice, RunResult
from billhook.data.token_sets import TokenSet
from billhook.engine.probe import Probe
from billhook.models.load import load
from billhook.report.run.search_words import search_in_words
from billhook.runs import choose_plan

ASKED: dict[str, Any] = {
    "tokens": 256, "length": 32, "self_share": 0.0, "eval_tokens": 256, "eval_length": 32, "loss": "nll",
}  # fmt: skip


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> list[TokenSet]:
    """The tokens on which finalists were judged."""
    heard: list[TokenSet] = []
    judge = choose_plan._final_choice

    def heard_choice(*given: Any, unseen: TokenSet, calibration: TokenSet) -> Any:
        assert not set(unseen.digests) & set(calibration.digests)
        heard.append(unseen)
        return judge(*given, unseen=unseen, calibration=calibration)

    monkeypatch.setattr(choose_plan, "_final_choice", heard_choice)
    return heard


def pruned(model: Path, text: Path, tmp_path: Path, **more: Any) -> RunResult:
    out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    return billhook.prune(model, data=text, out=out, store=tmp_path / "store.db", **{**ASKED, **more})


def final_of(result: RunResult) -> FinalChoice:
    assert result.search.final is not None
    return result.search.final


@pytest.mark.parametrize("search", ["greedy", "swap", "exhaustive"])
def test_the_plan_that_is_taken_has_the_lowest_loss_on_unseen_text(
    search: str, model: Path, text: Path, tmp_path: Path, unseen: list[TokenSet]
) -> None:
    """By a probe of its own. All pairs of sites are known to the exhaustive search."""
    result = pruned(model, text, tmp_path, remove="2sites", search=search, finalists=5)
    final, teacher = final_of(result), load(model)
    probe = Probe(teacher, unseen[0], "nll")
    assert probe.losses([result.plan])[0].mean == pytest.approx(final.unseen, rel=1e-5)
    assert final.gap == pytest.approx(final.before - final.unseen, abs=1e-9)
    assert final.gap >= 0
    assert 2 <= final.plans <= 5
    calibration = [step.loss for step in result.steps][-1]
    assert calibration == pytest.approx(final.calibration, rel=1e-5)
    assert final.optimism == pytest.approx(final.unseen - final.calibration)
    words = search_in_words(result.search)
    assert f"The best {final.plans} plans were judged on {final.data.tokens:,} tokens" in words
    if search == "exhaustive":
        alone = pruned(model, text, tmp_path, remove="2sites", search=search, finalists=0)
        assert alone.search.final is None
        assert probe.losses([alone.plan])[0].mean == pytest.approx(final.before, rel=1e-5)


def test_what_was_found_for_a_larger_size_is_a_finalist_for_a_smaller_one(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses on unseen text never fall with a larger removal, if the larger one was searched before."""
    larger = pruned(model, text, tmp_path, remove="3sites", search="greedy", finalists=4)
    seen: list[list[Plan]] = []
    judge = choose_plan._final_choice

    def heard(job: Any, teacher: Any, losses: Any, plans: list[Plan], **texts: Any) -> Any:
        seen.append(plans)
        return judge(job, teacher, losses, plans, **texts)

    monkeypatch.setattr(choose_plan, "_final_choice", heard)
    smaller = pruned(model, text, tmp_path, remove="2sites", search="greedy", finalists=200)
    assert larger.plan in seen[0]
    assert final_of(smaller).unseen <= final_of(larger).unseen + 1e-9
    other = pruned(model, text, tmp_path, remove="2sites", search="greedy", finalists=200, loss="kl")
    assert all(len(plan.removed) == 2 for plan in seen[1]), "found by another loss, it does not count"
    assert other.search.final is not None


def test_a_recipe_of_a_paper_has_no_second_choice(model: Path, text: Path, tmp_path: Path) -> None:
    result = pruned(model, text, tmp_path, remove="2sites", recipe="finercut", self_share=0.0)
    assert result.search.final is None
    with pytest.raises(RecipeError, match="finalists= has no effect with plan="):
        pruned(model, text, tmp_path, plan="mlp.1", finalists=3)
