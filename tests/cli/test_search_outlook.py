"""The forecast of a search in the terminal: what the live page says, seldom, on few columns, and never fatal."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from io import StringIO
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from made_runs import FINGERPRINT, a_run, file_run

from billhook import api
from billhook.cli import progress
from billhook.cli.search_outlook import FIRST_SECONDS, SHARE, SearchOutlook
from billhook.cli.visible_console import VisibleConsole
from billhook.core.events import OUTLOOK, Event
from billhook.core.outlook.search_end import SearchForecast
from billhook.core.plan import Site
from billhook.report.outlook.words import search_line
from billhook.runs.store import Store
from billhook.studies.outlook.reading import ended_searches, search_forecast

ROUND = Event("round", 10, 200, {"removed": "mlp.0", "narrowed": "", "loss": 0.02})
END = Event("search", 1, 1, {"seconds": 50.0})
LONG = search_line(SearchForecast(5000.0, 9e4, 7e4, 1.2e5, 0.9, 1.2345, 1.1111, 1.3333, 8, 120, "this store"))


def searched(store: Path, seconds: float, until: float = 1.0) -> str:
    """A run whose search went on evenly for so long."""
    run, clock = file_run(store, a_run(), done=until == 1.0), [1000.0]
    with closing(Store(store, clock=lambda: clock[0])) as opened:
        opened.add_event(run, Event("search"), at_once=True)
        for i in range(1, int(20 * until) + 1):
            clock[0] += seconds / 20
            values = {"removed_params": 5 * (i - 1), "target_params": 100, "objective": "kl", "lowest": 0.1}
            opened.add_event(run, Event("search", 10 * i, 200, values), at_once=True)
            names = ",".join(str(Site(b, "mlp")) for b in range(i))
            found = {"removed": names, "narrowed": "", "loss": 0.02 * i}
            opened.add_event(run, Event("round", 10 * i, 200, found), at_once=True)
        if until == 1.0:
            opened.add_event(run, END, at_once=True)
    return run


@pytest.fixture
def store(tmp_path: Path) -> Path:
    for seconds in (50.0, 55.0, 48.0):
        searched(tmp_path / "runs.db", seconds)
    return tmp_path / "runs.db"


def following(store: Path, run: str, clock: Iterator[float]) -> tuple[SearchOutlook, list[Event]]:
    shown: list[Event] = []
    outlook = SearchOutlook(shown.append, clock=lambda: next(clock))
    outlook.run_begins(store, run)
    return outlook, shown


def test_it_says_after_a_round_what_the_live_page_says(store: Path) -> None:
    run = searched(store, 300.0, 1 / 3)
    outlook, shown = following(store, run, count(0.0, FIRST_SECONDS))
    outlook(ROUND)
    assert shown == [], "the search has just begun"
    outlook(Event("evaluate", 1, 2))
    outlook(ROUND)
    with closing(Store(store, read_only=True)) as opened:
        told = search_forecast(opened, opened.run(run), lambda: ended_searches(opened, "swap"))
    assert told is not None
    assert told.left == pytest.approx(200.0, rel=0.3)
    assert shown == [Event(OUTLOOK, values={"words": search_line(told)})]
    assert "past forecasts" in search_line(told)
    outlook(END)
    assert shown[1:] == [Event(OUTLOOK)], "the search has ended, and with it the forecast"


def test_forecasts_take_at_most_a_share_of_the_time(store: Path) -> None:
    run = searched(store, 300.0, 1 / 3)
    times = [0.0, FIRST_SECONDS, FIRST_SECONDS + 3.0, FIRST_SECONDS + 3.0]  # the first forecast takes 3 seconds
    later = FIRST_SECONDS + 3.0 + 3.0 / SHARE
    outlook, shown = following(store, run, iter([*times, later - 1, later, later + 0.5, later + 0.5]))
    for _ in range(2):
        outlook(ROUND)
    assert len(shown) == 1
    outlook(ROUND)
    assert len(shown) == 1
    outlook(ROUND)
    assert len(shown) == 2


def test_it_never_fails_the_run(store: Path) -> None:
    run = searched(store, 300.0, 1 / 3)
    outlook, shown = following(store, run, count(0.0, FIRST_SECONDS))
    outlook(ROUND)
    store.unlink()
    for _ in range(3):
        outlook(ROUND)
    assert len(shown) == 1, "told once"
    assert str(shown[0].values["words"]).startswith("its end cannot be forecast (")


def test_a_pruning_tells_which_run_it_is_and_goes_on_as_without(model: Path, text: Path, tmp_path: Path) -> None:
    shown: list[Event] = []
    times = count(0.0, FIRST_SECONDS)
    outlook = SearchOutlook(shown.append, clock=lambda: next(times))
    told: dict[str, Any] = {
        "tokens": 128,
        "length": 32,
        "eval_tokens": 256,
        "eval_length": 64,
        "self_share": 0.0,
        "data": text,
    }
    asked: dict[str, Any] = {"remove": "3sites", "search": "greedy", "store": tmp_path / "runs.db"}
    result = api.prune(model, out=tmp_path / "out", watch=outlook, **asked, **told)
    assert outlook._of == (tmp_path / "runs.db", result.run)
    assert shown[-1] == Event(OUTLOOK), "the search has ended"
    assert not [event for event in shown if "cannot" in str(event.values.get("words", ""))]


def test_other_kinds_of_runs_have_no_forecast(store: Path) -> None:
    with closing(Store(store)) as opened:
        run = opened.new_run("sweep", {"model": "planted"}, {}, "out")
        opened.update(run, fingerprints={"model": FINGERPRINT})
    outlook, shown = following(store, run, count(0.0, FIRST_SECONDS))
    for _ in range(3):
        outlook(ROUND)
    assert shown == []
    nobody: list[Event] = []
    SearchOutlook(nobody.append)(ROUND)
    assert nobody == []


def test_the_forecast_is_whole_below_the_bars_of_80_columns() -> None:
    out = StringIO()
    watch, close = progress.bars_on(VisibleConsole(file=out, force_terminal=True, width=80, color_system=None))
    watch(Event("search", 5, 10, {"objective": "kl", "lowest": 0.1}))
    watch(Event(OUTLOOK, values={"words": LONG}))
    close()
    lines = [line.rstrip() for line in re.sub(r"\x1b\[[?0-9]*[A-Za-z]", "", out.getvalue()).splitlines()]
    last = max(i for i, line in enumerate(lines) if LONG.startswith(line) and line)
    assert " ".join(lines[last:]).strip() == LONG
    assert len(LONG) > 80
    assert max(map(len, lines)) <= 80


def test_counts_are_whole_on_80_columns_and_long_notes_are_cut() -> None:
    out = StringIO()
    watch, close = progress.bars_on(VisibleConsole(file=out, force_terminal=True, width=80, color_system=None))
    values = {"removed_params": 3.2, "target_params": 13.45, "objective": "kl", "lowest": 0.1}
    watch(Event("search", 5432, 10_300, values))
    close()
    told = re.sub(r"\x1b\[[?0-9]*[A-Za-z]", "", out.getvalue()).splitlines()[-1]
    assert "5432/10300" in told
    assert "3.200 of 13.450 par" in told
    assert told.rstrip().endswith("…")


def test_the_forecast_goes_with_the_search() -> None:
    out = StringIO()
    watch, close = progress.bars_on(VisibleConsole(file=out, force_terminal=True, width=80, color_system=None))
    watch(Event("search", 5, 10))
    watch(Event(OUTLOOK, values={"words": "soon"}))
    watch(Event(OUTLOOK))
    close()
    assert "soon" not in out.getvalue().rpartition("search ")[2]


def test_lines_without_a_terminal_are_few(capsys: pytest.CaptureFixture[str]) -> None:
    watch, close = progress.progress(quiet=False)
    for number in range(5):
        watch(Event(OUTLOOK, values={"words": f"forecast {number}"}))
    watch(Event(OUTLOOK))
    close()
    assert capsys.readouterr().err == "outlook forecast 0\n"
