"""Stores and servers for the tests of the dashboard."""

from __future__ import annotations

import json
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from browser import Tab

from billhook.dashboard.listing import Listing
from billhook.dashboard.server import make_app
from billhook.runs.store import Store

WIDE = 8  # columns of the table of events
CHILD = Path(__file__).with_name("live_child.py")


@dataclass(frozen=True)
class Served:
    """A dashboard in a thread of this process."""

    address: str
    server: uvicorn.Server

    def busy(self) -> int:
        """How many requests are being answered."""
        return len(self.server.server_state.tasks)


@contextmanager
def served(store: Path) -> Iterator[Served]:
    """A dashboard of a store."""
    ending = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        app = make_app(Listing(store.resolve()), ending.is_set)
        config = uvicorn.Config(app, log_level="critical", lifespan="off", ws="none", http="h11", loop="asyncio")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield Served(f"http://127.0.0.1:{listening.getsockname()[1]}", server)
        finally:
            ending.set()
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def faults(tab: Tab) -> list[dict[str, Any]]:
    """What a page complains of. The stream of the page before, which ends with it, is none."""
    return [each for each in tab.complaints() if not each["params"].get("canceled")]


def until(what: Any, seconds: float = 20.0) -> Any:
    """The first true value of a function."""
    end = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
    return value


def clones(store: Path, run: str, many: int, **columns: Any) -> None:
    """Put copies of a run into its store, each with a time, a text of its result and events of its own."""
    with closing(sqlite3.connect(store)) as db:
        db.row_factory = sqlite3.Row
        row = dict(db.execute("SELECT * FROM runs WHERE id = ?", (run,)).fetchone()) | columns
        events = [tuple(r) for r in db.execute("SELECT * FROM events WHERE run = ?", (run,))]
        for number in range(many):
            new = f"r{number:06x}"
            values = row | {"id": new, "created": row["created"] + number + 1, "result": row["result"] + " " * number}
            db.execute(
                f"INSERT INTO runs ({','.join(values)}) VALUES ({','.join('?' * len(values))})", (*values.values(),)
            )
            db.executemany(f"INSERT INTO events VALUES (?{',?' * (WIDE - 1)})", [(new, *rest) for _, *rest in events])
        db.commit()


def edited(store: Path, run: str, change: Any) -> None:
    """Change what a run was asked and what it found: `change(recipe, result)` edits both."""
    with closing(sqlite3.connect(store)) as db:
        recipe, result = (
            json.loads(t) for t in db.execute("SELECT recipe, result FROM runs WHERE id = ?", (run,)).fetchone()
        )
        change(recipe, result)
        db.execute("UPDATE runs SET recipe = ?, result = ? WHERE id = ?", (json.dumps(recipe), json.dumps(result), run))
        db.commit()


@dataclass
class Child:
    """A process that works on a run as a pruning does, a step for every line that it is sent."""

    process: subprocess.Popen[str]
    run: str

    @staticmethod
    def begun(store: Path, like: str, run: str = "") -> Child:
        """A new run, or an old one resumed; it ends with the result of the run `like`."""
        command = [sys.executable, str(CHILD), str(store), like, run]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        assert process.stdout is not None
        return Child(process, process.stdout.readline().strip())

    def step(self) -> str:
        """One more step; what it was."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.close()

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()
        self.process.wait()


def all_runs(store: Path) -> dict[str, str]:
    """State by run, as the store says."""
    with closing(Store(store, read_only=True)) as opened:
        return {run.id: run.state for run in opened.runs()}
