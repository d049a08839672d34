"""What a checkpoint larger than its memory budget costs: score, one exact greedy round, and a whole pruning.

    python benchmarks/make_checkpoint.py big --blocks 40 --width 3072 --intermediate 8192 --heads 24 --kv-heads 8 \\
        --vocabulary 32000
    python benchmarks/streamed.py big --memory 2GB

Every job is a child process that does only this; its peak resident memory is the kernel's figure for it. One JSON
object on stdout. This process itself stays small, because a child's peak begins at its parent's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROUND = """
import json, sys, time, torch
from billhook.face import keep_pages
from billhook.data import token_set
from billhook.loading import load
from billhook.plan import Plan
from billhook.probe import Probe
from billhook.recipe import read_bytes
keep_pages()
folder, memory, tokens = sys.argv[1], read_bytes(sys.argv[2]), int(sys.argv[3])
teacher = load(folder, memory=memory)
if teacher.weights is None:
    sys.exit("The model fits into --memory, so there is nothing to stream. Give less.")
ids = torch.randint(1, teacher.model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
probe = Probe(teacher, token_set([tuple(ids[0].tolist())], [0], [0], [""], "random"), "kl", memory=memory)
told = {"streamed": True}
start = time.perf_counter()
probe.losses([Plan()])
told["teacher_pass"] = {"s": time.perf_counter() - start, "bytes_read": teacher.weights.bytes_read}
before, start = teacher.weights.bytes_read, time.perf_counter()
losses = probe.losses([Plan(frozenset([site])) for site in teacher.anatomy.alive()], best=2)
told["round"] = {"s": time.perf_counter() - start, "bytes_read": teacher.weights.bytes_read - before}
told |= {"candidates": len(losses), "decided": dict(probe.tally[-1]), "layout": str(probe.layout)}
told["best"] = min(loss.mean for loss in losses if not loss.bound)
print(json.dumps(told))
"""


def main() -> None:
    """Run the three jobs in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--memory", default="2GB")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--jobs", default="score,round,prune", help="which of them, in order")
    given = parser.parse_args()
    model, memory, tokens = str(given.model), given.memory, str(given.tokens)
    size = sum(file.stat().st_size for file in given.model.glob("*.safetensors"))
    told: dict[str, Any] = {"model": model, "checkpoint_bytes": size, "memory": memory}
    with tempfile.TemporaryDirectory(dir=given.model.parent) as scratch:
        text = ("--tokens", tokens, "--length", tokens, "--memory", memory, "--json")
        less = ("--eval-tokens", "128", "--eval-length", "32")
        out = str(Path(scratch) / "out")
        store = ("--store", str(Path(scratch) / "runs.db"), "--out", out)
        billhook = [sys.executable, "-m", "billhook"]
        jobs = {
            "score": [*billhook, "score", model, "--metric", "cosine", *text],
            "round": [sys.executable, "-c", ROUND, model, memory, tokens],
            "prune": [*billhook, "prune", model, "--remove", "2blocks", *text, *less, *store],
        }
        for name in given.jobs.split(","):
            told[name] = _child(jobs[name])
            print(name, json.dumps(told[name]), file=sys.stderr, flush=True)
        if "prune" in told:
            loads = "import sys, billhook; t = billhook.load(sys.argv[1], memory=0); print(len(t.anatomy.sites))"
            told["loads"] = _child([sys.executable, "-c", loads, out])
    print(json.dumps(told, indent=2))


def _child(command: list[str]) -> dict[str, Any]:
    """Run a process to its end: what it printed, seconds, and its peak resident bytes."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    told: dict[str, Any] = {"exit": process.returncode, "wall_s": time.perf_counter() - start, "peak_rss_bytes": peak}
    found = json.loads(printed) if printed.strip() else None
    if not isinstance(found, dict):
        return told | {"printed": found}
    keep = ("seconds", "bytes_read", "streamed", "candidates", "decided", "layout", "best", "teacher_pass", "round",
            "plan", "perplexity", "search", "kind")  # fmt: skip
    return told | {key: found[key] for key in keep if key in found}


if __name__ == "__main__":
    main()
