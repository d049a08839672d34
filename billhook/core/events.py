"""Progress of a run, as values: what a stage has done, and who listens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Event:
    """Progress of one stage: `done` of `total` units; `note` is what is known so far."""

    stage: str
    done: int = 0
    total: int | None = None
    note: str = ""


EventListener = Callable[[Event], None]


def ignore_events(event: Event) -> None:
    """A watcher that looks away."""


def scaled_events(watch: EventListener, before: int, total: int) -> EventListener:
    """What watches one part of a whole of `total`, of which `before` is done."""
    return lambda event: watch(replace(event, done=before + event.done, total=total))
