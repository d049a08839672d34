"""Comparisons, gates and thresholds: what they say is what sums by hand give, and nobody is flattered."""

from __future__ import annotations

import json
import math
import random
import re
import shlex
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from browser import HOSTILE, OVERFLOW, Elements, Tab
from hypothesis import given
from hypothesis import strategies as st
from made_studies import MACHINE, a_threshold
from typer.testing import CliRunner

import billhook
from billhook.cli.main import app
from billhook.core.errors import DataError, FingerprintError, ResultError, UsageError
from billhook.core.plan import KeptGroups, Plan, Site
from billhook.core.results.comparisons import (
    Baseline,
    ComparedSet,
    Comparison,
    GateReport,
    PairVerdict,
    SeenSets,
    TaskScores,
)
from billhook.core.results.run import RunResult
from billhook.core.results.studies import ThresholdResult
from billhook.core.statistics import knee
from billhook.data.choice_tasks import load_items, read_items
from billhook.methods.evaluate.multiple_choice import log_probabilities
from billhook.report import compare_page, compare_words, run_words
from billhook.report.trials import threshold_page

SHORT: dict[str, Any] = {"eval_tokens": 512, "eval_length": 24}
SEARCH: dict[str, Any] = SHORT | {"search": "greedy", "tokens": 240, "length": 24}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compared")


@pytest.fixture(scope="module")
def task(home: Path) -> Path:
    draw = random.Random(1)

    def words(n: int) -> str:
        return " ".join(draw.choices(tiny.WORDS, k=n))

    rows = [{"query": words(5), "choices": [words(3) for _ in range(3)], "gold": draw.randrange(3)} for _ in range(150)]
    file = home / "task.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture(scope="module")
def pruned(model: Path, text: Path, home: Path) -> RunResult:
    return billhook.prune(model, remove="4sites", data=str(text), out=home / "pruned", store=home / "b.db", **SEARCH)


@pytest.fixture(scope="module")
def compared(model: Path, text: Path, task: Path, home: Path, pruned: RunResult) -> Comparison:
    return billhook.compare(
        model, pruned.out, model, data=str(text), tasks=str(task), out=home / "cmp", store=home / "b.db", **SHORT
    )


def on(compared: Comparison, source: Path) -> tuple[ComparedSet, PairVerdict]:
    """One set, and the verdict on the second model."""
    (each,) = (each for each in compared.sets if each.source == str(source))
    assert each.pairs[0] is not None
    return each, each.pairs[0]


def p_of(each: ComparedSet) -> float:
    assert each.pairs[0] is not None
    return each.pairs[0].p


# -- compare --------------------------------------------------------------------------------------------------------


def test_a_model_is_as_good_as_itself(compared: Comparison) -> None:
    for each in compared.sets:
        same = each.pairs[1]
        assert same is not None
        assert (same.verdict, same.change.value, same.p_holm) == ("equivalent", 0, 1)
        assert each.values[0] == each.values[2]
    pruned, alike = compared.agreement
    assert pruned is not None
    assert alike is not None
    assert alike.kl.value == pytest.approx(0, abs=1e-6)
    assert alike.same.value == 1
    assert pruned.kl.value > 0.05


def test_heads_of_another_width_are_not_held_together(model: Path, text: Path, tmp_path: Path) -> None:
    wider = tiny.with_tokenizer(tmp_path / "wider", vocab_size=72)
    told = billhook.compare(model, wider, data=str(text), out=tmp_path / "cmp", store=tmp_path / "b.db", **SHORT)
    assert told.agreement == (None,)
    assert told.verdicts()[0]


def test_a_pruned_model_is_found_out(compared: Comparison, pruned: RunResult, text: Path) -> None:
    each, pair = on(compared, text)
    assert each.values[1].estimate.value == pytest.approx(pruned.perplexity.student, rel=1e-5)
    assert each.values[0].estimate.value == pytest.approx(pruned.perplexity.teacher, rel=1e-5)
    assert math.exp(pair.change.value) == pytest.approx(pruned.perplexity.ratio.value, rel=1e-5)
    assert compared.models[1].sizes.parameters == pruned.sizes.student.parameters
    assert compared.models[1].earlier.names() == pruned.plan.names()


