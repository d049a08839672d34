"""Charts of tasks: every change with its interval is drawn once, and a chart of less than two tasks is none."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from typing import Any

import pytest
from made_studies import a_sweep, estimate

from billhook.core.results.measured import Estimate
from billhook.report.study_words import tasks_of
from billhook.report.trials.tasks import changes_chart, payers, tasks_curves

ARC, BOOLQ, PIQA = (f"/tasks/{name}.jsonl" for name in ("arc", "boolq", "piqa"))


def options(page: str) -> Any:
    """The options of the only chart of a page."""
    (told,) = re.findall(r'data-option="(.*?)"', page)
    return json.loads(html.unescape(told))


def drawn(option: Any) -> dict[str, list[list[float]]]:
    """[x or place, value, low, high] of every point, by the name of its line."""
    return {
        each["name"]: [point["value"] for point in each["data"]]
        for each in option["series"]
        if each["type"] == "@interval"
    }


def percent(change: Estimate) -> list[float]:
    return [100 * x for x in (change.value, change.low, change.high)]


def test_students_stand_side_by_side_and_the_task_that_pays_most_on_top() -> None:
    first = {ARC: estimate(-0.02, -0.04, 0.01), BOOLQ: estimate(0.03, 0.01, 0.05)}
    second = {ARC: estimate(-0.01, -0.02, -0.005), PIQA: estimate(-0.09, -0.12, -0.05)}
    option = options(changes_chart({"a": first, "b": second, "none": {}}))
    assert option["yAxis"]["data"] == ["piqa.jsonl", "arc.jsonl", "boolq.jsonl"]
    assert drawn(option) == {
        "a": [pytest.approx([1, *percent(first[ARC])]), pytest.approx([2, *percent(first[BOOLQ])])],
        "b": [pytest.approx([0, *percent(second[PIQA])]), pytest.approx([1, *percent(second[ARC])])],
    }
    hollow = [
        point["hollow"] for series in option["series"] if series["type"] == "@interval" for point in series["data"]
    ]
    assert hollow == [True, False, False, False]


def test_a_sentence_says_who_pays_for_whom() -> None:
    changes = {ARC: estimate(-0.02, -0.04, 0.01), BOOLQ: estimate(0.03, 0.01, 0.05), PIQA: estimate(-0.1, -0.2, -0.05)}
    assert payers(changes) == "Lower: piqa.jsonl. Higher: boolq.jsonl. No change seen: arc.jsonl."


@pytest.mark.parametrize("tasks", [(), (ARC,)])
def test_fewer_than_two_tasks_have_no_chart(tasks: tuple[str, ...]) -> None:
    assert changes_chart({"student": {task: estimate(0.0, -0.1, 0.1) for task in tasks}}) == ""
    assert tasks_curves(a_sweep(3, ("sleb", "uidl"), tasks=tasks)) == ""
    assert tasks_curves(a_sweep(3, ())) == ""


def test_a_sweep_draws_every_task_of_every_recipe_against_every_size() -> None:
    result = a_sweep(5, ("sleb", "uidl"), datas=("/data/wiki.jsonl", "/data/c4.jsonl"))
    found, tasks = options(tasks_curves(result)), tasks_of(result)
    rows = [(recipe, data) for data in ("/data/wiki.jsonl", "/data/c4.jsonl") for recipe in ("sleb", "uidl")]
    sizes = ("parameters", "kv_bytes_per_token", "ns_per_token")
    assert set(found) == {f"{i} {size}" for i in range(4) for size in sizes}
    for i, (recipe, data) in enumerate(rows):
        trials = [trial for trial in result.trials if (trial.recipe, trial.data) == (recipe, data)]
        for size in sizes:
            told = drawn(found[f"{i} {size}"])
            assert len(told) == len(tasks)
            for task in tasks:
                wanted = sorted(
                    [100 * getattr(t.sizes, size) / getattr(result.sizes, size), *percent(t.results[task].change)]
                    for t in trials
                )
                assert told[task.rpartition("/")[2]] == [pytest.approx(each) for each in wanted]


def test_a_sweep_of_one_size_has_its_recipes_side_by_side() -> None:
    result = a_sweep(6, ("sleb", "uidl"), ("25%sites",))
    told = drawn(options(tasks_curves(result)))
    assert set(told) == {"sleb", "uidl"}
    for trial in result.trials:
        assert sorted(value for _, value, *_ in told[trial.recipe]) == pytest.approx(
            sorted(100 * trial.results[task].change.value for task in tasks_of(result))
        )


def test_an_end_that_is_not_known_is_not_drawn() -> None:
    endless = replace(estimate(-0.1, -0.2, 0.0), low=float("-inf"), high=float("inf"))
    told = drawn(options(changes_chart({"student": {ARC: endless, PIQA: endless}})))
    assert told["student"] == [[0, pytest.approx(-10.0), None, None], [1, pytest.approx(-10.0), None, None]]
