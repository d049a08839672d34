"""The run store: what is filed comes back, nothing twice, and a run belongs to one process."""

from __future__ import annotations

import gzip
import itertools
import json
import multiprocessing
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import billhook
from billhook.core.errors import ResultError, RunError, UsageError
from billhook.core.events import Event
from billhook.core.files.cache_keys import (
    AttemptKey,
    BaselineKey,
    ChoicesKey,
    ComparedWith,
    EvaluationKey,
    FactKey,
    FoldedOn,
    LossKey,
    PlanKey,
    PlanLossKey,
    ScoresKey,
    SiteTimesKey,
    TimingKey,
)
from billhook.core.files.store_tables import MIGRATIONS
from billhook.core.plan import Plan
from billhook.core.results.measured import Environment, EvalResult, Loss, Timing, TimingProtocol
from billhook.core.results.specs import SweepSpec, plain_options
from billhook.runs.store import Store

SITES = [f"{part}.{block}" for block in range(4) for part in ("attention", "mlp")]

OF = LossKey("model", "tokens", "kl", "float32")
TIMING = Timing((0.1, 0.2), (1.0, 1.1), 8, 2, 1, None)
LOSS = Loss("kl", (0.1, 1 / 3, 2e-17), (3, 4, 5))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "deep" / "runs.db")


def new(store: Store, out: str = "out/{run}") -> str:
    return store.new_run("prune", {"model": "demo", "remove": "1sites"}, {"torch": "2"}, out)


def test_what_is_filed_comes_back_to_the_last_bit(store: Store) -> None:
    run, plan = new(store), Plan.parse(["attention.1"])
    store.add_loss(OF, plan, LOSS, run)
    assert store.lookup(PlanLossKey(OF, plan)) == LOSS
    result = EvalResult("perplexity", "t", (1.5, 2.25), (10, 11), (0, 0))
    evaluation = EvaluationKey("model", plan, "perplexity", "t", "float32")
    store.add(evaluation, result, run)
    assert store.lookup(evaluation) == result
    here = Environment("0", "3", "2", "5", "cpu", "a machine", 1)
    key, timing = TimingKey("model", plan, Plan(), here, "float32", TimingProtocol()), TIMING
    store.add(key, timing, run)
    assert store.lookup(key) == timing
    event = Event("search", 1, 2, {"lowest": 1 / 3, "plan": "mlp.1"})
    store.add_event(run, event)
    assert [Event(e.stage, e.done, e.total, e.values) for e in store.events(run)] == [event]


def test_nothing_else_comes_back(store: Store) -> None:
    run, plan = new(store), Plan.parse(["attention.1"])
    store.add_loss(OF, plan, LOSS, run)
    for other in (
        LossKey("other", "tokens", "kl", "float32"),
        LossKey("model", "other", "kl", "float32"),
        LossKey("model", "tokens", "js", "float32"),
        LossKey("model", "tokens", "kl", "bfloat16"),
        LossKey("model", "tokens", "kl", "float32", FoldedOn("texts", "next")),
    ):
        assert store.lookup(PlanLossKey(other, plan)) is None
    assert store.lookup(PlanLossKey(OF, Plan.parse(["mlp.1"]))) is None


def test_a_second_measurement_changes_nothing(store: Store) -> None:
    first, second, plan = new(store), new(store), Plan()
    store.add_loss(OF, plan, LOSS, first)
    store.add_loss(OF, plan, Loss("kl", (9.0,), (1,)), second)
    assert store.lookup(PlanLossKey(OF, plan)) == LOSS
    assert (store.count_losses(), store.count_losses(first), store.count_losses(second)) == (1, 1, 0)


