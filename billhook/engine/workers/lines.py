"""Lines between a coordinator and its workers, however these are started."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

from billhook.engine.workers.messages import Answer, Lost, Message


class Inbox(Protocol):
    """Where the answers of workers arrive."""

    def put(self, item: tuple[int, Answer], /) -> None:
        """Take an answer, with the number of its worker."""


class Line(Protocol):
    """Line to one worker. Its answers arrive in an inbox; the last one is `Lost`."""

    def send(self, message: Message) -> None:
        """Send a message. To a worker that is lost, nothing is sent."""

    def close(self) -> None:
        """End the worker. A second time does nothing."""


Hire = Callable[[Inbox], Sequence[Line]]  # starts workers 1, 2, …, whose answers arrive in the inbox


@dataclass(frozen=True, slots=True)
class Hiring:
    """How the workers of a team are started.

    - `others`: how many; the team's own process is one more.
    - `hire`: starts them.
    - `threads`: of torch in each; None leaves them as they are. `shared`: the team's own process has as many.
    """

    others: int
    hire: Hire
    threads: int | None = None
    shared: bool = False


def listen(number: int, line: Connection[Any, Any], inbox: Inbox, why: Callable[[], str]) -> None:
    """Hand what a worker answers to the inbox until its connection ends; then why it ended, unless it said that."""
    said: Answer | None = None
    try:
        while True:
            said = pickle.loads(line.recv_bytes())
            inbox.put((number, said))
    except (EOFError, OSError):
        reason = "" if isinstance(said, Lost) else why()
    except Exception as error:  # of another version: nothing else is read from it
        reason = f"its answers cannot be read: {type(error).__name__}: {error}"
    if not isinstance(said, Lost):
        inbox.put((number, Lost(reason)))


def last_line(log: str) -> str:
    """Return the last line of a worker's log behind a comma, for a message; empty if there is none."""
    lines = log.strip().splitlines()
    return f", {lines[-1].strip()[:200]}" if lines else ""