def test_flips_are_the_items_on_which_two_models_differ(
    compared: Comparison, model: Path, pruned: RunResult, task: Path
) -> None:
    items = {item.number: item for item in read_items(task)}
    each, pair = on(compared, task)
    told = {flip.number: flip for flip in each.flips}
    sides = []
    for folder in (model, pruned.out):
        teacher = billhook.load(folder)
        tokens = load_items(task, teacher, "evaluation")
        sums = torch.tensor(log_probabilities(teacher.model, tokens)).view(-1, 3)
        sides.append(dict(zip(tokens.clusters, sums, strict=True)))
    flipped = 0
    for number, sums in sides[0].items():
        right = [int(side[number].argmax()) == items[number].gold for side in sides]
        assert (number in told) == (right[0] != right[1])
        if number in told:
            flipped += 1
            assert list(told[number].right[:2]) == right
            assert told[number].choices == items[number].choices
            for side, given in zip((sums, sides[1][number]), told[number].probabilities, strict=False):
                assert given == pytest.approx(side.double().softmax(-1).tolist(), abs=1e-5)
    assert pair.gained is not None
    assert pair.lost is not None
    assert pair.gained + pair.lost == flipped > 0
    assert each.n == 75, "the half of the items that no search looks at"


def test_nothing_is_measured_twice(
    model: Path, text: Path, task: Path, home: Path, pruned: RunResult, compared: Comparison
) -> None:
    stages: list[str] = []
    again = billhook.compare(
        model, pruned.run, data=str(text), tasks=str(task), out=home / "again", store=home / "b.db", timed=False,
        watch=lambda event: stages.append(event.stage), **SHORT,
    )  # fmt: skip
    assert not {"evaluate", "compare", "speed"} & set(stages)
    assert [p_of(each) for each in again.sets] == [p_of(each) for each in compared.sets]
    assert again.speed == (None,)


def test_what_a_search_has_seen_is_refused_or_marked_everywhere(model: Path, home: Path, tmp_path: Path) -> None:
    """One line less, and the calibration texts are the held-out ones."""
    text = tiny.write_texts(tmp_path / "a.jsonl", 80, seed=3)
    moved = tmp_path / "moved.jsonl"
    moved.write_text("".join(text.read_text().splitlines(keepends=True)[1:]))
    store = tmp_path / "b.db"
    billhook.prune(model, remove="1sites", data=str(text), out=tmp_path / "p", store=store, **SEARCH)
    billhook.prune(tmp_path / "p", remove="1sites", data="pydoc", out=tmp_path / "pp", store=store, **SEARCH)
    for student in ("p", "pp"):  # what an earlier pruning has seen is not forgotten
        wanted: dict[str, Any] = {"data": str(moved), "store": store, "timed": False, **SHORT}
        with pytest.raises(DataError, match="seen=True"):
            billhook.compare(model, tmp_path / student, out=tmp_path / "no", **wanted)
        assert not (tmp_path / "no").exists()
        told = billhook.compare(model, tmp_path / student, out=tmp_path / f"yes{student}", seen=True, **wanted)
        (warning,) = compare_words.seen_warnings(told.seen)
        assert warning.startswith("NOT A PROOF")
        assert warning in Elements((tmp_path / f"yes{student}" / "index.html").read_text()).text
    fine = billhook.compare(
        model, tmp_path / "pp", data=str(text), out=tmp_path / "ok", store=store, timed=False, **SHORT
    )
    assert fine.seen == ()


def test_models_of_other_tokens_are_compared_on_tasks_alone(
    model: Path, text: Path, task: Path, tmp_path: Path
) -> None:
    other = tiny.with_tokenizer(tmp_path / "other")
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    words = vocabulary["model"]["vocab"]
    words["w0"], words["w1"] = words["w1"], words["w0"]
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    told = billhook.compare(
        model,
        other,
        data=str(text),
        tasks=str(task),
        out=tmp_path / "out",
        store=tmp_path / "b.db",
        timed=False,
        **SHORT,
    )
    pairs = {each.source: each.pairs[0] for each in told.sets}
    assert pairs[str(text)] is None
    assert pairs[str(task)] is not None
    assert told.agreement == (None,)
    assert "not comparable" in {row[1] for row in compare_words.verdict_rows(told)}