def test_runs_are_listed_newest_first_and_found_by_name(store: Store) -> None:
    runs = [new(store) for _ in range(3)]
    assert [run.id for run in store.runs()] == runs[::-1]
    assert store.run(runs[0]).out == f"out/{runs[0]}"
    store.update(runs[0], state="done", result={"a": 1}, fingerprints={"model": "m"})
    found = store.run(runs[0])
    assert (found.state, found.result, found.fingerprints) == ("done", {"a": 1}, {"model": "m"})
    with pytest.raises(RunError, match=rf"no run 'x{runs[1][1:]}'.*Did you mean {runs[1]}"):
        store.run("x" + runs[1][1:])


def test_brief_runs_lack_what_is_most_of_a_pruning_and_nothing_else(store: Store) -> None:
    whole = {"schema": 2, "plan": {"removed": ["mlp.1"]}, "steps": [1, 2], "anatomy": {"sites": []},
             "perplexity": {"teacher": 1 / 3}, "name": "☃ \" plan"}  # fmt: skip
    for kind, result in (("prune", whole), ("prune", None), ("sweep", whole)):
        run = store.new_run(kind, {"model": "m"}, {}, "out")
        store.update(run, result=result, fingerprints={"model": "f"})
    told, brief = store.runs(), store.runs(brief=True)
    assert [replace(each, result=None) for each in brief] == [replace(each, result=None) for each in told]
    less = {name: value for name, value in whole.items() if name not in ("plan", "steps", "anatomy")}
    assert [each.result for each in brief][:3] == [whole, None, less]


def test_events_are_found_by_their_stages(store: Store) -> None:
    run = new(store)
    for number, stage in enumerate(("load", "search", "round", "search%")):
        store.add_event(run, Event(stage, number), at_once=True)
    assert [each.stage for each in store.events(run)] == ["load", "search", "round", "search%"]
    assert [each.stage for each in store.events(run, "round", "search")] == ["search", "round"]
    assert store.events(run, "sear%") == []


def test_a_run_keeps_its_kind_and_its_spec(store: Store) -> None:
    spec = SweepSpec(
        "demo", ("billhook",), ("10%",), ("pydoc",), (), (), 200, plain_options({"seed": 1, "set": ("a",)})
    )
    run = store.new_run(spec.kind, spec.to_json(), {}, "-")
    assert store.run(run).kind == "sweep"
    assert SweepSpec.read(store.run(run).spec) == spec
    del (broken := spec.to_json())["items"]
    with pytest.raises(ResultError, match=r"SweepSpec of a stored result cannot be read"):
        SweepSpec.read(broken)


V0 = gzip.decompress((Path(__file__).parents[1] / "fixtures" / "v0" / "billhook.db.gz").read_bytes())


def test_a_store_that_is_only_read_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "old.db").write_bytes(V0)
    with closing(Store(tmp_path / "old.db", read_only=True)) as old:
        kinds = {run.id: run.kind for run in old.runs()}
        assert {"prune", "sweep", "transfer", "stability", "compare", "gate", "baseline", "eval", "threshold"} == {
            *kinds.values()
        }
        assert all("laboratory" not in run.environment for run in old.runs())
        assert sum(len(old.events(run)) for run in kinds) > 10
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            old.update(next(iter(kinds)), state="done")
    assert (tmp_path / "old.db").read_bytes() == V0, "reading never migrates"
    with closing(Store(tmp_path / "old.db")) as new:
        assert {run.id: run.kind for run in new.runs()} == kinds, "writing does, and says the same"
    assert (tmp_path / "old.db").read_bytes() != V0


def test_a_run_without_a_result_has_no_page_yet(store: Store, tmp_path: Path) -> None:
    run = new(store)
    with pytest.raises(RunError, match=rf"is interrupted and has no result. Finish it: billhook.resume\('{run}'\)"):
        billhook.make_report(run, out=tmp_path / "page", store=store.path)
    assert not (tmp_path / "page").exists()


