"""Events: the progress of a run as values, and their listeners."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

EventValue = float | int | str


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


def fan_out(*listeners: EventListener) -> EventListener:
    """Return a listener that hands every event to all `listeners`, in order."""

    def hand_on(event: Event) -> None:
        for listen in listeners:
            listen(event)

    return hand_on


def scaled_events(watch: EventListener, before: int, total: int) -> EventListener:
    """Return a listener for one part of a whole of `total` units, `before` of which are done."""
    return lambda event: watch(replace(event, done=before + event.done, total=total))
