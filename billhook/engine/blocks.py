"""The model's own blocks, called one at a time on given residual streams.

The other arguments of a block (masks, positions) are recorded from one call of the model's own forward in which the
blocks return their input. So every architecture computes by its own code.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from billhook.core.plan import PARTS, KeptGroups
from billhook.models import structure
from billhook.models.accelerator.narrowed_parts import NarrowedParts
from billhook.models.load import Teacher
from billhook.models.modeling_billhook import remove_part
from billhook.models.surgery import narrower

Call = tuple[tuple[Any, ...], dict[str, Any]]  # a block's arguments besides the residual stream
PartState = KeptGroups | bool  # of a site: kept whole, removed, or narrowed to some groups
Streams = dict["BlockState", torch.Tensor]  # after a block, by its state
ANY_ROWS = 0  # the number of rows under which arguments are cached that serve any number
CACHED_SHAPES = 64  # shapes whose recorded calls are cached


class BlockState(NamedTuple):
    """State of a block's two sites under a plan."""

    attention: PartState
    mlp: PartState

    @property
    def removed(self) -> set[str]:
        """The parts that are removed."""
        return {part for part, state in zip(PARTS, self, strict=True) if state is False}

    @property
    def narrowed(self) -> frozenset[KeptGroups]:
        """What is kept of the sites that are narrowed."""
        return frozenset(state for state in self if isinstance(state, KeptGroups))


KEPT, NO_ATTENTION, NO_MLP, NEITHER = (BlockState(a, m) for m in (True, False) for a in (True, False))


class _CachedOutput(nn.Module):
    """Stand-in for a site that returns its earlier output and computes nothing."""

    layer_idx = None

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


