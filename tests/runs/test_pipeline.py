"""The main job on a tiny model: its figures are true, its runs resume, and nothing half-written remains."""

from __future__ import annotations

import html
import json
import math
import multiprocessing
import os
import signal
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

import billhook
from billhook.cli.progress import event_words
from billhook.core.errors import ResourceError, UsageError
from billhook.core.events import ALERT, Event, EventListener
from billhook.core.plan import Plan
from billhook.core.results.run import RunResult
from billhook.data.calibration import calibration_tokens, held_out_tokens
from billhook.data.texts import TextSpec
from billhook.methods.evaluate import speed
from billhook.methods.evaluate.speed import peak_bytes
from billhook.models.surgery import masked
from billhook.report.run.search_words import search_in_words, work_in_words
from billhook.report.run_report import run_page
from billhook.report.run_words import run_notes
from billhook.runs.store import Store

OPTIONS: dict[str, Any] = {"remove": "3sites", "search": "greedy", "tokens": 240, "length": 24, "eval_tokens": 600,
                           "eval_length": 32, "self_share": 0.0}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def events() -> list[Event]:
    return []


@pytest.fixture(scope="module")
def result(model: Path, text: Path, home: Path, events: list[Event]) -> RunResult:
    return billhook.prune(
        str(model), data=str(text), out=home / "out", store=home / "runs.db", watch=events.append, **OPTIONS
    )


def perplexity(model: Any, text: Path, teacher: Any) -> float:
    """Written out: every held-out row alone, float64."""
    tokens = held_out_tokens(TextSpec(str(text), "text", 600, 32, 0), teacher.model, teacher.tokenizer)
    nll, count = 0.0, 0
    for row, length in zip(tokens.rows, tokens.lengths, strict=True):
        with torch.inference_mode():
            log_p = model(input_ids=row[None, :length], use_cache=False).logits[0].double().log_softmax(-1)
        nll -= float(log_p[torch.arange(length - 1), row[1:length]].sum())
        count += length - 1
    return math.exp(nll / count)


def test_the_figures_are_those_of_the_saved_folder(result: RunResult, model: Path, text: Path) -> None:
    teacher, student = billhook.load(model), billhook.load(result.out)
    assert student.removed_earlier.names() == result.plan.names()
    assert len(student.removed_earlier.removed) == 3
    for who, loaded in (("teacher", teacher), ("student", student)):
        assert getattr(result.perplexity, who) == pytest.approx(perplexity(loaded.model, text, teacher), rel=1e-5)
        assert getattr(result.sizes, who).parameters == sum(p.numel() for p in loaded.model.parameters())
        size = sum(t.numel() * t.element_size() for t in load_file(loaded.folder / "model.safetensors").values())
        assert getattr(result.sizes, who).bytes == size
        assert getattr(result.sizes, who).kv_bytes_per_token == loaded.anatomy.total("kv_bytes_per_token")
    assert result.perplexity.ratio.value == pytest.approx(
        result.perplexity.student / result.perplexity.teacher, rel=1e-6
    )
    ratio = result.perplexity.ratio
    assert ratio.low < ratio.value < ratio.high


def test_the_steps_are_those_of_a_greedy_search_by_hand(result: RunResult, model: Path, text: Path) -> None:
    teacher = billhook.load(model)
    tokens = calibration_tokens(TextSpec(str(text), "text", 240, 24, 0), teacher.model, teacher.tokenizer)
    ids = torch.stack([row for row, n in zip(tokens.rows, tokens.lengths, strict=True) if n == 24])
    assert len(ids) == len(tokens.lengths), "rows of one length, so that the mean is over all positions"
    with torch.inference_mode():
        p = teacher.model(input_ids=ids, use_cache=False).logits.log_softmax(-1)

    def kl(plan: Plan) -> float:
        with torch.inference_mode(), masked(teacher, plan):
            q = teacher.model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())

    plan = Plan()
    for step in result.steps:
        tried = {site: kl(plan.without(site)) for site in teacher.anatomy.sites_present() if site not in plan.removed}
        ranked = sorted(tried, key=lambda site: tried[site])
        assert step.sites == (ranked[0],)
        assert step.loss == pytest.approx(tried[ranked[0]], rel=1e-4)
        assert step.gap == pytest.approx(tried[ranked[1]] - tried[ranked[0]], rel=1e-2, abs=1e-6)
        plan = plan.without(ranked[0])
    assert plan.names() == result.plan.names()


