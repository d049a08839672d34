"""Alerts of prunings, gates and sweeps, of runs that stand still, of drift, and of steps of a lineage."""

from __future__ import annotations

import json
import math
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_watch import store_baseline
from typer.testing import CliRunner

import billhook
from billhook.cli import main
from billhook.core.errors import RecipeError, UsageError
from billhook.core.events import Event, ignore_events
from billhook.core.margin import Margin
from billhook.core.monitoring.alerts import ALERT, Alert, Rule
from billhook.core.monitoring.observations import observations_of, percent_lost, points_lost
from billhook.core.results.comparisons import GateCheck, GateReport
from billhook.core.results.measured import Estimate, EvalResult
from billhook.core.results.run import RunResult
from billhook.core.results.specs import GateSpec
from billhook.core.statistics import paired_difference
from billhook.report.monitoring.alert_words import alert_sentence
from billhook.runs.store import Store
from billhook.studies.monitoring.alerting import Alarm, check_result
from billhook.studies.monitoring.lineage import caused_by, lineage, whole_loss

LITTLE: dict[str, Any] = {"tokens": 240, "length": 24, "self_share": 0.0, "eval_tokens": 640, "eval_length": 32}
LITTLE |= {"search": "greedy", "device": "cpu"}
TEXT = {name: LITTLE[name] for name in ("eval_tokens", "eval_length", "device")}


def rules_file(folder: Path, *rules: dict[str, Any]) -> Path:
    path = folder / "rules.yaml"
    path.write_text(json.dumps({"rules": rules}))  # JSON is YAML
    return path


ANY_LOSS = {"name": "any loss", "when": "quality", "loses": "0%ppl", "severity": "critical"}
SLOWER = {"name": "slower", "when": "speed", "below": "100000%"}
LARGE = {"name": "large", "when": "memory", "above": "1kB"}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory, model: Path, text: Path) -> tuple[Path, RunResult, RunResult]:
    """The folder of two prunings of a tiny model, the second of the student of the first, and both results."""
    home = tmp_path_factory.mktemp("lineage")
    given: dict[str, Any] = {"data": str(text), "store": home / "runs.db", **LITTLE}
    first = billhook.prune(model, remove="1mlp", out=home / "one", **given)
    second = billhook.prune(home / "one", remove="1attention", out=home / "two", **given)
    return home, first, second


# -- what a run found ------------------------------------------------------------------------------------------------


def test_a_pruning_tells_its_alerts_as_events_of_its_run(model: Path, text: Path, tmp_path: Path) -> None:
    rules, events = rules_file(tmp_path, ANY_LOSS, SLOWER, LARGE), list[Event]()
    store = tmp_path / "runs.db"
    result = billhook.prune(
        model, remove="1sites", data=str(text), out=tmp_path / "out", store=store, rules=rules, watch=events.append,
        **LITTLE,
    )  # fmt: skip
    told = [Alert.from_event(event) for event in events if event.stage == ALERT]
    assert result.perplexity is not None
    assert result.speed is not None
    by_rule = {(alert.rule, alert.what): alert for alert in told}
    assert set(by_rule) >= {("slower", "prefill"), ("slower", "decode"), ("large", "student")}
    decode = by_rule["slower", "decode"]
    assert decode.value.value == pytest.approx(100 * result.speed.ratio.decode.value / result.speed.predicted.decode)
    assert by_rule["large", "student"].value.value == result.speed.student.peak_bytes
    assert (("any loss", str(text)) in by_rule) == (result.perplexity.ratio.low > 1)
    with closing(Store(store, read_only=True)) as opened:
        stored = [Alert.from_event(Event(e.stage, values=e.values)) for e in opened.events(result.run, ALERT)]
    assert stored == told
    assert billhook.alerts(store=store).told == tuple(told)


def test_the_observations_of_a_pruning_are_its_numbers_in_other_units(
    pruned: tuple[Path, RunResult, RunResult],
) -> None:
    _, first, _ = pruned
    assert first.perplexity is not None
    by_kind = {(each.kind, each.what): each for each in observations_of(first, 5.0)}
    lost = by_kind["quality", first.data.evaluation.source]
    assert lost.value.value == pytest.approx(100 * (first.perplexity.student / first.perplexity.teacher - 1))
    assert (lost.unit, lost.at, lost.value.n) == ("%ppl", 5.0, first.perplexity.ratio.n)
    assert points_lost(Estimate(-0.02, -0.05, 0.01, 9, 9, True)) == Estimate(2.0, -1.0, 5.0, 9, 9, True)


