"""Workers as actors of a Ray cluster, which carries their messages."""

from __future__ import annotations

import logging
import os
import queue
import threading
from typing import Any

from billhook.core.errors import UsageError, option
from billhook.engine.workers.crew import MOST, Crew
from billhook.engine.workers.lines import Hiring, Inbox, Line
from billhook.engine.workers.messages import Lost, Message
from billhook.engine.workers.worker import Worker


class ActorLine:
    """Line to an actor, a handle of `Worker` that Ray starts."""

    def __init__(self, number: int, inbox: Inbox, actor: Any) -> None:
        self._number, self._inbox, self.actor, self._open = number, inbox, actor, True
        self._calls: queue.SimpleQueue[Any] = queue.SimpleQueue()  # streams of references to answers; None at the end
        threading.Thread(target=self._listen, daemon=True).start()

    def send(self, message: Message) -> None:
        """Send a message. To an actor that is lost, nothing is sent."""
        if self._open:
            self._calls.put(self.actor.answers.remote(message))

    def close(self) -> None:
        """End the actor. A second time does nothing."""
        import ray

        self._open = False
        self._calls.put(None)
        ray.kill(self.actor)

    def _listen(self) -> None:
        """Hand what the actor answers to the inbox, call by call, and at its end why it ended."""
        import ray

        try:
            while self._open and (call := self._calls.get()) is not None:
                for reference in call:
                    answer = ray.get(reference)
                    self._inbox.put((self._number, answer))
                    if isinstance(answer, Lost):
                        return self.close()
        except Exception as error:  # of the actor, its machine or its cluster
            self._open = False
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            self._inbox.put((self._number, Lost(f"{type(error).__name__}: {' '.join(lines)[:300]}")))
        return None


def hiring(crew: Crew, gpus: int) -> Hiring:
    """Return how actors of the cluster are started that this process can reach, with `gpus` each.

    Raises UsageError where there is no cluster, or none with room for a worker.
    """
    import ray

    connect()
    cpus = crew.cpus or 1
    free = ray.available_resources()
    room = int(min(free.get("CPU", 0) // cpus, free.get("GPU", 0) // gpus if gpus else MOST))
    if crew.others is None and room < 1:
        raise UsageError(
            f"The Ray cluster has {free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs free, and a worker needs "
            f"{cpus} and {gpus}. Wait, add machines, or say how many workers shall come: {option('workers', 'ray:n=4')}"
        )
    kind = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0)(Worker)

    def hire(inbox: Inbox) -> list[Line]:
        return [ActorLine(number, inbox, kind.remote()) for number in range(1, others + 1)]

    others = min(MOST, room) if crew.others is None else crew.others
    return Hiring(others, hire, crew.cpus)


def connect() -> None:
    """Connect this process to a Ray cluster, if it is not: that of RAY_ADDRESS, else one that runs on this machine."""
    import ray

    if ray.is_initialized():
        return
    advice = (
        "Start one with `ray start --head`, set RAY_ADDRESS to HOST:6379, or run the command in the cluster: "
        "ray job submit -- billhook prune …"
    )
    if "://" in (address := os.environ.get("RAY_ADDRESS", "")):
        raise UsageError(f"RAY_ADDRESS is {address}, of a cluster that this process is no part of. {advice}")
    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200].rstrip(".")
        raise UsageError(f"No Ray cluster was reached ({reason}). {advice}") from error
