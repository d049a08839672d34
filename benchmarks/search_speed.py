"""Billhook's search against the plain one: the same greedy search, model, tokens and machine, one after the other.

    python benchmarks/search_speed.py --mode exact --model demo --sequences 8 --length 64 --remove 12sites

The plain search is what reference implementations do at their best: one full forward pass of all documents in one
batch for every candidate, the outputs of removed sites computed and zeroed, KL from the log-softmax of all logits,
the teacher's kept. Ours computes as `billhook prune` does: it drops candidates in bfloat16 on a CPU that multiplies it.
Each search runs in a process of its own, with the same settings of the allocator. One JSON object on stdout; progress
on stderr.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from billhook.core.budget import parse_budgets
from billhook.core.plan import MeasureRequest, Plan
from billhook.core.problem import Problem
from billhook.core.results.measured import Loss
from billhook.data.texts import read_texts
from billhook.data.token_sets import TokenSet, documents, pack_rows, special_prefix, token_set
from billhook.engine.probe import Probe, RacingOptions
from billhook.methods.search import SEARCHES, drive
from billhook.models.device import keep_freed_memory
from billhook.models.load import Teacher, load

HELD_OUT = 64  # sequences on which the two plans are compared


def main() -> None:
    """Run the sides as child processes and put their figures together."""
    given = _arguments()
    if given.side:
        print(json.dumps(_side(given)))
        return
    sides = {side: _child(side) for side in ("plain", "billhook")}
    plans = {side: told["plan"] for side, told in sides.items()}
    held_out = _child("heldout", json.dumps(plans))
    told = {
        **sides,
        "ratio": sides["plain"]["wall_s"] / sides["billhook"]["wall_s"],
        "heldout_kl": held_out,
        "same_plan": set(plans["plain"]) == set(plans["billhook"]),
        "settings": {k: v for k, v in vars(given).items() if k not in ("side", "plans")},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }
    print(json.dumps(told, indent=2))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=("exact", "fast"), default="exact")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", default="pydoc", help="as for billhook prune, or `random` tokens")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--remove", default="12sites")
    parser.add_argument("--rounds", type=int, help="stop after so many removals")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--side", choices=("plain", "billhook", "heldout"), help=argparse.SUPPRESS)
    parser.add_argument("--plans", default="{}", help=argparse.SUPPRESS)
    return parser.parse_args()


def _child(side: str, plans: str = "{}") -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--plans", plans]
    print(f"{side} …", file=sys.stderr, flush=True)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def _side(given: argparse.Namespace) -> dict[str, Any]:
    keep_freed_memory()
    teacher = load(given.model)
    calibration, held_out = _tokens(given, teacher)
    if given.side == "heldout":
        probe = Probe(teacher, held_out, "kl")
        plans = json.loads(given.plans)
        losses = probe.losses([Plan.parse(names) for names in plans.values()])
        return {side: loss.mean for side, loss in zip(plans, losses, strict=True)}
    problem = Problem(teacher.anatomy, parse_budgets(given.remove)).check()
    return _plain(given, teacher, calibration, problem) if given.side == "plain" else _ours(
        given, teacher, calibration, problem
    )  # fmt: skip


def _tokens(given: argparse.Namespace, teacher: Teacher) -> tuple[TokenSet, TokenSet]:
    """Calibration sequences of exactly `length` tokens, each a document of its own, and held-out ones."""
    count = given.sequences + HELD_OUT
    if given.data == "random":
        draw = torch.Generator().manual_seed(given.seed)
        rows = torch.randint(1, teacher.model.config.vocab_size, (count, given.length), generator=draw)
        found = [tuple(row) for row in rows.tolist()]
    else:
        texts = read_texts(given.data, "text", teacher.tokenizer)
        prefix = special_prefix(teacher.tokenizer)
        long = [d for d in documents(texts, teacher.tokenizer, given.seed) if len(d.ids) >= given.length]
        one = pack_rows(long[:count], count * given.length, given.length, prefix, given.data)
        found = [tuple(row) for row in one.rows.tolist()]
    sets = [found[: given.sequences], found[given.sequences : count]]
    return tuple(token_set(s, range(len(s)), range(len(s)), [""] * len(s), given.data) for s in sets)  # type: ignore


# -- the plain search -----------------------------------------------------------------------------------------------


@torch.inference_mode()
def _plain(given: argparse.Namespace, teacher: Teacher, tokens: TokenSet, problem: Problem) -> dict[str, Any]:
    model, ids = teacher.model, tokens.rows
    reference = model(input_ids=ids).logits.log_softmax(-1)
    probability = reference.exp()

    def measure(plan: Plan) -> list[float]:
        with _zeroed(teacher, plan):
            return _kl(model(input_ids=ids).logits, reference, probability)

    bare = [_seconds(lambda: _kl(model(input_ids=ids).logits, reference, probability)) for _ in range(4)][1:]
    each: list[float] = []
    start = time.perf_counter()
    plan, losses, count = Plan(), [], 0
    while not problem.is_met(plan) and len(losses) < (given.rounds or len(problem.anatomy.sites)):
        found = []
        for move in problem.moves(plan):
            begin = time.perf_counter()
            found.append((sum(measure(plan.without(*move))) / tokens.tokens, plan.without(*move)))
            each.append(time.perf_counter() - begin)
        best = min(range(len(found)), key=lambda i: (found[i][0], i))
        plan = found[best][1]
        losses.append(found[best][0])
        count += len(found)
        print(f"plain {len(losses)}: {plan} {losses[-1]:.5f}", file=sys.stderr, flush=True)
    wall = time.perf_counter() - start
    sites = len(problem.anatomy.sites)
    return {
        "wall_s": wall, "site_evaluations": count * sites, "plan": plan.names(), "losses": losses,
        "candidate_s": statistics.median(each), "bare_forward_and_kl_s": statistics.median(bare),
    }  # fmt: skip


def _kl(logits: torch.Tensor, reference: torch.Tensor, probability: torch.Tensor) -> list[float]:
    q = logits.log_softmax(-1)
    return (probability * (reference - q)).sum((1, 2)).tolist()  # type: ignore[no-any-return]


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@contextmanager
def _zeroed(teacher: Teacher, plan: Plan) -> Iterator[None]:
    """Compute the removed sublayers all the same, and turn what they give into zeros."""

    def zero(module: Any, args: Any, output: Any) -> Any:
        return (output[0].zero_(), *output[1:]) if isinstance(output, tuple) else output.zero_()

    names = {"attention": teacher.architecture.attention, "mlp": teacher.architecture.mlp[-1]}
    handles = [getattr(teacher.block(s.block), names[s.part]).register_forward_hook(zero) for s in plan.sites()]
    yield
    for handle in handles:
        handle.remove()


# -- ours -----------------------------------------------------------------------------------------------------------


class _Enough(Exception):
    """The rounds that were asked for are done."""


def _ours(given: argparse.Namespace, teacher: Teacher, tokens: TokenSet, problem: Problem) -> dict[str, Any]:
    probe = Probe(teacher, tokens, "kl", fast=RacingOptions() if given.mode == "fast" else None, bfloat16=True)
    losses: list[float] = []
    reached: list[Plan] = []

    def measure(ask: MeasureRequest) -> list[Loss]:
        found = probe.losses(ask.plans, ask.full_results)
        full = [(loss.mean, i) for i, loss in enumerate(found) if not loss.bound]
        losses.append(min(full)[0])
        reached.append(ask.plans[min(full)[1]])
        print(f"billhook {len(losses)}: {losses[-1]:.5f} {dict(probe.tally[-1])}", file=sys.stderr, flush=True)
        if len(losses) == given.rounds:
            raise _Enough
        return found

    start = time.perf_counter()
    with suppress(_Enough):
        drive(SEARCHES["greedy"](problem), measure)
    wall = time.perf_counter() - start
    decided = {kind: sum(tally[kind] for tally in probe.tally) for kind in ("full", "bound", "raced", "skipped")}
    return {
        "wall_s": wall, "site_evaluations": round(probe.site_evaluations, 1), "plan": reached[-1].names(),
        "losses": losses, "decided": decided, "layout": str(probe.layout), "peak_rss_bytes": _peak(),
    }  # fmt: skip


def _peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss begins at the parent's peak
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