def test_what_is_written_is_what_is_returned(result: RunResult) -> None:
    out = Path(result.out)
    written, returned = json.loads((out / "report.json").read_text()), json.loads(json.dumps(result.to_json()))
    assert returned.pop("seconds").items() > written.pop("seconds").items()  # all but that of the report itself
    assert written == returned
    assert {"README.md", "report.html", "billhook.json", "config.json", "tokenizer.json", "modeling_billhook.py"} <= {
        path.name for path in out.iterdir()
    }
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "out",
        "runs.db",
    ]  # no lock, no journal, nothing aside


def test_progress_is_told_for_every_stage(result: RunResult, events: list[Event]) -> None:
    stages = list(dict.fromkeys(event.stage for event in events if event.stage != ALERT))  # by how fast the machine is
    assert stages == ["load", "search", "finalists", "influence", "evaluate", "answer", "save", "speed"]
    searched = [event for event in events if event.stage == "search"]
    assert searched[-1].done == searched[-1].total == 8 + 7 + 6
    assert [event.done for event in searched] == sorted(event.done for event in searched)
    assert any("2 of 3 sites removed, lowest kl" in event_words(event.stage, event.values) for event in searched)


def test_what_is_told_is_stored_too(result: dict[str, Any], home: Path) -> None:
    stored = billhook.show(result.run, home / "runs.db")
    for stage in ("load", "calibrate", "search", "apply", "evaluate", "save", "speed", "report"):
        (seconds,) = [
            event.values["seconds"] for event in stored.events if "seconds" in event.values and event.stage == stage
        ]
        assert seconds >= 0
    searched = [event for event in stored.events if event.stage == "search" and "objective" in event.values]
    assert (searched[-1].done, searched[-1].total) == (21, 21)
    rounds = [event for event in stored.events if event.stage == "round"]
    assert str(rounds[-1].values["removed"]).split(",") == sorted(result.plan.names())
    assert rounds[-1].values["loss"] == result.steps[-1].loss
    assert {"at", "stage", "done", "total", "lowest", "memory_bytes"} <= set(stored.rows()[0])


def test_the_page_of_a_run_is_made_again_from_the_store(result: RunResult, home: Path, tmp_path: Path) -> None:
    page = billhook.make_report(result.run, out=tmp_path / "again", store=home / "runs.db")
    assert page.read_text() == run_page(result), "as in the run's folder, with the seconds that its report took"
    kept = json.loads((tmp_path / "again" / "result.json").read_text())
    assert kept == billhook.show(result.run, home / "runs.db").to_json()["result"]
    with pytest.raises(UsageError, match="is not empty"):
        billhook.make_report(result.run, out=tmp_path / "again", store=home / "runs.db")


def test_peak_memory_is_that_of_a_process_which_holds_the_model(model: Path, tmp_path: Path) -> None:
    wide = tiny.saved(tmp_path / "wide", "llama", intermediate_size=60_000)
    small, large = (peak_bytes(folder, "cpu", "float32", 8, 2) for folder in (model, wide))
    weights = (wide / "model.safetensors").stat().st_size
    assert small is not None
    assert large is not None
    assert 0.9 * weights < large - small < 2 * weights
    assert peak_bytes(tmp_path, "cpu", "float32", 8, 2) is None, "no model there"


def measured(store: Path, run: str) -> tuple[int, int]:
    """How many losses, and how many pieces of others, a run has measured itself."""
    with closing(sqlite3.connect(store)) as db:
        return tuple(
            db.execute(f"SELECT count(*) FROM {table} WHERE run = ?", (run,)).fetchone()[0]
            for table in ("losses", "pieces")
        )


def test_a_second_run_measures_nothing(result: RunResult, model: Path, text: Path, home: Path) -> None:
    again = billhook.prune(str(model), data=str(text), out=home / "again", store=home / "runs.db", **OPTIONS)
    first, second = (measured(home / "runs.db", run.run) for run in (result, again))
    assert first[0] > 2 * 3, "the best two of three rounds, and what a bound did not rule out"
    assert second == (0, 0)
    for key in ("plan", "steps", "perplexity", "speed"):
        assert getattr(again, key) == getattr(result, key)


