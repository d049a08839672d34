"""The process of a worker: answers the messages of its coordinator over a pipe, and ends with it. Started by it."""

from __future__ import annotations

import os
import pickle
import queue
import signal
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

import torch

from billhook.core.errors import BillhookError
from billhook.engine.workers.messages import Desk, Lost, Message, Start, hello_of
from billhook.models.load import Teacher, load

Line = Connection  # to the coordinator


def main(handle: int) -> None:
    """Load the model of the first message, then answer the others until the pipe is closed."""
    os.dup2(2, 1)  # what libraries print is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, which the coordinator answers
    line: Connection[Any, Any] = Connection(handle)
    messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(line, messages), daemon=True).start()

    def say(answer: object) -> None:
        line.send_bytes(pickle.dumps(answer))

    try:
        first = messages.get()
        assert isinstance(first, Start)
        desk = Desk(_loaded(first))
        say(hello_of(desk.teacher))
        while True:
            for answer in desk.answers(messages.get()):
                say(answer)
    except OSError:  # nobody reads any more
        return
    except BillhookError as error:
        say(Lost(str(error)))
    except Exception as error:  # whatever it is, others can go on
        say(Lost(f"{type(error).__name__}: {error}"))
        raise


def _listen(line: Connection[Any, Any], messages: queue.SimpleQueue[Message]) -> None:
    """Take messages from the pipe. Once it is closed, end this process at once, whatever it computes."""
    try:
        while True:
            messages.put(pickle.loads(line.recv_bytes()))
    except (EOFError, OSError):
        os._exit(0)


def _loaded(start: Start) -> Teacher:
    if start.threads is not None:
        torch.set_num_threads(start.threads)
    return load(
        start.folder, device=start.device, dtype=start.dtype, memory=start.memory,
        trust_remote_code=start.trust_remote_code,
    )  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]))