def test_a_gate_and_a_sweep_take_rules_too(model: Path, text: Path, tmp_path: Path) -> None:
    rules, events = rules_file(tmp_path, ANY_LOSS), list[Event]()
    given: dict[str, Any] = {"data": str(text), "store": tmp_path / "runs.db", "rules": rules, "watch": events.append}
    report = billhook.gate(model, model, **given, **TEXT)
    assert report.verdict == "PASS"
    assert not [event for event in events if event.stage == ALERT], "a model is no worse than itself"
    options = {name: value for name, value in LITTLE.items() if name != "search"}
    result = billhook.sweep(model, ["billhook-depth"], remove=["2sites"], out=tmp_path / "out", **given, **options)
    (trial,) = result.trials
    change = trial.results[str(text)].change
    told = [Alert.from_event(event) for event in events if event.stage == ALERT]
    assert [alert.value for alert in told] == ([percent_lost(change)] if change.low > 0 else [])
    with pytest.raises(RecipeError, match="There is no file of rules"):
        billhook.sweep(model, rules=tmp_path / "none.yaml", store=tmp_path / "none.db")
    assert not (tmp_path / "none.db").exists()


# -- lineages --------------------------------------------------------------------------------------------------------


def test_a_lineage_is_its_prunings_and_what_all_lost_is_their_product(
    pruned: tuple[Path, RunResult, RunResult], model: Path, text: Path
) -> None:
    home, first, second = pruned
    assert [step.run for step in lineage(home / "two")] == [first.run, second.run]
    assert [step.run for step in lineage(home / "one")] == [first.run]
    assert lineage(model) == ()
    (whole,) = whole_loss(home / "two", 1.0)
    before, after = (billhook.evaluate(each, data=text, **TEXT).perplexity for each in (model, home / "two"))
    assert before is not None
    assert after is not None
    assert whole.value.value == pytest.approx(100 * (after.value / before.value - 1), rel=1e-4)
    assert whole.value.low <= whole.value.value <= whole.value.high
    assert whole_loss(home / "one", 1.0) == ()


def _planted(home: Path, results: tuple[RunResult, ...], *ratios: tuple[float, float, float]) -> Path:
    """A lineage of steps with known losses: low, value, high of each."""
    model = "demo"
    for number, (low, value, high) in enumerate(ratios):
        step, folder = results[min(number, 1)], home / f"step{number}"
        assert step.perplexity is not None
        ratio = replace(step.perplexity.ratio, low=low, value=value, high=high)
        planted = replace(
            step, run=f"r00000{number}", out=str(folder), recipe={**step.recipe, "model": model},
            perplexity=replace(step.perplexity, ratio=ratio),
        )  # fmt: skip
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(json.dumps(planted.to_json()))
        model = str(folder)
    return Path(model)


@pytest.mark.parametrize(
    ("ratios", "named"),
    [
        ([(1.0, 1.01, 1.02), (1.3, 1.4, 1.5), (1.0, 1.02, 1.05)], "2 of 3, run r000001, step1"),
        ([(1.2, 1.4, 1.6), (1.3, 1.45, 1.5)], "1 of 2, run r000000, step0 or 2 of 2, run r000001, step1"),
        ([(1.2, 1.4, 1.6), (1.3, 1.45, 1.5), (1.1, 1.3, 1.5)], ""),
        ([(0.9, 0.95, 1.0), (0.9, 0.98, 1.1)], ""),
        ([(1.3, 1.4, 1.5)], ""),
    ],
)
def test_the_step_with_the_greatest_loss_is_named_where_it_can_be_told(
    ratios: list[tuple[float, float, float]], named: str, pruned: tuple[Path, RunResult, RunResult], tmp_path: Path
) -> None:
    last = _planted(tmp_path, pruned[1:], *ratios)
    assert caused_by(last) == named
    whole = whole_loss(last, 1.0)
    if len(ratios) > 1:
        assert whole[0].value.high == pytest.approx(100 * (math.prod(high for _, _, high in ratios) - 1))
        assert whole[0].step == named


def test_a_lineage_that_bites_its_tail_ends(pruned: tuple[Path, RunResult, RunResult], tmp_path: Path) -> None:
    last = _planted(tmp_path, pruned[1:], (1.0, 1.1, 1.2), (1.0, 1.1, 1.2))
    first = json.loads((tmp_path / "step0" / "report.json").read_text())
    first["recipe"]["model"] = str(last)
    (tmp_path / "step0" / "report.json").write_text(json.dumps(first))
    assert len(lineage(last)) == 2


