"""The model's own blocks, called one at a time on given residual streams.

The other arguments of a block (masks, positions) are recorded from one call of the model's own forward in which the
blocks return their input. So every architecture computes by its own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from billhook.models import structure
from billhook.models.load import Teacher
from billhook.models.modeling_billhook import remove_part

Call = tuple[tuple[Any, ...], dict[str, Any]]  # a block's arguments besides the residual stream
KEPT, NO_ATTENTION, NO_MLP, NEITHER = range(4)  # variants of a block under a plan
ANY_ROWS = 0  # the number of rows under which arguments are cached that serve any number
CACHED_SHAPES = 64  # shapes whose recorded calls are cached


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
        self._present = [{s.part for s in present if s.block == p} for p in teacher.positions]
        self._calls: dict[tuple[int, int], list[Call]] = {}  # by rows and time

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

    def step(
        self, index: int, block: nn.Module | None, items: list[tuple[torch.Tensor, set[int]]]
    ) -> list[dict[int, torch.Tensor]]:
        """Return for each item (stream, variants) its stream after block `index`, by variant (KEPT, NO_ATTENTION …).

        A site runs once on a stream, however many variants use it, and not at all where it is removed. `block` may be
        None if all variants are NEITHER.
        """
        if block is None:
            return [{NEITHER: x} for x, _ in items]
        done: list[dict[int, torch.Tensor]] = [{NEITHER: x} if NEITHER in wanted else {} for x, wanted in items]
        whole = [i for i, (_, wanted) in enumerate(items) if wanted == {KEPT}]
        first = [i for i, (_, wanted) in enumerate(items) if wanted != {KEPT} and wanted & {KEPT, NO_MLP}]
        alone = [i for i, (_, wanted) in enumerate(items) if NO_ATTENTION in wanted]
        both = [i for i in first if KEPT in items[i][1]]
        for i, y in zip(whole, self._run(index, block, [items[i][0] for i in whole]), strict=True):
            done[i][KEPT] = y
        if self.parallel:
            self._parallel(index, block, items, (first, alone, both), done)
            return done
        middles = dict(zip(first, self._run(index, block, [items[i][0] for i in first], ("mlp",)), strict=True))
        for i in first:
            if NO_MLP in items[i][1]:
                done[i][NO_MLP] = middles[i]
        inputs = [middles[i] for i in both] + [items[i][0] for i in alone]
        outputs = self._run(index, block, inputs, ("attention",))
        for i, variant, y in zip(both + alone, [KEPT] * len(both) + [NO_ATTENTION] * len(alone), outputs, strict=True):
            done[i][variant] = y
        return done

    def _parallel(
        self, index: int, block: nn.Module, items: list[tuple[torch.Tensor, set[int]]],
        which: tuple[list[int], list[int], list[int]], done: list[dict[int, torch.Tensor]],
    ) -> None:  # fmt: skip
        """Add to `done` the variants of a block whose parts read the same stream: each part runs once."""
        first, alone, both = which
        captured: dict[str, dict[int, Any]] = {}
        orders = ("attention", "mlp", NO_MLP, first), ("mlp", "attention", NO_ATTENTION, sorted({*alone, *both}))
        for part, other, variant, chosen in orders:
            outputs: list[Any] = []
            module = getattr(block, self._parts[part]["zero"][0])
            handle = module.register_forward_hook(lambda m, args, output, outputs=outputs: outputs.append(output))
            try:
                streams = [items[i][0] for i in chosen]
                for i, y in zip(chosen, self._run(index, block, streams, (other,), stack=False), strict=True):
                    done[i] |= {variant: y} if variant in items[i][1] else {}
            finally:
                handle.remove()
            captured[part] = dict(zip(chosen, outputs, strict=True))
        for i in both:
            names = {part: self._parts[part]["zero"][0] for part in captured}
            modules = {name: getattr(block, name) for name in names.values()}
            for part, name in names.items():
                setattr(block, name, _CachedOutput(captured[part][i]))
            try:
                done[i][KEPT] = self.call(index, block, items[i][0])
            finally:
                for name, module in modules.items():
                    setattr(block, name, module)

    def _run(
        self, index: int, block: nn.Module, streams: list[torch.Tensor], without: tuple[str, ...] = (), *,
        stack: bool = True,
    ) -> list[torch.Tensor]:  # fmt: skip
        """Run a block `without` parts on many streams [rows, time, width], stacked where their times are equal."""
        outputs: list[torch.Tensor] = [torch.empty(0)] * len(streams)
        with self.without_parts(block, without):
            for chunk in self._chunks(streams, stack):
                x = streams[chunk[0]] if len(chunk) == 1 else torch.cat([streams[i] for i in chunk])
                y = self.call(index, block, x)
                for i, piece in zip(chunk, y.split([streams[i].shape[0] for i in chunk]), strict=True):
                    outputs[i] = piece
                self.computed += x.shape[0] * x.shape[1] * len(self._present[index] - set(without))
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
    def without_parts(self, block: nn.Module, parts: tuple[str, ...]) -> Iterator[None]:
        """Remove parts of `block` inside the context."""
        original: dict[str, nn.Module] = {}
        for part in parts:
            original |= remove_part(block, self._parts[part])
        try:
            yield
        finally:
            for name, module in original.items():
                setattr(block, name, module)

    def call(self, index: int, block: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
        """Return the stream [rows, time, width] after block `index`, computed by `block` or a stand-in for it."""
        rows, time = x.shape[0], x.shape[1]
        while (calls := self._calls.get((ANY_ROWS, time)) or self._calls.get((rows, time))) is None:
            self.embed(torch.zeros((rows, time), dtype=torch.int64, device=x.device))
        args, kwargs = calls[index]
        output = block(x, *args, **kwargs)
        y: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return y


def _serve_any_rows(calls: list[Call], rows: int, time: int) -> bool:
    """Return whether arguments that were recorded with several rows say nothing of them: they broadcast."""
    tensors = [x for x in tree_flatten(calls)[0] if isinstance(x, torch.Tensor) and x.dim()]
    by_position = rows != time
    return rows > 1 and all(x.shape[0] == 1 or (x.dim() == 1 and by_position and x.shape[0] == time) for x in tensors)
