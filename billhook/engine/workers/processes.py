"""Workers as processes of this machine: on visible GPUs of their own, or on a share of the CPU's threads."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import IO, Any

import torch

from billhook.core.errors import ResourceError, UsageError, option
from billhook.engine.workers.lines import Hiring, Inbox, Line, last_line, listen
from billhook.engine.workers.messages import Message
from billhook.models.device import SHARE_OF_FREE, child_environment, device_count, free_memory
from billhook.models.load import Teacher

SECONDS = 5.0  # for a process to end by itself


class ProcessLine:
    """Line to a process of this machine, which is started with `environment` on top of ours."""

    def __init__(self, number: int, inbox: Inbox, environment: Mapping[str, str]) -> None:
        self._number, self._inbox = number, inbox
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        line, theirs = Pipe()
        self._line: Connection[Any, Any] = line
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "billhook.engine.workers.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
            env={**child_environment(), **environment},
        )  # fmt: skip
        theirs.close()
        threading.Thread(target=self._listen, daemon=True).start()

    def send(self, message: Message) -> None:
        """Send a message. To a process that has ended, nothing is sent."""
        with suppress(OSError):
            self._line.send_bytes(pickle.dumps(message))

    def close(self) -> None:
        """End the process. A second time does nothing."""
        self.process.terminate()
        try:
            self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _listen(self) -> None:
        """Hand what the process answers to the inbox, and at its end why it ended."""
        with self._line, self._log:
            listen(self._number, self._line, self._inbox, self._why)

    def _why(self) -> str:
        """Return how the process ended, and the last line that it wrote."""
        code = self.process.wait()
        self._log.seek(0)
        ended = f"signal {-code}" if code < 0 else f"exit status {code}"
        return ended + last_line(self._log.read().decode(errors="replace"))


def hiring(workers: int, teacher: Teacher) -> Hiring:
    """Return how `workers` processes of this machine are started, of which this one is the first.

    On a CPU they share the threads that torch uses here. Raises as `environments`.
    """
    places = environments(workers, teacher)
    threads = max(1, torch.get_num_threads() // workers) if teacher.device.type == "cpu" else None

    def hire(inbox: Inbox) -> list[Line]:
        return [ProcessLine(number, inbox, place) for number, place in enumerate(places, 1)]

    return Hiring(workers - 1, hire, threads, shared=True)


def environments(workers: int, teacher: Teacher) -> list[dict[str, str]]:
    """Return the environment of each worker but the coordinator, which has loaded `teacher`.

    On CUDA each sees as many GPUs as hold the teacher, and no other worker sees them. Raises UsageError where there
    are fewer, and ResourceError where the machine's memory has no room for a model in each.
    """
    device, own = teacher.device, {each.index or 0 for each in teacher.devices}
    if device.type == "cpu":
        room = int(SHARE_OF_FREE * free_memory(device)) // max(1, teacher.weight_bytes)
        if workers - 1 > room:
            raise ResourceError(
                f"Each worker loads the model, which takes {teacher.weight_bytes / 1e9:,.1f} GB, and "
                f"{free_memory(device) / 1e9:,.1f} GB are free. Type {option('workers', room + 1)}, or less."
            )
        return [{} for _ in range(workers - 1)]
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    count = device_count(device)
    names = visible if len(visible) == count else [str(number) for number in range(count)]
    if workers > 1 and workers * len(own) > count:
        kind = "GPU that torch sees" if count == 1 else "GPUs that torch sees"
        each = "a GPU" if len(own) == 1 else f"{len(own)} GPUs"
        raise UsageError(
            f"{option('workers', workers)} needs {each} for each worker, and there are {count} {kind}. Type "
            f"{option('workers', count // len(own))}, or {option('device', 'cpu')}."
        )
    others = [name for number, name in enumerate(names) if number not in own]
    sets = [",".join(others[worker * len(own) : (worker + 1) * len(own)]) for worker in range(workers - 1)]
    return [{"CUDA_VISIBLE_DEVICES": each} for each in sets]
