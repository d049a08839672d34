"""Walks of one plan at a time: under a repair of its blocks, or with narrower sites."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from billhook.core.errors import UsageError, option
from billhook.core.plan import PARTS, Plan, Site
from billhook.engine.blocks import BlockRunner
from billhook.engine.prefix_trie import StreamCache, Walk, WalkJob
from billhook.models import structure
from billhook.models.modeling_billhook import remove_part
from billhook.models.repair import NO_REPAIR, Repair, add_bias, patch_module
from billhook.models.streaming import set_tensor
from billhook.models.surgery import zeroed_block_weights


@contextmanager
def patched_block(trunk: BlockRunner, index: int, block: nn.Module, plan: Plan, repair: Repair) -> Iterator[None]:
    """Inside, block `index` is as a repaired student has it: removed parts out, patches and biases in, weights new, and
    zeros where channel groups go."""
    position, row, config = trunk.teacher.positions[index], trunk.row, trunk.model.config
    parts = row.parts(block, config)
    stood: dict[str, nn.Module] = {}
    weights: dict[str, torch.Tensor] = {}
    inside = f"{row.blocks}.{index}."
    biased: list[nn.Module] = []
    try:
        for key, tensor in zeroed_block_weights(trunk.teacher, plan, position, block).items():
            weights[key] = set_tensor(block, key, tensor)
        for name, tensor in repair.weights.items():
            if name.startswith(inside):
                key = name.removeprefix(inside)
                if tensor.shape != block.get_parameter(key).shape:
                    raise UsageError(
                        f"What was trained of a narrower site ({name}) cannot be refitted. Recover by fold before "
                        f"training: {option('recover', 'fold,lora')}."
                    )
                weights.setdefault(key, set_tensor(block, key, tensor.to(block.get_parameter(key))))
        for site in (Site(position, part) for part in PARTS):
            if site in repair.biases:
                output = structure.output_projection(block, site.part, row, config)
                biased.append(block.get_submodule(str(output)))
                add_bias(biased[-1], repair.biases[site])
            if site in plan.removed:
                outputs, place = parts[site.part]["outputs"], None
                if site in repair.patches:
                    place = patch_module(repair.patches[site], outputs, trunk.teacher.device, trunk.model.dtype)
                stood |= remove_part(block, parts[site.part], place)
        yield
    finally:
        for module in biased:
            setattr(module, "bias", None)  # noqa: B010 (a typed assignment wants a tensor)
        for name, module in stood.items():
            setattr(block, name, module)
        for key, parameter in weights.items():
            set_tensor(block, key, parameter)


@dataclass(frozen=True)
class RepairedWalk:
    """Walks like `walk`, but for the jobs of one plan, which goes as its repair has it, block by block."""

    walk: Walk
    plan: Plan
    mask: int
    repair: Repair

    def run(self, jobs: Sequence[WalkJob], layers: bool) -> Iterator[tuple[WalkJob, torch.Tensor]]:
        """As `Walk.run`."""
        if others := [job for job in jobs if job[1] != self.mask]:
            yield from self.walk.run(others, layers)
        trunk, mine = self.walk.trunk, [job for job in jobs if job[1] == self.mask]
        streams = [trunk.embed(self.walk.ids[group]) for group, _ in mine]
        for index, block in enumerate(trunk.blocks(range(trunk.depth) if mine else ())):
            with patched_block(trunk, index, block, self.plan, self.repair):
                streams = [trunk.call(index, block, x) for x in streams]
        yield from zip(mine, streams, strict=True)


@dataclass
class NarrowedWalk:
    """Walks like `walk`, but for the jobs of one `plan`, which narrows sites: zeros stand where channel groups go.

    It begins at the deepest block whose streams an earlier plan that is the same so far has left in `streams`.
    """

    walk: Walk
    plan: Plan
    streams: StreamCache[Plan]

    def run(self, jobs: Sequence[WalkJob], layers: bool) -> Iterator[tuple[WalkJob, torch.Tensor]]:
        """As `Walk.run`."""
        trunk, groups = self.walk.trunk, [group for group, _ in jobs]
        so_far = [self._before(position) for position in trunk.teacher.positions] + [self.plan]
        start = trunk.depth
        while start and not all((group, start, so_far[start]) in self.streams for group in groups):
            start -= 1
        held = [
            self.streams.get((group, start, so_far[start])) if start else trunk.embed(self.walk.ids[group])
            for group in groups
        ]
        for index, block in enumerate(trunk.blocks(range(start, trunk.depth)), start):
            with patched_block(trunk, index, block, self.plan, NO_REPAIR):
                held = [trunk.call(index, block, x) for x in held]
            for group, x in zip(groups, held, strict=True):
                self.streams.put((group, index + 1, so_far[index + 1]), x)
        yield from zip(jobs, held, strict=True)

    def _before(self, position: int) -> Plan:
        """What of the plan concerns the blocks before a position."""
        narrowed = frozenset(narrow for narrow in self.plan.narrowed if narrow.site.block < position)
        return Plan(frozenset(site for site in self.plan.removed if site.block < position), narrowed)
