"""The prefix trie: every distinct history of kept and removed sites is computed once.

A plan is a bit mask here: bit 2·i is the attention of the model's i-th block, bit 2·i + 1 its mlp. A node of the trie
is (document group, depth, mask of what went before that depth); plans that agree so far share it. Two orders of the
same walk: layer by layer runs every block once on the stacked streams of all live nodes, depth-first holds one path.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Generic, TypeVar

import torch

from billhook.engine.blocks import NEITHER, BlockRunner

WalkJob = tuple[int, int]  # a document group, a plan's mask
Node = tuple[int, int, int]  # a document group, a depth in blocks, the mask of what went before
History = TypeVar("History", bound=Hashable)  # what went before
Look = Callable[[int, Sequence[torch.Tensor]], None]  # sees the streams after a block


def prefix_mask(mask: int, depth: int) -> int:
    """What of a plan's mask concerns the blocks before `depth`."""
    return mask & ((1 << 2 * depth) - 1)


class StreamCache(Generic[History]):
    """Residual streams by node, the least recently used dropped beyond `limit` bytes; those of depth 0 stay."""

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._kept: OrderedDict[tuple[int, int, History], torch.Tensor] = OrderedDict()

    def __contains__(self, node: tuple[int, int, History]) -> bool:
        return node in self._kept

    def get(self, node: tuple[int, int, History]) -> torch.Tensor:
        self._kept.move_to_end(node)
        return self._kept[node]

    def put(self, node: tuple[int, int, History], stream: torch.Tensor) -> None:
        if node in self._kept or (node[1] and stream.nbytes > self.limit):
            return
        # A piece of a stack would keep the whole stack in memory.
        own = stream if stream.untyped_storage().nbytes() == stream.nbytes else stream.clone()
        self._kept[node] = own
        self.size += own.nbytes
        for old in list(self._kept):
            if self.size <= self.limit:
                break
            if old[1] > 0:
                self.size -= self._kept.pop(old).nbytes

    def clear(self) -> None:
        """Drop all streams."""
        self._kept.clear()
        self.size = 0

    def drop(self, useless: Callable[[tuple[int, int, History]], bool]) -> None:
        """Drop what is of no use."""
        for node in [node for node in self._kept if useless(node)]:
            self.size -= self._kept.pop(node).nbytes


class Walk:
    """Final residual streams of jobs. `checkpoints`: depths whose streams are kept for later jobs, besides the end."""

    def __init__(self, trunk: BlockRunner, ids: Sequence[torch.Tensor], limit: int) -> None:
        self.trunk, self.ids = trunk, ids
        self.streams: StreamCache[int] = StreamCache(limit)
        self.checkpoints = frozenset(range(trunk.depth + 1))
        self.look: Look = lambda depth, streams: None

    def run(self, jobs: Sequence[WalkJob], layers: bool) -> Iterator[tuple[WalkJob, torch.Tensor]]:
        """(job, residual stream after the last block [rows, time, width]) of every job, in no particular order."""
        for group in sorted({group for group, _ in jobs}):  # before the starts are chosen: what is put in may evict
            if (group, 0, 0) not in self.streams:
                self.streams.put((group, 0, 0), self.trunk.embed(self.ids[group]))
        starts = {job: self._start(job) for job in jobs}
        kept = [job for job in jobs if starts[job] == self.trunk.depth]
        for group, mask in kept:
            yield (group, mask), self.streams.get((group, self.trunk.depth, mask))
        fresh = [job for job in jobs if starts[job] < self.trunk.depth]
        if fresh:
            yield from (self._layers if layers else self._depth_first)({job: starts[job] for job in fresh})

    def evict(self, base: int) -> None:
        """Drop streams that no plan which removes at least `base` can start from."""
        self.streams.drop(lambda node: bool(prefix_mask(base, node[1]) & ~node[2]))

    def _start(self, job: WalkJob) -> int:
        """The deepest depth at which the stream of a job is known."""
        group, mask = job
        for depth in range(self.trunk.depth, 0, -1):
            if (group, depth, prefix_mask(mask, depth)) in self.streams:
                return depth
        return 0

    def _layers(self, starts: dict[WalkJob, int]) -> Iterator[tuple[WalkJob, torch.Tensor]]:
        depth_of = self.trunk.depth
        wanted: list[dict[tuple[int, int], set[int]]] = [defaultdict(set) for _ in range(depth_of)]
        for (group, mask), start in starts.items():
            for depth in range(start, depth_of):
                wanted[depth][group, prefix_mask(mask, depth)].add(mask >> 2 * depth & 3)
        shared = _common(starts)
        roots = {(g, start, prefix_mask(m, start)) for (g, m), start in starts.items()}
        known = {node: self.streams.get(node) for node in sorted(roots)}  # whatever the walk drops meanwhile
        live: dict[tuple[int, int], torch.Tensor] = {}
        first = min(starts.values())
        needed = [d for d in range(first, depth_of) if any(v != {NEITHER} for v in wanted[d].values())]
        blocks = self.trunk.blocks(needed)  # the others are removed from every plan, and not even read
        for depth in range(first, depth_of):
            nodes = list(wanted[depth])
            for group, mask in nodes:
                if (group, mask) not in live:
                    live[group, mask] = known.pop((group, depth, mask))
            items = [(live.pop(node), wanted[depth][node]) for node in nodes]
            done = self.trunk.step(depth, next(blocks) if depth in needed else None, items)
            del items
            for (group, mask), variants in zip(nodes, done, strict=True):
                for variant, stream in variants.items():
                    live[group, mask | variant << 2 * depth] = stream
            self.look(depth, list(live.values()))
            for (group, mask), stream in live.items():
                if depth + 1 in self.checkpoints or mask == prefix_mask(shared, depth + 1):
                    self.streams.put((group, depth + 1, mask), stream)
        next(blocks, None)  # a streamed block goes back
        for (group, mask), stream in live.items():
            yield (group, mask), stream

    def _depth_first(self, starts: dict[WalkJob, int]) -> Iterator[tuple[WalkJob, torch.Tensor]]:
        roots: dict[Node, list[int]] = defaultdict(list)
        for (group, mask), start in starts.items():
            roots[group, start, prefix_mask(mask, start)].append(mask)
        shared = _common(starts)
        stack = [(node, self.streams.get(node), masks) for node, masks in sorted(roots.items(), reverse=True)]
        while stack:
            (group, depth, mask), stream, masks = stack.pop()
            if depth == self.trunk.depth:
                yield (group, mask), stream
                continue
            branches: dict[int, list[int]] = defaultdict(list)
            for plan in masks:
                branches[plan >> 2 * depth & 3].append(plan)
            blocks = self.trunk.blocks([depth] if set(branches) != {NEITHER} else [])
            done = self.trunk.step(depth, next(blocks, None), [(stream, set(branches))])[0]
            next(blocks, None)
            self.look(depth, list(done.values()))
            for variant in sorted(branches, reverse=True):
                node = (group, depth + 1, mask | variant << 2 * depth)
                if depth + 1 in self.checkpoints or node[2] == prefix_mask(shared, depth + 1):
                    self.streams.put(node, done[variant])
                stack.append((node, done[variant], branches[variant]))


def _common(starts: dict[WalkJob, int]) -> int:
    """What all plans of a walk remove: their streams are what the next walk will most likely share."""
    masks = [mask for _, mask in starts]
    common = masks[0]
    for mask in masks[1:]:
        common &= mask
    return common
