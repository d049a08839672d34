"""Runs by effort: what each does, says and leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import billhook
from billhook.report.run_words import run_notes

SHORT: dict[str, Any] = {"tokens": 128, "length": 32, "eval_tokens": 256, "eval_length": 32, "recover_tokens": 640,
                         "recover_length": 32, "self_share": 0.0}  # fmt: skip


def test_a_quick_run_proves_its_perplexity_alone(model: Path, text: Path, tmp_path: Path) -> None:
    told = billhook.prune(
        model,
        remove="20%",
        effort="quick",
        recover="fold",
        data=text,
        out=tmp_path / "a",
        store=tmp_path / "b.db",
        **SHORT,
    )
    assert told.perplexity is not None
    assert (told.speed, told.answers, told.skills) == (None, (), ())
    assert told.reasons == ("loss_alone",)
    assert [each.recovery for each in told.recoveries] == ["fold"]
    assert list(told.recoveries[0].on) == ["held-out"]
    notes = " ".join(run_notes(told))
    assert "Perplexity alone was measured" in notes
    assert "Speed was not measured" not in notes
    alone = {name: value for name, value in SHORT.items() if not name.startswith("recover")}
    plain = billhook.prune(
        model, remove="20%", effort="quick", data=text, out=tmp_path / "c", store=tmp_path / "b.db", **alone
    )
    assert (plain.recoveries, plain.plan) == ((), told.plan)


@pytest.mark.parametrize(
    ("asked", "search"), [({"remove": "20%"}, "joint"), ({"remove": "1block"}, "swap"),
                          ({"remove": "20%", "target": "stock"}, "rank_channels"),
                          ({"remove": "20%", "target": "llama.cpp"}, "joint")]
)  # fmt: skip
def test_the_default_recovers_whatever_the_size_and_the_target(
    asked: dict[str, Any], search: str, model: Path, text: Path, tmp_path: Path
) -> None:
    told = billhook.prune(model, **asked, data=text, proof="loss", out=tmp_path / "a", store=tmp_path / "b.db", **SHORT)
    assert told.recipe["search"] == search
    assert [each.recovery for each in told.recoveries] == ["fold", "lora"]


def test_what_a_size_takes_depends_on_the_effort(model: Path, text: Path) -> None:
    asked: dict[str, Any] = {"remove": "20%", "data": text, "length": 32, "eval_length": 32, "self_share": 0.0,
                             "tokens": 512}  # fmt: skip
    quick, thorough = (billhook.dry_run(model, effort=effort, **asked) for effort in ("quick", "thorough"))
    assert quick.seconds.recover < thorough.seconds.recover
    assert billhook.dry_run(model, recover="none", **asked).seconds.recover == 0
