"""The prefix trie: every distinct prefix of kept, narrowed and removed sites is computed once.

A plan is a bit mask here (`PlanBits`). A node of the trie is (document group, depth, the bits of the blocks before that
depth); plans with equal prefixes share it. The walk has two orders: layer by layer runs every block once on the stacked
streams of all live nodes; depth-first holds one path.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from itertools import groupby
from operator import and_, itemgetter, or_

import torch

from billhook.core.plan import PARTS, KeptGroups, Plan, Site
from billhook.engine.blocks import NEITHER, BlockRunner, BlockState, PartState
from billhook.engine.workers.columns import END, Path

WalkJob = tuple[int, int]  # a document group, a plan's mask
Node = tuple[int, int, int]  # a document group, a depth in blocks, the mask of its prefix
Finals = Iterator[tuple[WalkJob, torch.Tensor]]  # jobs, and their streams after the last block
Look = Callable[[int, Sequence[torch.Tensor]], None]  # (depth, streams after that block)


class PlanBits:
    """Bit masks of the plans of a model whose blocks stand at `positions`.

    Bit 2·i says that the attention of the i-th block is removed, bit 2·i + 1 its mlp. A site that is narrowed has a bit
    of its own for every choice of kept groups, in the order in which they were added. So the bits that two masks have
    in common are what both plans do.
    """

    def __init__(self, positions: Sequence[int]) -> None:
        self._names: list[Site | KeptGroups] = [
            Site(position, part) for position in positions for part in PARTS
        ]  # by bit
        self._bits = {name: 1 << bit for bit, name in enumerate(self._names)}
        self._index = {position: index for index, position in enumerate(positions)}
        self._before = [(1 << 2 * depth) - 1 for depth in range(len(positions) + 1)]
        self._states: dict[int, BlockState] = {}

    def unknown(self, plans: Iterable[Plan]) -> list[KeptGroups]:
        """Return what plans keep of narrowed sites that has no bit yet, in one order."""
        narrowed = {narrow for plan in plans for narrow in plan.narrowed}
        return sorted(narrow for narrow in narrowed if narrow not in self._bits)

    def add(self, narrowed: Iterable[KeptGroups]) -> None:
        """Give bits to what is kept of narrowed sites."""
        for narrow in narrowed:
            if narrow not in self._bits:
                bit = self._bits[narrow] = 1 << len(self._names)
                self._names.append(narrow)
                for depth in range(self._index[narrow.site.block] + 1, len(self._before)):
                    self._before[depth] |= bit

    def added(self) -> list[KeptGroups]:
        """Return what has been given bits, in order."""
        return [name for name in self._names if isinstance(name, KeptGroups)]

    def mask(self, plan: Plan) -> int:
        """Return a plan's mask. What it narrows must have been added."""
        return sum(self._bits[site] for site in plan.removed) + sum(self._bits[narrow] for narrow in plan.narrowed)

    def path(self, mask: int) -> Path:
        """Return what a mask does, in the order of the walk. A site has the number of the bit that removes it."""
        steps = []
        for choice in _set_bits(mask):
            name = self._names[choice]
            site = name.site if isinstance(name, KeptGroups) else name
            steps.append((self._bits[site].bit_length() - 1, choice))
        return (*sorted(steps), (2 * (len(self._before) - 1), END))

    def plan(self, mask: int) -> Plan:
        """Return the plan of a mask."""
        done = [self._names[bit] for bit in _set_bits(mask)]
        narrowed = frozenset(each for each in done if isinstance(each, KeptGroups))
        return Plan(frozenset(each for each in done if isinstance(each, Site)), narrowed)

    def narrowed(self, masks: Iterable[int]) -> list[KeptGroups]:
        """Return what plans with these masks keep of the sites that they narrow."""
        names = (self._names[bit] for bit in _set_bits(reduce(or_, masks, 0)))
        return [name for name in names if isinstance(name, KeptGroups)]

    def prefix(self, mask: int, depth: int) -> int:
        """Return the part of a mask that concerns the blocks before `depth`."""
        return mask & self._before[depth]

    def at(self, mask: int, depth: int) -> int:
        """Return the part of a mask that concerns the block at `depth`."""
        return mask & self._before[depth + 1] & ~self._before[depth]

    def state(self, mask: int) -> BlockState:
        """Return the state of the block that such a part concerns."""
        if mask not in self._states:
            parts: dict[str, PartState] = dict.fromkeys(PARTS, True)
            for bit in _set_bits(mask):
                each = self._names[bit]
                parts |= {each.part: False} if isinstance(each, Site) else {each.site.part: each}
            self._states[mask] = BlockState(**parts)
        return self._states[mask]