class BlockRunner:
    """Runs the blocks of one teacher, its weights in memory or streamed, on stacks of residual streams.

    It swaps modules of the blocks for a moment and restores them, so the caller must hold the teacher's lock.
    `chunk`: tokens that pass a block at a time. `computed`: tokens times sites so far, padding included.
    """

    def __init__(self, teacher: Teacher, chunk: int) -> None:
        self.teacher, self.chunk, self.computed = teacher, chunk, 0
        self.model, self.row = teacher.model, teacher.architecture
        self.depth = len(teacher.positions)
        self.parallel = self.row.parallel(self.model.config)
        self._blocks = structure.blocks_of(self.model, self.row)
        self._parts = self.row.parts(self._blocks[0], self.model.config)
        present = set(teacher.anatomy.sites_present())
        self.devices = teacher.devices
        self._devices = [teacher.block_device(index) for index in range(self.depth)]
        self._present = [{s.part for s in present if s.block == p} for p in teacher.positions]
        self._calls: dict[tuple[int, int], list[Call]] = {}  # by rows and time
        self._narrowed = NarrowedParts(teacher)

    # -- before and after the blocks --------------------------------------------------------------------------------

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the residual stream [rows, time, width] before the first block, for token ids [rows, time]."""
        weights = self.teacher.weights
        if weights is None:
            return self._record(ids)
        unique, renumbered = torch.unique(ids, return_inverse=True)
        embedding = self.model.get_input_embeddings()
        whole, padding = embedding.weight, getattr(embedding, "padding_idx", None)
        embedding.weight, embedding.padding_idx = nn.Parameter(weights.rows(unique), requires_grad=False), None
        try:  # the model's own forward, on an embedding with only the rows it needs
            return self._record(renumbered)
        finally:
            embedding.weight, embedding.padding_idx = whole, padding

    def _record(self, ids: torch.Tensor) -> torch.Tensor:
        """Call the model's forward once with blocks that return their input; cache their arguments."""
        calls: list[Call] = []
        streams: list[torch.Tensor] = []

        def pass_through(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            streams.append(hidden_states)
            return (hidden_states, None) if self.row.block_outputs == 2 else hidden_states

        for block in self._blocks:
            block.forward = pass_through
        try:
            with torch.no_grad():
                self.model.base_model(input_ids=ids, use_cache=False)
        finally:
            for block in self._blocks:
                del block.forward
        if len(self._calls) >= CACHED_SHAPES:
            del self._calls[next(iter(self._calls))]
        rows, time = int(ids.shape[0]), int(ids.shape[1])
        self._calls[ANY_ROWS if _serve_any_rows(calls, rows, time) else rows, time] = calls
        return streams[0]

    def final_norm(self, stream: torch.Tensor) -> torch.Tensor:
        """Return the head's input, in float32, from the residual stream after the last block."""
        stream = stream.to(self.teacher.head_device)
        for path in self.row.final:
            owner, _, name = path.rpartition(".")
            module = getattr(self.model.get_submodule(owner), name, None)
            stream = stream if module is None else module(stream)
        return stream.float()

    # -- the blocks -------------------------------------------------------------------------------------------------

    def blocks(self, indices: Iterable[int]) -> Iterator[nn.Module]:
        """Yield blocks that can be called, in the given order; a streamed one is valid until the next is yielded."""
        if self.teacher.weights is not None:
            yield from self.teacher.weights.blocks(indices)
        else:
            yield from (self._blocks[index] for index in indices)

    def prepare(self, narrowed: Iterable[KeptGroups]) -> None:
        """Prepare for states in which these sites are narrowed: what that needs comes to the devices at once."""
        self._narrowed.bring(narrowed)

    def fetch(self, index: int, streams: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """Return the streams on the device of block `index`."""
        return [stream.to(self._devices[index]) for stream in streams]

    def step(
        self, index: int, block: nn.Module | None, items: Sequence[tuple[torch.Tensor, Collection[BlockState]]]
    ) -> list[Streams]:
        """Return for each item (stream, states) its stream after block `index`, by state (KEPT, NO_ATTENTION …).

        A site runs once on a stream in each of its states, however many combinations use it, and not at all where it
        is removed. `block` may be None if all states are NEITHER.
        """
        if block is not None:
            items = list(zip(self.fetch(index, (x for x, _ in items)), (wanted for _, wanted in items), strict=True))
        done: list[Streams] = [{NEITHER: x} if NEITHER in wanted else {} for x, wanted in items]
        if block is None:
            return done
        whole: dict[BlockState, list[int]] = defaultdict(list)
        staged: list[int] = []
        for i, (_, wanted) in enumerate(items):
            only = next(iter(wanted)) if len(wanted) == 1 else None
            if only is not None and not only.removed:
                whole[only].append(i)
            else:
                staged.append(i)
        for state, chosen in whole.items():
            for i, y in zip(chosen, self._run(index, block, [items[i][0] for i in chosen], state), strict=True):
                done[i][state] = y
        (self._parallel if self.parallel else self._in_turn)(index, block, [(i, *items[i]) for i in staged], done)
        return done

    def _in_turn(
        self, index: int, block: nn.Module, items: list[tuple[int, torch.Tensor, Collection[BlockState]]],
        done: list[Streams],
    ) -> None:  # fmt: skip
        """Add to `done` the states of a block whose mlp reads what its attention leaves: first that, then the mlp."""
        first: dict[PartState, list[int]] = defaultdict(list)
        second: dict[PartState, list[tuple[int, PartState]]] = defaultdict(list)
        for number, (_, _, wanted) in enumerate(items):
            for one in dict.fromkeys(state.attention for state in wanted if state.attention is not False):
                first[one].append(number)
            for state in wanted:
                if state.mlp is not False:
                    second[state.mlp].append((number, state.attention))
        middles: dict[tuple[int, PartState], torch.Tensor] = {(n, False): x for n, (_, x, _) in enumerate(items)}
        for attention, numbers in first.items():
            alone = BlockState(attention, False)
            for number, y in zip(numbers, self._run(index, block, [items[n][1] for n in numbers], alone), strict=True):
                middles[number, attention] = y
                if alone in items[number][2]:
                    done[items[number][0]][alone] = y
        for mlp, places in second.items():
            places.sort(key=lambda place: place[1] is False)  # what attention left stands before what it did not touch
            outputs = self._run(index, block, [middles[place] for place in places], BlockState(False, mlp))
            for (number, before), y in zip(places, outputs, strict=True):
                done[items[number][0]][BlockState(before, mlp)] = y

    def _parallel(
        self, index: int, block: nn.Module, items: list[tuple[int, torch.Tensor, Collection[BlockState]]],
        done: list[Streams],
    ) -> None:  # fmt: skip
        """Add to `done` the states of a block whose parts read the same stream: each part runs once in each state."""
        outputs: dict[tuple[int, str, PartState], Any] = {}  # by item, part and its state
        names = {part: self._parts[part]["zero"][0] for part in PARTS}
        for part in PARTS:
            chosen: dict[BlockState, list[int]] = defaultdict(list)
            for number, (_, _, wanted) in enumerate(items):
                for one in dict.fromkeys(getattr(state, part) for state in wanted):
                    if one is not False:
                        chosen[BlockState(*(one if each == part else False for each in PARTS))].append(number)
            for alone, numbers in chosen.items():
                captured: list[Any] = []
                keep = lambda module, args, output, to=captured: to.append(output)  # noqa: E731
                handle = getattr(block, names[part]).register_forward_hook(keep)
                try:
                    streams = self._run(index, block, [items[n][1] for n in numbers], alone, stack=False)
                finally:
                    handle.remove()
                for number, y, output in zip(numbers, streams, captured, strict=True):
                    outputs[number, part, getattr(alone, part)] = output
                    if alone in items[number][2]:
                        done[items[number][0]][alone] = y
        modules = {name: getattr(block, name) for name in names.values()}
        for number, (i, x, wanted) in enumerate(items):
            for state in (state for state in wanted if not state.removed):
                try:
                    for part, name in names.items():
                        setattr(block, name, _CachedOutput(outputs[number, part, getattr(state, part)]))
                    done[i][state] = self.call(index, block, x)
                finally:
                    for name, module in modules.items():
                        setattr(block, name, module)

    def _run(
        self, index: int, block: nn.Module, streams: list[torch.Tensor], state: BlockState, *, stack: bool = True
    ) -> list[torch.Tensor]:
        """Run a block in a state on many streams [rows, time, width], stacked where their times are equal."""
        outputs: list[torch.Tensor] = [torch.empty(0)] * len(streams)
        with self._in_state(block, state):
            for chunk in self._chunks(streams, stack):
                x = streams[chunk[0]] if len(chunk) == 1 else torch.cat([streams[i] for i in chunk])
                y = self.call(index, block, x)
                for i, piece in zip(chunk, y.split([streams[i].shape[0] for i in chunk]), strict=True):
                    outputs[i] = piece
                self.computed += x.shape[0] * x.shape[1] * len(self._present[index] - state.removed)
        return outputs

    def _chunks(self, streams: list[torch.Tensor], stack: bool) -> Iterator[list[int]]:
        """Yield numbers of streams of equal time, at most `chunk` tokens together, or one by one without `stack`."""
        by_time: dict[int, list[int]] = {}
        for i, stream in enumerate(streams):
            by_time.setdefault(stream.shape[1], []).append(i)
        for time, numbers in by_time.items():
            chunk: list[int] = []
            rows = 0
            for i in numbers:
                if chunk and (not stack or (rows + streams[i].shape[0]) * time > self.chunk):
                    yield chunk
                    chunk, rows = [], 0
                chunk.append(i)
                rows += streams[i].shape[0]
            yield chunk

    @contextmanager
    def _in_state(self, block: nn.Module, state: BlockState) -> Iterator[None]:
        """Give a block, inside the context, the sites of a state."""
        parts = [self._narrowed[each] for each in state.narrowed]
        with narrower(self.teacher, parts, block), self.without_parts(block, state.removed):
            yield

    @contextmanager
    def without_parts(self, block: nn.Module, parts: Iterable[str]) -> Iterator[None]:
        """Remove parts of `block` inside the context."""
        original: dict[str, nn.Module] = {}
        for part in parts:
            original |= remove_part(block, self._parts[part])
        try:
            yield
        finally:
            for name, module in original.items():
                setattr(block, name, module)

    def whole(self, index: int, block: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
        """As `call`, of a block in which all sites compute, which is counted."""
        self.computed += x.shape[0] * x.shape[1] * len(self._present[index])
        return self.call(index, block, x)

    def call(self, index: int, block: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
        """Return the stream [rows, time, width] after block `index`, computed by `block` or a stand-in for it."""
        rows, time = x.shape[0], x.shape[1]
        while (calls := self._calls.get((ANY_ROWS, time)) or self._calls.get((rows, time))) is None:
            self.embed(torch.zeros((rows, time), dtype=torch.int64, device=self.teacher.device))
        args, kwargs = calls[index]
        output = block(x, *args, **kwargs)
        y: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return y


def _serve_any_rows(calls: list[Call], rows: int, time: int) -> bool:
    """Return whether arguments that were recorded with several rows say nothing of them: they broadcast."""
    tensors = [x for x in tree_flatten(calls)[0] if isinstance(x, torch.Tensor) and x.dim()]
    by_position = rows != time
    return rows > 1 and all(x.shape[0] == 1 or (x.dim() == 1 and by_position and x.shape[0] == time) for x in tensors)
