"""Events: the progress of a run as values, and their listeners."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

EventValue = float | int | str

ALERT = "alert"  # the stage of events that tell of alerts
OUTLOOK = "outlook"  # the stage of events that forecast, in `words`, how a search will end; without, it has ended


@dataclass(frozen=True, slots=True)
class Event:
    """Progress of one stage: `done` of `total` units, and current `values` by name."""

    stage: str
    done: int = 0
    total: int | None = None
    values: Mapping[str, EventValue] = field(default_factory=dict)


EventListener = Callable[[Event], None]


def ignore_events(event: Event) -> None:
    """Do nothing."""


@dataclass(frozen=True, slots=True)
class _FanOut:
    """A listener that hands every event to several ones, in order."""

    listeners: tuple[EventListener, ...]

    def __call__(self, event: Event) -> None:
        for listen in self.listeners:
            listen(event)


def fan_out(*listeners: EventListener) -> EventListener:
    """Return a listener that hands every event to all `listeners`, in order."""
    return _FanOut(listeners)


def hear_all(watch: EventListener, event: Event) -> None:
    """Hand an event that is stored, and that no terminal shows, to those behind `watch` that state `hears_all`."""
    for listen in _behind(watch):
        if getattr(listen, "hears_all", False):
            listen(event)


def begin_run(watch: EventListener, store: Path, run: str) -> None:
    """Tell those behind `watch` that have a method `run_begins` which run of which store they hear from now on."""
    for listen in _behind(watch):
        begins = getattr(listen, "run_begins", None)
        if begins is not None:
            begins(store, run)


def _behind(watch: EventListener) -> Iterator[EventListener]:
    """The listeners behind one that hands events on, else itself."""
    if isinstance(watch, _FanOut):
        for listen in watch.listeners:
            yield from _behind(listen)
    else:
        yield watch


def scaled_events(watch: EventListener, before: int, total: int) -> EventListener:
    """Return a listener for one part of a whole of `total` units, `before` of which are done."""
    return lambda event: watch(replace(event, done=before + event.done, total=total))
