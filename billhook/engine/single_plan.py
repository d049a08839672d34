"""Walks of one plan at a time: under a repair of its blocks, or with narrowed sites."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from billhook.core.errors import UsageError, option
from billhook.core.plan import PARTS, Plan, Site
from billhook.core.results.json_form import JsonObject
from billhook.engine.blocks import BlockRunner
from billhook.engine.prefix_trie import StreamCache, Walk, WalkJob
from billhook.models import structure
from billhook.models.modeling_billhook import remove_part, set_attributes
from billhook.models.repair import NO_REPAIR, Repair, add_bias, patch_module
from billhook.models.streaming import set_tensor
from billhook.models.surgery import masked_block


@contextmanager
def patched_block(runner: BlockRunner, index: int, block: nn.Module, plan: Plan, repair: Repair) -> Iterator[None]:
    """Give block `index`, inside the context, the sites, patches, biases and weights that a repaired student has.

    Removed channel groups are zeros, removed experts are not there.
    """
    position, row, config = runner.teacher.positions[index], runner.row, runner.model.config
    parts = row.parts(block, config)
    original: dict[str, nn.Module] = {}
    weights: dict[str, torch.Tensor] = {}
    known: dict[str, JsonObject] = {}
    prefix = f"{row.blocks}.{index}."
    biased: list[nn.Module] = []
    try:
        masked, numbers = masked_block(runner.teacher, plan, position, block)
        for key, tensor in masked.items():
            weights[key] = set_tensor(block, key, tensor)
        for path, given in numbers.items():
            module = block.get_submodule(path)
            known[path] = {name: getattr(module, name) for name in given}
        set_attributes(block, numbers)
        for name, tensor in repair.weights.items():
            if name.startswith(prefix):
                key = name.removeprefix(prefix)
                if tensor.shape != block.get_parameter(key).shape:
                    raise UsageError(
                        f"The trained weights of a narrowed site ({name}) cannot be refitted. Recover by fold before "
                        f"training: {option('recover', 'fold,lora')}."
                    )
                weights.setdefault(key, set_tensor(block, key, tensor.to(block.get_parameter(key))))
        for site in (Site(position, part) for part in PARTS):
            if site in repair.biases:
                output = structure.output_projection(block, site.part, row, config)
                biased.append(block.get_submodule(str(output)))
                add_bias(biased[-1], repair.biases[site])
            if site in plan.removed:
                outputs, patch = parts[site.part]["outputs"], None
                if site in repair.patches:
                    patch = patch_module(repair.patches[site], outputs, runner.teacher.device, runner.model.dtype)
                original |= remove_part(block, parts[site.part], patch)
        yield
    finally:
        for module in biased:
            setattr(module, "bias", None)  # noqa: B010 (a typed assignment needs a tensor)
        for name, module in original.items():
            setattr(block, name, module)
        for key, parameter in weights.items():
            set_tensor(block, key, parameter)
        set_attributes(block, known)


@dataclass(frozen=True)
class RepairedWalk:
    """Walk that runs the jobs of one plan under its repair, block by block, and all others by `walk`."""

    walk: Walk
    plan: Plan
    mask: int
    repair: Repair

    def run(self, jobs: Sequence[WalkJob], layers: bool) -> Iterator[tuple[WalkJob, torch.Tensor]]:
        """Yield (job, final stream) like `Walk.run`."""
        if others := [job for job in jobs if job[1] != self.mask]:
            yield from self.walk.run(others, layers)
        runner, repaired = self.walk.runner, [job for job in jobs if job[1] == self.mask]
        streams = [runner.embed(self.walk.ids[group]) for group, _ in repaired]
        for index, block in enumerate(runner.blocks(range(runner.depth) if repaired else ())):
            with patched_block(runner, index, block, self.plan, self.repair):
                streams = [runner.call(index, block, x) for x in streams]
        yield from zip(repaired, streams, strict=True)


@dataclass
class NarrowedWalk:
    """Walk of one `plan` that narrows sites; removed channel groups are zeros.

    It begins at the deepest block whose streams an earlier plan with the same beginning has left in `streams`.
    """

    walk: Walk
    plan: Plan
    streams: StreamCache[Plan]

    def run(self, jobs: Sequence[WalkJob], layers: bool) -> Iterator[tuple[WalkJob, torch.Tensor]]:
        """Yield (job, final stream) like `Walk.run`."""
        runner, groups = self.walk.runner, [group for group, _ in jobs]
        prefixes = [self._before(position) for position in runner.teacher.positions] + [self.plan]
        start = runner.depth
        while start and not all((group, start, prefixes[start]) in self.streams for group in groups):
            start -= 1
        if start:
            streams = [self.streams.get((group, start, prefixes[start])) for group in groups]
        else:
            streams = [runner.embed(self.walk.ids[group]) for group in groups]
        for index, block in enumerate(runner.blocks(range(start, runner.depth)), start):
            with patched_block(runner, index, block, self.plan, NO_REPAIR):
                streams = [runner.call(index, block, x) for x in streams]
            for group, x in zip(groups, streams, strict=True):
                self.streams.put((group, index + 1, prefixes[index + 1]), x)
        yield from zip(jobs, streams, strict=True)

    def _before(self, position: int) -> Plan:
        """Return the part of the plan that concerns the blocks before a position."""
        narrowed = frozenset(narrow for narrow in self.plan.narrowed if narrow.site.block < position)
        return Plan(frozenset(site for site in self.plan.removed if site.block < position), narrowed)
