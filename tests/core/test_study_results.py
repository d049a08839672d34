"""Results of studies as values: JSON and back, rows for a table, and what a prompt shows."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from made_studies import a_stability, a_sweep, a_threshold, a_transfer

from billhook.core.errors import ResultError
from billhook.core.plan import Plan
from billhook.core.results.json_form import PagedResult
from billhook.core.results.measured import Estimate
from billhook.core.results.studies import SweepResult

SMALL = ("shortgpt", "sleb")


def without_ends() -> SweepResult:
    """A sweep with intervals that are not known, a plan of channel groups, and a refused recipe."""
    result = a_sweep(3, SMALL, datas=("/data/wiki.jsonl", "self"), blown=("sleb",), refused=2)
    unknown = Estimate(0.1, -math.inf, math.inf, 3, 1, False, "one_text")
    first = result.trials[0]
    outcomes = {name: replace(on, change=unknown, above_first_text=unknown) for name, on in first.results.items()}
    plan = Plan.parse(["mlp.3", "mlp.0[0-1 3-4]"])
    return replace(result, trials=(replace(first, results=outcomes, plan=plan, resumed=True), *result.trials[1:]))


RESULTS: dict[str, PagedResult] = {
    "sweep": a_sweep(1, SMALL, refused=1),
    "no interval": without_ends(),
    "nothing compared": a_sweep(2, (), refused=2),
    "transfer": a_transfer(1),
    "stability": a_stability(1),
    "threshold": a_threshold(1),
    "nothing within": a_threshold(2, plan=Plan(), step=0, share=0.0, confirmed=None, test=(), knee=None, page=""),
}


@pytest.mark.parametrize("name", RESULTS)
def test_json_and_back_is_the_same_value(name: str) -> None:
    result = RESULTS[name]
    told = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert (told["schema"], told["kind"], told["page"]) == (2, result.kind, result.page)
    assert type(result).from_json(told) == result


@pytest.mark.parametrize("name", RESULTS)
def test_rows_are_flat_and_have_equal_columns(name: str) -> None:
    rows = RESULTS[name].rows()
    assert len({tuple(row) for row in rows}) == min(1, len(rows))
    assert all(isinstance(cell, str | int | float | None) for row in rows for cell in row.values())
    assert "<table>" in RESULTS[name]._repr_html_()


def test_rows_hold_what_the_result_holds() -> None:
    sweep = a_sweep(1, SMALL)
    rows = sweep.rows()
    assert len(rows) == len(sweep.trials) * len(sweep.evaluation)
    wiki = next(row for row in rows if row["set"] == "/data/wiki.jsonl")
    first = sweep.trials[0]
    on = first.results["/data/wiki.jsonl"]
    assert (wiki["recipe"], wiki["remove"], wiki["attention"] + wiki["mlp"]) == ("shortgpt", "15%sites", 12)
    assert (wiki["value_low"], wiki["nats"], wiki["change_high"]) == (on.estimate.low, on.nats, on.change.high)
    assert wiki["above_best"] == on.above_best.value if on.above_best else None
    assert wiki["above_first_text"] is None
    assert wiki["plan"] == str(first.plan)
    threshold = a_threshold(1)
    items = [row["items"] for row in threshold.rows()]
    assert (items.count("validation"), items.count("test")) == (3 * 2, 2)
    assert [row["tokens"] for row in a_stability(1).rows()] == [256, 1024, 4096, 16384]
    assert [row["recipe"] for row in a_transfer(1, ("arc",)).rows()] == ["text", "arc"]


def test_a_prompt_shows_one_line() -> None:
    assert repr(a_sweep(1, SMALL, texts=("a.txt",), tasks=())) == "SweepResult(SmolLM2-135M: 6 trials on a.txt)"
    assert repr(a_threshold(1)) == "ThresholdResult(SmolLM2-135M: step 5 of 12, 16.7% of the parameters)"
    for result in RESULTS.values():
        shown = repr(result)
        assert "\n" not in shown
        assert len(shown) < 160


def test_a_result_of_the_version_before_is_refused_with_what_to_do() -> None:
    old = {"model": "demo", "rows": [], "teacher": {}, "page": "lab/r1/index.html"}
    with pytest.raises(ResultError, match=r"schema 1 .* Run the command again"):
        SweepResult.from_json(old)
