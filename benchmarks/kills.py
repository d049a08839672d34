"""Shared searches whose workers, or whose whole command, are killed at random moments: what is found all the same.

    python benchmarks/kills.py --trials 30 --out kills.json

Both parts prune a random llama with a byte tokenizer. First a worker is killed at a moment drawn from the time that an
undisturbed search takes; the search goes on without it. Then `billhook prune … --workers 2` is killed at such a moment,
and resumed by `--resume`; `--pause` seconds after each batch of pieces that it stores leave its worker time to load.
Each trial is compared with an undisturbed search: the same plan, the largest gap of losses, pieces that were measured
twice though their answer was stored, and workers that outlive their command. With `--forked`, workers are forked
instead of started anew, which takes a tenth of the time. One JSON line a trial in `--out`; the summary on stdout.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, redirect_stderr, redirect_stdout
from copy import deepcopy
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import psutil
import torch

from billhook.cli.main import app
from billhook.core.budget import parse_budgets
from billhook.core.plan import Plan
from billhook.core.problem import Problem
from billhook.core.results.measured import Loss
from billhook.data.texts import read_texts
from billhook.data.token_sets import TokenSet, documents, pack_rows, special_prefix
from billhook.engine.measurements import DocumentIds, Known
from billhook.engine.probe import Probe
from billhook.engine.racing import Quality, Sums
from billhook.engine.workers import processes
from billhook.engine.workers.processes import hiring
from billhook.engine.workers.team import Team
from billhook.engine.workers.worker import serve
from billhook.methods.search import SEARCHES, drive
from billhook.models.load import Teacher, load
from billhook.runs.executor import Executor
from billhook.runs.store import Store

LENGTH = 64  # of a row
PIECES = "pieces.txt"  # what a command has stored, a line each
SECONDS = 20.0  # for a worker to end after its command
Row = dict[str, Any]


def main() -> None:
    """Kill, resume, compare, and sum up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=30, help="of each part")
    parser.add_argument("--workers", type=int, default=3, help="in the first part, with the searching process")
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--remove", default="4sites")
    parser.add_argument("--search", default="swap")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--pause", type=float, default=0.1)
    parser.add_argument("--forked", action="store_true")
    parser.add_argument("--parts", default="worker,command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    home, draw = Path(tempfile.mkdtemp()), random.Random(given.seed)
    size = ["--blocks", str(given.blocks), "--width", str(given.width), "--vocabulary", "512", "--dtype", "float32"]
    maker = Path(__file__).with_name("make_checkpoint.py")
    subprocess.run([sys.executable, maker, home / "model", *size], check=True, stdout=subprocess.DEVNULL)
    words = ["".join(draw.choices("abcdefgh ", k=2 * LENGTH)) for _ in range(given.tokens // LENGTH + 60)]
    (home / "texts.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in words))
    if given.forked:
        processes.subprocess = SimpleNamespace(  # type: ignore[attr-defined]
            Popen=Forked, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired
        )
    parts = {"command": _commands, "worker": _workers}  # the first forks, before torch has threads
    found: dict[str, list[Row]] = {}
    with given.out.open("a") as out:
        for name, part in ((name, part) for name, part in parts.items() if name in given.parts.split(",")):
            found[name] = []
            for row in part(given, home, draw):
                found[name].append(row)
                print(json.dumps({"part": name, **row}), file=out, flush=True)
    settings = {name: str(value) for name, value in vars(given).items()}
    print(json.dumps({name: _summary(rows) for name, rows in found.items()} | {"settings": settings}, indent=2))


def _summary(rows: Sequence[Row]) -> Row:
    return {
        "trials": len(rows),
        "when": Counter(row["when"] for row in rows),
        "same_plan": sum(row["same_plan"] for row in rows),
        "losses_compared": sum(row["compared"] for row in rows),
        "largest_gap_of_losses": max(row["gap"] for row in rows),
        "measured_twice": sum(row["twice"] for row in rows),
        "pieces_to_undisturbed": sum(row["pieces"] for row in rows) / sum(row["undisturbed"] for row in rows),
        "left_alive": sum(row["left_alive"] for row in rows),
    }


def _gap(found: Mapping[Any, Sequence[float]], expected: Mapping[Any, Sequence[float]]) -> Row:
    """How many losses both searches have, and their largest gap as a share of the loss."""
    both = [(sum(found[key]), sum(expected[key])) for key in found.keys() & expected.keys()]
    return {"compared": len(both), "gap": max(abs(a - b) / abs(b) for a, b in both)}


class Forked:
    """A worker that is forked from this process, which has imported all that it needs; in place of a `Popen`."""

    def __init__(self, command: Sequence[str], *, pass_fds: Sequence[int], stderr: IO[bytes], **_: object) -> None:
        (line,) = pass_fds
        self.pid = os.fork()
        if not self.pid:  # what else is open, such as the other end of the line, is not its own
            os.dup2(stderr.fileno(), 1)
            os.dup2(stderr.fileno(), 2)
            sys.stdout = sys.stderr = os.fdopen(1, "w")  # where what it had written to is closed
            os.closerange(3, line)
            os.closerange(line + 1, 1024)
            serve(Connection(line))
            os._exit(0)
        self._ended = threading.Event()
        self._code = 0
        threading.Thread(target=self._reap, daemon=True).start()

    def _reap(self) -> None:
        self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self._ended.set()

    def wait(self, timeout: float | None = None) -> int:
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired("worker", timeout or 0.0)
        return self._code

    def terminate(self) -> None:
        if not self._ended.is_set():
            os.kill(self.pid, signal.SIGTERM)

    kill = terminate


# -- workers --------------------------------------------------------------------------------------------------------


class Record:
    """A cache that recalls as the run store does, and counts how often each piece is measured."""

    def __init__(self) -> None:
        self.measured: Counter[tuple[Quality, Plan, DocumentIds]] = Counter()
        self.losses: dict[Plan, Loss] = {}
        self._pieces: dict[Plan, dict[Quality, dict[DocumentIds, Sums]]] = {}

    def lookup(self, plans: Sequence[Plan]) -> list[Known]:
        return [Known(self.losses.get(plan), deepcopy(self._pieces.get(plan, {}))) for plan in plans]

    def add_partial(self, quality: Quality, nats: Mapping[tuple[Plan, DocumentIds], Sums]) -> None:
        for (plan, ids), sums in nats.items():
            self.measured[quality, plan, ids] += 1
            self._pieces.setdefault(plan, {}).setdefault(quality, {})[ids] = sums

    def add(self, plan: Plan, loss: Loss) -> None:
        self.losses[plan] = loss


def _tokens(given: argparse.Namespace, home: Path, teacher: Teacher) -> TokenSet:
    texts = read_texts(str(home / "texts.jsonl"), "text", teacher.tokenizer)
    found = list(documents(texts, teacher.tokenizer, 0))
    return pack_rows(found, given.tokens, LENGTH, special_prefix(teacher.tokenizer), "texts")


def _searched(
    given: argparse.Namespace, teacher: Teacher, tokens: TokenSet, after: float | None
) -> tuple[Plan, Record, float, bool]:
    """Search by workers, one of which is killed `after` so many seconds.

    Returns the plan, what was measured, the seconds, and whether the search was still at work then.
    """
    record, killed = Record(), threading.Event()
    with Team(teacher, hiring(given.workers, teacher)) as team:
        team.wait()
        assert len(team.workers) == given.workers
        probe = Probe(teacher, tokens, "kl", cache_factory=lambda *_: record, team=team)
        problem = Problem(teacher.anatomy, parse_budgets(given.remove)).check()
        if after is not None:
            victim = random.Random(after).choice(_worker_processes(psutil.Process()))

            def kill() -> None:
                victim.kill()
                killed.set()

            timer = threading.Timer(after, kill)
            timer.start()
        start = time.perf_counter()
        plan = drive(SEARCHES[given.search](problem), Executor(probe))[-1]
        seconds, at_work = time.perf_counter() - start, killed.is_set()
        if after is not None:
            timer.cancel()
    return plan, record, seconds, at_work


def _worker_processes(parent: psutil.Process) -> list[psutil.Process]:
    """The workers that a process has started and that have not ended."""
    return [each for each in parent.children() if each.status() != psutil.STATUS_ZOMBIE]


def _workers(given: argparse.Namespace, home: Path, draw: random.Random) -> Iterator[Row]:
    """Kill one worker of each search; yield what the search found."""
    torch.set_num_threads(1)
    teacher = load(home / "model", device="cpu", dtype="float32")
    tokens = _tokens(given, home, teacher)
    plan, whole, seconds, _ = _searched(given, teacher, tokens, None)
    expected = {plan: loss.sums for plan, loss in whole.losses.items()}
    for _ in range(given.trials):
        after = draw.random() * seconds
        found, record, _, at_work = _searched(given, teacher, tokens, after)
        yield {
            "when": "searching" if at_work else "after the end",
            "after_s": after,
            "same_plan": found == plan,
            **_gap({plan: loss.sums for plan, loss in record.losses.items()}, expected),
            "twice": sum(count - 1 for count in record.measured.values()),
            "pieces": record.measured.total(),
            "undisturbed": whole.measured.total(),
            "left_alive": 0,
        }


# -- whole commands -------------------------------------------------------------------------------------------------


def _run(words: Sequence[str], folder: Path, pause: float) -> None:
    """Carry out `billhook` in this process, in a folder; each piece that is stored is a line of a file there."""
    os.chdir(folder)
    torch.set_num_threads(1)
    store_pieces = Store.add_pieces

    def recorded(self: Store, key: Any, quality: str, nats: Mapping[tuple[Plan, DocumentIds], Sums], run: str) -> None:
        store_pieces(self, key, quality, nats, run)
        with Path(PIECES).open("a") as file:  # after the commit: what is here is stored
            file.write("".join(f"{key} {quality} {plan.key()} {ids}\n" for plan, ids in nats))
        time.sleep(pause)

    Store.add_pieces = recorded  # type: ignore[method-assign]
    with Path("said.txt").open("a") as said, redirect_stdout(said), redirect_stderr(said):
        app(list(words))


def _start(words: Sequence[str], folder: Path, pause: float) -> multiprocessing.process.BaseProcess:
    folder.mkdir(exist_ok=True)
    child = multiprocessing.get_context("fork").Process(target=_run, args=(words, folder, pause))
    child.start()
    return child


def _first_piece(child: multiprocessing.process.BaseProcess, folder: Path) -> None:
    """Wait until a command has stored the first piece of its search, or has ended."""
    while child.is_alive() and not (folder / PIECES).exists():
        child.join(0.01)


def _seconds_of_search(child: multiprocessing.process.BaseProcess, folder: Path) -> float:
    """Wait for the end of a command; return the seconds between the first and the last piece that it stores."""
    _first_piece(child, folder)
    first = time.time()
    child.join()
    return (folder / PIECES).stat().st_mtime - first


def _commands(given: argparse.Namespace, home: Path, draw: random.Random) -> Iterator[Row]:
    """Kill each command once, resume it, and yield what both found together."""
    prune = [
        "prune", str(home / "model"), "--remove", given.remove, "--search", given.search,
        "--data", str(home / "texts.jsonl"), "--self-share", "0", "--tokens", str(given.tokens),
        "--length", str(LENGTH), "--eval-tokens", "512", "--recover", "none", "--proof", "loss",
        "--workers", "2", "--device", "cpu", "--store", "b.db", "--out", "out",
    ]  # fmt: skip
    child = _start(prune, home / "whole", given.pause)
    seconds = _seconds_of_search(child, home / "whole")
    assert child.exitcode == 0, (home / "whole" / "said.txt").read_text()
    plan, losses, whole = _found(home / "whole")
    for number in range(given.trials):
        folder, after = home / f"trial-{number}", draw.random() * seconds
        child = _start(prune, folder, given.pause)
        _first_piece(child, folder)
        child.join(after)
        assert child.pid is not None
        at_work = child.is_alive()
        workers = _worker_processes(psutil.Process(child.pid)) if at_work else []
        if at_work:
            os.kill(child.pid, signal.SIGKILL)
            child.join()
        _, alive = psutil.wait_procs(workers, SECONDS)
        state = _state(folder / "b.db")
        if state != "done":
            words = prune if state is None else ["prune", "--resume", "--store", "b.db"]
            again = _start(words, folder, given.pause)
            again.join()
            assert again.exitcode == 0, (folder / "said.txt").read_text()
        found, found_losses, pieces = _found(folder)
        yield {
            "when": "before a run was stored" if state is None else f"{state}, {len(workers)} worker",
            "after_s": after,
            "same_plan": found == plan,
            **_gap(found_losses, losses),
            "twice": sum(count - 1 for count in pieces.values()),
            "pieces": pieces.total(),
            "undisturbed": whole.total(),
            "left_alive": len(alive),
        }


def _state(path: Path) -> str | None:
    """What a command has left in its store: `interrupted`, `done`, or None if it has stored no run."""
    if not path.exists():
        return None
    with closing(Store(path)) as store:
        runs = store.runs()
    return runs[0].state if runs else None


def _found(folder: Path) -> tuple[Any, dict[str, list[float]], Counter[str]]:
    """The plan, all losses by key, and how often each piece was stored."""
    with closing(Store(folder / "b.db", read_only=True)) as store:
        result = store.runs()[0].result
    with closing(sqlite3.connect(folder / "b.db")) as db:
        rows = db.execute("SELECT tokens || loss || plan, sums FROM losses").fetchall()
    assert result is not None
    file = folder / PIECES
    pieces = Counter(file.read_text().splitlines()) if file.exists() else Counter[str]()
    return result["plan"], {key: json.loads(sums) for key, sums in rows}, pieces


if __name__ == "__main__":
    main()
