"""Efficiency of a search that several workers share, simulated with the real choice of pieces.

    python benchmarks/simulated_workers.py --sites 64 --documents 32 --length 128

A greedy search removes 27% of the sites of a model whose losses are made up: a site's, a document's and a site's on a
document are log-normal, and several removals cost more than their sum. Pieces are chosen by `billhook.engine.racing`,
groups are divided by `billhook.engine.workers.division`. A request takes as long as its busiest worker. Work is
counted in tokens times sites, from the first site that a candidate changes; a token of the head counts as `--head`
sites, and as a tenth of that for a bound. What travels, and what the first process does alone, costs nothing here.
`--wave` is the least tokens of a request for one worker: 1,024 on a CPU. With `--together`, as on a GPU, candidates
are finished all at once. One JSON object on stdout. Imports no torch.

`--columns N` simulates what the engine does not do: from `--columns-from` workers on, they stand in N columns. Each
column holds all groups, divided among its members, and measures the candidates whose site leaves its number when it is
divided by N. A removal that another column has measured is walked again.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import Counter
from collections.abc import Iterator

from billhook.engine.racing import Piece, SelectionTask, Sums, measure_best
from billhook.engine.workers.division import divided, interleaved

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


def grouped(documents: int, length: int, workers: int) -> list[list[int]]:
    """Documents in groups, as the engine makes them."""
    least = max(LEAST_TOKENS, documents * length // (GROUPS * workers))
    size = -(-least // length)
    return [list(range(start, min(start + size, documents))) for start in range(0, documents, size)]


def columns_of(given: argparse.Namespace, workers: int) -> int:
    """In how many columns so many workers stand."""
    return int(given.columns) if workers >= max(given.columns, given.columns_from) else 1


def search(given: argparse.Namespace, workers: int, seed: int) -> dict[str, float]:
    """Work of the busiest workers, of all together, and the requests of one search."""
    land = Landscape(given.sites, given.documents, given.length, seed)
    columns = columns_of(given, workers)
    members = workers // columns
    groups = grouped(given.documents, given.length, members)
    tokens = tuple(given.length * len(group) for group in groups)
    owners = divided({}, tokens, range(members))
    again: Counter[tuple[int, int]] = Counter()  # what columns walk again in the next round, by column and member
    kept, hardness = list(range(given.sites)), [0.0] * len(groups)
    busiest = together = requests = 0.0
    for _ in range(round(SHARE * given.sites)):
        order = interleaved(sorted(range(len(groups)), key=lambda g: (-hardness[g], g)), owners)
        wave = given.wave * workers
        task = SelectionTask(
            len(kept), 1, tuple(order), tokens, wave, given.together, workers=len(set(owners.values()))
        )
        walked: set[Piece] = set()
        choice, full = measure_best(task, bounds=True), dict[Piece, Sums]()
        answer: dict[Piece, Sums] | None = None
        while True:
            try:
                request = choice.send(answer)  # type: ignore[arg-type]
            except StopIteration:
                break
            work, again, answer = again, Counter(), {}
            for plan, group in request.pieces:
                site = kept[plan]
                worker = site % columns, owners[group]
                if (plan, group) not in walked:
                    work[worker] += tokens[group] * sum(other > site for other in kept)
                    walked.add((plan, group))
                work[worker] += round(tokens[group] * given.head * (BOUND if request.quality == "bound" else 1))
                sums = tuple(land.loss(site, document) for document in groups[group])
                answer[plan, group] = sums if request.quality == "full" else tuple(TIGHT * x for x in sums)
                full |= {(plan, group): sums} if request.quality == "full" else {}
            busiest += max(work.values(), default=0)
            together += work.total()
            requests += 1
        totals = {p: math.fsum(x for g in range(len(groups)) for x in full[p, g]) for p in complete(full, len(groups))}
        best = min(totals, key=lambda p: (totals[p], p))
        hardness = [math.fsum(full[best, group]) for group in range(len(groups))]
        gone = kept.pop(best)
        land.remove(gone)
        for column in (column for column in range(columns) if column != gone % columns):
            for group, owner in owners.items():
                again[column, owner] += tokens[group] * sum(other > gone for other in kept)
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
    parser.add_argument("--columns", type=int, default=1)
    parser.add_argument("--columns-from", type=int, default=1, help="workers")
    parser.add_argument("--together", action="store_true")
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
