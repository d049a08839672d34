"""A model that behaves as if sites or channel groups were gone, and is whole again afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from billhook import arch, width
from billhook.loading import Teacher
from billhook.modeling_billhook import remove_part
from billhook.plan import Plan
from billhook.repair import Repair


def narrowing(teacher: Teacher, plan: Plan) -> Repair:
    """What makes the teacher's whole parts compute as the narrower ones of a plan: zeros where channel groups go.

    Raises PlanError if the plan does not fit the teacher.
    """
    teacher.anatomy.check(plan)
    repair = Repair()
    for position in sorted({narrow.site.block for narrow in plan.narrowed}):
        repair = repair.with_weights(narrowing_of(teacher, plan, position, teacher.block(position)).weights)
    return repair


def narrowing_of(teacher: Teacher, plan: Plan, position: int, block: nn.Module) -> Repair:
    """The part of `narrowing` that is of one block, whose weights are in memory."""
    index, weights = teacher.positions.index(position), {}
    sizes = {size.site: size for size in teacher.anatomy.sites}
    for each in (narrow for narrow in plan.narrowed if narrow.site.block == position):
        of = arch.layout_in(block, each.site.part, teacher.row, teacher.model.config)
        kept = width.kept_of(of, sizes[each.site].groups, each.groups)
        for name, tensor in width.masked_weights(block, of, kept).items():
            weights[f"{teacher.row.blocks}.{index}.{name}"] = tensor
    return Repair(weights)


@contextmanager
def masked(teacher: Teacher, plan: Plan) -> Iterator[None]:
    """Inside, the teacher's model computes without the plan's sites; they cost nothing and add nothing.

    For measuring without a KV cache. The modules are put back on leaving, whatever happens.
    """
    stood: list[tuple[nn.Module, dict[str, nn.Module]]] = []
    try:
        for site in plan.sites():
            block = teacher.block(site.block)
            names = teacher.row.parts(block, teacher.model.config)[site.part]
            stood.append((block, remove_part(block, names)))
        yield
    finally:
        for block, modules in stood:
            for name, module in modules.items():
                setattr(block, name, module)