def test_blocks_make_a_stock_checkpoint(model: Path, text: Path, home: Path) -> None:
    options = OPTIONS | {"remove": "1blocks", "search": "oneshot", "loss": "nll"}
    result = billhook.prune(str(model), data=str(text), out=home / "blocks", store=home / "runs.db", **options)
    assert (result.checkpoint, result.reasons) == ("llama", ("no_skills",)), "its tokenizer knows w0 to w59 alone"
    config = json.loads((home / "blocks" / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"]) == ("llama", 3)
    assert "auto_map" not in config
    assert len(config["billhook"]["kept_blocks"]) == 3
    assert len(result.steps) == 1
    assert len(result.steps[0].sites) == 2


# -- larger than memory ---------------------------------------------------------------------------------------------


def test_a_model_larger_than_its_memory_ends_as_the_same_checkpoint(
    result: RunResult, model: Path, text: Path, home: Path, tmp_path: Path
) -> None:
    options = OPTIONS | {"data": str(text), "memory": "0.1MB", "store": tmp_path / "runs.db", "out": tmp_path / "out"}
    told = billhook.prune(str(model), **options)
    assert told.plan == result.plan
    assert [step.loss for step in told.steps] == pytest.approx([step.loss for step in result.steps], 1e-4)
    assert told.perplexity.ratio.value == pytest.approx(result.perplexity.ratio.value, rel=1e-5)
    assert (told.speed, told.answers) == (None, ())
    assert told.reasons == ("streamed",)
    assert "read block by block" in " ".join(run_notes(told))
    assert "blocks from disk" in work_in_words(told.search.work)
    mine, other = ({k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}
                   for folder in (tmp_path / "out", Path(result.out)))  # fmt: skip
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert "speed, sample answers and skills were not measured" in (tmp_path / "out" / "report.html").read_text()


def test_the_model_writes_half_of_the_calibration_text_or_the_result_says_why_not(
    model: Path, text: Path, tmp_path: Path
) -> None:
    """By default; the proof is on the same held-out text as without it."""
    options = OPTIONS | {"self_share": 0.5, "search": "oneshot", "data": str(text), "store": tmp_path / "runs.db"}
    mixed = billhook.prune(str(model), **options, out=tmp_path / "mixed")
    alone = billhook.prune(str(model), **options | {"self_share": 0.0}, out=tmp_path / "alone")
    assert mixed.data.calibration.source == f"{text}+self"
    assert (mixed.data.evaluation, mixed.reasons) == (alone.data.evaluation, ("no_skills",))
    streamed = billhook.prune(
        str(model), **options | {"store": tmp_path / "other.db"}, memory="0.1MB", out=tmp_path / "streamed"
    )
    assert streamed.data.calibration == alone.data.calibration
    assert streamed.reasons == ("streamed", "calibrated_on_text_alone")
    assert "Calibrated on the given text alone" in " ".join(run_notes(streamed))


def test_a_streamed_model_is_evaluated_and_refuses_what_needs_it_whole(model: Path, text: Path) -> None:
    options = {"data": str(text), "eval_tokens": 600, "eval_length": 32}
    whole, streamed = (billhook.evaluate(str(model), **options, **more) for more in ({}, {"memory": "0.1MB"}))
    assert streamed.perplexity.value == pytest.approx(whole.perplexity.value, rel=1e-5)
    assert (streamed.perplexity.low, streamed.perplexity.high) == pytest.approx(
        (whole.perplexity.low, whole.perplexity.high), rel=1e-5
    )
    with pytest.raises(UsageError, match="would write its calibration text itself, and it does not fit"):
        billhook.score(str(model), data="self", length=24, memory="0.1MB")
    with pytest.raises(ResourceError, match=r"memory='0\.01MB' is too little.*Give memory='1MB' or more"):
        billhook.evaluate(str(model), **options, memory="0.01MB")


# -- racing ---------------------------------------------------------------------------------------------------------


def test_racing_says_what_it_did_and_an_audit_what_that_cost(model: Path, text: Path, tmp_path: Path) -> None:
    options = OPTIONS | {"data": str(text), "fast": True, "shortlist": 3, "audit": True}
    told = billhook.prune(str(model), out=tmp_path / "out", store=tmp_path / "runs.db", **options).search
    assert told.mode == "fast"
    assert told.decided.total == 8 + 7 + 6
    assert told.decided.skipped == 4 + 3
    assert len(told.audit) == 3
    for row in told.audit:
        assert row.regret >= 0
        assert (row.regret == 0) == (row.chosen == row.best)
    assert "Fast search, 21 candidates" in search_in_words(told)
    assert "Audit: " in search_in_words(told)
    assert search_in_words(told) in html.unescape((tmp_path / "out" / "report.html").read_text())


def test_estimates_are_never_filed_as_losses(model: Path, text: Path, tmp_path: Path) -> None:
    """An exact search over the store of a racing one ends as one over a store of its own."""
    options = OPTIONS | {"data": str(text)}
    billhook.prune(str(model), out=tmp_path / "a", store=tmp_path / "one.db", fast=True, **options)
    over, own = (
        billhook.prune(str(model), out=tmp_path / name, store=tmp_path / store, **options)
        for name, store in (("b", "one.db"), ("c", "two.db"))
    )
    assert over.plan == own.plan
    assert [s.loss for s in over.steps] == pytest.approx([s.loss for s in own.steps], rel=1e-5)
    assert [s.gap for s in over.steps] == pytest.approx([s.gap for s in own.steps], rel=1e-3)


# -- interrupted and resumed ----------------------------------------------------------------------------------------


def waits_for_its_parent(end: Any, held: Any) -> None:
    held.close()
    os.dup2(end.fileno(), 0)
    speed._end_with_parent()


def test_the_process_that_measures_memory_ends_with_the_one_that_began_it() -> None:
    context = multiprocessing.get_context("fork")
    end, held = context.Pipe(duplex=False)
    child = context.Process(target=waits_for_its_parent, args=(end, held))
    child.start()
    child.join(0.1)
    assert child.exitcode is None
    held.close()
    child.join(20)
    assert child.exitcode == -signal.SIGKILL


def killed_at(stage: str, count: int, resume: bool, options: dict[str, Any]) -> None:
    """Begin or resume a pruning, and end the process at the `count`th event of a stage."""

    def watch(event: Event) -> None:
        nonlocal count
        count -= event.stage == stage
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    if resume:
        billhook.resume(store=options["store"], watch=watch)
    else:
        billhook.prune(watch=watch, **options)


@pytest.mark.parametrize("fast", [False, True])
def test_killed_at_any_moment_it_goes_on_and_measures_nothing_twice(
    fast: bool, model: Path, text: Path, tmp_path: Path
) -> None:
    options = OPTIONS | {
        "model": str(model), "data": str(text), "store": str(tmp_path / "runs.db"), "out": str(tmp_path / "out"),
        **({"fast": True, "shortlist": 4} if fast else {}),
    }  # fmt: skip
    result = billhook.prune(**options | {"store": tmp_path / "whole.db", "out": tmp_path / "whole"})
    moments = [("search", 2), ("search", 9), ("answer", 1), ("save", 2), ("speed", 2)]
    for attempt, (stage, count) in enumerate(moments):
        child = multiprocessing.get_context("fork").Process(target=killed_at, args=(stage, count, attempt > 0, options))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".out.*.partial")), "it was killed inside saving"
    resumed = billhook.resume(store=tmp_path / "runs.db")
    assert not list(tmp_path.glob(".out.*"))
    store = Store(tmp_path / "runs.db")
    assert len(store.runs()) == 1
    assert measured(tmp_path / "runs.db", resumed.run) == measured(tmp_path / "whole.db", result.run)
    assert resumed.search.decided == result.search.decided
    assert store.runs()[0].state == "done"
    assert (resumed.plan, resumed.steps, resumed.perplexity) == (
        result.plan, result.steps, result.perplexity
    )  # fmt: skip