def _set_bits(mask: int) -> Iterator[int]:
    """Yield the numbers of the bits of a mask that are 1."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


class StreamCache:
    """Residual streams by node, the least recently used dropped beyond `limit` bytes, except those of depth 0."""

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._roots: dict[Node, torch.Tensor] = {}
        self._streams: OrderedDict[Node, torch.Tensor] = OrderedDict()

    def __contains__(self, node: Node) -> bool:
        return node in self._streams or node in self._roots

    def get(self, node: Node) -> torch.Tensor:
        if node in self._roots:
            return self._roots[node]
        self._streams.move_to_end(node)
        return self._streams[node]

    def put(self, node: Node, stream: torch.Tensor) -> None:
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

    def drop(self, useless: Callable[[Node], bool]) -> None:
        """Drop the streams of useless nodes."""
        for streams in (self._streams, self._roots):
            for node in [node for node in streams if useless(node)]:
                self.size -= streams.pop(node).nbytes


class Walk:
    """Walk to the final streams of jobs. `checkpoints`: depths whose streams are cached for later jobs."""

    def __init__(self, runner: BlockRunner, ids: Sequence[torch.Tensor], limit: int, bits: PlanBits) -> None:
        self.runner, self.ids, self.bits = runner, ids, bits
        self.streams = StreamCache(limit)
        self.checkpoints = frozenset(range(runner.depth + 1))
        self.look: Look = lambda depth, streams: None

    def run(self, jobs: Sequence[WalkJob], layers: bool) -> Finals:
        """Yield (job, residual stream after the last block [rows, time, width]) for every job, in any order."""
        for group in sorted({group for group, _ in jobs}):  # before the starts are chosen, since adding may evict
            if (group, 0, 0) not in self.streams:
                self.streams.put((group, 0, 0), self.runner.embed(self.ids[group]))
        starts = {job: self._start(job) for job in jobs}
        for group, mask in (job for job in jobs if starts[job] == self.runner.depth):
            yield (group, mask), self.streams.get((group, self.runner.depth, mask))
        uncached = {job: starts[job] for job in jobs if starts[job] < self.runner.depth}
        self.runner.prepare(self.bits.narrowed(mask for _, mask in uncached))
        nodes = {(g, start, self.bits.prefix(m, start)) for (g, m), start in uncached.items()}
        roots = {node: self.streams.get(node) for node in sorted(nodes)}  # whatever the walk drops meanwhile
        for part in self._parts(uncached):
            yield from (self._layers if layers else self._depth_first)(part, roots)

    def _parts(self, starts: dict[WalkJob, int]) -> Iterator[dict[WalkJob, int]]:
        """Yield the jobs of all groups together; of a model on several devices in parts that fill one device.

        Nothing waits for a device between two parts: the first device begins the second part while the next device
        computes the first one.
        """
        part = starts if len(self.runner.devices) == 1 else {}
        for _, jobs in groupby(() if part else sorted(starts), key=itemgetter(0)):
            part = part | {job: starts[job] for job in jobs}
            if sum(self.ids[group].numel() for group, _ in part) >= self.runner.chunk:
                yield part
                part = {}
        if part:
            yield part

    def evict(self, base: int) -> None:
        """Drop streams from which no plan that removes at least `base` can start."""
        self.streams.drop(lambda node: bool(self.bits.prefix(base, node[1]) & ~node[2]))

    def _start(self, job: WalkJob) -> int:
        """Return the greatest depth at which the stream of a job is cached."""
        group, mask = job
        for depth in range(self.runner.depth, 0, -1):
            if (group, depth, self.bits.prefix(mask, depth)) in self.streams:
                return depth
        return 0

    def _layers(self, starts: dict[WalkJob, int], roots: dict[Node, torch.Tensor]) -> Finals:
        depth_of = self.runner.depth
        wanted: list[dict[tuple[int, int], set[int]]] = [defaultdict(set) for _ in range(depth_of)]
        for (group, mask), start in starts.items():
            for depth in range(start, depth_of):
                wanted[depth][group, self.bits.prefix(mask, depth)].add(self.bits.at(mask, depth))
        shared = _common(starts)
        live: dict[tuple[int, int], torch.Tensor] = {}
        first = min(starts.values())
        removed = [
            all(self.bits.state(choice) == NEITHER for choices in at.values() for choice in choices) for at in wanted
        ]
        needed = [depth for depth in range(first, depth_of) if not removed[depth]]
        blocks = self.runner.blocks(needed)  # the others are removed from every plan, and not even read
        for depth in range(first, depth_of):
            nodes = list(wanted[depth])
            for group, mask in nodes:
                if (group, mask) not in live:
                    live[group, mask] = roots.pop((group, depth, mask))
            items = [(live.pop(node), [*map(self.bits.state, sorted(wanted[depth][node]))]) for node in nodes]
            done = self.runner.step(depth, next(blocks) if depth in needed else None, items)
            del items
            for (group, mask), streams in zip(nodes, done, strict=True):
                for choice in wanted[depth][group, mask]:
                    live[group, mask | choice] = streams[self.bits.state(choice)]
            del done
            self.look(depth, list(live.values()))
            for (group, mask), stream in live.items():
                if depth + 1 in self.checkpoints or mask == self.bits.prefix(shared, depth + 1):
                    self.streams.put((group, depth + 1, mask), stream)
        next(blocks, None)  # a streamed block is released
        for (group, mask), stream in live.items():
            yield (group, mask), stream

    def _depth_first(self, starts: dict[WalkJob, int], known: dict[Node, torch.Tensor]) -> Finals:
        roots: dict[Node, list[int]] = defaultdict(list)
        for (group, mask), start in starts.items():
            roots[group, start, self.bits.prefix(mask, start)].append(mask)
        shared = _common(starts)
        stack = [(node, known.pop(node), masks) for node, masks in sorted(roots.items(), reverse=True)]
        while stack:
            (group, depth, mask), stream, masks = stack.pop()
            if depth == self.runner.depth:
                yield (group, mask), stream
                continue
            branches: dict[int, list[int]] = defaultdict(list)
            for plan in masks:
                branches[self.bits.at(plan, depth)].append(plan)
            states = {choice: self.bits.state(choice) for choice in branches}
            blocks = self.runner.blocks([depth] if set(states.values()) != {NEITHER} else [])
            done = self.runner.step(depth, next(blocks, None), [(stream, [*states.values()])])[0]
            next(blocks, None)
            self.look(depth, list(done.values()))
            for choice in sorted(branches, reverse=True):
                node, after = (group, depth + 1, mask | choice), done[states[choice]]
                if depth + 1 in self.checkpoints or node[2] == self.bits.prefix(shared, depth + 1):
                    self.streams.put(node, after)
                stack.append((node, after, branches[choice]))


def _common(starts: dict[WalkJob, int]) -> int:
    """Return the mask of what all plans of a walk remove: the next walk will most likely share these streams."""
    return reduce(and_, (mask for _, mask in starts))