def test_an_alert_names_the_step_that_caused_it(
    pruned: tuple[Path, RunResult, RunResult], text: Path, tmp_path: Path
) -> None:
    """Of a gate of the last student, and of a pruning, where only all steps together exceed the limit."""
    last = _planted(tmp_path, pruned[1:], (1.0, 1.01, 1.02), (1.3, 1.4, 1.5), (1.1, 1.2, 1.25))
    lost = Estimate(40.0, 35.0, 45.0, 60, 60, True)
    check = GateCheck(str(text), "perplexity", 60, "FAIL", 10.0, 14.0, lost, Margin.parse("3%ppl"))
    report = GateReport("FAIL", str(last), "v1", (check,), (), pruned[1].environment)
    step = RunResult.from_json(json.loads((last / "report.json").read_text()))
    rule = Rule("lost", "quality", "critical", 30.0, "%ppl")
    with closing(Store(tmp_path / "runs.db")) as store:
        run = store.new_run("gate", {}, {}, "-")
        alarm, target = Alarm((rule,)), str(last)
        (of_gate,) = check_result(store, run, ignore_events, report, alarm, target=target, folder=target)
        (of_pruning,) = check_result(store, run, ignore_events, step, alarm, target=target, folder=target)
        (alone,) = check_result(store, run, ignore_events, report, alarm, target=target)
    assert (of_gate.step, alone.step) == ("2 of 3, run r000001, step1", "")
    assert (of_pruning.step, of_pruning.what) == (of_gate.step, f"{step.data.evaluation.source}, all 3 steps")
    assert "; caused by step 2 of 3, run r000001, step1" in alert_sentence(of_gate)


# -- the alerts of a store -------------------------------------------------------------------------------------------


def spec(model: str) -> dict[str, Any]:
    return {"model": model, "kind": GateSpec.kind}


def test_runs_that_ended_early_are_told_until_the_same_is_done(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    with closing(Store(path)) as store:
        failed, again = (store.new_run("gate", spec("a"), {}, "-") for _ in range(2))
        store.update(failed, state="failed")
        other = store.new_run("gate", spec("b"), {}, "-")
        store.update(other, state="failed")
        store.update(again, state="done", result={})
    found = billhook.alerts(store=path)
    assert [(alert.kind, alert.what) for alert in found.now] == [("stopped", other)]


def test_a_run_that_does_nothing_stalls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "runs.db"
    with closing(Store(path)) as store:
        run = store.new_run("gate", spec("a"), {}, "-")
        with store.lock(run):
            store.add_event(run, Event("load", 1, 1), at_once=True)
            assert billhook.alerts(store=path).now == ()
            later = time.time() + 3700
            monkeypatch.setattr(time, "time", lambda: later)
            (alert,) = billhook.alerts(store=path).now
    assert (alert.kind, alert.what, alert.threshold) == ("stalled", run, 3600)
    assert 3699 < alert.value.value < 3800


def test_drift_between_baselines_is_their_paired_difference(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    old = EvalResult("acc", "h", tuple(float(i % 5 > 0) for i in range(200)), (1,) * 200, tuple(range(200)))
    new = replace(old, sums=tuple(x * (i % 3 > 0) for i, x in enumerate(old.sums)))
    for name, result in (("v1", old), ("v2", new)):
        store_baseline(path, name, result, "task.jsonl")
    store_baseline(path, "other", replace(new, tokens="of another tokenizer"), "task.jsonl")
    rules = rules_file(tmp_path, {"name": "drift", "when": "drift", "loses": "1pp"})
    (alert,) = billhook.alerts(rules=rules, between=["v1", "v2", "other"], store=path).now
    assert alert.what == "task.jsonl, v1 to v2"
    assert alert.value == points_lost(paired_difference(old, new))
    assert billhook.alerts(rules=rules, between=["v2", "v1"], store=path).now == (), "a gain is no loss"
    with pytest.raises(UsageError, match="There is no baseline 'v9'"):
        billhook.alerts(between=["v1", "v9"], store=path)


# -- the command line ------------------------------------------------------------------------------------------------


def test_a_critical_alert_is_exit_code_4_and_is_told_quietly_too(model: Path, text: Path, tmp_path: Path) -> None:
    command = ["gate", str(model), "--baseline", str(model), "--data", str(text), "--eval-tokens", "640"]
    command += ["--eval-length", "32", "--device", "cpu", "--store", str(tmp_path / "runs.db"), "--json"]
    rule = {"name": "never worse", "when": "drift", "loses": "1pp", "severity": "critical"}
    done = CliRunner().invoke(main.app, [*command, "--rules", str(rules_file(tmp_path, rule))])
    assert done.exit_code == 0, done.stderr
    store = tmp_path / "more.db"
    old = EvalResult("acc", "h", (1.0,) * 200, (1,) * 200, tuple(range(200)))
    for name, result in (("v1", old), ("v2", replace(old, sums=(0.0,) * 200))):
        store_baseline(store, name, result, "task.jsonl")
    listed = ["alerts", "--store", str(store), "--between", "v1,v2", "--rules", str(rules_file(tmp_path, rule))]
    done = CliRunner(env={"COLUMNS": "160"}).invoke(main.app, listed)
    assert done.exit_code == 4
    assert "1 alert now" in done.stdout
    assert "Rules are broken: never worse." in done.stderr
    done = CliRunner().invoke(main.app, [*listed, "--json"])
    assert json.loads(done.stdout)["now"][0]["what"] == "task.jsonl, v1 to v2"
    done = CliRunner().invoke(main.app, ["alerts", "--store", str(store), "--rules", str(tmp_path / "none.yaml")])
    assert done.exit_code == 2
    assert "There is no file of rules" in done.stderr