def hostile(told: Comparison) -> Comparison:
    sets = []
    for each in told.sets:
        flips = (replace(flip, query=HOSTILE, choices=(HOSTILE,) * 3) for flip in each.flips)
        sets.append(replace(each, flips=tuple(flips)))
    models = tuple(replace(each, model=HOSTILE) for each in told.models)
    return replace(told, models=models, sets=tuple(sets), seen=(SeenSets(HOSTILE, (HOSTILE,)),))


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(
    tab: Tab, compared: Comparison, task: Path, width: int, scheme: str, tmp_path: Path
) -> None:
    each, pair = on(compared, task)
    for name, told in (("plain", compared), ("hostile", hostile(compared))):
        file = tmp_path / f"{name}.html"
        file.write_text(compare_page.comparison_page(told), encoding="utf-8")
        tab.show(file, width, scheme)
        assert tab.run(OVERFLOW) <= 0
        assert tab.complaints() == []
        assert tab.run("document.title") != "owned"
        flips = sum(flip.right[0] != flip.right[1] for flip in on(told, task)[0].flips)
        assert tab.run("document.querySelectorAll('article').length") == flips
    shown = "[...document.querySelectorAll('article')].filter(a => !a.hidden).length"
    tab.show(tmp_path / "plain.html", width, scheme)
    tab.run("{const s = document.querySelector('select'); s.value = 'a'; s.dispatchEvent(new Event('input'))}")
    assert each.score == "acc"
    assert tab.run(shown) == pair.lost
    assert tab.run("document.querySelector('.flips output').textContent") == f"{pair.lost} of {flips} shown"
    word = each.flips[0].query.split()[0]
    tab.run(
        "{const s = document.querySelector('select'), i = document.querySelector('input'); s.value = ''; "
        f"i.value = '{word}'; i.dispatchEvent(new Event('input'))}}"
    )
    assert 0 < tab.run(shown) <= flips


def test_the_page_counts_items_of_tasks_and_texts_of_text(compared: Comparison, text: Path, task: Path) -> None:
    page = compare_page.comparison_page(compared)
    for file, keys in ((text, ("tokens", "documents", "texts", "–")), (task, ("tokens", "–", "–", "items"))):
        about = on(compared, file)[0].info.tokens
        cells = "".join(f"<td>{key if key == '–' else format(getattr(about, key), ',')}</td>" for key in keys)
        assert f'<tr><th scope="row">{file.name}</th>{cells}</tr>' in page


# -- gate -----------------------------------------------------------------------------------------------------------


def test_a_gate_passes_the_teacher_and_fails_a_broken_model(
    model: Path, text: Path, task: Path, home: Path, pruned: RunResult, tmp_path: Path
) -> None:
    runner, common = CliRunner(), ["--eval-tokens", "512", "--eval-length", "24", "--store", str(home / "b.db"), "-q"]
    sets = ["--data", str(text), "--tasks", str(task)]
    junit = tmp_path / "junit.xml"
    good = runner.invoke(app, ["gate", str(model), "--baseline", str(model), *sets, *common, "--junit", str(junit)])
    assert good.exit_code == 0, good.output
    assert "PASS" in good.output
    assert ET.parse(junit).getroot().get("failures") == "0"
    broken = tmp_path / "broken"
    teacher = billhook.load(model)
    everything = billhook.Plan.parse(["attention.0", "attention.1", "mlp.1", "attention.2", "mlp.2", "mlp.3"])
    billhook.save(billhook.apply(teacher, everything), teacher.tokenizer, everything, broken, teacher=teacher)
    margins = ["--ppl-margin", "0.1%", "--margin", "100pp"]
    asked = ["gate", str(broken), "--baseline", str(model), *sets, *common, *margins]
    bad = runner.invoke(app, [*asked, "--junit", str(junit)])
    assert bad.exit_code == 4, bad.output
    cases = ET.parse(junit).getroot().findall("testcase")
    assert [case.find("failure") is not None for case in cases] == [True, False]
    told = json.loads(runner.invoke(app, [*asked, "--json"]).stdout)
    report = GateReport.from_json(told)
    assert report.checks[0].verdict in ("FAIL", "UNDECIDED")
    assert (report.checks[0].verdict == "FAIL") == (report.checks[0].lost.low > 0.1)
    assert report.checks[1].verdict == "PASS"


