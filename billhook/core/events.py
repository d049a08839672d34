"""Events: the progress of a run as values, and their listeners."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

EventValue = float | int | str

ALERT = "alert"  # the stage of events that tell of alerts


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
    for listen in watch.listeners if isinstance(watch, _FanOut) else (watch,):
        if isinstance(listen, _FanOut):
            hear_all(listen, event)
        elif getattr(listen, "hears_all", False):
            listen(event)


def scaled_events(watch: EventListener, before: int, total: int) -> EventListener:
    """Return a listener for one part of a whole of `total` units, `before` of which are done."""
    return lambda event: watch(replace(event, done=before + event.done, total=total))