def interrupt_at(stage: str, done: int) -> EventListener:
    def watch(event: Event) -> None:
        if event.stage == stage and event.done >= done:
            raise KeyboardInterrupt

    return watch


@pytest.mark.parametrize("stage", ["search", "evaluate", "save", "speed"])
def test_interrupted_it_leaves_nothing_half_written(
    stage: str, model: Path, text: Path, home: Path, tmp_path: Path, result: RunResult
) -> None:
    store = home / "runs.db" if stage != "speed" else tmp_path / "runs.db"
    options = OPTIONS | {"search": "oneshot"} if stage == "speed" else OPTIONS
    if stage == "evaluate":
        options = options | {"eval_tokens": 500}
    with pytest.raises(KeyboardInterrupt):
        billhook.prune(
            str(model), data=str(text), out=tmp_path / "out", store=store, watch=interrupt_at(stage, 0), **options
        )
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("runs.db")] == []
    assert Store(store).runs()[0].state == "interrupted"


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_out_defaults_to_a_folder_of_the_run(model: Path, text: Path, nowhere: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        billhook.prune(str(model), data=str(text), watch=interrupt_at("search", 1), **OPTIONS)
    (run,) = Store(nowhere / "billhook.db").runs()
    assert run.out == os.path.join("pruned", run.id)  # noqa: PTH118 - as it is stored


def test_generation_of_the_saved_model_is_the_students(result: RunResult) -> None:
    student = billhook.load(result.out).model
    rows = tiny.tokens(2, 6)
    kept = student.generate(rows, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(
        kept, student.generate(rows, max_new_tokens=12, do_sample=False, pad_token_id=0, use_cache=False)
    )