def test_a_baseline_is_not_measured_again_and_does_not_change(
    model: Path, text: Path, task: Path, home: Path, pruned: RunResult, tmp_path: Path
) -> None:
    store = tmp_path / "b.db"
    billhook.save_baseline("v1", model, data=str(text), tasks=str(task), store=store, **SHORT)
    assert [baseline.name for baseline in billhook.baselines(store)] == ["v1"]
    loaded: list[str] = []
    told = billhook.gate(
        pruned.out,
        "v1",
        store=store,
        watch=lambda e: loaded.append(str(e.values.get("model"))) if e.stage == "load" else None,
    )
    assert str(model) not in loaded
    direct = billhook.gate(pruned.out, model, data=str(text), tasks=str(task), store=store, **SHORT)
    assert told.checks == direct.checks
    kept = billhook.show(billhook.list_runs(store)[0].run, store).result
    assert kept == direct
    with pytest.raises(UsageError, match="does not change"):
        billhook.save_baseline("v1", pruned.out, data=str(text), tasks=str(task), store=store, **SHORT)
    with pytest.raises(UsageError, match="Leave data="):
        billhook.gate(pruned.out, "v1", data=str(text), store=store)
    for options in ({"score": "acc_norm"}, {"shots_from": str(task)}):
        with pytest.raises(UsageError, match="score= out"):
            billhook.gate(pruned.out, "v1", store=store, **options)
    with pytest.raises(UsageError, match="Did you mean 'v1'"):
        billhook.gate(pruned.out, "v2", store=store)
    text_moved = tmp_path / "text.jsonl"
    text_moved.write_text(text.read_text())
    billhook.save_baseline("other", model, data=str(text_moved), store=store, **SHORT)
    tiny.write_texts(text_moved, 80, seed=9)
    with pytest.raises(FingerprintError, match="Save a new baseline"):
        billhook.gate(pruned.out, "other", store=store)


def test_wrong_margins_and_sets_say_what_to_type(model: Path, tmp_path: Path) -> None:
    store = tmp_path / "b.db"
    for margins, match in (
        (("1%", "3%ppl"), "Write .* or 1pp for"),
        (("1pp", "3pp"), "1pp and 3pp are both margins of accuracy on every task"),
        (("101pp", "3%ppl"), "1pp"),
        (("1pp:no.jsonl",), "The margin 1pp:no.jsonl is of a task that is not measured. Measured: none"),
    ):
        with pytest.raises(UsageError, match=match):
            billhook.compare(model, model, margins=margins, store=store)
    for typed, match in (
        (("--margin", "1%"), "--margin 1pp"),
        (("--ppl-margin", "3pp"), "--ppl-margin 3%"),
        (("--margin", "101pp"), "--margin 1pp"),
        (("--margin", "2%ppl", "--ppl-margin", "3%"), "2%ppl and 3%ppl are both margins of perplexity"),
    ):
        refused = CliRunner().invoke(app, ["compare", str(model), str(model), *typed, "--store", str(store)])
        assert refused.exit_code == 2
        assert match in refused.output
    with pytest.raises(UsageError, match="two models"):
        billhook.compare(model, store=store)
    with pytest.raises(UsageError, match="nothing to compare on"):
        billhook.compare(model, model, data=(), store=store)
    with pytest.raises(UsageError, match="is no score of a task"):
        billhook.compare(model, model, score="f1", store=store)


# -- values ---------------------------------------------------------------------------------------------------------


