"""Factors by a command: what it writes, stores and measures, and what is said of wrong inputs."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

import billhook
from billhook.core.errors import BillhookError
from billhook.core.results.exports import FactorReport
from billhook.models.load import load
from billhook.runs.store import Store

LITTLE: dict[str, Any] = {"tokens": 256, "length": 32, "eval_tokens": 1024, "eval_length": 32}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a text."""
    place = tmp_path_factory.mktemp("factors")
    tiny.with_tokenizer(place / "model", max_position_embeddings=512)
    tiny.write_texts(place / "texts.jsonl", 120)
    return place


@pytest.fixture(scope="module")
def report(place: Path) -> FactorReport:
    return billhook.factor(
        place / "model", remove="10%", ranks="energy", data=place / "texts.jsonl", out=place / "out",
        store=place / "s.db", **LITTLE,
    )  # fmt: skip


def test_the_report_is_of_the_folder_and_stored_whole(place: Path, report: FactorReport) -> None:
    before, after = load(place / "model"), load(place / "out")
    assert report.parameters_before == before.anatomy.total("parameters")
    assert report.parameters_after == after.anatomy.total("parameters")
    assert report.parameters_before - report.parameters_after >= 0.1 * report.parameters_before
    assert {(each.site, each.name): each.rank for each in report.factors} == {
        (site, name): rank for site, ranks in after.pruned.factors.items() for name, rank in ranks.items()
    }
    assert report.whole + len(report.factors) == 28
    assert all(0 <= each.lost < 1 and each.rank * (each.outputs + each.inputs) < each.outputs * each.inputs
               for each in report.factors)  # fmt: skip
    assert [row["site"] for row in report.rows()] == [str(each.site) for each in report.factors]
    with_store = Store(place / "s.db", read_only=True)
    (run,) = with_store.runs()
    with_store.close()
    assert (run.kind, run.state) == ("factor", "done")
    assert FactorReport.from_json(run.result or {}) == report


def test_what_held_out_text_costs_is_what_evaluate_measures(place: Path, report: FactorReport) -> None:
    given = {"data": place / "texts.jsonl", "eval_tokens": 1024, "eval_length": 32}
    for folder, told in (("model", report.before), ("out", report.after)):
        found = billhook.evaluate(place / folder, **given).perplexity
        assert found is not None
        assert found.value == pytest.approx(told.mapped(math.exp).value, rel=1e-5)
    assert report.change.value == pytest.approx(report.after.value - report.before.value)
    assert report.change.low <= report.change.value <= report.change.high


def test_ranks_by_loss_are_others_and_meet_the_budget(place: Path, report: FactorReport, tmp_path: Path) -> None:
    loss = billhook.factor(
        place / "model", remove="10%", data=place / "texts.jsonl", out=tmp_path / "out",
        store=tmp_path / "s.db", **LITTLE,
    )  # fmt: skip
    assert loss.parameters_before - loss.parameters_after >= 0.1 * loss.parameters_before
    assert load(tmp_path / "out").anatomy.total("parameters") == loss.parameters_after
    assert loss.before == report.before
    assert [(each.site, each.name, each.rank) for each in loss.factors] != [
        (each.site, each.name, each.rank) for each in report.factors
    ]
    (run,) = billhook.list_runs(tmp_path / "s.db")
    assert loss.ranks == billhook.show(run.run, tmp_path / "s.db").spec["ranks"] == "loss"


def never(*given: object, **more: object) -> None:
    raise AssertionError("the model was loaded")


def test_wrong_inputs_are_told_before_anything_is_read_or_written(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(told: str, **more: Any) -> None:
        given = {"remove": "10%", "data": place / "texts.jsonl", "out": tmp_path / "out", "store": tmp_path / "s.db"}
        with pytest.raises(BillhookError, match=told):
            billhook.factor(place / "model", **{**given, **LITTLE, **more})
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "s.db").exists()

    refuses(r"asks for .* parameters, and factors of rank 1 in the place of every linear map save", remove="95%")
    monkeypatch.setattr("billhook.models.load.Teacher.__init__", never)
    refuses("counts sites, and factors save parameters", remove="3sites")
    refuses("has no unit", remove="10")
    refuses(r"ranks='size' is no way to choose ranks\. Write loss", ranks="size")
    refuses("is missing", data=tmp_path / "none.jsonl")
    refuses("is missing", eval_data=tmp_path / "none.jsonl")
    refuses("eval_length", eval_length=2)
    refuses("is not empty", out=place / "model")


def test_the_command_prints_ranks_and_what_they_cost(place: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "billhook", "factor", str(place / "model"), "--remove", "5%", "--ranks", "energy",
         "--data", str(place / "texts.jsonl"), "--tokens", "256", "--length", "32", "--eval-tokens", "512",
         "--eval-length", "32", "--out", "cut", "--store", str(tmp_path / "s.db"), "--quiet"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for told in ("parameters:", "energy lost", "mlp.", "Perplexity on", "with ranks by energy",
                 "linear maps stay whole", "Checkpoint: cut"):  # fmt: skip
        assert told in " ".join(done.stdout.split())