def test_what_is_missing_or_no_store_is_not_made_by_reading(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"There is no store .*none\.db\. Give the file"):
        Store(tmp_path / "none.db", read_only=True)
    sqlite3.connect(tmp_path / "empty.db").close()
    with pytest.raises(UsageError, match=r"empty\.db is not a store of Billhook"):
        Store(tmp_path / "empty.db", read_only=True)
    assert [path.name for path in tmp_path.iterdir()] == ["empty.db"]


# -- the cache ------------------------------------------------------------------------------------------------------


def test_a_value_is_computed_once(store: Store) -> None:
    run, calls = new(store), list[int]()

    def compute() -> list[float]:
        calls.append(1)
        return [0.5, 1 / 3]

    key = ChoicesKey("model", Plan(), "float32", "tokens")
    assert store.lookup(key) is None
    assert [store.remember(key, compute, run) for _ in range(3)] == [[0.5, 1 / 3]] * 3
    assert store.remember(replace(key, repair="r1"), compute, run) == [0.5, 1 / 3]
    assert len(calls) == 2, "a repaired model is another one"


def test_of_several_values_the_missing_ones_are_computed_and_each_is_kept_at_once(store: Store) -> None:
    run = new(store)
    keys = [ChoicesKey("model", Plan.parse([f"mlp.{i}"]), "float32", "tokens") for i in range(4)]
    store.add(keys[1], [1.0], run)

    def compute(missing: list[int]) -> Iterator[list[float]]:
        assert missing == [0, 2, 3]
        for number in missing:
            if number == 3:
                raise KeyboardInterrupt
            yield [float(number)]

    with pytest.raises(KeyboardInterrupt):
        store.remember_each(keys, compute, run)
    assert [store.lookup(key) for key in keys] == [[0.0], [1.0], [2.0], None]
    assert store.remember_each(keys, lambda missing: [[9.0]], run) == [[0.0], [1.0], [2.0], [9.0]]


def test_values_that_are_measured_together_are_measured_again_together(store: Store) -> None:
    run, here = new(store), Environment("0", "3", "2", "5", "cpu", "a machine", 1)
    plans = (Plan(), Plan.parse(["mlp.1"]))
    keys = [TimingKey("model", a, b, here, "float32", TimingProtocol()) for a, b in (plans, plans[::-1])]
    store.add(keys[0], TIMING, run)
    later = replace(TIMING, batch=7)
    assert store.remember_together(keys, lambda: [later, later], run) == [later, later]
    assert store.remember_together(keys, lambda: [TIMING, TIMING], run) == [later, later]