def test_a_margin_of_one_task_is_of_that_task_alone(
    model: Path, task: Path, home: Path, pruned: RunResult, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(task.read_text())
    wanted: dict[str, Any] = {"data": (), "tasks": [str(task), str(other)], "store": home / "b.db"}
    report = billhook.gate(pruned.out, model, margins=("100pp", f"0pp:{other}"), **wanted)
    assert [str(check.margin) for check in report.checks] == ["100pp", f"0pp:{other}"]
    wide, narrow = report.checks
    assert (wide.baseline, wide.student, wide.verdict) == (narrow.baseline, narrow.student, "PASS")
    assert narrow.verdict != "PASS"
    assert report.verdict == narrow.verdict


def test_results_are_values_with_rows_and_one_json_form(
    model: Path, text: Path, task: Path, home: Path, pruned: RunResult, compared: Comparison
) -> None:
    on_sets: dict[str, Any] = {"data": str(text), "tasks": str(task), "store": home / "b.db", **SHORT}
    scores = billhook.evaluate_tasks(pruned.out, str(task), store=home / "b.db")
    gated = billhook.gate(pruned.out, model, **on_sets)
    kept = billhook.save_baseline("values", model, **on_sets)
    rows = {Comparison: 6, GateReport: 2, Baseline: 2, TaskScores: 2}
    for result in (compared, gated, kept, scores):
        found = type(result).from_json(json.loads(json.dumps(result.to_json())))
        assert found == result
        assert len(result.rows()) == rows[type(result)]
        scalars = (str, int, float, bool, type(None))
        assert all(isinstance(value, scalars) for row in result.rows() for value in row.values())
        assert len({tuple(row) for row in result.rows()}) == 1
        assert type(result).__name__ in repr(result)
        assert len(repr(result).splitlines()) == 1
        assert result._repr_html_().startswith("<table>")
        with pytest.raises(ResultError, match="Run the command again"):
            type(result).from_json({"rows": []})
    assert [row["verdict"] is None for row in compared.rows()] == [True, False, False] * 2
    assert {each.value for each in kept.sets} == {check.baseline for check in gated.checks}
    assert Baseline.from_stored(json.loads(json.dumps(kept.stored()))).stored() == kept.stored()


# -- what every command leaves in the store ------------------------------------------------------------------------

LEAVES = {
    "compare": ["compare", "{model}", "{pruned}", "--no-speed", "--data", "{text}", "--tasks", "{task}"],
    "gate": ["gate", "{pruned}", "--baseline", "{model}", "--data", "{text}", "--tasks", "{task}"],
    "baseline": ["baseline", "save", "named", "{model}", "--data", "{text}"],
    "eval": ["eval", "{model}", "--tasks", "{task}"],
    "threshold": ["threshold", "--run", "{run}", "--margin", "60%ppl", "--data", "{text}"],
}


@pytest.mark.parametrize("kind", LEAVES)
def test_show_tells_what_the_command_told(
    kind: str, model: Path, text: Path, task: Path, home: Path, pruned: RunResult, tmp_path: Path
) -> None:
    store = home / "b.db"
    values = {"model": model, "text": text, "task": task, "pruned": pruned.out, "run": pruned.run}
    asked = [word.format(**values) for word in LEAVES[kind]] + ["--eval-tokens", "512", "--eval-length", "24"]
    asked += ["--out", str(tmp_path / "out")] if kind in ("compare", "threshold") else []
    done = CliRunner().invoke(app, [*asked, "--store", str(store)])
    assert done.exit_code in (0, 4), done.output
    run = billhook.list_runs(store)[0].run
    shown = CliRunner().invoke(app, ["show", run, "--store", str(store)])
    assert shown.exit_code == 0, shown.output
    assert len(done.stdout.splitlines()) >= 2
    assert shown.stdout.endswith(done.stdout)
    kept = billhook.show(run, store)
    assert kept.kind == kind
    report = CliRunner().invoke(app, ["report", run, "--store", str(store), "--out", str(tmp_path / "again")])
    assert (report.exit_code == 0) == (kind in ("compare", "gate", "threshold"))
    if kind in ("compare", "threshold"):
        pages = [(tmp_path / name / "index.html").read_text() for name in ("out", "again")]
        assert pages[0] == pages[1], "from the store alone"
    elif kind != "gate":
        assert (report.exit_code, (tmp_path / "again").exists()) == (2, False)
        assert f"A run of kind {kind} has no page" in " ".join(report.stderr.split())
    if kind in ("compare", "threshold"):
        assert kept.to_json()["result"] == json.loads((tmp_path / "out" / "result.json").read_text())


def test_one_label_for_one_sided_bounds(
    model: Path, text: Path, task: Path, home: Path, pruned: RunResult, tmp_path: Path
) -> None:
    store, junit = home / "b.db", tmp_path / "junit.xml"
    asked = ["gate", str(pruned.out), "--baseline", str(model), "--data", str(text), "--tasks", str(task)]
    asked += ["--eval-tokens", "512", "--eval-length", "24", "--store", str(store), "--junit", str(junit)]
    gated = CliRunner().invoke(app, asked).stdout
    told = billhook.threshold(margins="60%ppl", run=pruned.run, out=tmp_path / "t", store=store, eval_tokens=1024)
    within = billhook.prune(
        model, within="60%ppl", data=str(text), out=tmp_path / "w", store=store, **SEARCH | {"eval_tokens": 1024}
    )
    both = billhook.compare(model, pruned.out, data=str(text), timed=False, out=tmp_path / "c", store=store, **SHORT)
    places = {
        "the table of a gate": gated,
        "its JUnit": junit.read_text(),
        "the table of a threshold": " ".join(threshold_page.TRIAL_COLUMNS),
        "its verdict": threshold_page.threshold_headline(told),
        "its page": (tmp_path / "t" / "index.html").read_text(),
        "the notes of a pruning": " ".join(run_words.run_notes(within)),
        "the page of a comparison": compare_page.comparison_page(both),
    }
    for place, words in places.items():
        assert "one-sided 95%" in words, place
        assert not re.search(r"90%|either side|95% confidence|At most \(95%\)", words), place


# -- threshold ------------------------------------------------------------------------------------------------------


def test_a_threshold_takes_the_last_step_within_and_proves_it_elsewhere(
    model: Path, text: Path, home: Path, pruned: RunResult
) -> None:
    told = billhook.threshold(margins="60%ppl", run=pruned.run, out=home / "thr", store=home / "b.db", eval_tokens=1024)
    within = [trial.step for trial in told.trials if trial.within]
    assert told.step == max(within)
    beyond = [trial.step for trial in told.trials if not trial.within]
    assert all(step > told.step for step in beyond)
    sites = [str(site) for step in pruned.steps[: told.step] for site in step.sites]
    assert sorted(told.plan.names()) == sorted(sites)
    for trial in told.trials:
        for each in trial.losses:
            assert each.within == (each.lost.high <= 60 + 1e-9)
    assert told.confirmed == all(each.lost.high <= 60 for each in told.test)
    sets = told.data["60%ppl"]
    assert sets.validation.hash != sets.test.hash
    assert list(told.losses) == [step.loss for step in pruned.steps]
    assert ThresholdResult.from_json(json.loads((home / "thr" / "result.json").read_text())) == told
    assert (home / "thr" / "index.html").is_file()
    nothing = billhook.threshold(
        margins="0%ppl", run=pruned.run, out=home / "thr0", store=home / "b.db", eval_tokens=1024
    )
    assert (nothing.step, nothing.plan, nothing.confirmed) == (0, Plan(), None) or nothing.step > 0
    assert threshold_page.threshold_headline(nothing)


def test_without_a_run_a_threshold_searches(model: Path, text: Path, task: Path, tmp_path: Path) -> None:
    told = billhook.threshold(
        model, margins=["200%ppl", f"100pp:{task}"], remove="2sites", data=str(text), out=tmp_path / "t",
        store=tmp_path / "b.db", **SEARCH,
    )  # fmt: skip
    assert (told.step, told.steps, told.confirmed) == (2, 2, True)
    assert [str(each.margin) for each in told.test] == ["200%ppl", f"100pp:{task}"]


def test_a_threshold_takes_what_became_narrower(model: Path, text: Path, tmp_path: Path) -> None:
    told = billhook.threshold(
        model, margins="1000%ppl", metric="flap", remove="20%", data=str(text), out=tmp_path / "t",
        store=tmp_path / "b.db", **(SEARCH | {"search": "rank_channels"}),
    )  # fmt: skip
    assert (told.step, told.steps) == (1, 1)
    assert all(kept.groups for kept in told.plan.narrowed), "channel groups"
    assert told.share >= 0.2
    assert told.plan.sites() == [], "a site that keeps some of its groups is not removed"
    many = len(told.plan.narrowed)
    assert many > 0
    assert f"0 sites can be removed and {many} narrowed" in threshold_page.threshold_headline(told)


def test_prune_takes_the_plan_that_a_threshold_wrote(
    model: Path, text: Path, home: Path, pruned: RunResult, tmp_path: Path
) -> None:
    told = billhook.threshold(
        margins="1000%ppl", run=pruned.run, out=tmp_path / "t", store=home / "b.db", eval_tokens=1024
    )
    assert told.plan.removed
    plan = str(tmp_path / "t" / "result.json")
    small = {name: value for name, value in SEARCH.items() if name != "search"}
    small |= {"data": str(text), "store": home / "b.db"}
    again = billhook.prune(model, plan=plan, out=tmp_path / "p", **small)
    assert again.plan.names() == told.plan.names()
    with pytest.raises(FingerprintError, match=r"made for another model \(fingerprint \w+, this one is"):
        billhook.prune(pruned.out, plan=plan, out=tmp_path / "q", **small)


def test_the_command_that_a_threshold_prints_can_be_pasted(model: Path, text: Path, tmp_path: Path) -> None:
    """Channel groups hold spaces and brackets, and so may the model's folder."""
    spaced = tmp_path / "a model [1]"
    spaced.symlink_to(model, target_is_directory=True)
    store, small = str(tmp_path / "b.db"), ["--data", str(text), "--eval-tokens", "512", "--eval-length", "24"]
    asked = ["threshold", str(spaced), "--margin", "1000%ppl", "--metric", "flap", "--remove", "20%", "--search"]
    small += ["--tokens", "240", "--length", "24", "--store", store]
    asked += ["rank_channels", "--out", str(tmp_path / "t"), *small]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("Prune so: ")]
    typed = shlex.split(line.removeprefix("Prune so: "))
    assert typed[:4] == ["billhook", "prune", str(spaced), "--plan"]
    page = Elements((tmp_path / "t" / "index.html").read_text()).text
    assert line.removeprefix("Prune so: ") in page
    again = CliRunner().invoke(app, [*typed[1:], *small, "--out", str(tmp_path / "p"), "--json"])
    assert again.exit_code == 0, again.output
    told = json.loads((tmp_path / "t" / "result.json").read_text())
    assert json.loads(again.stdout)["plan"]["narrowed"] == told["plan"]["narrowed"] != []
    wide = frozenset(KeptGroups(Site(block, "mlp"), tuple(range(0, 200, 2))) for block in range(20))
    long = replace(ThresholdResult.from_json(told), plan=Plan(narrowed=wide))
    assert shlex.split(threshold_page.command(long))[3:] == ["--plan", str(tmp_path / "t" / "result.json")]


