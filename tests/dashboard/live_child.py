"""Works on a run as a pruning does: its lock, its events, its result. One step for every line of its input."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import billhook.models
from billhook.core.events import Event
from billhook.runs.store import Store

used = ({"cpu_seconds": 10.0 * n, "memory_bytes": 10**9} for n in range(100))
sys.modules["billhook.models.device"] = types.SimpleNamespace(resource_use=lambda: next(used))  # type: ignore[assignment]
assert billhook.models, "torch, which the real one asks, takes seconds to import"

STEPS = [
    Event("load", 0, None, {"model": "tiny"}), Event("load", 1, 1, {"seconds": 0.1}), Event("search", 0, None),
    Event("search", 5, 30, {"lowest": 0.02, "objective": "kl", "removed_sites": 0, "target_sites": 3}),
    Event("round", 8, 30, {"removed": "attention.1", "narrowed": "", "loss": 0.02}),
    Event("search", 12, 30, {"lowest": 0.05, "objective": "kl", "removed_sites": 1, "target_sites": 3}),
    Event("round", 15, 30, {"removed": "attention.1,mlp.2", "narrowed": "", "loss": 0.05}),
    Event("evaluate", 100, 512, {"of": "student"}),
]  # fmt: skip


def main(path: str, like: str, run: str) -> None:
    """Begin a run like another one, or resume one, and end it when the steps are done."""
    store = Store(Path(path))
    old = store.run(like)
    run = run or store.new_run(old.kind, old.spec, old.environment, old.out)
    with store.lock(run):
        store.update(run, state="running")
        print(run, flush=True)
        for event in STEPS:
            sys.stdin.readline()
            store.add_event(run, event, at_once=True)
            print(event.stage, flush=True)
        sys.stdin.readline()
        assert old.result is not None
        store.update(run, state="done", result=old.result | {"run": run})
        print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