def test_what_is_measured_together_is_stored_together_or_not_at_all(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, keys, insert = new(store), [ScoresKey("m", name, {}, "t", "kl", "c") for name in ("a", "b")], Store._insert

    def fill(self: Store, key: Any, value: Any, run: str) -> None:
        if key is keys[1]:
            raise sqlite3.OperationalError("database or disk is full")
        insert(self, key, value, run)

    monkeypatch.setattr(Store, "_insert", fill)
    with pytest.raises(sqlite3.OperationalError):
        store.remember_together(keys, lambda: [{"0": 1.0}, {"0": 2.0}], run)
    assert [store.lookup(key) for key in keys] == [None, None]


def typed_key(model: str, what: str, parts: dict[str, Any]) -> FactKey[Any]:
    """The key of a fact from its JSON."""
    if what in ("plan", "attempt"):
        times = SiteTimesKey(model, **parts["ns"]) if "ns" in parts else None
        key = PlanKey(model, parts["recipe"], parts["tokens"], parts["compute"], times, parts.get("refitted"))
        return key if what == "plan" else AttemptKey(model, key)
    kinds = {"scores": ScoresKey, "choices": ChoicesKey, "ns": SiteTimesKey, "baseline": BaselineKey}
    if "plan" in parts:
        parts = parts | {"plan": PLANS[parts["plan"]]}
    return kinds[what](model, **parts)


PLANS = {plan.key(): plan for n in range(5) for plan in map(Plan.parse, itertools.combinations(SITES, n))}


def test_everything_that_the_first_version_stored_has_a_typed_key(tmp_path: Path) -> None:
    (tmp_path / "old.db").write_bytes(V0)
    with closing(sqlite3.connect(tmp_path / "old.db")) as db:
        facts = db.execute("SELECT model, what, of, value FROM facts").fetchall()
        evaluations = db.execute("SELECT model, plan, name, tokens, dtype FROM evaluations").fetchall()
        timings = db.execute("SELECT model, plan, rival, environment, dtype, protocol FROM timings").fetchall()
    assert {row[1] for row in facts} == {"scores", "choices", "ns", "plan", "attempt", "baseline"}
    with closing(Store(tmp_path / "old.db")) as store:
        for model, what, text, value in facts:
            found = store.lookup(typed_key(model, what, json.loads(text)))
            assert found is not None, (what, text)
            if what not in ("plan", "attempt"):
                assert found == json.loads(value)
        for model, plan, name, tokens, dtype in evaluations:
            which = re.fullmatch(r"(kl|agreement) (?:to|with) (\w+) (.*)", name)
            of = ComparedWith(*which.groups()) if which else name
            assert store.lookup(EvaluationKey(model, PLANS[plan], of, tokens, dtype)) is not None, name
        for model, plan, rival, environment, dtype, protocol in timings:
            here = Environment(**json.loads(environment))
            key = TimingKey(model, PLANS[plan], PLANS[rival], here, dtype, TimingProtocol(**json.loads(protocol)))
            assert store.lookup(key) is not None, protocol


def test_events_are_written_once_a_second_and_the_last_of_a_stage_is_kept(tmp_path: Path) -> None:
    now = 100.0
    store = Store(tmp_path / "runs.db", clock=lambda: now)
    run, other = new(store), Store(tmp_path / "runs.db", read_only=True)

    def rows() -> list[tuple[str, int]]:
        return [(event.stage, event.done) for event in other.events(run)]

    store.add_event(run, Event("search"), at_once=True)
    for tick in range(40):  # four events a second
        store.add_event(run, Event("search", tick, 40, {"lowest": 1 / (tick + 1)}))
        now += 0.25
    assert rows() == [("search", 0), *(("search", tick) for tick in range(0, 40, 4))], "a row a second"
    store.add_event(run, Event("evaluate", 1, 2))
    assert rows()[-2:] == [("search", 39), ("evaluate", 1)], "in order, with what was held back"
    now += 0.1
    store.add_event(run, Event("evaluate", 2, 2, {"of": "student"}))
    assert rows()[-1] == ("evaluate", 1)
    store.update(run, state="done")
    assert rows()[-1] == ("evaluate", 2), "the end of a stage is never lost"
    last = other.events(run)[-1]
    assert (last.values, last.total) == ({"of": "student"}, 2)
    assert last.resources["memory_bytes"] > 10**6
    assert last.resources["cpu_seconds"] > 0
    other.close()
    store.add_event(run, Event("report", 1, 1))
    store.close()
    with closing(Store(tmp_path / "runs.db", read_only=True)) as again:
        assert again.events(run)[-1].stage == "report", "nor that of a store which is closed"


def test_events_of_the_first_version_keep_their_words(tmp_path: Path) -> None:
    (tmp_path / "old.db").write_bytes(V0)
    with closing(Store(tmp_path / "old.db", read_only=True)) as old:
        notes = [event.values.get("note") for event in old.events("r0ee804")]
    assert "attention.3: 0.151611" in notes
    with closing(Store(tmp_path / "old.db")) as new:
        assert [event.values.get("note") for event in new.events("r0ee804")] == notes


def test_a_measurement_needs_a_run(store: Store) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        store.add_loss(OF, Plan(), LOSS, "nobody")


def test_two_runs_share_a_store(store: Store) -> None:
    other = Store(store.path)
    plan = Plan.parse(["mlp.0"])
    other.add_loss(OF, plan, LOSS, new(other))
    assert store.lookup(PlanLossKey(OF, plan)) == LOSS


HOLD = """
import sys
from pathlib import Path
from billhook.core.results.specs import SweepSpec, plain_options

from billhook.core.files.store_tables import MIGRATIONS
from billhook.runs.store import Store
with Store(Path(sys.argv[1])).lock(sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_is_held_by_one_process_and_freed_by_its_death(store: Store) -> None:
    run = new(store)
    command = [sys.executable, "-c", HOLD, str(store.path), run]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=f"Another process works on run {run}"), store.lock(run):
            pass
        assert not store.free(run)
        holder.kill()
    assert store.free(run)
    with store.lock(run):
        assert list(store.path.parent.glob("*.lock"))
    assert not list(store.path.parent.glob("*.lock"))


def _file_many(path: str, start: int) -> None:
    store = Store(Path(path))
    run = new(store)
    for i in range(start, start + 40):
        store.add_loss(OF, Plan.parse([f"attention.{i}"]), Loss("kl", (float(i),), (1,)), run)


def test_processes_that_write_at_once_lose_nothing(store: Store) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_file_many, args=(str(store.path), start)) for start in (0, 20)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert store.count_losses() == 60
    found = [store.lookup(PlanLossKey(OF, Plan.parse([f"attention.{i}"]))) for i in range(60)]
    assert [loss.mean for loss in found if loss] == list(range(60))


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is no database, whatever its name says " * 50)
    with pytest.raises(UsageError, match=r"store='.*text\.db' cannot be used.*Give another file"):
        Store(tmp_path / "text.db")
    Store(tmp_path / "new.db")._db.execute("PRAGMA user_version = 99")
    with pytest.raises(UsageError, match="written by a newer Billhook"):
        Store(tmp_path / "new.db")


def test_a_write_that_an_interrupt_left_open_is_undone_and_the_next_one_counts(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs.db")
    run = new(store)
    unfinished = store._write()
    unfinished.__enter__()  # as if the interrupt came before anything was written, and nobody left the block
    store._db.execute("UPDATE runs SET out = 'lost'")
    store.update(run, state="interrupted")
    other = Store(tmp_path / "runs.db")
    assert (other.run(run).state, other.run(run).out) == ("interrupted", f"out/{run}")


@pytest.mark.parametrize("kind", ["prune", "sweep"])
def test_a_run_that_was_killed_is_interrupted_and_leaves_no_lock(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "runs.db"
    with closing(Store(path)) as store:
        run = store.new_run(kind, {}, {}, "out")
        with store.lock(run):
            assert store.run(run).state == "running"
            held = (tmp_path / f"runs.db-{run}.lock").stat().st_ino
        assert held
        (tmp_path / f"runs.db-{run}.lock").touch()  # SIGKILL leaves it, unlocked
    with closing(Store(path, read_only=True)) as store, monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        assert [each.state for each in store.runs()] == ["interrupted"], "who may not delete the lock sees it too"
    with closing(Store(path, read_only=True)) as store:
        assert [each.state for each in store.runs()] == ["interrupted"]
    assert not list(tmp_path.glob("*.lock"))


def refuse(*_: object) -> None:
    raise PermissionError


def test_a_run_that_was_killed_after_it_stored_its_result_is_done(store: Store) -> None:
    run = new(store)
    store.update(run, result={"kind": "sweep"})
    with store.lock(run):
        assert store.run(run).state == "running"
    assert store.run(run).state == "done"


def ended_without_closing(path: Path) -> None:
    """A process that leaves its writes in the -wal."""
    store = Store(path)
    store.new_run("sweep", {}, {}, "out")
    os._exit(0)


def test_a_reader_leaves_no_file_and_clears_what_a_killed_process_left(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    child = multiprocessing.get_context("fork").Process(target=ended_without_closing, args=(path,))
    child.start()
    child.join()
    assert (tmp_path / "runs.db-wal").stat().st_size
    for _ in range(2):
        with closing(Store(path, read_only=True)) as store:
            assert len(store.runs()) == 1
            with pytest.raises(sqlite3.OperationalError, match="readonly"):
                store.new_run("sweep", {}, {}, "out")
        assert [file.name for file in tmp_path.iterdir()] == ["runs.db"]


def test_a_store_is_read_where_no_file_can_be_made(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    with closing(Store(path)) as store:
        run = store.new_run("sweep", {}, {}, "out")
    (tmp_path / "runs.db-shm").mkdir()  # as on a full disk, SQLite gets none
    with closing(Store(path, read_only=True)) as store:
        assert [each.id for each in store.runs()] == [run]
    (tmp_path / "runs.db-wal").write_bytes(b"what a writer has not yet put into the file")
    with pytest.raises(UsageError, match="cannot be used"):
        Store(path, read_only=True)


# -- stores that somebody else wrote --------------------------------------------------------------------------------


def other_database(path: Path, *statements: str) -> bytes:
    with closing(sqlite3.connect(path)) as db:
        for statement in statements:
            db.execute(statement)
        db.commit()
    return path.read_bytes()


@pytest.mark.parametrize("version", [0, 3, len(MIGRATIONS)])
@pytest.mark.parametrize("read_only", [False, True])
def test_a_database_of_something_else_is_not_made_a_store(version: int, read_only: bool, tmp_path: Path) -> None:
    path = tmp_path / "places.sqlite"
    content = other_database(path, "CREATE TABLE runs (id TEXT, url TEXT)", f"PRAGMA user_version = {version}")
    with pytest.raises(UsageError, match=r"places\.sqlite is not a store of Billhook\. Give the file"):
        Store(path, read_only=read_only)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_file_is_no_store(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path(":memory:")):
        for read_only in (False, True):
            with pytest.raises(UsageError, match=r"is no file\. Give the name of one: store='billhook\.db'"):
                Store(path, read_only=read_only)


@pytest.mark.parametrize(
    ("column", "value"),
    [("recipe", "{"), ("recipe", "[1]"), ("bound", "null"), ("environment", b"\xff"), ("state", "asleep"),
     ("created", "soon"), ("result", "7"), ("recipe", "[" * 100_000)],
)  # fmt: skip
def test_a_run_that_somebody_else_wrote_is_one_message(column: str, value: object, store: Store) -> None:
    run = new(store)
    with closing(sqlite3.connect(store.path)) as db:
        db.execute(f"UPDATE runs SET {column} = ?", (value,))
        db.commit()
    for read in (store.runs, lambda: store.run(run)):
        with pytest.raises(ResultError, match=r"A row of the store .*runs\.db cannot be read"):
            read()


@pytest.mark.parametrize("sums", ["{}", '["a", "b", "c"]', "[1.0]", "[[1], 2, 3]", "nan"])
def test_a_loss_that_somebody_else_wrote_is_one_message(sums: str, store: Store) -> None:
    store.add_loss(OF, Plan(), LOSS, new(store))
    with closing(sqlite3.connect(store.path)) as db:
        db.execute("UPDATE losses SET sums = ?", (sums,))
        db.commit()
    with pytest.raises(ResultError, match=r"A row of the store"):
        store.lookup(PlanLossKey(OF, Plan()))


def test_facts_are_of_their_kind(store: Store) -> None:
    key, run = ChoicesKey("m", Plan(), "float32", "t"), new(store)
    store.add(key, [1.0, 2.0], run)
    assert store.lookup(key) == [1.0, 2.0]
    with closing(sqlite3.connect(store.path)) as db:
        db.execute("""UPDATE facts SET value = '{"a": 1}'""")
        db.commit()
    with pytest.raises(ResultError):
        store.lookup(key)
