"""Workers that call their coordinator over a network: who they are is proved by a secret key, in both directions.

What follows is neither encrypted nor signed, so that the network between the machines has to be trusted.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge
from typing import Any

from billhook.core.errors import UsageError, option

MOST_BYTES = 16  # of the number that a worker says
KEEP_ALIVE = (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 60_000))


@dataclass(frozen=True, slots=True)
class Address:
    """Where a coordinator is called, and the key that both sides prove to have."""

    host: str
    port: int
    key: bytes


class Reception:
    """Place where workers call. `admit` gets each worker's number and connection, in a thread of its own.

    - `host`: name or address of this machine, as workers reach it; only there it listens. Empty: on all, by its name.
    - `port`: 0 takes a free one.

    Raises UsageError where the host or the port is not this machine's to use.
    """

    def __init__(self, host: str, port: int, admit: Callable[[int, Connection[Any, Any]], None]) -> None:
        try:
            self._listener = socket.create_server((host or "0.0.0.0", port), backlog=128)
        except (OSError, OverflowError) as error:
            raise UsageError(
                f"Workers cannot call this machine as {host or 'any address'}, port {port} ({error}). Give an address "
                f"of this machine and a free port: {option('workers', 'slurm:n=16,host=10.0.0.1,port=5555')}."
            ) from error
        self._admit = admit
        self.address = Address(host or socket.gethostname(), int(self._listener.getsockname()[1]), os.urandom(32))
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more calls. A second time does nothing."""
        with suppress(OSError):  # what waits in `accept` wakes up
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError:
                return
            line: Connection[Any, Any] = Connection(caller.detach())
            threading.Thread(target=self._receive, args=(line,), daemon=True).start()

    def _receive(self, line: Connection[Any, Any]) -> None:
        """Admit a caller that has the key; nothing else of a stranger is read."""
        with suppress(AuthenticationError, EOFError, OSError, ValueError), line:
            deliver_challenge(line, self.address.key)
            answer_challenge(line, self.address.key)
            keep_alive(line)
            self._admit(int(line.recv_bytes(MOST_BYTES)), line)


def call(address: Address, number: int) -> Connection[Any, Any]:
    """Call a coordinator as one of its workers. Raises AuthenticationError, or OSError where it cannot be reached."""
    line: Connection[Any, Any] = Client((address.host, address.port), authkey=address.key)
    keep_alive(line)
    line.send_bytes(str(number).encode())
    return line


def keep_alive(line: Connection[Any, Any]) -> None:
    """Let a connection end within two minutes of the loss of the other machine."""
    with socket.socket(fileno=os.dup(line.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        same.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for name, value in KEEP_ALIVE:
            if hasattr(socket, name):
                same.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def hang_up(line: Connection[Any, Any]) -> None:
    """End a connection for both sides, also for a thread that reads from it."""
    with suppress(OSError), socket.socket(fileno=os.dup(line.fileno())) as same:
        same.shutdown(socket.SHUT_RDWR)
