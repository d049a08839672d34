"""Speed as a run of the store: filed, listed, shown, and held against rules."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

import billhook
from billhook.cli import main
from billhook.core.errors import UsageError
from billhook.core.events import Event
from billhook.core.monitoring.alerts import ALERT, Alert
from billhook.core.monitoring.observations import observations_of
from billhook.core.plan import Plan
from billhook.core.results.model import SpeedReport
from billhook.core.results.specs import SpeedSpec
from billhook.dashboard.listing import Listing
from billhook.dashboard.server import make_app
from billhook.methods.evaluate.speed import predicted_by_weights, predicted_speed
from billhook.report.timing.words import speed_headline, speed_rows
from billhook.runs.store import Store

QUICK = billhook.TimingProtocol(prompt_tokens=8, new_tokens=2, repeats=6)


@pytest.fixture(scope="module")
def timed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, SpeedReport, list[Event]]:
    """A student of a tiny model, the store, its speed against the model, and the events."""
    home, events = tmp_path_factory.mktemp("timed"), list[Event]()
    teacher = billhook.load(model)
    plan = Plan.parse(["mlp.1", "attention.0"])
    billhook.save(billhook.apply(teacher, plan), None, plan, home / "student", teacher=teacher)
    rules = home / "rules.yaml"
    rules.write_text(json.dumps({"rules": [
        {"name": "below prediction", "when": "speed", "below": "100000%"},
        {"name": "large", "when": "memory", "above": "1kB"},
    ]}))  # fmt: skip
    report = billhook.measure_speed(
        model, home / "student", protocol=QUICK, rules=rules, store=home / "runs.db", watch=events.append, device="cpu"
    )
    return home / "student", home / "runs.db", report, events


def test_a_speed_is_a_run_of_the_store(timed: tuple[Path, Path, SpeedReport, list[Event]], model: Path) -> None:
    student, store, report, _ = timed
    (run,) = billhook.list_runs(store)
    assert (run.kind, run.state, run.model) == ("speed", "done", str(model))
    shown = billhook.show(run.run, store)
    assert shown.result == report
    assert SpeedSpec.read(dict(shown.spec)) == SpeedSpec(str(model), str(student), None, "cpu", "auto", QUICK)
    assert [event.stage for event in shown.events if event.stage == "speed"]


def test_two_checkpoints_are_predicted_as_their_plan_is(
    timed: tuple[Path, Path, SpeedReport, list[Event]], model: Path
) -> None:
    """By what is left of each: the anatomy of the student that was saved, and that of the teacher less the plan."""
    student, _, report, _ = timed
    teacher = billhook.load(model)
    by_plan = predicted_speed(teacher.anatomy, Plan.parse(["mlp.1", "attention.0"]))
    assert report.predicted == predicted_by_weights(teacher.anatomy, billhook.load(student).anatomy)
    assert report.predicted is not None
    assert (report.predicted.prefill, report.predicted.decode) == pytest.approx((by_plan.prefill, by_plan.decode))
    assert predicted_by_weights(teacher.anatomy, teacher.anatomy).decode == 1.0


def test_rules_are_about_the_predicted_speed_and_memory(
    timed: tuple[Path, Path, SpeedReport, list[Event]], model: Path
) -> None:
    student, store, report, events = timed
    told = [Alert.from_event(event) for event in events if event.stage == ALERT]
    assert {(alert.rule, alert.what) for alert in told} == {
        ("below prediction", "prefill"), ("below prediction", "decode"), ("large", str(model)), ("large", str(student)),
    }  # fmt: skip
    assert report.ratio is not None
    assert report.predicted is not None
    (decode,) = [alert.value for alert in told if alert.what == "decode"]
    ratio = report.ratio.decode
    assert (decode.value, decode.low, decode.n) == pytest.approx(
        (100 * ratio.value / report.predicted.decode, 100 * ratio.low / report.predicted.decode, 6)
    )
    assert set(billhook.alerts(store=store).told) == set(told)
    alone = SpeedReport(report.models[:1], report.protocol, report.environment)
    assert {each.kind for each in observations_of(alone, 1.0)} == {"memory"}


def test_the_dashboard_shows_a_speed_with_its_intervals(timed: tuple[Path, Path, SpeedReport, list[Event]]) -> None:
    _, store, report, _ = timed
    with closing(Store(store, read_only=True)) as opened:
        (run,) = opened.runs()
    page = TestClient(make_app(Listing(store)), base_url="http://127.0.0.1").get(f"/runs/{run.id}").text
    assert speed_headline(report) in page
    for row in speed_rows(report):
        assert all(cell in page for cell in row[1:])
    assert "median (95% interval of the median)" in page


def test_what_cannot_be_timed_leaves_no_run(model: Path, tmp_path: Path) -> None:
    store = tmp_path / "runs.db"
    calls: list[tuple[dict[str, Any], str]] = [
        ({"protocol": billhook.TimingProtocol(prompt_tokens=10**6)}, "more than the"),
        ({"webhook": "http://169.254.169.254/"}, "metadata address"),
        ({"engine": "llama.cpp", "device": "cpu"}, "chooses device and dtype"),
    ]
    for options, words in calls:
        with pytest.raises(UsageError, match=words):
            billhook.measure_speed(model, store=store, **options)
    assert not store.exists()


def test_the_command_files_what_it_shows_in_80_columns(model: Path, tmp_path: Path) -> None:
    store, runner = tmp_path / "runs.db", CliRunner(env={"COLUMNS": "80", "TERM": "dumb"})
    timing = ["--repeats", "2", "--prompt-tokens", "8", "--new-tokens", "2", "--store", str(store), "--quiet"]
    done = runner.invoke(main.app, ["speed", str(model), str(model), *timing])
    assert done.exit_code == 0, done.stderr
    assert "By their weights alone it would be: prefill ×1.00, decode ×1.00." in " ".join(done.stdout.split())
    assert "Few runs: the interval is the range of 2 runs" in " ".join(done.stdout.split())
    assert max(map(len, done.stdout.splitlines())) <= 80
    listed = runner.invoke(main.app, ["runs", "--store", str(store)])
    assert "speed" in listed.stdout
    (run,) = billhook.list_runs(store)
    done = runner.invoke(main.app, ["report", run.run, "--store", str(store), "--out", str(tmp_path / "page")])
    assert (done.exit_code, (tmp_path / "page" / "index.html").is_file()) == (0, True), done.stderr
