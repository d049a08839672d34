"""A training by several processes against one, measured on this machine.

    python benchmarks/shared_training.py --model demo --workers 2 --rounds 2

The same `lora` trains in turn in one process of one thread, and in processes of one thread each. The first and the last
step are not counted. Efficiency is told by wall time, and by CPU seconds of all processes, which say more where other
work runs on the machine. One JSON object on stdout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import psutil
import torch

from billhook.core.events import Event
from billhook.core.plan import Plan
from billhook.data.token_sets import TokenSet, token_set
from billhook.engine.workers.processes import hiring
from billhook.methods.recover import RECOVERIES, RecoveryTask
from billhook.methods.recover.together import train_together
from billhook.models.load import Teacher, load


def main() -> None:
    """Measure both sides in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="as for billhook prune")
    parser.add_argument("--plan", default="attention.10,mlp.11,attention.20", help="sites that the student lacks")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2, help="trainings of each side")
    parser.add_argument("--batch", type=int, default=4, help="rows per step")
    parser.add_argument("--length", type=int, default=128, help="tokens per row")
    parser.add_argument("--steps", type=int, default=5, help="of each training")
    given = parser.parse_args()
    teacher = load(given.model)
    rows = given.batch * given.steps
    texts = _random(teacher, rows, given.length, 0), _random(teacher, 2, given.length, 1)
    sides: dict[int, list[dict[str, list[float]]]] = {1: [], given.workers: []}
    for _ in range(given.rounds):
        for workers, found in sides.items():
            found.append(_training(teacher, Plan.parse(given.plan.split(",")), texts, workers, given.batch))
    wall, cpu = ([_mean(found, name) for found in sides.values()] for name in ("wall_s", "cpu_s"))
    losses = [found[0]["losses"] for found in sides.values()]
    print(json.dumps({
        "sides": sides, "wall_s": wall, "cpu_s": cpu, "torch": torch.__version__, "settings": vars(given),
        "efficiency_by_wall": wall[0] / wall[1] / given.workers, "efficiency_by_cpu": cpu[0] / cpu[1],
        "largest_gap_of_losses": max(abs(a - b) for a, b in zip(*losses, strict=True)),
    }, indent=2))  # fmt: skip


def _random(teacher: Teacher, rows: int, length: int, seed: int) -> TokenSet:
    """Rows of random tokens: a step takes as long as with others."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(int(teacher.model.config.vocab_size), (rows, length), generator=draw).tolist()
    return token_set([tuple(row) for row in ids], range(rows), range(rows), [""] * rows, "random")


def _training(
    teacher: Teacher, plan: Plan, texts: tuple[TokenSet, TokenSet], workers: int, batch: int
) -> dict[str, list[float]]:
    """Seconds of each counted step, by the clock and of all processors, and the loss of every step."""
    moments: list[tuple[float, float]] = []
    losses: list[float] = []

    def watch(event: Event) -> None:
        if "objective" in event.values:
            moments.append((time.perf_counter(), _cpu_seconds()))
            losses.append(float(event.values["loss"]))

    torch.set_num_threads(workers)  # which share them
    with tempfile.TemporaryDirectory() as folder:
        task, own = RecoveryTask(teacher, plan, work=Path(folder), watch=watch), {"batch": batch}
        if workers == 1:
            RECOVERIES["lora"](task, *texts, **own)
        else:
            train_together("lora", hiring(workers, teacher), task, texts, own)
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(moments)][:-1]
    return {"wall_s": [wall for wall, _ in steps], "cpu_s": [cpu for _, cpu in steps], "losses": losses}


def _cpu_seconds() -> float:
    """CPU seconds of this process and of those that it has started."""
    me = psutil.Process()
    return sum(sum(each.cpu_times()[:2]) for each in (me, *me.children()))


def _mean(found: list[dict[str, list[float]]], name: str) -> float:
    return statistics.fmean(seconds for each in found for seconds in each[name])


if __name__ == "__main__":
    main()
