"""Several workers against one: measured on this machine, or simulated for more workers than it has cores.

    python benchmarks/workers.py measure --model demo --workers 2 --rounds 3
    python benchmarks/workers.py simulate --workers 1,2,4,8,16,32,64

`measure` runs the same search in turn by one process of one thread, and by workers of one thread each, every time in a
fresh process; the workers are there before the clock starts. `simulate` runs the real search with the real workers one
after the other in this process. It counts, for every request, the work of the busiest worker, in tokens times sites:
a token of the head counts as `--head` sites where its loss is computed in full, and as a tenth of that for a bound.
What travels between workers costs nothing there. One JSON object on stdout; progress on stderr.
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
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from billhook.core.budget import parse_budgets
from billhook.core.problem import Problem
from billhook.data.texts import read_texts
from billhook.data.token_sets import TokenSet, documents, pack_rows, special_prefix, token_set
from billhook.engine.prefix_trie import WalkJob
from billhook.engine.probe import Probe
from billhook.engine.racing import Quality, Sums
from billhook.engine.workers.division import HERE
from billhook.engine.workers.messages import Desk, Message, Start, hello_of
from billhook.engine.workers.processes import Inbox, Line
from billhook.engine.workers.shared import SharedMeasurer
from billhook.engine.workers.team import Team
from billhook.methods.search import SEARCHES, drive
from billhook.models.load import Teacher, load
from billhook.runs.executor import Executor

BOUND = 0.1  # of the vocabulary: what a bound reads


def main() -> None:
    """Measure, simulate, or run one side of a measurement."""
    given = _arguments()
    if given.what == "side":
        return print(json.dumps(_side(given)))
    found = _measured(given) if given.what == "measure" else _simulated(given)
    settings = {name: value for name, value in vars(given).items() if name != "what"}
    print(json.dumps({**found, "settings": settings, "torch": torch.__version__}, indent=2))
    return None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "simulate", "side"))
    parser.add_argument("--model", default="random", help="as for billhook prune, or `random`: a llama of 32 blocks")
    parser.add_argument("--width", type=int, default=32, help="of the random llama")
    parser.add_argument("--search", default="greedy")
    parser.add_argument("--remove", default="17sites")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--workers", default="2", help="how many, with commas for a simulation")
    parser.add_argument("--rounds", type=int, default=1, help="measurements of each side")
    parser.add_argument("--head", type=float, default=4.8, help="sites that cost as much as the head")
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
    """As many rows as asked for, each of another document."""
    if teacher.tokenizer is None:
        draw = torch.Generator().manual_seed(1)
        words = int(teacher.model.config.vocab_size)
        rows = torch.randint(words, (given.sequences, given.length), generator=draw).tolist()
        ids = range(given.sequences)
        return token_set([tuple(row) for row in rows], list(ids), list(ids), [""] * given.sequences, "random")
    found = documents(read_texts("pydoc", "text"), teacher.tokenizer, given.length)
    prefix = special_prefix(teacher.tokenizer)
    return pack_rows(found, given.sequences * given.length, given.length, prefix, "pydoc")


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
    if given.workers == "1":
        return _search(given, teacher, None)
    with Team(teacher, int(given.workers)) as team:
        team.wait()
        return _search(given, teacher, team) | dict(team.loads())


def _measured(given: argparse.Namespace) -> dict[str, Any]:
    sides: dict[str, list[dict[str, Any]]] = {"1": [], given.workers: []}
    for _ in range(given.rounds):
        for workers, found in sides.items():
            print(f"{workers} …", file=sys.stderr, flush=True)
            words = [*sys.argv[2:], "--workers", workers]
            done = subprocess.run(
                [sys.executable, __file__, "side", *words], check=True, stdout=subprocess.PIPE, text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            found.append(json.loads(done.stdout))
    one, several = (
        {name: statistics.median(each[name] for each in found) for name in ("wall_s", "cpu_s", "site_evaluations")}
        for found in sides.values()
    )
    plans = {tuple(each["plan"]) for found in sides.values() for each in found}
    losses = [each["loss"] for found in sides.values() for each in found]
    count = int(given.workers)
    return {
        "sides": sides,
        "same_plan": len(plans) == 1,
        "largest_gap_of_losses": max(losses) - min(losses),
        "efficiency_by_wall": one["wall_s"] / several["wall_s"] / count,
        "efficiency_by_cpu": one["cpu_s"] / several["cpu_s"],
    }


# -- simulated ------------------------------------------------------------------------------------------------------


class HereLine:
    """A worker in this process, which answers at once."""

    def __init__(self, number: int, inbox: Inbox, teacher: Teacher) -> None:
        self._desk, self._number, self._inbox = Desk(teacher), number, inbox

    def send(self, message: Message) -> None:
        """Answer a message."""
        if isinstance(message, Start):
            return self._inbox.put((self._number, hello_of(self._desk.teacher)))
        for answer in self._desk.answers(message):
            self._inbox.put((self._number, answer))
        return None

    def close(self) -> None:
        """Nothing has to end."""


class Clock:
    """Counts the work of every worker within a request, and adds up that of the busiest one."""

    def __init__(self, head: float) -> None:
        self.head, self.total, self.requests, self.work = head, 0.0, 0, Counter[int]()

    def watch(self, team: Team) -> None:
        """Count what the team measures from now on."""
        counted, pieces = team.count, SharedMeasurer.pieces

        def count(worker: int, done: Any) -> None:
            self.work[worker] += done.computed
            counted(worker, done)

        def timed(bench: SharedMeasurer, quality: Quality, jobs: Sequence[WalkJob]) -> Iterator[dict[WalkJob, Sums]]:
            for group, _ in jobs:
                share = self.head * (BOUND if quality == "bound" else 1.0)
                self.work[bench._owners[group]] += round(share * bench._tokens[group])
            yield from pieces(bench, quality, jobs)
            self.requests += bool(jobs)
            self.total += max(self.work.values(), default=0)
            self.work.clear()

        team.count = count  # type: ignore[method-assign]
        setattr(SharedMeasurer, "pieces", timed)  # noqa: B010
        self._pieces = pieces

    def end(self) -> None:
        """Count no more."""
        setattr(SharedMeasurer, "pieces", self._pieces)  # noqa: B010


def _simulated(given: argparse.Namespace) -> dict[str, Any]:
    teacher = _teacher(given)
    found: dict[int, dict[str, Any]] = {}
    for workers in map(int, given.workers.split(",")):
        print(f"{workers} …", file=sys.stderr, flush=True)

        def hire(inbox: Inbox, workers: int = workers) -> list[Line]:
            return [HereLine(number, inbox, teacher) for number in range(HERE + 1, workers)]

        clock = Clock(given.head)
        with Team(teacher, workers, hire=hire) as team:
            team.wait()
            clock.watch(team)
            told = _search(given, teacher, team)
            clock.end()
        found[workers] = {
            "work": clock.total / (given.sequences * given.length), "requests": clock.requests,
            **{name: told[name] for name in ("groups", "site_evaluations", "loss", "plan")},
        }  # fmt: skip
    first = min(found)
    plan = found[first]["plan"]
    for workers, each in found.items():
        each["efficiency"] = found[first]["work"] * first / (each["work"] * workers)
        each["same_plan"] = each.pop("plan") == plan
    return {"sites": len(teacher.anatomy.sites_present()), "by_workers": found}


if __name__ == "__main__":
    main()
