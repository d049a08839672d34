"""Workers as processes of this machine: one a visible GPU, or on a share of the CPU's threads."""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import IO, Any, Protocol

from billhook.core.errors import ResourceError, UsageError, option
from billhook.engine.workers.messages import Answer, Lost, Message
from billhook.models.device import SHARE_OF_FREE, child_environment, device_count, free_memory
from billhook.models.load import Teacher

Inbox = queue.SimpleQueue[tuple[int, Answer]]  # answers with the number of their worker
SECONDS = 5.0  # for a process to end by itself


class Line(Protocol):
    """Line to one worker. Its answers arrive in an inbox; the last one is `Lost`."""

    def send(self, message: Message) -> None:
        """Send a message. To a worker that is lost, nothing is sent."""

    def close(self) -> None:
        """End the worker. A second time does nothing."""


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
        said: Answer | None = None
        with self._line, self._log:
            try:
                while True:
                    said = pickle.loads(self._line.recv_bytes())
                    self._inbox.put((self._number, said))
            except (EOFError, OSError):
                code = self.process.wait()
            if not isinstance(said, Lost):
                ended = f"signal {-code}" if code < 0 else f"exit status {code}"
                self._inbox.put((self._number, Lost(f"{ended}{self._last_line()}")))

    def _last_line(self) -> str:
        """Return the last line that the process wrote, for a message."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return f", {lines[-1].strip()[:200]}" if lines else ""


def environments(workers: int, teacher: Teacher) -> list[dict[str, str]]:
    """Return the environment of each worker but the coordinator, which has loaded `teacher`.

    On CUDA each sees one GPU. Raises UsageError where there are fewer GPUs than workers, and ResourceError where the
    machine's memory has no room for a model in each.
    """
    device = teacher.device
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
    if workers > count:
        kind = "GPU that torch sees" if count == 1 else "GPUs that torch sees"
        raise UsageError(
            f"{option('workers', workers)} needs a GPU for each worker, and there are {count} {kind}. Type "
            f"{option('workers', count)}, or {option('device', 'cpu')}."
        )
    del names[device.index or 0]  # the coordinator's
    return [{"CUDA_VISIBLE_DEVICES": name} for name in names[: workers - 1]]
