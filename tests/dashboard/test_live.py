"""Events: what changes reaches the page, once, and after a lost line what changed meanwhile."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import Tab
from dashboards import Child, Served, all_runs, clones, faults, served, until

from billhook.core.events import Event
from billhook.dashboard import live
from billhook.dashboard.listing import Listing, Seen, changed, opened, seen_in
from billhook.dashboard.progress import progress_of
from billhook.runs import tag
from billhook.runs.store import Store


def newest(store: Path) -> str:
    return Listing(store).runs()[0].id


@contextmanager
def messages(here: Served, path: str, **headers: str) -> Iterator[Iterator[tuple[str, dict[str, str]]]]:
    """The events of a stream, as (id, parts)."""

    def read(answer: httpx.Response) -> Iterator[tuple[str, dict[str, str]]]:
        told: dict[str, str] = {}
        for line in answer.iter_lines():
            name, _, value = line.partition(": ")
            if line:
                told[name] = value
            elif told.get("event") == "parts":
                yield told["id"], json.loads(told["data"])
                told = {}

    address, more = f"{here.address}{path}", {"trust_env": False, "timeout": 20}
    with httpx.stream("GET", address, headers=headers, **more) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield read(answer)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the server found at each of its looks: what changes before the first is told with all the rest."""
    found, look = [], live._news

    def heard(*given: Any) -> Any:
        found.append(look(*given))
        return found[-1]

    monkeypatch.setattr(live, "_news", heard)
    return found


def test_what_changes_is_told_and_nothing_twice(store: Path, looks: list[Any]) -> None:
    run, since = newest(store), seen_in(Listing(store).runs())
    with served(store) as here, messages(here, f"/events?since={since}") as told:
        until(lambda: bool(looks))
        with closing(Store(store)) as opened_store:
            new = opened_store.new_run("prune", {"model": "m", "remove": "1sites"}, {}, "out")
        _, parts = next(told)
        assert list(parts) == [f"row-{new}"]
        assert "interrupted" in parts[f"row-{new}"], "no process holds it"
        tag(run, ["good"], store=store)
        _, parts = next(told)
        assert list(parts) == [f"row-{run}"]
        assert ">good<" in parts[f"row-{run}"]
        with closing(Store(store)) as opened_store:
            opened_store.add_event(new, Event("search", 3, 10), at_once=True)
        number, parts = next(told)
        assert list(parts) == [f"row-{new}"]
        assert number == str(seen_in(Listing(store).runs()))


def test_a_lost_line_is_taken_up_where_it_was_lost(store: Path) -> None:
    with served(store) as here:
        with closing(Store(store)) as opened_store:
            new = opened_store.new_run("prune", {"model": "m", "remove": "1sites"}, {}, "out")
            with messages(here, "/events") as told:
                last, parts = next(told)
                assert len(parts) == len(Listing(store).runs()), "who has seen nothing gets everything"
            opened_store.add_event(new, Event("search", 3, 10), at_once=True)
        with messages(here, "/events?since=0-0", **{"Last-Event-ID": last}) as told:
            last, parts = next(told)
            assert list(parts) == [f"row-{new}"]
        until(lambda: not here.busy())  # the streams ended with their readers


def test_of_one_run_its_own_news_alone(store: Path, looks: list[Any]) -> None:
    first, second = (run.id for run in Listing(store).runs()[:2])
    since = seen_in(Listing(store).runs())
    with served(store) as here, messages(here, f"/events/{first}?since={since}") as told:
        until(lambda: bool(looks))
        tag(second, ["other"], store=store)
        tag(first, ["mine"], store=store)
        _, parts = next(told)
        assert list(parts) == ["run"]
        assert ">mine<" in parts["run"]
        assert ">other<" not in parts["run"]


def test_a_heart_beats_while_nothing_happens(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "LOOK_SECONDS", 0.01)
    since = seen_in(Listing(store).runs())
    with served(store) as here, httpx.stream("GET", f"{here.address}/events?since={since}", trust_env=False) as answer:
        assert next(line for line in answer.iter_lines() if line.startswith(":")) == ": here"


@pytest.mark.parametrize("written", ["", "x", "1", "1-", "-1-2", "1-2-3", "9" * 40 + "-1", "٣-1"])
def test_what_is_no_id_has_seen_nothing(store: Path, written: str) -> None:
    runs = Listing(store).runs()
    assert Seen.parse(written) == Seen(-1, -1)
    assert changed(runs, Seen.parse(written)) == runs
    assert changed(runs, Seen.parse(str(seen_in(runs)))) == []


