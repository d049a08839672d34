"""How a search will end, told in the terminal while it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from billhook.core.events import OUTLOOK, Event, EventListener

if TYPE_CHECKING:
    from billhook.core.outlook.search_end import SearchTrace

FIRST_SECONDS = 10.0  # of a search, in which nothing is forecast: shorter ones need it not
SHARE = 0.02  # of the time of a search that its forecasts may take


class SearchOutlook:
    """A listener that forecasts the end of a pruning's search after its rounds, and hands it on to `show`.

    It reads what the live page reads, from the store. It waits after each forecast, so that all of them take at most a
    share of the time. A forecast that fails is told once, and never fails the run.
    """

    hears_all = True  # rounds, which are stored and not shown

    def __init__(self, show: EventListener, clock: Callable[[], float] = time.monotonic) -> None:
        self._show, self._clock = show, clock
        self._of: tuple[Path, str] | None = None
        self._earlier: Sequence[SearchTrace] | None = None
        self._next: float | None = None

    def run_begins(self, store: Path, run: str) -> None:
        """Follow this run from now on."""
        self._of, self._earlier, self._next = (store, run), None, None

    def __call__(self, event: Event) -> None:
        """Forecast after a round, if it is time; take the forecast away when the search ends."""
        if event.stage == "search" and "seconds" in event.values:
            self._show(Event(OUTLOOK))
        if event.stage != "round" or self._of is None:
            return
        now = self._clock()
        if self._next is None:
            self._next = now + FIRST_SECONDS
        if now < self._next:
            return
        try:
            words = self._words(*self._of)
        except Exception as error:  # of a store that is busy, damaged or gone
            self._of, words = None, f"its end cannot be forecast ({type(error).__name__}: {error})"
        self._next = self._clock() + (self._clock() - now) / SHARE
        if words:
            self._show(Event(OUTLOOK, values={"words": words}))

    def _words(self, store: Path, run: str) -> str:
        """The forecast in a line; empty where it is too early, or where the run is no pruning."""
        from billhook.core.results.specs import PRUNE
        from billhook.report.outlook.words import search_line
        from billhook.runs.store import Store
        from billhook.studies.outlook.reading import ended_searches, search_forecast

        with closing(Store(store, read_only=True)) as opened:
            own = opened.run(run)
            if own.kind != PRUNE:
                self._of = None
                return ""
            if self._earlier is None:
                self._earlier = ended_searches(opened, str(own.spec.get("search")))
            forecast = search_forecast(opened, own, lambda: self._earlier or ())
        return "" if forecast is None else search_line(forecast)
