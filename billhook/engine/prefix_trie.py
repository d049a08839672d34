"""The prefix trie: every distinct prefix of kept and removed sites is computed once.

A plan is a bit mask here: bit 2·i is the attention of the model's i-th block, bit 2·i + 1 its mlp. A node of the trie
is (document group, depth, mask of the sites removed before that depth); plans with equal prefixes share it. The walk
has two orders: layer by layer runs every block once on the stacked streams of all live nodes; depth-first holds one
path.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import reduce
from operator import and_
from typing import Generic, TypeVar

import torch

from billhook.engine.blocks import NEITHER, BlockRunner

WalkJob = tuple[int, int]  # a document group, a plan's mask
Node = tuple[int, int, int]  # a document group, a depth in blocks, the mask of its prefix
Prefix = TypeVar("Prefix", bound=Hashable)  # a plan up to a depth
Look = Callable[[int, Sequence[torch.Tensor]], None]  # (depth, streams after that block)


def prefix_mask(mask: int, depth: int) -> int:
    """Return the part of a plan's mask that concerns the blocks before `depth`."""
    return mask & ((1 << 2 * depth) - 1)


class StreamCache(Generic[Prefix]):
    """Residual streams by node, the least recently used dropped beyond `limit` bytes, except those of depth 0."""

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._roots: dict[tuple[int, int, Prefix], torch.Tensor] = {}
        self._streams: OrderedDict[tuple[int, int, Prefix], torch.Tensor] = OrderedDict()

    def __contains__(self, node: tuple[int, int, Prefix]) -> bool:
        return node in self._streams or node in self._roots

    def get(self, node: tuple[int, int, Prefix]) -> torch.Tensor:
        if node in self._roots:
            return self._roots[node]
        self._streams.move_to_end(node)
        return self._streams[node]

    def put(self, node: tuple[int, int, Prefix], stream: torch.Tensor) -> None:
        if node in self or (node[1] and stream.nbytes > self.limit):
            return
        # A piece of a stack would keep the whole stack in memory.
        copy = stream if stream.untyped_storage().nbytes() == stream.nbytes else stream.clone()
        (self._streams if node[1] else self._roots)[node] = copy
        self.size += copy.nbytes
        while self.size > self.limit and self._streams:
            self.size -= self._streams.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Drop all streams."""
        self._streams.clear()
        self._roots.clear()
        self.size = 0

    def drop(self, useless: Callable[[tuple[int, int, Prefix]], bool]) -> None:
        """Drop the streams of useless nodes."""
        for streams in (self._streams, self._roots):
            for node in [node for node in streams if useless(node)]:
                self.size -= streams.pop(node).nbytes


class Walk:
    """Walk to the final streams of jobs. `checkpoints`: depths whose streams are cached for later jobs."""

    def __init__(self, runner: BlockRunner, ids: Sequence[torch.Tensor], limit: int) -> None:
        self.runner, self.ids = runner, ids
        self.streams: StreamCache[int] = StreamCache(limit)
        self.checkpoints = frozenset(range(runner.depth + 1))
        self.look: Look = lambda depth, streams: None

    def run(self, jobs: Sequence[WalkJob], layers: bool) -> Iterator[tuple[WalkJob, torch.Tensor]]:
        """Yield (job, residual stream after the last block [rows, time, width]) for every job, in any order."""
        for group in sorted({group for group, _ in jobs}):  # before the starts are chosen, since adding may evict
            if (group, 0, 0) not in self.streams:
                self.streams.put((group, 0, 0), self.runner.embed(self.ids[group]))
        starts = {job: self._start(job) for job in jobs}
        for group, mask in (job for job in jobs if starts[job] == self.runner.depth):
            yield (group, mask), self.streams.get((group, self.runner.depth, mask))
        uncached = {job: starts[job] for job in jobs if starts[job] < self.runner.depth}
        if uncached:
            yield from (self._layers if layers else self._depth_first)(uncached)

    def evict(self, base: int) -> None:
        """Drop streams from which no plan that removes at least `base` can start."""
        self.streams.drop(lambda node: bool(prefix_mask(base, node[1]) & ~node[2]))

    def _start(self, job: WalkJob) -> int:
        """Return the greatest depth at which the stream of a job is cached."""
        group, mask = job
        for depth in range(self.runner.depth, 0, -1):
            if (group, depth, prefix_mask(mask, depth)) in self.streams:
                return depth
        return 0

    def _layers(self, starts: dict[WalkJob, int]) -> Iterator[tuple[WalkJob, torch.Tensor]]:
        depth_of = self.runner.depth
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
        blocks = self.runner.blocks(needed)  # the others are removed from every plan, and not even read
        for depth in range(first, depth_of):
            nodes = list(wanted[depth])
            for group, mask in nodes:
                if (group, mask) not in live:
                    live[group, mask] = known.pop((group, depth, mask))
            items = [(live.pop(node), wanted[depth][node]) for node in nodes]
            done = self.runner.step(depth, next(blocks) if depth in needed else None, items)
            del items
            for (group, mask), variants in zip(nodes, done, strict=True):
                for variant, stream in variants.items():
                    live[group, mask | variant << 2 * depth] = stream
            self.look(depth, list(live.values()))
            for (group, mask), stream in live.items():
                if depth + 1 in self.checkpoints or mask == prefix_mask(shared, depth + 1):
                    self.streams.put((group, depth + 1, mask), stream)
        next(blocks, None)  # a streamed block is released
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
            if depth == self.runner.depth:
                yield (group, mask), stream
                continue
            branches: dict[int, list[int]] = defaultdict(list)
            for plan in masks:
                branches[plan >> 2 * depth & 3].append(plan)
            blocks = self.runner.blocks([depth] if set(branches) != {NEITHER} else [])
            done = self.runner.step(depth, next(blocks, None), [(stream, set(branches))])[0]
            next(blocks, None)
            self.look(depth, list(done.values()))
            for variant in sorted(branches, reverse=True):
                node = (group, depth + 1, mask | variant << 2 * depth)
                if depth + 1 in self.checkpoints or node[2] == prefix_mask(shared, depth + 1):
                    self.streams.put(node, done[variant])
                stack.append((node, done[variant], branches[variant]))


def _common(starts: dict[WalkJob, int]) -> int:
    """Return the mask of what all plans of a walk remove: the next walk will most likely share these streams."""
    return reduce(and_, (mask for _, mask in starts))
