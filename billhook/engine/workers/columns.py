"""Which owner of a document group measures which of its jobs. Pure: plans as paths over the sites, no torch.

The owners of a group share its jobs, as columns of a table of groups and candidates. What begins alike is walked once
by the worker that measures it, so jobs are given to the owner that has walked most of them, unless it has more to do.
"""

from __future__ import annotations

from bisect import bisect, insort
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence

from billhook.engine.workers.division import Owners

# What a plan does, in the order of the walk: (site, choice), where the choice to remove it has the site's number, and
# (number of sites, END) at last. Of a path that is known up to a site only, (site, END) is the last.
Path = tuple[tuple[int, int], ...]
END = -1
HEAD = 1  # sites that cost as much as what is computed after the last one (about: between 0.5 and 5 nothing changes)


def parting(one: Path, other: Path) -> int:
    """Return the site at which two paths part. Before it all streams are the same; equal paths part at their end."""
    for left, right in zip(one, other, strict=False):
        if left != right:
            return min(left[0], right[0])
    return one[-1][0]


def cost(path: Path, start: int) -> int:
    """Return how many sites are computed from `start` on."""
    removed = sum(site == choice >= start for site, choice in path)
    return path[-1][0] - start - removed


def useful(path: Path, base: Path) -> Path:
    """Return a path up to the site at which no plan that does all that `base` does can go on from it."""
    done = set(path)
    until = next((site for site, choice in base if (site, choice) not in done), None)
    if until is None:
        return path
    return (*(step for step in path if step[0] < until), (until, END))


class Trail:
    """Paths that one worker has walked in one document group, as far as later plans can go on from them.

    `unchanged`: the path of the teacher, which every owner walks for its references.
    """

    def __init__(self, unchanged: Path) -> None:
        self._paths = [unchanged]  # sorted, so that what a path has most in common with stands beside it
        self._new = [unchanged]

    def known(self, path: Path) -> int:
        """Return the site before which the streams of a path are known."""
        at = bisect(self._paths, path)
        return max((parting(path, near) for near in self._paths[max(0, at - 1) : at + 1]), default=0)

    def walk(self, path: Path) -> None:
        """Add a path."""
        insort(self._paths, path)
        self._new.append(path)

    def begin(self, base: Path) -> None:
        """Forget what was not walked since the last call, and what no plan that does `base` can use."""
        self._paths, self._new = sorted({useful(path, base) for path in self._new}), []


class Columns:
    """What the workers have walked, by document group. `tokens`: of each group; `unchanged`: the teacher's path.

    It is what they should have in memory. Where they have dropped it, parts are less even, and results the same.
    """

    def __init__(self, tokens: Sequence[int], unchanged: Path) -> None:
        self._tokens = tokens
        self._trails = defaultdict[tuple[int, int], Trail](lambda: Trail(unchanged))  # by worker and group

    def begin(self, base: Path) -> None:
        """Prepare for plans that all do what `base` does."""
        for trail in self._trails.values():
            trail.begin(base)

    def keep(self, worker: int, groups: Collection[int]) -> None:
        """Forget what a worker has walked in other document groups than these."""
        for pair in [(each, group) for each, group in self._trails if each == worker and group not in groups]:
            del self._trails[pair]

    def forget(self) -> None:
        """Forget all that was walked."""
        self._trails.clear()

    def share(self, jobs: Iterable[tuple[int, Path]], owners: Owners) -> dict[tuple[int, Path], int]:
        """Return the worker of each job (document group, path): of its group's owners the one that ends first with it.

        Work is counted in tokens times sites, less what each worker has walked. Jobs are given away in the order of
        the walk, so that the long ones come first, and each worker's have much in common.
        """
        load: Counter[int] = Counter()
        workers: dict[tuple[int, Path], int] = {}
        for group, path in sorted(jobs, key=lambda job: (job[1], job[0])):
            after: dict[int, int] = {}
            for worker in owners[group]:
                sites = HEAD + cost(path, self._trails[worker, group].known(path))
                after[worker] = load[worker] + self._tokens[group] * sites
            first = min(after, key=lambda worker: (after[worker], worker))
            self._trails[first, group].walk(path)
            load[first], workers[group, path] = after[first], first
        return workers
