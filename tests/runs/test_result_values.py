"""What the functions on one model return: values with attributes, rows and one JSON form, which read back as equal."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import tiny

import billhook
from billhook.core.errors import ResultError, UsageError
from billhook.core.plan import Plan
from billhook.core.results.json_form import Result
from billhook.core.results.measured import TimingProtocol
from billhook.core.results.model import Evaluation, Inspection, ScoreTable, SpeedReport, WorkEstimate
from billhook.core.results.run import RunResult

TEXT: dict[str, Any] = {"tokens": 240, "length": 24, "eval_tokens": 600, "eval_length": 24, "self_share": 0.0}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """One of every kind; the pruning has a margin, a recovery, a task and an audit, so that no field is empty."""
    home = tmp_path_factory.mktemp("values")
    model = str(tiny.with_tokenizer(home / "model", "llama"))
    tiny.write_texts(home / "text.jsonl", 160)
    given: dict[str, Any] = {**TEXT, "data": str(home / "text.jsonl")}
    pruned = billhook.prune(
        model, within="300%ppl", search="greedy", fast=True, audit=True, recover="mean", out=home / "out",
        store=home / "b.db", recover_tokens=640, recover_length=24, **given | {"eval_tokens": 960},
    )  # fmt: skip
    fast = TimingProtocol(prompt_tokens=8, new_tokens=2, repeats=2)
    return {
        "prune": pruned,
        "dry_run": billhook.dry_run(model, remove="2sites", **given),
        "inspect": billhook.inspect(home / "out"),
        "score": billhook.score(model, "cosine,angular_span,flap", data=given["data"], tokens=240, length=24),
        "evaluation": billhook.evaluate(model, data=given["data"], eval_tokens=600, eval_length=24),
        "named": billhook.evaluate(
            model, data=given["data"], eval_tokens=600, eval_length=24, evaluations="perplexity"
        ),
        "speed": billhook.measure_speed(model, home / "out", protocol=fast, store=home / "s.db"),
        "one speed": billhook.measure_speed(model, protocol=fast, store=home / "s.db"),
    }


KINDS: dict[str, type[Result]] = {
    "prune": RunResult, "dry_run": WorkEstimate, "inspect": Inspection, "score": ScoreTable, "evaluation": Evaluation,
    "named": Evaluation, "speed": SpeedReport, "one speed": SpeedReport,
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_a_result_is_a_value_with_one_json_form(name: str, results: dict[str, Result]) -> None:
    result, kind = results[name], KINDS[name]
    assert type(result) is kind
    written = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert kind.from_json(written) == result
    assert {"schema", "kind"} <= set(written)
    with pytest.raises(ResultError, match="Run the command again"):
        kind.from_json({key: value for key, value in written.items() if key != "schema"})


@pytest.mark.parametrize("name", KINDS)
def test_a_result_is_shown_short_and_as_a_table(name: str, results: dict[str, Result]) -> None:
    result = results[name]
    rows = result.rows()
    assert rows
    assert {tuple(row) for row in rows} == {tuple(rows[0])}, "equal columns in each"
    assert all(isinstance(value, str | int | float | None) for row in rows for value in row.values())
    assert result._repr_html_().count("<tr>") == len(rows) + 1
    assert len(repr(result)) < 200
    assert "\n" not in repr(result)


def test_a_run_result_holds_no_sentence_and_says_what_happened(results: dict[str, Result]) -> None:
    result = results["prune"]
    assert isinstance(result, RunResult)
    assert result.within
    assert result.perplexity
    assert result.search.audit
    assert result.within.taken.within
    assert result.recoveries[0].on["held-out"].ratio.n == result.perplexity.ratio.n
    assert repr(result).startswith(f"RunResult({result.run} of ")
    (row,) = result.rows()
    assert row["removed"] == len(result.plan.removed)
    assert (row["perplexity_ratio"], row["perplexity_ratio_low"]) == (
        result.perplexity.ratio.value, result.perplexity.ratio.low,
    )  # fmt: skip
    facts = result.to_json()
    del facts["recipe"], facts["answers"]
    long = [text for text in strings(facts) if text.count(" ") > 5 and "keeps" not in text]
    assert not long, "values carry numbers and reasons; sentences are made for readers"


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for each in value.values() for text in strings(each)]
    if isinstance(value, list):
        return [text for each in value for text in strings(each)]
    return [value] if isinstance(value, str) else []


def test_what_is_not_known_survives_json(results: dict[str, Result]) -> None:
    result = results["prune"]
    assert isinstance(result, RunResult)
    assert result.perplexity
    unknown = replace(result.perplexity.ratio, low=-math.inf, high=math.inf, reliable=False, reason="one_text")
    odd = replace(
        result, perplexity=replace(result.perplexity, ratio=unknown), speed=None, within=None, plan=Plan(), steps=(),
        reasons=("zeroed", "streamed"), recipe={"set": {"a": [1, None, "x"]}},
    )  # fmt: skip
    assert RunResult.from_json(json.loads(json.dumps(odd.to_json(), allow_nan=False))) == odd


def test_scores_of_one_metric_are_at_hand_and_of_several_by_name(results: dict[str, Result]) -> None:
    table = results["score"]
    assert isinstance(table, ScoreTable)
    with pytest.raises(UsageError, match=r"cosine, angular_span, flap\. Choose one: \.scores\[NAME\]\.sites"):
        table.sites  # noqa: B018 - the look-up is the test
    alone = replace(table, scores={"cosine": table.scores["cosine"]})
    assert alone.sites == table.scores["cosine"].sites
    assert {row["of"] for row in table.rows()} == {"site", "block", "span", "group"}