def test_progress_is_that_of_the_events(store: Path) -> None:
    clock = iter(range(1000, 2000))
    with closing(Store(store, clock=lambda: float(next(clock)))) as opened_store:
        run = opened_store.new_run("prune", {"model": "m", "remove": "2sites"}, {}, "out")
        for event in (
            Event("load", 0), Event("load", 1, 1), Event("search", 0), Event("search", 2, 40),
            Event("search", 6, 40, {"removed_sites": 1, "target_sites": 2}),
            Event("round", 8, 40, {"removed": "mlp.1", "narrowed": "mlp.2=5", "loss": 0.5}),
            Event("search", 18, 40, {"removed_sites": 1, "target_sites": 2}),
        ):  # fmt: skip
            opened_store.add_event(run, event, at_once=True)
    with opened(store) as db:
        found = progress_of(db, store, run)
    assert found is not None
    assert (found.now.stage, found.now.done, found.now.total, found.began) == ("search", 18, 40, 1000.0)
    assert found.rate == pytest.approx(18 / 4), "since the search began, at 1002"
    assert found.left == pytest.approx((40 - 18) / (18 / 4))
    assert found.removed == (1.0, 2.0, "sites")
    assert [(each.removed, each.narrowed, each.loss) for each in found.rounds] == [(("mlp.1",), ("mlp.2=5",), 0.5)]
    assert found.disk_free > 0


# -- a run from start to end, in a browser ----------------------------------------------------------------------------


def words_of(tab: Tab) -> str:
    return str(tab.run("document.querySelector('main').innerText"))


def shows(tab: Tab, words: str) -> Any:
    return until(lambda: words in words_of(tab))


def test_a_run_is_watched_through_a_kill_and_a_resume(store: Path, tab: Tab) -> None:
    like = next(run for run in Listing(store).runs() if run.out.endswith("four"))
    child = Child.begun(store, like.id)
    with served(store) as here:
        tab.open(f"{here.address}/runs/{child.run}", 1440, "light")
        tab.run("window.same = true")
        shows(tab, "It has not begun to measure")
        while child.step() != "round":
            pass
        shows(tab, "Gone so far: 1 attention site, loss 0.02")
        assert "5 of 30" in words_of(tab)
        child.step()
        assert child.step() == "round"
        shows(tab, "1 attention site and 1 mlp site")
        drawn = "echarts.getInstanceByDom(document.querySelector('.plot')).getOption().series"
        losses = f"{drawn}.find(each => each.type === 'custom').data.map(each => each.value[1])"
        assert until(lambda: tab.run(losses) == [0.02, 0.05])
        child.kill()
        shows(tab, "Interrupted while searching")
        assert all_runs(store)[child.run] == "interrupted"
        child = Child.begun(store, like.id, child.run)
        assert child.step() == "load"
        shows(tab, "Running for")
        shows(tab, "attempt 2")
        while child.step() != "done":
            pass
        child.close()
        shows(tab, "Quality against size")
        shows(tab, "pruned")
        assert until(lambda: tab.run("!!document.querySelector('.state.done')"))
        assert tab.run("window.same"), "the page was not loaded again"
        assert tab.run("[...document.querySelectorAll('.plot')].every(each => echarts.getInstanceByDom(each))")
        assert faults(tab) == []
        assert all(url.startswith(here.address) for url in tab.requests())


def test_the_list_moves_with_its_runs(store: Path, tab: Tab) -> None:
    clones(store, next(iter(Listing(store).runs())).id, 3)
    with served(store) as here:
        tab.open(f"{here.address}/", 1440, "dark")
        tab.run("window.same = true, document.querySelector('#rows input').click()")
        child = Child.begun(store, newest(store))
        row = f"document.querySelector('#row-{child.run}')"
        until(lambda: tab.run(f"{row}?.dataset.state") == "running")
        assert tab.run(f"document.querySelector('#rows').rows[0] === {row}"), "the newest is first"
        for _ in range(4):
            child.step()
        until(lambda: tab.run(f"{row}.querySelector('progress')?.value") == 5)
        assert "of 3 sites removed" in tab.run(f"{row}.textContent")
        child.process.send_signal(signal.SIGKILL)
        child.close()
        until(lambda: tab.run(f"{row}.dataset.state") == "interrupted")
        assert tab.run("window.same && document.querySelectorAll('#rows input:checked').length") == 1
        assert faults(tab) == []
