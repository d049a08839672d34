"""Walk of one plan under a repair of its blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from billhook.core.errors import UsageError, option
from billhook.core.plan import PARTS, Plan, Site
from billhook.engine.blocks import BlockRunner
from billhook.engine.prefix_trie import Walk, WalkJob
from billhook.models import structure
from billhook.models.modeling_billhook import remove_part, set_attributes, set_parameter
from billhook.models.repair import Repair, add_bias, patch_module
from billhook.models.surgery import masked_block, restored


@contextmanager
def patched_block(runner: BlockRunner, index: int, block: nn.Module, plan: Plan, repair: Repair) -> Iterator[None]:
    """Give block `index`, inside the context, the sites, patches, biases and weights that a repaired student has.

    Removed channel groups are zeros, removed experts are not there.
    """
    position, row, config = runner.teacher.positions[index], runner.row, runner.model.config
    parts = row.parts(block, config)
    prefix = f"{row.blocks}.{index}."
    with restored(block):
        weights, numbers = masked_block(runner.teacher, plan, position, block)
        for key, tensor in weights.items():
            set_parameter(block, key, tensor)
        set_attributes(block, numbers)
        for name, tensor in repair.weights.items():
            if name.startswith(prefix):
                key = name.removeprefix(prefix)
                if tensor.shape != block.get_parameter(key).shape:
                    raise UsageError(
                        f"The trained weights of a narrowed site ({name}) cannot be refitted. Recover by fold before "
                        f"training: {option('recover', 'fold,lora')}."
                    )
                set_parameter(block, key, tensor.to(block.get_parameter(key)))
        for site in (Site(position, part) for part in PARTS):
            if site in repair.biases:
                output = structure.output_projection(block, site.part, row, config)
                add_bias(block.get_submodule(str(output)), repair.biases[site])
            if site in plan.removed:
                outputs, patch = parts[site.part]["outputs"], None
                if site in repair.patches:
                    place = runner.teacher.block_device(index)
                    patch = patch_module(repair.patches[site], outputs, place, runner.model.dtype)
                remove_part(block, parts[site.part], patch)
        yield


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
