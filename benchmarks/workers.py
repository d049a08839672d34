"""Several workers against one process, measured on this machine.

    python benchmarks/workers.py --model demo --workers 2 --rounds 3

The same search runs in turn by one process of one thread, and by workers of one thread each, every time in a fresh
process. The workers are there before the clock starts. Efficiency is told by wall time, and by CPU seconds of all
processes, which say more where other work runs on the machine. `benchmarks/simulated_workers.py` simulates more
workers than there are cores. One JSON object on stdout; progress on stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from billhook.core.budget import parse_budgets
from billhook.core.problem import Problem
from billhook.data.texts import read_texts
from billhook.data.token_sets import TokenSet, documents, pack_rows, special_prefix, token_set
from billhook.engine.probe import Probe
from billhook.engine.workers.processes import hiring
from billhook.engine.workers.team import Team
from billhook.methods.search import SEARCHES, drive
from billhook.models.load import Teacher, load
from billhook.runs.executor import Executor


def main() -> None:
    """Measure both sides in turn, or run one of them."""
    given = _arguments()
    if given.side:
        print(json.dumps(_side(given)))
        return
    settings = {name: value for name, value in vars(given).items() if name != "side"}
    print(json.dumps({**_measured(given), "settings": settings, "torch": torch.__version__}, indent=2))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random", help="as for billhook prune, or `random`: a llama of 32 blocks")
    parser.add_argument("--width", type=int, default=32, help="of the random llama")
    parser.add_argument("--search", default="greedy")
    parser.add_argument("--remove", default="17sites")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1, help="measurements of each side")
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _teacher(given: argparse.Namespace) -> Teacher:
    if given.model != "random":
        return load(given.model)
    width = given.width
    folder = Path(tempfile.gettempdir()) / f"billhook-random-llama-{width}-wide"
    if not folder.exists():
        config = transformers.LlamaConfig(
            vocab_size=512, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=32,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        )  # fmt: skip
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        for block in model.model.layers:  # no two sites are worth the same
            for matrix in (block.self_attn.o_proj, block.mlp.down_proj):
                matrix.weight.data.normal_(0, 0.3 * float(torch.randn(()).exp()) / width**0.5)
        model.model.embed_tokens.weight.data.normal_()
        model.lm_head.weight.data.normal_(0, 2.0 / width**0.5)
        model.save_pretrained(folder)
    return load(folder)


def _tokens(given: argparse.Namespace, teacher: Teacher) -> TokenSet:
    """As many rows as asked for, each a document of its own."""
    if teacher.tokenizer is None:
        draw = torch.Generator().manual_seed(1)
        words = int(teacher.model.config.vocab_size)
        rows = torch.randint(words, (given.sequences, given.length), generator=draw).tolist()
    else:
        texts = read_texts("pydoc", "text", teacher.tokenizer)
        long = [each for each in documents(texts, teacher.tokenizer, 0) if len(each.ids) >= given.length]
        prefix = special_prefix(teacher.tokenizer)
        rows = pack_rows(long, given.sequences * given.length, given.length, prefix, "pydoc").rows.tolist()
    found = [tuple(row) for row in rows[: given.sequences]]
    return token_set(found, range(len(found)), range(len(found)), [""] * len(found), given.model)


def _search(given: argparse.Namespace, teacher: Teacher, team: Team | None) -> dict[str, Any]:
    """The plan of the search, its loss, and what it took."""
    tokens = _tokens(given, teacher)
    probe = Probe(teacher, tokens, "kl", team=team)
    problem = Problem(teacher.anatomy, parse_budgets(given.remove)).check()
    start, spent = time.perf_counter(), _cpu_seconds()
    path = drive(SEARCHES[given.search](problem), Executor(probe))
    taken = {"wall_s": time.perf_counter() - start, "cpu_s": _cpu_seconds() - spent}
    loss = Probe(teacher, tokens, "kl").losses([path[-1]])[0].mean
    plan = sorted(map(str, path[-1].removed))
    groups = probe.layout.groups
    return {"plan": plan, "loss": loss, "groups": groups, "site_evaluations": probe.site_evaluations, **taken}


# -- measured -------------------------------------------------------------------------------------------------------


def _cpu_seconds() -> float:
    """CPU seconds of this process and of those that it has started."""
    me = psutil.Process()
    return sum(sum(each.cpu_times()[:2]) for each in (me, *me.children()))


def _side(given: argparse.Namespace) -> dict[str, Any]:
    teacher = _teacher(given)
    if given.workers == 1:
        return _search(given, teacher, None)
    with Team(teacher, hiring(given.workers, teacher)) as team:
        team.wait()
        return _search(given, teacher, team) | dict(team.loads())


def _measured(given: argparse.Namespace) -> dict[str, Any]:
    sides: dict[int, list[dict[str, Any]]] = {1: [], given.workers: []}
    for _ in range(given.rounds):
        for workers, found in sides.items():
            print(f"{workers} …", file=sys.stderr, flush=True)
            words = [*sys.argv[1:], "--side", "--workers", str(workers)]
            done = subprocess.run(
                [sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            found.append(json.loads(done.stdout))
    one, several = (
        {name: statistics.median(each[name] for each in found) for name in ("wall_s", "cpu_s", "site_evaluations")}
        for found in sides.values()
    )
    plans = {tuple(each["plan"]) for found in sides.values() for each in found}
    losses = [each["loss"] for found in sides.values() for each in found]
    return {
        "sides": sides,
        "same_plan": len(plans) == 1,
        "largest_gap_of_losses": max(losses) - min(losses),
        "efficiency_by_wall": one["wall_s"] / several["wall_s"] / given.workers,
        "efficiency_by_cpu": one["cpu_s"] / several["cpu_s"],
    }


if __name__ == "__main__":
    main()
