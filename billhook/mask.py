"""masked(model, plan): a model that behaves as if sites were gone, and is whole again afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from billhook.loading import Teacher
from billhook.modeling_billhook import remove_part
from billhook.plan import Plan


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
