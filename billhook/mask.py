"""A model that behaves as if sites or channel groups were gone, and is whole again afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from billhook import arch, width
from billhook.loading import Teacher
from billhook.modeling_billhook import remove_part
from billhook.plan import Plan


def zeroed_block_weights(teacher: Teacher, plan: Plan, position: int, block: nn.Module) -> dict[str, torch.Tensor]:
    """Weights of a block, by its own names, with which its whole parts compute as the narrower ones of a plan: zeros
    where channel groups go. `position`: of the block in the unpruned model; what it has now must be in memory."""
    weights: dict[str, torch.Tensor] = {}
    sizes = {size.site: size for size in teacher.anatomy.sites}
    for each in (narrow for narrow in plan.narrowed if narrow.site.block == position):
        of = arch.channel_layout(block, each.site.part, teacher.architecture, teacher.model.config)
        weights |= width.zeroed_weights(block, of, width.kept_positions(of, sizes[each.site].groups, each.groups))
    return weights


@contextmanager
def masked(teacher: Teacher, plan: Plan) -> Iterator[None]:
    """Inside, the teacher's model computes without the plan's sites; they cost nothing and add nothing.

    For measuring without a KV cache. The modules are put back on leaving, whatever happens; the lock of the teacher is
    held until then.
    """
    with teacher.lock, _without(teacher, plan):
        yield


@contextmanager
def _without(teacher: Teacher, plan: Plan) -> Iterator[None]:
    stood: list[tuple[nn.Module, dict[str, nn.Module]]] = []
    try:
        for site in plan.sites():
            block = teacher.block(site.block)
            names = teacher.architecture.parts(block, teacher.model.config)[site.part]
            stood.append((block, remove_part(block, names)))
        yield
    finally:
        for block, modules in stood:
            for name, module in modules.items():
                setattr(block, name, module)
