"""Methods of somebody else are checked at their first call: the message names what they must return."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import billhook
from billhook.core.errors import ModelError, UsageError
from billhook.core.plan import MeasureRequest, Plan
from billhook.core.results.measured import Score
from billhook.engine.losses import LOSSES
from billhook.methods.export import EXPORTS
from billhook.methods.metrics import GROUP_METRICS, METRICS
from billhook.methods.search import SEARCHES

SHORT: dict[str, Any] = {"tokens": 160, "length": 20, "eval_tokens": 256, "eval_length": 32, "self_share": 0.0}


def yields_text(problem: Any) -> Iterator[Any]:
    yield "attention.1"


def returns_nothing(problem: Any) -> Iterator[Any]:
    yield MeasureRequest((Plan(),))


def misses_the_budget(problem: Any) -> Any:
    yield MeasureRequest((Plan(),))
    return [Plan()]


def removes_all(problem: Any) -> Any:
    yield from ()
    return [Plan(frozenset(problem.anatomy.sites_present()))]


def three(probe: Any) -> dict[Any, torch.Tensor]:
    return {size.site: torch.zeros(3) for size in probe.teacher.anatomy.sites}


SCORED, RANKED = {"search": "oneshot", "metric": "mine"}, {"search": "rank_channels", "metric": "mine"}
FOREIGN: list[tuple[Any, Any, dict[str, Any], str]] = [
    (METRICS, lambda probe: {"size": 1.0}, SCORED, r"metric mine must return a dict of Score.*'size'"),
    (METRICS, lambda probe: {3: 1.0}, SCORED, r"must return a dict of Score.*1.0 for 3"),
    (METRICS, lambda probe: {3: Score(float("nan"))}, SCORED, "Score.*for 3"),
    (METRICS, lambda probe: None, SCORED, "not NoneType"),
    (GROUP_METRICS, three, RANKED, r"a tensor for each site.*\(3,\) for attention.0, which has 2 groups"),
    (LOSSES, lambda teacher, student, targets: 0.5, {"loss": "mine"}, "loss mine must return a tensor of .* values"),
    (LOSSES, lambda teacher, student, targets: teacher, {"loss": "mine"}, "one a token, not one of shape"),
    (SEARCHES, lambda problem: [Plan()], {"search": "mine"}, "a generator of MeasureRequest"),
    (SEARCHES, yields_text, {"search": "mine"}, "yields MeasureRequest of plans, not attention.1"),
    (SEARCHES, returns_nothing, {"search": "mine"}, "a list of plans, .* not None"),
    (SEARCHES, misses_the_budget, {"search": "mine"}, "ends with nothing"),
    (SEARCHES, removes_all, {"search": "mine"}, "removes every attention site"),
    (EXPORTS, lambda student, folder: str(folder), {"export": "mine"}, "export mine must return an Exported, and"),
]


@pytest.mark.parametrize("number", range(len(FOREIGN)))
def test_what_a_foreign_method_returns_is_checked(number: int, model: Path, text: Path, tmp_path: Path) -> None:
    registry, function, options, words = FOREIGN[number]
    registry._entries["mine"] = function
    try:
        with pytest.raises(UsageError, match=words):
            billhook.prune(str(model), data=str(text), out=tmp_path / "out", store=tmp_path / "b.db", remove="25%",
                           **SHORT, **{"search": "greedy"} | options)  # fmt: skip
        if registry is METRICS:
            with pytest.raises(UsageError, match=words):
                billhook.score(str(model), "mine", data=str(text), tokens=160, length=20)
    finally:
        del registry._entries["mine"]
    assert not (tmp_path / "out").exists()


def test_a_mistyped_model_leaves_no_run_and_no_store(model: Path, tmp_path: Path) -> None:
    store, wrong = tmp_path / "b.db", str(tmp_path / "no-model")
    for call in (
        lambda: billhook.prune(wrong, remove="10%", out=tmp_path / "out", store=store),
        lambda: billhook.sweep(wrong, "billhook", out=tmp_path / "out", store=store),
        lambda: billhook.compare(str(model), wrong, out=tmp_path / "out", store=store),
    ):
        with pytest.raises(ModelError, match="There is no folder"):
            call()
    assert list(tmp_path.iterdir()) == []