def test_a_threshold_takes_steps_of_a_pruning_only(model: Path, home: Path, pruned: RunResult) -> None:
    billhook.threshold(margins="60%ppl", run=pruned.run, out=home / "once", store=home / "b.db", eval_tokens=1024)
    run = billhook.list_runs(home / "b.db")[0].run
    with pytest.raises(UsageError, match=f"Run {run} has no steps of a search"):
        billhook.threshold(margins="60%ppl", run=run, out=home / "twice", store=home / "b.db")


@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_of_a_threshold_in_a_browser(tab: Tab, home: Path, tmp_path: Path, width: int) -> None:
    machine = replace(MACHINE, machine=HOSTILE)
    result = a_threshold(1, HOSTILE.replace("\n", " "), model=HOSTILE, environment=machine, loss=HOSTILE)
    file = tmp_path / "t.html"
    file.write_text(threshold_page.threshold_page(result), encoding="utf-8")
    tab.show(file, width, "light")
    assert tab.run(OVERFLOW) <= 0
    assert tab.complaints() == []
    assert tab.run("document.title") != "owned"
    drawn = "[...document.querySelectorAll('.plot')].map(box => echarts.getInstanceByDom(box).getOption().series)"
    counts = f"{drawn}.map(all => all.filter(s => s.type === 'custom').map(s => s.data.length))"
    assert tab.run(counts) == [[3, 1], [3, 1], [12]]  # trials and proof of two margins; steps


@given(st.floats(1.2, 6), st.integers(5, 40))
def test_the_knee_is_the_point_farthest_below_the_chord(power: float, n: int) -> None:
    xs = [i / n for i in range(n + 1)]
    ys = [x**power for x in xs]
    found = knee(xs, ys)
    assert found is not None
    exact = power ** (-1 / (power - 1))  # where the slope is that of the chord
    assert abs(xs[found] - exact) <= 1 / n
    assert knee(xs, [-y for y in ys]) is None
    assert knee(xs, xs) is None or max(abs(x - y) for x, y in zip(xs, xs, strict=True)) == 0
    assert knee(xs[:2], ys[:2]) is None
