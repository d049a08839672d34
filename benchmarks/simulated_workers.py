"""Efficiency of a search that several workers share, simulated with the engine's own choice of pieces and division.

    python benchmarks/simulated_workers.py --sites 64 --documents 32 --length 128

A greedy search removes 27% of the sites of a model whose losses are made up: a site's, a document's and a site's on a
document are log-normal, and several removals cost more than their sum. Pieces are chosen by `billhook.engine.racing`.
Groups are divided by `billhook.engine.workers.division`, and the jobs of a group among its owners by `columns` beside
it. A request takes as long as its busiest worker. Work is counted in tokens times sites that a worker has not walked
before; it keeps all streams from which plans can still go on. Every owner of a group first computes the teacher's
outputs. A token of the head counts as `--head` sites, and as a tenth of that for a bound. What travels, and what the
first process does alone, costs nothing here.

`--wave` is the least tokens of a request for one worker: 1,024 on a CPU. With `--together`, as on a GPU, candidates
are finished all at once. With `--estimate` each site alone is removed once, by bounds on all documents, as a joint
search does on few documents. One JSON object on stdout. Imports no torch.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence

from billhook.engine.racing import Piece, PieceRequest, SelectionTask, Sums, measure_all, measure_best
from billhook.engine.workers.columns import END, Columns, Path
from billhook.engine.workers.division import Owners, abreast, divided, interleaved

GROUPS, LEAST_TOKENS = 16, 64  # as billhook.engine.document_groups
BOUND = 0.1  # of the head: what a bound costs
TIGHT = 0.9  # of a loss: what a bound says
SHARE = 0.27  # of the sites, which are removed


class Landscape:
    """Losses of a model with so many sites on so many documents of equal length."""

    def __init__(self, sites: int, documents: int, length: int, seed: int) -> None:
        draw = random.Random(seed)
        self.sites, self.documents, self.length = sites, documents, length
        hard = [draw.lognormvariate(0, 0.4) for _ in range(documents)]
        worth = [draw.lognormvariate(-4, 1.2) for _ in range(sites)]
        self._rise = [
            [worth[s] * hard[d] * draw.lognormvariate(0, 0.3) for d in range(documents)] for s in range(sites)
        ]
        self._so_far = [0.0] * documents

    def loss(self, site: int, document: int) -> float:
        """Nats of a document without `site` and all that is removed."""
        return self.length * (self._so_far[document] + self._rise[site][document]) ** 1.2

    def remove(self, site: int) -> None:
        """Remove a site."""
        self._so_far = [x + y for x, y in zip(self._so_far, self._rise[site], strict=True)]


class Streams:
    """Streams that a worker has of one document group: after so many sites, under what is removed before."""

    def __init__(self) -> None:
        self._nodes: set[tuple[int, int]] = set()  # depth, bit mask of removed sites

    def walk(self, mask: int, sites: int) -> int:
        """Walk a plan to its end, and return how many sites are computed."""
        depth, computed = sites, 0
        while depth and (node := (depth, mask & ((1 << depth) - 1))) not in self._nodes:
            self._nodes.add(node)
            depth -= 1
            computed += not mask >> depth & 1
        return computed

    def evict(self, base: int) -> None:
        """Drop those from which no plan can go on that removes `base`."""
        self._nodes = {(depth, mask) for depth, mask in self._nodes if not base & ((1 << depth) - 1) & ~mask}


class Workers:
    """So many workers that share document groups: what each of them computes."""

    def __init__(self, groups: Sequence[Sequence[int]], given: argparse.Namespace, workers: int) -> None:
        self.tokens = [given.length * len(group) for group in groups]
        self.owners: Owners = divided({}, self.tokens, range(workers))
        self._sites, self._head = given.sites, given.head
        self.columns = Columns(self.tokens, self._path(0))
        self._streams = {(worker, group): Streams() for group, own in self.owners.items() for worker in own}
        self.opening: Counter[int] = Counter()  # the teacher's outputs
        for (worker, group), streams in self._streams.items():
            self.opening[worker] += round(self.tokens[group] * (streams.walk(0, given.sites) + given.head))

    def begin(self, base: int) -> None:
        """Prepare for plans that remove at least `base`."""
        self.columns.begin(self._path(base))
        for streams in self._streams.values():
            streams.evict(base)

    def measure(self, jobs: Sequence[tuple[int, int]], head: float) -> Counter[int]:
        """Return what each worker computes, in tokens times sites. `head`: the share of it that is computed."""
        paths = {(group, self._path(mask)): (group, mask) for group, mask in jobs}
        work: Counter[int] = Counter()
        for job, worker in self.columns.share(paths, self.owners).items():
            group, mask = paths[job]
            walked = self._streams[worker, group].walk(mask, self._sites)
            work[worker] += round(self.tokens[group] * (walked + self._head * head))
        return work

    def _path(self, mask: int) -> Path:
        return (*((site, site) for site in range(self._sites) if mask >> site & 1), (self._sites, END))


def grouped(documents: int, length: int, workers: int) -> list[list[int]]:
    """Documents in groups, as the engine makes them."""
    least = max(LEAST_TOKENS, documents * length // (GROUPS * workers))
    size = -(-least // length)
    return [list(range(start, min(start + size, documents))) for start in range(0, documents, size)]


def search(given: argparse.Namespace, workers: int, seed: int) -> dict[str, float]:
    """Work of the busiest workers, of all together, and the requests of one search, in tokens times sites."""
    land = Landscape(given.sites, given.documents, given.length, seed)
    groups = grouped(given.documents, given.length, workers)
    team = Workers(groups, given, workers)
    at_once, at_work = abreast(team.owners), len({worker for own in team.owners.values() for worker in own})
    kept, hardness, base = list(range(given.sites)), [0.0] * len(groups), 0
    busiest, together, requests = max(team.opening.values()), team.opening.total(), 0
    for _ in range(1 if given.estimate else round(SHARE * given.sites)):
        order = interleaved(sorted(range(len(groups)), key=lambda g: (-hardness[g], g)), team.owners)
        task = SelectionTask(
            len(kept), 1, tuple(order), tuple(team.tokens), given.wave * at_work,
            given.together or at_once < at_work, abreast=at_once,
        )  # fmt: skip
        team.begin(base)
        choice, full = measure_all(task) if given.estimate else measure_best(task, bounds=True), dict[Piece, Sums]()
        request: PieceRequest | None = next(choice)
        while request is not None:
            bound = given.estimate or request.quality == "bound"
            jobs = [(group, base | 1 << kept[plan]) for plan, group in request.pieces]
            work = team.measure(jobs, BOUND if bound else 1)
            sums = {(p, g): tuple(land.loss(kept[p], document) for document in groups[g]) for p, g in request.pieces}
            full |= {} if bound else sums
            busiest += max(work.values(), default=0)
            together += work.total()
            requests += 1
            told = {piece: tuple(TIGHT * x for x in nats) for piece, nats in sums.items()} if bound else sums
            try:
                request = choice.send(told)
            except StopIteration:
                request = None
        totals = {p: math.fsum(x for g in range(len(groups)) for x in full[p, g]) for p in complete(full, len(groups))}
        if totals:
            best = min(totals, key=lambda p: (totals[p], p))
            hardness = [math.fsum(full[best, group]) for group in range(len(groups))]
            base |= 1 << kept[best]
            land.remove(kept.pop(best))
    return {"busiest": busiest, "together": together, "requests": requests}


def complete(full: dict[Piece, Sums], groups: int) -> Iterator[int]:
    """Plans that are known in full on all groups."""
    count = Counter(plan for plan, _ in full)
    return (plan for plan, known in count.items() if known == groups)


def main() -> None:
    """Simulate searches of several seeds by every number of workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=64)
    parser.add_argument("--documents", type=int, default=32)
    parser.add_argument("--length", type=int, default=128, help="tokens of a document")
    parser.add_argument("--workers", default="1,2,4,8,16,32,64", help="the first one is what others are compared with")
    parser.add_argument("--head", type=float, default=4.8, help="sites that cost as much as the head")
    parser.add_argument("--wave", type=int, default=1024)
    parser.add_argument("--together", action="store_true")
    parser.add_argument("--estimate", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    found, first = {}, 0.0
    for workers in map(int, given.workers.split(",")):
        every = [search(given, workers, seed) for seed in range(given.seeds)]
        mean = {name: sum(each[name] for each in every) / len(every) for name in every[0]}
        first = first or mean["busiest"] * workers
        found[workers] = {
            "efficiency": round(first / (mean["busiest"] * workers), 3),
            "balance": round(mean["together"] / (mean["busiest"] * workers), 3),
            "passes": round(mean["together"] / (given.sites * given.documents * given.length), 1),
            "requests": round(mean["requests"]),
        }  # fmt: skip
    print(json.dumps({"by_workers": found, "settings": vars(given)}, indent=2))


if __name__ == "__main__":
    main()
