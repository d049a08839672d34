"""What the pages say is what the store holds: figures, paths, commands, fronts, forecasts."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import random
import re
import shlex
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import made_studies
import pytest
import typer
from browser import Elements
from dashboards import clones, edited
from starlette.testclient import TestClient

import billhook
from billhook.cli import main
from billhook.core.errors import UsageError
from billhook.core.events import Event
from billhook.core.outlook.machines import machine
from billhook.core.outlook.roofline import Workload, resources
from billhook.core.plan import Plan
from billhook.core.results.run import RunResult
from billhook.core.results.stored import Run
from billhook.core.statistics import exp_capped, paired_difference
from billhook.dashboard.commands import point_command, prune_command
from billhook.dashboard.entries import Entry, entries_of, front, paired
from billhook.dashboard.listing import Listing, opened, stamp
from billhook.dashboard.measured import Measured, enriched, next_removal, stops_of
from billhook.dashboard.outlooks import UNITS, amounts, end_of_search, known_of, needs_at, predicted, share_at
from billhook.dashboard.parts.studies import TOLD
from billhook.dashboard.server import make_app
from billhook.report.numbers import format_duration, format_ratio
from billhook.report.run_words import summary_rows
from billhook.runs import tag
from billhook.runs.recipe import parse_recipe, with_overrides
from billhook.runs.store import Store


def runs_of(path: Path) -> dict[str, Run]:
    """Runs by the name of their folder."""
    with closing(Store(path, read_only=True)) as store:
        return {Path(run.out).name: run for run in store.runs()}


def result_of(run: Run) -> RunResult:
    assert run.result is not None
    return RunResult.from_json(run.result)


@pytest.fixture
def four(pruned_store: Path) -> Iterator[Measured]:
    """The real run, with its store."""
    with opened(pruned_store) as db:
        yield Measured(db, result_of(runs_of(pruned_store)["four"]))


# -- the list ---------------------------------------------------------------------------------------------------------


def test_the_list_shows_what_results_say(pruned_store: Path) -> None:
    whole = runs_of(pruned_store)
    listed = Listing(pruned_store).runs()
    assert [run.id for run in listed] == [run.id for run in sorted(whole.values(), key=lambda run: -run.created)]
    for run in listed:
        result, figures = result_of(whole[Path(run.out).name]), run.figures
        assert figures is not None
        assert (figures.sizes, figures.perplexity, figures.speed) == (result.sizes, result.perplexity, result.speed)
        assert figures.seconds == pytest.approx(math.fsum(result.seconds.values()))
        assert (run.model, run.remove) == (result.recipe["model"], result.recipe["remove"])
        assert (figures.fingerprint, figures.held_out) == (result.model.fingerprint, result.data.evaluation.hash)


def test_the_speed_of_list_and_comparison_is_that_of_the_report(pruned_store: Path) -> None:
    run = runs_of(pruned_store)["four"]
    told = next(row.change for row in summary_rows(result_of(run)) if row.label == "Decode tokens/s")
    with opened(pruned_store) as db:
        (entry,) = entries_of(db, [run.id])
    assert entry.decode is not None
    assert told.startswith(format_ratio(entry.decode.value))
    client = TestClient(make_app(Listing(pruned_store)), base_url="http://127.0.0.1")
    row = Elements(client.get("/").text).text
    assert format_ratio(entry.decode.value) in row


def test_tags_are_set_found_and_taken_away(store: Path) -> None:
    run = runs_of(store)["two"].id
    before = stamp(Listing(store).runs())
    assert tag(run, ["good", "small"], store=store) == ["good", "small"]
    assert tag(run, ["good"], store=store) == ["good", "small"]
    assert {each.id: each.tags for each in Listing(store).runs()}[run] == ("good", "small")
    assert stamp(Listing(store).runs()) != before
    assert tag(run, ["small"], remove=True, store=store) == ["good"]
    for wrong in ("two words", "", "a,b", "x" * 41, "\x1b[31m"):
        with pytest.raises(UsageError, match="is not a tag"):
            tag(run, [wrong], store=store)
    with pytest.raises(UsageError, match=r"has no tag 'small'\. It has good"):
        tag(run, ["small"], remove=True, store=store)
    with pytest.raises(UsageError, match="There is no run"):
        tag("r000000", ["good"], store=store)


def test_a_thousand_runs_load_in_half_a_second(store: Path) -> None:
    clones(store, runs_of(store)["four"].id, 997)
    client = TestClient(make_app(Listing(store)), base_url="http://127.0.0.1")
    times = []
    for _ in range(3):
        began = time.process_time()  # other tests run beside this one
        answer = client.get("/")
        times.append(time.process_time() - began)
    rest = client.get("/rows?after=100").text
    rows = re.findall(r'<tr id="row-(\w+)"', answer.text + rest)
    assert rows == [run.id for run in Listing(store).runs()]
    assert len(rows) == 1000
    assert min(times) < 0.5, times


def write_events(path: Path, run: str, many: int) -> None:
    with closing(Store(path)) as store:
        for number in range(many):
            store.add_event(run, Event("search", number, many, {"lowest": 1.0 / (number + 1)}), at_once=True)


def test_three_processes_may_write_meanwhile(store: Path) -> None:
    with closing(Store(store)) as opened_store:
        old = next(iter(runs_of(store).values()))
        new = [opened_store.new_run("prune", old.spec, old.environment, "out") for _ in range(3)]
    client = TestClient(make_app(Listing(store)), base_url="http://127.0.0.1")
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_events, args=(store, run, 150)) for run in new]
    for writer in writers:
        writer.start()
    looks = 0
    while any(writer.is_alive() for writer in writers):
        for path in ("/", f"/runs/{new[looks % 3]}"):
            assert client.get(path).status_code == 200
        looks += 1
    assert looks, "pages were asked for while they wrote"
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    shown = client.get(f"/runs/{new[0]}").text
    assert "Interrupted while searching" in shown


# -- one run ----------------------------------------------------------------------------------------------------------


def test_the_path_is_that_of_the_search(four: Measured) -> None:
    result, stops = four.result, stops_of(four)
    assert [len(stop.plan.removed) for stop in stops] == [0, 1, 2, 3, 4]
    assert stops[-1].plan == result.plan
    for stop, step in zip(stops[1:], result.steps, strict=True):
        assert stop.loss == step.loss
        assert stop.interval is not None
        assert stop.interval.value == pytest.approx(step.loss, rel=1e-9), "the stored losses are those of the steps"
        assert stop.interval.low < step.loss < stop.interval.high
        assert stop.sizes == result.anatomy.sizes(stop.plan)
    assert result.perplexity is not None
    (held_out,) = stops[-1].held_out
    assert held_out.ratio == result.perplexity.ratio, "from the stored evaluations, in pairs"
    assert not any(stop.held_out for stop in stops[:-1])


def test_sites_have_the_losses_of_the_first_round(four: Measured, pruned_store: Path) -> None:
    with opened(pruned_store) as db:
        whole = enriched(db, four)
    assert len(whole.alone) > 1, "those that the search measured in full"
    for each in whole.alone:
        loss = four.loss(Plan(frozenset({each.site})))
        assert loss is not None
        assert each.loss == loss.mean
    best = min(whole.alone, key=lambda each: each.loss)
    assert best.site in four.result.steps[0].sites
    assert best.loss == pytest.approx(four.result.steps[0].loss)


def test_the_next_removal_is_the_cheapest_that_was_measured(four: Measured) -> None:
    stops = stops_of(four)
    found = next_removal(four, stops)
    assert found is not None
    assert found.site not in four.result.plan.removed
    before = four.loss(stops[found.after].plan)
    assert before is not None
    prices = {}
    for size in four.result.anatomy.sites:
        loss = four.loss(stops[found.after].plan.without(size.site))
        if size.site not in four.result.plan.removed and loss is not None:
            prices[size.site] = (loss.mean - before.mean) / size.parameters
    assert len(prices) > 1
    assert min(prices, key=lambda site: prices[site]) == found.site
    assert found.change.value == pytest.approx(prices[found.site] * found.parameters)


def typed(command: str) -> dict[str, Any]:
    """The recipe that the command line makes of a command."""
    words = shlex.split(command)
    assert words[:2] == ["billhook", "prune"]
    group: Any = typer.main.get_command(main.app)
    prune = group.commands["prune"]
    values = prune.make_context("prune", words[2:]).params
    given = {name: value for name, value in values.items() if value not in (None, [], ()) and name in FIELDS}
    return parse_recipe(with_overrides(values["recipe"], **given)).model_dump()


FIELDS = set(parse_recipe({"remove": "1sites"}).model_dump())


@pytest.mark.parametrize(
    "asked",
    [
        {"remove": "4sites", "search": "greedy", "tokens": 256},
        {"remove": "10%"},
        {"remove": "30%kv,2mlp", "search": "swap", "fast": True, "shortlist": 8, "set": {"front": "0.4", "a": "b c"}},
        {"within": "3%ppl", "data": "my text.jsonl", "recover": "fold", "recover_tokens": 2048},
        {"recipe": "billhook", "remove": "20%", "self_share": 0.25, "memory": "4GB"},
        {"recipe": "shortgpt", "remove": "5blocks", "dtype": "bfloat16", "protect": "0-3"},
        {"plan": "attention.1,mlp.2", "stock": True, "seed": 3},
    ],
)
def test_the_command_makes_the_same_recipe(asked: dict[str, Any]) -> None:
    recipe = asked.pop("recipe", None)
    spec = parse_recipe(with_overrides(recipe, model="a model", **asked)).model_dump()
    command = prune_command(json.loads(json.dumps(spec)), Path("my store.db"))
    told = typed(command)
    assert {**told, "about": ""} == {**spec, "about": ""}
    assert shlex.split(command)[-2:] == ["--store", "my store.db"]


def test_the_command_of_a_point_makes_its_plan(four: Measured) -> None:
    for stop in stops_of(four)[1:]:
        command = point_command(four.result.recipe, Path("runs.db"), stop.plan, stop.shares["parameters"])
        told = typed(command)
        assert Plan.parse(told["plan"].split(",")) == stop.plan
        assert told["remove"] is None
        same = ("data", "tokens", "length", "eval_tokens", "eval_length", "recover", "seed", "model")
        assert {name: told[name] for name in same} == {name: four.result.recipe[name] for name in same}


def test_a_page_says_verdict_first_and_names_no_gate(pruned_store: Path) -> None:
    client = TestClient(make_app(Listing(pruned_store)), base_url="http://127.0.0.1")
    run = runs_of(pruned_store)["four"]
    text = Elements(client.get(f"/runs/{run.id}").text).text
    heads = ["No gate was run", "Quality against size", "The next removal", "What it costs and saves", "What it cost"]
    places = [text.index(head) for head in heads]
    assert places == sorted(places)
    quality = result_of(run).perplexity
    assert quality is not None
    assert f"n = {quality.ratio.n}" in text


def test_a_run_of_an_unfinished_store_says_how_to_go_on(store: Path) -> None:
    with closing(Store(store)) as opened_store:
        run = opened_store.new_run("prune", {"model": "m", "remove": "2sites", "search": "greedy"}, {}, "out")
    client = TestClient(make_app(Listing(store)), base_url="http://127.0.0.1")
    assert "It has not begun to measure" in client.get(f"/runs/{run}").text
    with closing(Store(store)) as opened_store:
        opened_store.add_event(run, Event("search", 3, 9, {}), at_once=True)
    text = Elements(client.get(f"/runs/{run}").text).text
    assert f"billhook prune --resume --run {run} --store {store}" in text
    assert "billhook prune m --remove 2sites --search greedy --store" in text


def searched(store: Store, old: Run, seconds: int) -> str:
    """A run like an old one, whose search has lasted so many of its 20 seconds."""
    run = store.new_run(old.kind, old.spec, old.environment, old.out)
    store.update(run, fingerprints=old.fingerprints)
    for event in (Event("load", 0), Event("search", 0)):
        store.add_event(run, event, at_once=True)
    for number in range(1, seconds + 1):
        values = {"removed_sites": number // 5, "target_sites": 4, "lowest": 0.01 * number, "objective": "kl"}
        store.add_event(run, Event("search", 5 * number, 100, values), at_once=True)
        names = ",".join(old.result["plan"]["removed"][: number // 5 + 1]) if old.result else ""
        store.add_event(run, Event("round", 5 * number, 100, {"removed": names, "narrowed": "", "loss": 0.01 * number}))
    if seconds == 20:
        store.add_event(run, Event("search", 1, 1, {"seconds": 20.0}), at_once=True)
        store.update(run, state="done", result=old.result)
    return run


def test_the_end_of_a_search_is_forecast_from_earlier_ones(store: Path) -> None:
    earlier, clock = runs_of(store)["four"], itertools.count(10**9, 0.5)
    with closing(sqlite3.connect(store)) as db, db:
        db.execute("DELETE FROM events")  # how the real run went depends on the machine
    with closing(Store(store, clock=lambda: float(next(clock)))) as opened_store:
        searched(opened_store, earlier, 20)
        live = searched(opened_store, earlier, 10)
        client = TestClient(make_app(Listing(store)), base_url="http://127.0.0.1")
        assert "The search takes" not in client.get(f"/runs/{live}").text, "no process holds it"
        with opened_store.lock(live):
            told = Elements(client.get(f"/runs/{live}").text).text
    found = end_of_search(store, live, 0)
    assert found is not None
    assert found.seconds == pytest.approx(2 * found.elapsed, rel=0.2), "half of it is done"
    assert f"The search takes {format_duration(found.seconds)}" in told
    assert "last event" in told


# -- comparing --------------------------------------------------------------------------------------------------------


def test_pairs_and_figures_are_those_of_the_store(pruned_store: Path) -> None:
    whole = runs_of(pruned_store)
    names = ["four", "two", "narrow"]
    with opened(pruned_store) as db:
        entries = entries_of(db, [whole[name].id for name in names])
        measured = Measured(db, result_of(whole["four"]))
        tokens = measured.result.data.evaluation.hash
        teacher = next(iter(measured.evaluations(Plan(), tokens).values()))
    assert [entry.run for entry in entries] == [whole[name].id for name in names]
    first = entries[0]
    assert first.quality == result_of(whole["four"]).perplexity.ratio  # type: ignore[union-attr]
    assert first.evaluation is not None
    as_teacher = replace(first, evaluation=teacher)
    assert paired(as_teacher, first) == paired_difference(teacher, first.evaluation).mapped(exp_capped) == first.quality
    assert paired(first, entries[1]) is None, "it was made up, so that the store has no evaluation of it"
    assert first.left("parameters") == pytest.approx(
        result_of(whole["four"]).sizes.student.parameters / result_of(whole["four"]).sizes.teacher.parameters
    )


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_what_nothing_dominates(seed: int) -> None:
    rng = random.Random(seed)
    points = [(float(rng.randint(0, 6)), float(rng.randint(0, 6))) for _ in range(rng.randint(1, 12))]

    def worse(a: tuple[float, float], b: tuple[float, float]) -> bool:
        """Whether b is as good in both ways, and better in one."""
        return b[0] <= a[0] and b[1] <= a[1] and b != a

    assert front(points) == [i for i, a in enumerate(points) if not any(worse(a, b) for b in points)]


def test_names_are_told_apart(store: Path) -> None:
    run = runs_of(store)["two"].id
    with opened(store) as db:
        entries: list[Entry] = entries_of(db, [run, run, "r000000"])
    assert [entry.run for entry in entries] == [run]
    client = TestClient(make_app(Listing(store)), base_url="http://127.0.0.1")
    text = client.get(f"/compare?run={run}&run=r000000").text
    assert "Without a result to compare: r000000" in text
    assert "Nothing to compare in r000000" in client.get("/compare?run=r000000").text


# -- exploring --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [unit for unit in UNITS if unit != "ns_per_token"])
def test_a_budget_in_any_unit_is_found_on_the_path(four: Measured, unit: str) -> None:
    stops = stops_of(four)
    shares = [stop.shares["parameters"] for stop in stops]
    at = amounts(stops, unit)
    for a, b, x, y in zip(at, at[1:], shares, shares[1:], strict=False):
        if b > a:
            assert share_at(stops, unit, b) == pytest.approx(y)
            assert share_at(stops, unit, (a + b) / 2) == pytest.approx((x + y) / 2)
    assert share_at(stops, unit, 2 * at[-1]) == pytest.approx(2 * shares[-1])
    assert share_at(stops[:1], unit, 1.0) is None


def test_needs_at_a_stop_are_those_of_its_plan(four: Measured) -> None:
    stops, place, use = stops_of(four), machine("rtx-4090"), Workload(1024, 4)
    for stop in stops[1:]:
        exact = resources(four.result.anatomy, place, use, stop.plan)
        _, found = needs_at(four.result, stops, stop.shares["parameters"], place, use)
        assert found.weight_bytes == pytest.approx(exact.weight_bytes)
        assert found.kv_cache_bytes == pytest.approx(exact.kv_cache_bytes)
        assert found.decode_seconds == pytest.approx(exact.decode_seconds)
        assert (found.largest_batch, found.fits) == (exact.largest_batch, exact.fits)


def test_a_forecast_at_a_measured_size_is_the_measurement(pruned_store: Path) -> None:
    whole = runs_of(pruned_store)
    known = known_of(pruned_store, whole["four"].id, 0)
    assert known is not None
    assert {size.run for size in known.curve.sizes} == {whole["four"].id, whole["two"].id}, "of one recipe"
    for size in known.curve.sizes:
        found = predicted(known, size.point.share)
        assert found is not None
        assert found.low <= size.point.nats <= found.high
    assert predicted(known, 0.0) is None
    assert predicted(known, 1.0) is None


def test_a_better_way_is_named_if_there_is_one(store: Path) -> None:
    whole = runs_of(store)
    client = TestClient(make_app(Listing(store)), base_url="http://127.0.0.1")
    narrow, four_ = whole["narrow"].id, whole["four"].id
    share = (
        1 - result_of(whole["narrow"]).sizes.student.parameters / result_of(whole["narrow"]).sizes.teacher.parameters
    )
    address = f"/explore?run={four_}&unit=parameters&amount={100 * share:.3f}"
    assert f"run={narrow}" in client.get(address).text
    assert "No run of this teacher" in client.get(f"/explore?run={narrow}&unit=parameters&amount=60").text

    def worse(recipe: dict[str, Any], result: dict[str, Any]) -> None:
        result["perplexity"]["ratio"] |= {"value": 9.0, "low": 8.0, "high": 10.0}

    edited(store, narrow, worse)
    client = TestClient(make_app(Listing(store)), base_url="http://127.0.0.1")
    assert f"run={narrow}" not in client.get(address).text.partition('id="better"')[2]


@pytest.mark.parametrize(
    "query", ["amount=nan", "amount=-1", "amount=x&unit=y", "context=0&batch=9e99", "machine=no", "run=no"]
)
def test_a_query_that_cannot_be_read_is_left_out(pruned_store: Path, query: str) -> None:
    client = TestClient(make_app(Listing(pruned_store)), base_url="http://127.0.0.1")
    assert client.get(f"/explore?{query}").status_code == 200


def test_a_run_that_was_done_again_is_still_forecast(store: Path) -> None:
    client = TestClient(make_app(Listing(store)), base_url="http://127.0.0.1")
    run = next(each.id for each in Listing(store).runs() if each.out.endswith("four"))
    before = known_of(store, run, 0)
    clones(store, run, 1)  # of the same recipe, text and size, and newer
    again = known_of(store, run, 1)
    assert before is not None
    assert again is not None
    assert again.curve.points == before.curve.points
    assert client.get(f"/explore?run={run}").status_code == 200
    assert billhook.forecast(run, store=store).curve is not None


# -- studies ----------------------------------------------------------------------------------------------------------

STUDIES = {
    "sweep": made_studies.a_sweep(recipes=("a", "b"), texts=("/data/wiki.jsonl",), tasks=()),
    "transfer": made_studies.a_transfer(), "stability": made_studies.a_stability(),
    "threshold": made_studies.a_threshold(),
}  # fmt: skip


@pytest.mark.parametrize("kind", STUDIES)
def test_studies_have_the_sections_of_their_reports(store: Path, kind: str) -> None:
    result = STUDIES[kind]
    with closing(Store(store)) as opened_store:
        run = opened_store.new_run(kind, {"model": "m"}, {}, "out")
        opened_store.update(run, state="done", result=result.to_json())
    client = TestClient(make_app(Listing(store)), base_url="http://127.0.0.1")
    page, told = client.get(f"/runs/{run}"), TOLD[type(result)]
    assert page.status_code == 200
    words = Elements(page.text).text
    assert told.title(result) in words
    assert told.verdict(result)[:60] in words
    for section in told.sections(result):
        assert not section.title or section.title in words


def test_the_trials_of_a_sweep_are_compared(store: Path) -> None:
    result = made_studies.a_sweep(3, ("sleb", "uidl"))
    with closing(Store(store)) as opened_store:
        run = opened_store.new_run("sweep", {"model": "m"}, {}, "out")
        opened_store.update(run, state="done", result=result.to_json())
    with opened(store) as db:
        entries = entries_of(db, [run])
    assert len(entries) == len(result.trials)
    for entry, trial in zip(entries, result.trials, strict=True):
        assert (entry.plan, entry.sizes, entry.seconds) == (trial.plan, trial.sizes, trial.search_seconds)
        change = trial.results["/data/wiki.jsonl"].change
        assert entry.quality is not None
        assert entry.quality.value == pytest.approx(math.exp(change.value))
        assert entry.tasks == {name: trial.results[name].change for name in result.teacher if "/tasks/" in name}
        assert len(entry.tasks) > 1
    assert len({entry.name for entry in entries}) == len(entries)
    client = TestClient(make_app(Listing(store)), base_url="http://127.0.0.1")
    assert "What each task gains or pays" in client.get(f"/compare?run={run}").text


def test_students_without_tasks_have_no_chart_of_them(pruned_store: Path) -> None:
    runs = "&".join(f"run={run.id}" for run in Listing(pruned_store).runs())
    client = TestClient(make_app(Listing(pruned_store)), base_url="http://127.0.0.1")
    assert "What each task gains or pays" not in client.get(f"/compare?{runs}").text
