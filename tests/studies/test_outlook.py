"""Forecasts, costs and suggestions from planted stores, and their commands."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_runs import TEACHER, a_run, an_anatomy, file_run, near
from typer.testing import CliRunner

import billhook
from billhook.cli.main import app
from billhook.core.errors import BudgetError, ModelError, RunError, UsageError
from billhook.core.events import Event
from billhook.core.outlook.suggestions import SUGGESTIONS, Idea, Situation
from billhook.core.plan import Site
from billhook.core.results.exports import TargetFit
from billhook.core.results.measured import Environment, Estimate, TimingProtocol
from billhook.core.results.model import ModelRates, SpeedReport
from billhook.core.results.outlook import CostReport, ForecastReport, MachineReport
from billhook.core.results.run import Rates, RunResult, SpeedRatio, TaskChange
from billhook.core.results.specs import SpeedSpec
from billhook.core.results.suggestions import SuggestionReport
from billhook.runs.recipe import parse_recipe
from billhook.runs.store import Store
from billhook.studies.outlook.forecasting import forecast, measure_here
from billhook.studies.outlook.suggesting import prune_command, suggest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "s.db"


def typed(*words: Any) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "80", "TERM": "dumb"})
    return done.exit_code, done.stdout, done.stderr


# -- forecasts --------------------------------------------------------------------------------------------------------


def share(sites: int) -> float:
    return sites * 30_000 / 500_000


def test_a_planted_law_is_forecast_from_the_runs_of_its_recipe(store: Path) -> None:
    runs = [file_run(store, a_run(4 * share(n), n, recipe={"remove": f"{n}sites"})) for n in (1, 2, 3)]
    file_run(store, a_run(9.0, 3, recipe={"search": "greedy"}))
    told = forecast(runs[1], remove=["30%", 0.4], machine="rtx-4090", store=store)
    assert told.curve is not None
    assert [round(p.share, 3) for p in told.curve.measured] == [0.06, 0.12, 0.18]
    assert [p.run for p in told.curve.measured] == runs
    assert [p.perplexity for p in told.curve.measured] == pytest.approx(
        [TEACHER * math.exp(4 * share(n)) for n in (1, 2, 3)]
    )
    for each in told.curve.forecasts:
        assert each.value == pytest.approx(4 * each.share, rel=0.1)
        assert each.low <= 4 * each.share <= each.high
        assert each.n == 3
    assert [(each.label, each.even) for each in told.resources] == [
        ("unpruned", False), (runs[1], False), ("30% removed", True), ("40% removed", True)
    ]  # fmt: skip
    assert told.resources[1].resources.weight_bytes == told.resources[0].resources.weight_bytes - 2 * 120_000
    assert ForecastReport.from_json(json.loads(json.dumps(told.to_json()))) == told
    assert len(told.rows()) == 3 + 2 + 4


def test_a_model_without_a_size_has_resources_alone(store: Path) -> None:
    run = file_run(store, a_run(perplexity=None))
    told = forecast(run, machine="m4:16GB", store=store)
    assert told.curve is None
    assert told.search is None
    assert told.resources[0].resources.machine.memory_bytes == 16 * 10**9
    assert forecast("planted", store=store).model == "planted"
    with pytest.raises(BudgetError, match="Write 20%"):
        forecast(run, remove="12sites", store=store)
    with pytest.raises(RunError, match="There is no run 'rffffff'"):
        forecast("rffffff", store=store)
    with pytest.raises(RunError, match="There is no store that holds run rffffff"):
        forecast("rffffff", store=store.with_name("none.db"))
    with pytest.raises(UsageError, match=r"bits=64.* is not between 1 and 32"):
        forecast(run, bits=64, store=store)


def test_a_search_that_goes_on_is_forecast_by_those_that_ended(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]

    def searching(seconds: float, until: float = 1.0) -> str:
        run = file_run(store, a_run(), done=until == 1.0)
        with closing(Store(store, clock=lambda: clock[0])) as opened:
            opened.add_event(run, Event("search"), at_once=True)
            for i in range(1, int(20 * until) + 1):
                clock[0] += seconds / 20
                values = {"removed_params": 5 * (i - 1), "target_params": 100, "objective": "kl", "lowest": 0.1}
                opened.add_event(run, Event("search", 10 * i, 200, values), at_once=True)
                names = ",".join(str(Site(b, "mlp")) for b in range(i))
                opened.add_event(
                    run, Event("round", 10 * i, 200, {"removed": names, "narrowed": "", "loss": 0.02 * i}), at_once=True
                )
            if until == 1.0:
                opened.add_event(run, Event("search", 1, 1, {"seconds": seconds}), at_once=True)
        return run

    for seconds in (50.0, 55.0):
        searching(seconds)
    told = forecast(searching(300.0, 1 / 3), store=store).search
    assert told is not None
    assert told.seconds == pytest.approx(300.0, rel=0.2)
    assert told.loss == pytest.approx(0.4, rel=0.15), "the last of 20 rounds"
    assert told.traces == 2
    code, words, _ = typed("forecast", "--store", store)
    assert code == 0
    assert "The search takes" in words
    assert "It ends at a loss of about" in words


def test_this_machine_is_measured_once_and_kept(store: Path) -> None:
    run = file_run(store, a_run())
    told = measure_here(device="cpu", store=store)
    assert told.machine.name == "here"
    assert told.machine.memory_bytes > 10**9
    assert min(told.machine.bandwidth, told.machine.flops, told.machine.call_seconds) > 0
    assert MachineReport.from_json(json.loads(json.dumps(told.to_json()))) == told
    on_it = forecast(run, machine="here", store=store)
    assert on_it.resources[0].resources.machine == told.machine
    assert on_it.check is not None
    assert (on_it.check.run, on_it.check.measured.value, on_it.check.batch) == (run, 10.0, 1)
    again = forecast(run, machine="here", context=128 + 16, prompt_tokens=128, bits=32, store=store)
    assert on_it.check.predicted == pytest.approx(again.resources[0].resources.decode_tokens_per_s)
    assert "Checked: run" in typed("forecast", run, "--machine", "here", "--store", store)[1]
    assert forecast(run, machine="l4", store=store).check is None
    assert [run.kind for run in billhook.list_runs(store)] == ["machine", "prune"]


# -- costs ------------------------------------------------------------------------------------------------------------


def test_costs_come_from_what_the_run_measured(store: Path) -> None:
    run = file_run(store, a_run(0.1, speedup=1.25, seconds=3600.0))
    told = billhook.cost(run, price_per_hour=2.0, tokens_per_day=864_000, store=store)
    teacher, student = told.costs
    assert teacher.per_million.value == pytest.approx(1e6 / 10 / 3600 * 2)
    assert student.per_million.value == pytest.approx(teacher.per_million.value / 1.25)
    assert student.saved is not None
    assert student.payback_hours is not None
    assert (student.saved.value, student.payback_hours.value) == pytest.approx((0.2, 5.0))
    assert student.saved.low is not None
    assert student.saved.low < 0.2
    assert (teacher.machines, told.making_seconds) == (1, 3600.0)
    assert run in student.rate.source
    assert CostReport.from_json(json.loads(json.dumps(told.to_json()))) == told
    other = file_run(store, a_run(0.3, speedup=2.0))
    rival = billhook.cost(run, price_per_hour=2.0, against=other, store=store).costs[2]
    assert rival.per_million.value == pytest.approx(teacher.per_million.value / 2)
    assert rival.ratio is not None
    assert rival.ratio.value == pytest.approx(math.exp(0.3))


def test_a_quantised_file_is_as_fast_as_it_is_small(store: Path, tmp_path: Path) -> None:
    run = file_run(store, a_run())
    (tmp_path / "q.gguf").write_bytes(b"0" * (an_anatomy().total("bytes") // 4))
    told = billhook.cost(run, price_per_hour=1.0, against=str(tmp_path / "q.gguf"), store=store)
    assert told.costs[2].rate.value == pytest.approx(4 * told.costs[0].rate.value, rel=1e-3)
    assert told.costs[2].ratio is None
    by_machine = billhook.cost(run, price_per_kwh=0.3, machine="l4", against=str(tmp_path / "q.gguf"), store=store)
    assert by_machine.prices.per_hour == pytest.approx(0.072 * 0.3)
    assert by_machine.costs[1].saved is not None
    assert by_machine.costs[1].saved.low is None, "a roofline has no interval"


def with_joules(result: RunResult, teacher: float, student: float) -> RunResult:
    """A planted pruning whose energy was measured, per decoded token."""
    assert result.speed is not None
    both = [replace(getattr(result.speed, who), decode_joules=estimate(x)) for who, x in
            (("teacher", teacher), ("student", student))]  # fmt: skip
    ratio = replace(result.speed.ratio, decode_joules=estimate(student / teacher))
    return replace(result, speed=replace(result.speed, teacher=both[0], student=both[1], ratio=ratio))


def estimate(value: float) -> Estimate:
    return Estimate(value, 0.9 * value, 1.1 * value, 9, 9, True)


def test_a_price_of_a_kwh_is_that_of_the_energy_that_was_measured(store: Path) -> None:
    """The student is faster by a quarter, and takes three quarters of the energy: it is the energy that is paid."""
    run = file_run(store, with_joules(a_run(0.1, speedup=1.25, seconds=3600.0), 2.0, 1.5))
    told = billhook.cost(run, price_per_kwh=0.36, store=store)
    teacher, student = told.costs
    assert teacher.per_million.value == pytest.approx(2.0e6 / 3.6e6 * 0.36)
    assert student.per_million.value == pytest.approx(1.5e6 / 3.6e6 * 0.36)
    assert student.saved is not None
    assert student.payback_hours is not None
    assert (student.saved.value, student.saved.low, student.saved.high) == pytest.approx((0.25, 0.175, 0.325))
    assert student.payback_hours.value == pytest.approx(1 / 0.25)
    assert told.prices.per_hour == pytest.approx(2.0 * 10 / 1000 * 0.36), "2 J a token at 10 tokens a second are 20 W"
    assert "20 W of the teacher, measured" in told.prices.basis
    by_hour = billhook.cost(run, price_per_hour=1.0, store=store).costs[1]
    assert by_hour.saved is not None
    assert by_hour.saved.value == pytest.approx(0.2), "an hour is paid by the clock"
    said = billhook.cost(run, price_per_kwh=0.36, watts=100.0, store=store)
    assert said.prices.per_hour == pytest.approx(0.036), "what is said is taken"
    other = file_run(store, with_joules(a_run(0.3, speedup=2.0), 2.0, 0.5))
    rival = billhook.cost(run, price_per_kwh=0.36, against=other, store=store).costs[2]
    assert rival.per_million.value == pytest.approx(0.5e6 / 3.6e6 * 0.36)


def file_speed(store: Path, *models: str, engine: str | None) -> str:
    """File a planted measurement of speed, of which the second model is three times as fast; returns its id."""
    rows = tuple(ModelRates(name, Rates(estimate(300.0), estimate(10.0 * 3**i), None)) for i, name in enumerate(models))
    ratio = SpeedRatio(estimate(2.0), estimate(3.0)) if len(models) > 1 else None
    where = Environment("0", "3", "2", "5", "cpu", "here", 2)
    report = SpeedReport(rows, TimingProtocol(), where, ratio, "llama.cpp 1" if engine else "")
    spec = SpeedSpec(models[0], models[1] if len(models) > 1 else None, engine, "auto", "auto", TimingProtocol())
    with closing(Store(store)) as opened:
        run = opened.new_run("speed", spec.to_json(), {}, "-")
        opened.update(run, result=report.to_json(), state="done")
    return run


def test_a_quantised_file_in_its_runtime_has_the_speed_that_was_measured(store: Path, tmp_path: Path) -> None:
    run, file = file_run(store, a_run()), str(tmp_path / "q.gguf")
    Path(file).write_bytes(b"0" * (an_anatomy().total("bytes") // 4))
    name = f"llama.cpp:{file}"
    by_size = billhook.cost(run, price_per_hour=1.0, against=name, store=store).costs[2]
    assert by_size.label == name
    assert by_size.rate.value == pytest.approx(40.0, rel=1e-3), "four times as small"
    timed = file_speed(store, "whole.gguf", file, engine="llama.cpp")
    for against in (name, file, timed):
        rival = billhook.cost(run, price_per_hour=1.0, against=against, store=store).costs[2]
        assert rival.saved is not None
        assert (rival.rate.value, rival.saved.value) == pytest.approx((30.0, 1 - 1 / 3))
        assert rival.saved.low == pytest.approx(1 - 1 / 2.7)
        assert timed in rival.rate.source
    machine = billhook.cost(run, price_per_hour=1.0, machine="l4", against=name, store=store).costs[2]
    assert "bandwidth of l4" in machine.rate.source
    alone = file_speed(store, file, engine="llama.cpp")
    with pytest.raises(RunError, match="timed one model alone"):
        billhook.cost(run, price_per_hour=1.0, against=alone, store=store)
    with pytest.raises(ModelError, match=r"There is no model llama\.cpp:none\.gguf"):
        billhook.cost(run, price_per_hour=1.0, against="llama.cpp:none.gguf", store=store)
    code, out, _ = typed("cost", run, "--price-per-hour", "1", "--against", name, "--store", store)
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, "Say what the machine costs, once"), ({"price_per_hour": 1.0, "price_per_kwh": 1.0}, "once"),
        ({"price_per_kwh": 0.3}, "The power of this machine is not known"),
        ({"price_per_hour": 1.0, "watts": 9.0}, "has no effect"), ({"price_per_hour": -1.0}, "is not above 0"),
    ],
)  # fmt: skip
def test_prices_that_say_too_little_or_too_much_are_refused(asked: dict[str, Any], words: str, store: Path) -> None:
    run = file_run(store, a_run())
    with pytest.raises(UsageError, match=words):
        billhook.cost(run, store=store, **asked)
    silent = file_run(store, a_run(speed=None))
    with pytest.raises(RunError, match=r"did not measure speed\. Name a machine instead"):
        billhook.cost(silent, price_per_hour=1.0, store=store)


# -- suggestions ------------------------------------------------------------------------------------------------------


def named(report: SuggestionReport) -> dict[str, Any]:
    return {each.name: each for each in report.suggestions}


def test_a_gain_comes_from_this_store_before_the_docs(store: Path) -> None:
    run = file_run(store, a_run(1.0))
    shipped = named(suggest(run, store=store))["fold_after_pruning"]
    assert shipped.gain.source == "docs/results.md, depth against width"
    for closed in (0.2, 0.4, 0.3):
        file_run(store, a_run(0.5, recovered=closed, recipe={"recover": "fold", "search": "greedy"}))
    own = named(suggest(run, store=store))["fold_after_pruning"]
    assert (own.gain.value, own.gain.low, own.gain.high, own.gain.n) == pytest.approx((0.3, 0.2, 0.4, 3))
    assert own.gain.source == "this store"
    assert own.seconds == pytest.approx(1 + 9 + 30), "no search, and the recovery of the others"
    assert own.found is None


def test_what_a_suggestion_brought_stands_beside_what_was_expected(store: Path) -> None:
    run = file_run(store, a_run(1.0))
    later = file_run(store, a_run(0.6, recovered=0.4, recipe={"recover": "fold?"}))
    told = named(suggest(run, store=store))["fold_after_pruning"]
    assert told.found.run == later
    assert told.gain.source.startswith("docs/"), "what was expected before the run itself was evidence"
    assert told.found.value == pytest.approx(0.4)
    assert told.found.low < 0.4 < told.found.high
    assert told.found.seconds == pytest.approx(110.0)
    assert "fold_after_pruning" not in named(suggest(later, store=store))
    assert SuggestionReport.from_json(json.loads(json.dumps(suggest(run, store=store).to_json())))


def test_each_fact_of_a_run_leads_to_its_suggestion(store: Path) -> None:
    steps = (0.01, 0.02, 0.03, 0.5)
    task = TaskChange("piqa.jsonl", 0.7, 0.6, replace(near(-0.1), low=-0.15, high=-0.05))
    targets = (TargetFit("llama.cpp", "gguf", "sites", True), TargetFit("mlx", "mlx", "model", True))
    run = file_run(store, a_run(1.0, 4, steps=steps, tasks=(task,), targets=targets))
    told = named(suggest(run, store=store))
    assert told["stop_at_the_knee"].gain.value == pytest.approx(1 - 0.03 / 0.5)
    assert "--remove 18%params" in " ".join(told["stop_at_the_knee"].command)
    assert "--data pydoc+piqa.jsonl" in " ".join(told["share_for_a_task"].command)
    assert "--target llama.cpp" in " ".join(told["serve_it"].command)
    assert {"narrow_as_well", "more_calibration", "text_of_its_own"} <= set(told)
    gains = [each.gain.value for each in told.values() if each.gain is not None]
    assert gains == sorted(gains, reverse=True)
    assert [each.gain is None for each in told.values()] == sorted(each.gain is None for each in told.values())
    losing = file_run(store, a_run(1.0, 3, recovered=-0.2, recipe={"recover": "fold", "seed": 9}))
    assert losing
    ranked = [each.name for each in suggest(run, store=store).suggestions]
    assert ranked[-1] == "fold_after_pruning", "what lost elsewhere comes last"
    straight = file_run(store, a_run(1.0, 4, steps=(0.1, 0.2, 0.3, 0.4), recipe={"self_share": 0.5}))
    assert not {"stop_at_the_knee", "share_for_a_task", "serve_it", "text_of_its_own"} & set(
        named(suggest(straight, store=store))
    )


def test_joint_is_suggested_with_the_settings_that_were_evidence(store: Path) -> None:
    run = file_run(store, a_run(1.0, recipe={"search": "greedy"}))
    assert "levels" not in " ".join(named(suggest(run, store=store))["narrow_as_well"].command)
    joint = {"search": "joint", "metric": "taylor_mix", "fast": True}
    cheap = {**joint, "set": {"levels": "3", "rounds": "1"}}
    best = file_run(store, a_run(0.5, recipe=cheap))
    file_run(store, a_run(0.7, recipe=joint))
    file_run(store, a_run(0.1, recipe={**cheap, "seed": 9}))  # which differs in more
    told = named(suggest(run, store=store))["narrow_as_well"]
    assert {"--fast", "levels=3", "rounds=1"} <= set(told.command)
    assert told.found.run == best
    assert told.gain.source.startswith("docs/"), "what was expected before the run itself was evidence"
    other = file_run(store, a_run(2.0, recipe={"search": "greedy", "seed": 3}))
    told = named(suggest(other, store=store))["narrow_as_well"]
    assert "levels" not in " ".join(told.command)


def test_more_tokens_are_judged_by_pairs_of_runs_that_differ_in_them_alone(store: Path) -> None:
    run = file_run(store, a_run(1.0, recipe={"tokens": 1024}))
    for seed, (few, many) in enumerate(((1.0, 0.9), (2.0, 1.6))):
        for tokens, nats in ((1024, few), (4096, many)):
            file_run(store, a_run(nats, recipe={"tokens": tokens, "seed": seed + 1}))
    gain = named(suggest(run, store=store))["more_calibration"].gain
    assert (gain.value, gain.low, gain.high, gain.n) == pytest.approx((0.15, 0.1, 0.2, 2))


@pytest.mark.parametrize(
    "recipe",
    [{}, {"search": "joint", "metric": "taylor_mix", "recover": "fold?"}, {"fast": True, "tokens": 77},
     {"search": "joint", "metric": "taylor_mix", "set": {"levels": "3", "rounds": "1"}, "self_share": 0.5},
     {"search": "oneshot", "metric": "cosine", "length": 99, "protect": "0-3"}],
)  # fmt: skip
def test_a_command_asks_for_exactly_the_recipe(recipe: dict[str, Any]) -> None:
    from billhook.runs.recipe import with_overrides
    from billhook.runs.recipes.effort import recipe_of

    wanted = parse_recipe({"remove": "20%params", "model": "m", **recipe})
    words = list(prune_command(wanted))
    assert words[:3] == ["billhook", "prune", "m"]
    given: dict[str, Any] = {}
    rest = iter(words[3:])
    for word in rest:
        name = word.removeprefix("--").replace("-", "_")
        field = parse_recipe({"remove": "1sites"}).model_dump().get(name)
        if isinstance(field, bool):
            given[name] = True
        elif name in ("set", "recover_set"):
            given.setdefault(name, []).append(next(rest))
        else:
            text = next(rest)
            given[name] = type(field)(text) if isinstance(field, int | float) else text
    name, overruled = recipe_of(given, given.pop("recipe", None))
    assert parse_recipe(with_overrides(name, **overruled, **{"model": "m", **given})).model_copy(
        update={"about": ""}
    ) == wanted.model_copy(update={"about": ""})


def test_a_suggestion_of_ones_own_is_one_function(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = file_run(store, a_run(1.0))

    def look_again(situation: Situation) -> Idea | None:
        """Look at the run again."""
        return Idea(command=("billhook", "show", situation.run.id), facts={"sites": 4})

    monkeypatch.setitem(SUGGESTIONS._entries, "look_again", look_again)
    own = named(suggest(run, store=store))["look_again"]
    assert (own.what, own.command) == ("Look at the run again.", ("billhook", "show", run))
    code, words, _ = typed("suggest", run, "--store", store)
    assert code == 0
    assert "Seen: sites 4." in words
    monkeypatch.setitem(SUGGESTIONS._entries, "look_again", lambda situation: Idea())
    with pytest.raises(UsageError, match="look_again must return an Idea with changes or a command"):
        suggest(run, store=store)


# -- commands ---------------------------------------------------------------------------------------------------------


def test_tables_fit_eighty_columns_and_json_is_the_result(store: Path) -> None:
    run = file_run(store, a_run(0.4, steps=(0.01, 0.02, 0.03, 0.5)))
    file_run(store, a_run(0.1, 2))
    for words in (
        ("forecast", run, "--remove", "30%", "--bits", "4.5"),
        ("cost", run, "--price-per-hour", "0.8", "--tokens-per-day", "1e6"), ("suggest", run),
    ):  # fmt: skip
        code, shown, trouble = typed(*words, "--store", store)
        assert code == 0, trouble
        lines = [line for line in shown.splitlines() if not line.startswith("billhook ")]
        assert max(map(len, lines)) <= 80, max(lines, key=len)
        code, shown, _ = typed(*words, "--store", store, "--json")
        assert code == 0
        assert json.loads(shown)["kind"] == words[0]
    code, _, trouble = typed("suggest", "--store", store.with_name("no.db"))
    assert code == 2
    assert "There is no store yet" in trouble


def test_the_functions_read_a_store_without_torch(store: Path) -> None:
    file_run(store, a_run(0.4))
    code = (
        "import sys, billhook\n"
        f"s = {str(store)!r}\n"
        "billhook.forecast(store=s); billhook.cost(price_per_hour=1.0, store=s); billhook.suggest(store=s)\n"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
