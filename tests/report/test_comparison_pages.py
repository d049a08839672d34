"""Pages of comparisons, gates and two servers: one table of students, charts that draw its numbers, hostile names."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import HOSTILE, OVERFLOW, Elements, Tab
from made_comparisons import VERDICTS, a_comparison, a_gate, an_ab_report

from billhook.core.results.ab_report import AbReport, Completion
from billhook.core.results.comparisons import Comparison
from billhook.report.ab_page import ab_page
from billhook.report.ab_words import ab_headline
from billhook.report.compare_page import comparison_page, comparison_verdict, labels_of
from billhook.report.compare_words import change_words
from billhook.report.gate_page import gate_page, gate_verdict


def hostile_comparison() -> Comparison:
    result = a_comparison(3)
    sets = []
    for each in result.sets:
        flips = tuple(replace(flip, query=HOSTILE, choices=(HOSTILE,) * 3) for flip in each.flips)
        sets.append(replace(each, info=replace(each.info, source=each.source + HOSTILE), flips=flips))
    models = tuple(replace(each, model=HOSTILE) for each in result.models)
    environment = replace(result.environment, machine=HOSTILE)
    return replace(result, models=models, sets=tuple(sets), environment=environment)


def hostile_servers() -> AbReport:
    result = an_ab_report()
    ends = {name: replace(getattr(result, name), url=HOSTILE, model=HOSTILE) for name in ("a", "b")}
    said = Completion(HOSTILE), Completion(None, "timeout", HOSTILE)
    outcomes = tuple(replace(each, a=said[0], b=said[1], same=None) for each in result.outcomes)
    return replace(result, **ends, outcomes=outcomes, run=HOSTILE, prompts=HOSTILE)


def options_of(page: str) -> list[Any]:
    return [json.loads(str(about["data-option"])) for _, about in Elements(page).found if "data-option" in about]


PAGES = {
    "three": comparison_page(a_comparison()),
    "one": comparison_page(a_comparison(students=1)),
    "hostile": comparison_page(hostile_comparison()),
    "gate": gate_page(a_gate()),
    "hostile gate": gate_page(replace(a_gate("UNDECIDED"), student=HOSTILE, baseline=HOSTILE)),
    "servers": ab_page(an_ab_report()),
    "hostile servers": ab_page(hostile_servers()),
}
CHARTS = {"three": 2, "one": 2, "hostile": 2, "gate": 2, "hostile gate": 2, "servers": 1, "hostile servers": 1}


@pytest.mark.parametrize("students", [1, 2, 3, 9])
def test_one_table_has_every_student_with_every_verdict(students: int) -> None:
    result = a_comparison(1, students)
    page = comparison_page(result)
    assert page.count('<table class="stack">') == 1 + students  # that of all, and one to open of each
    table = page.split('<table class="stack">')[1].split("</table>")[0]
    rows = table.split("<tr>")[2:]
    assert len(rows) == students
    for other, (row, name) in enumerate(zip(rows, labels_of(result)[1:], strict=True), 1):
        assert f'<th scope="row">{name}</th>' in row
        for each in result.sets:
            pair = each.pairs[other - 1]
            assert pair is not None
            value, ends = change_words(pair, each.is_text)
            assert f'<span class="word {pair.verdict}">{pair.verdict}</span><br>{value}<small>{ends}</small>' in row
    assert page.count("<details>") == (students if students > 1 else 0)
    assert comparison_verdict(result).count("margins: ") == 1


def test_the_charts_draw_every_change_and_margin() -> None:
    result = a_comparison(2)
    texts, tasks = options_of(comparison_page(result))
    for option, is_text, scale in ((texts, True, 1), (tasks, False, 100)):
        sets = [each for each in result.sets if each.is_text == is_text]
        series = [each for each in option["series"] if each["type"] == "@interval"]
        assert [each["name"] for each in series] == [*labels_of(result)[1:], "margin"]
        for other, drawn in enumerate(series[:-1]):
            for place, (point, each) in enumerate(zip(drawn["data"], sets, strict=True)):
                pair = each.pairs[other]
                assert pair is not None
                ends = [pair.change.value, pair.change.low, pair.change.high]
                assert point["value"] == pytest.approx([place, *(scale * x for x in ends)])
                assert point["hollow"] == (pair.verdict == "undecided")
                assert pair.verdict in point["tip"]
        limit = math.log(1.03) if is_text else 1.0
        assert all(point["value"][2:] == pytest.approx([-limit, limit]) for point in series[-1]["data"])


def test_models_of_one_name_are_told_apart() -> None:
    result = a_comparison(students=2)
    result = replace(result, models=tuple(replace(each, model="same") for each in result.models))
    assert labels_of(result) == ["same (A)", "same (B)", "same (C)"]


def test_the_verdict_of_a_gate_has_its_numbers() -> None:
    told = "on arc.jsonl it loses 6.00 pp (one-sided 95%: 3.10 to 8.90); 1 may go"
    assert gate_verdict(a_gate()) == f"FAIL: pruned/student against SmolLM2-135M: {told}."
    passed = a_gate("PASS")
    assert gate_verdict(passed).endswith("on every set it loses less than may go.")


def test_the_gate_draws_what_is_lost_and_what_may_go() -> None:
    report = a_gate()
    for option, check in zip(options_of(gate_page(report)), report.checks, strict=True):
        lost, margin = (each["data"] for each in option["series"] if each["type"] == "@interval")
        assert lost[0]["value"] == [0, check.lost.value, check.lost.low, check.lost.high]
        assert margin[0]["value"][1] == float(check.margin.amount)
        assert lost[0]["hollow"] == (check.verdict != "PASS")


def test_the_page_of_two_servers_says_what_is_better_and_where_the_answers_lie() -> None:
    result = an_ab_report()
    page = Elements(ab_page(result)).text
    assert "billhook show r3fa9c1 --json" in page
    assert "billhook report r3fa9c1" in page
    assert ab_headline(result) == (
        "B is better in latency, ×0.80 (0.75–0.86); B is better in tokens per second, ×1.25 (1.20–1.31); 75.0% of the "
        "answers are the same. Over 40 prompts that both answered."
    )
    (option,) = options_of(ab_page(result))
    drawn = next(each["data"] for each in option["series"] if each["type"] == "@interval")
    for place, (point, measure) in enumerate(zip(drawn, result.measures, strict=True)):
        ends = (measure.ratio.value, measure.ratio.low, measure.ratio.high)
        assert point["value"] == pytest.approx([place, *map(math.log, ends)])
    assert page.count("Rome.") == sum(not each.same for each in result.outcomes)
    nobody = replace(result, measures=(), agreement=None, pairs=0, outcomes=())
    assert ab_headline(nobody).startswith("No prompt was answered by both")
    assert "data-option" not in ab_page(nobody)


@pytest.mark.parametrize("name", [name for name in PAGES if "hostile" in name])
def test_hostile_strings_stay_strings(name: str) -> None:
    page = PAGES[name]
    assert HOSTILE not in page
    found = [tag for tag, _ in Elements(page).found]
    assert found.count("script") == 3
    assert not {"img", "iframe"} & set(found)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("comparisons")
    told = {name: folder / f"{name.replace(' ', '-')}.html" for name in PAGES}
    for name, path in told.items():
        path.write_text(PAGES[name], encoding="utf-8")
    return told


LOOKS = [(390, "light"), (390, "dark"), (1440, "light"), (1440, "dark")]
VIEWS = [(name, *LOOKS[(i + j) % 4]) for i, name in enumerate(PAGES) for j in (0, 3)] + [
    ("three", *look) for look in LOOKS
]


@pytest.mark.parametrize(("name", "width", "scheme"), VIEWS)
def test_the_page_in_a_browser(tab: Tab, paths: dict[str, Path], name: str, width: int, scheme: str) -> None:
    tab.show(paths[name], width, scheme)
    assert tab.run(OVERFLOW) <= 0
    assert tab.run("document.title") != "owned"
    assert tab.complaints() == []
    assert [url for url in tab.requests() if not url.startswith("data:")] == [paths[name].as_uri()]
    assert tab.run("document.querySelectorAll('.plot canvas').length") == CHARTS[name]
    if name == "three" and width == 390:  # no interval is cut, and no cell has to be scrolled into sight
        cells = "[...document.querySelectorAll('#students td div, #students small')]"
        assert tab.run(f"{cells}.every(c => c.getBoundingClientRect().right <= 390)")
        assert tab.run("document.querySelector('#students .scroll').scrollWidth") <= 390


def test_verdicts_are_told_apart_without_colour(tab: Tab, paths: dict[str, Path]) -> None:
    for scheme in ("light", "dark"):
        tab.show(paths["three"], 1440, scheme)
        marks, colours = [], []
        for word in VERDICTS:
            first = f"document.querySelector('.word.{word}')"
            marks.append(tab.run(f"getComputedStyle({first}, '::before').content"))
            colours.append(tab.run(f"getComputedStyle({first}).color"))
        assert len(set(marks)) == len(set(colours)) == 4
