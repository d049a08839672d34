"""A worker, wherever it runs; and the process of one on the coordinator's machine, which ends with it."""

from __future__ import annotations

import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch
import transformers

from billhook.core.errors import BillhookError
from billhook.engine.workers.messages import Answer, Desk, Lost, Message, Start, hello_of
from billhook.models.load import Teacher, load


class Worker:
    """A worker: it loads the model of the first message, then does what the others say."""

    def __init__(self) -> None:
        self._desk: Desk | None = None

    def answers(self, message: Message) -> Iterator[Answer]:
        """Do what a message says, and yield the answers. `Lost` is the last one of a worker that cannot go on."""
        try:
            if isinstance(message, Start):
                self._desk = Desk(_loaded(message))
                yield hello_of(self._desk.teacher)
            else:
                assert self._desk is not None
                yield from self._desk.answers(message)
        except BillhookError as error:
            yield Lost(str(error))
        except Exception as error:  # whatever it is, others can go on
            traceback.print_exc()
            yield Lost(f"{type(error).__name__}: {error}")


def serve(line: Connection[Any, Any]) -> None:
    """Be a worker that answers over a connection, until it cannot go on. With the connection this process ends."""
    messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(line, messages), daemon=True).start()
    worker = Worker()
    with suppress(OSError):  # nobody reads any more
        while True:
            for answer in worker.answers(messages.get()):
                line.send_bytes(pickle.dumps(answer))
                if isinstance(answer, Lost):
                    return


def _listen(line: Connection[Any, Any], messages: queue.SimpleQueue[Message]) -> None:
    """Take messages from a connection. Once it is closed, end this process at once, whatever it computes."""
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
    os.dup2(2, 1)  # what libraries print is no answer
    transformers.utils.logging.disable_progress_bar()  # the last line of the log says why this process ended
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, which the coordinator answers
    serve(Connection(int(sys.argv[1])))
