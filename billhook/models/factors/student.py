"""A student whose linear maps are pairs of smaller ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from billhook.core.errors import PlanError
from billhook.core.plan import Part, Site
from billhook.models import architectures, channel_groups, structure
from billhook.models.architectures import Architecture, Config
from billhook.models.load import Teacher
from billhook.models.modeling_billhook import Factors, factor_linear, number_caches, pruned_classes, skipped_parts
from billhook.models.pruned_config import read_config, write_config
from billhook.models.transformers_internals import is_linear, stock_classes


def largest_rank(outputs: int, inputs: int) -> int:
    """Return the largest rank of which two factors have fewer numbers than the matrix; 0 if none has."""
    return (outputs * inputs - 1) // (outputs + inputs)


def linear_stages(block: nn.Module, part: Part, row: Architecture, config: Config) -> list[list[str]]:
    """Return the names of the linear maps of a part in its block, those that read its input and then its output.

    Empty for mixtures of experts and for parts that have no channel groups.
    """
    of = channel_groups.find_layout(block, part, row, config)
    if isinstance(of, str) or of.experts > 1:
        return []
    last = of.output.name.removesuffix(".weight")
    names = dict.fromkeys(slot.name.removesuffix(".weight") for slot in of.slots if slot.name.endswith(".weight"))
    first = [name for name in names if name != last and is_linear(block.get_submodule(name))]
    return [first, [last]]


def put_factors(block: nn.Module, name: str, up: torch.Tensor, down: torch.Tensor) -> None:
    """Put two factors in the place of a linear map of a block. The bias stays that of the map.

    `up` [outputs, rank], `down` [rank, inputs]. Raises PlanError where they have no fewer numbers than the map.
    """
    old: Any = block.get_submodule(name)
    weight, rank = old.weight, len(down)
    if rank > largest_rank(len(up), int(down.shape[1])):
        raise PlanError(
            f"Two factors of rank {rank} in the place of {name} save nothing: it is {len(up)} x {down.shape[1]}. Take "
            f"a rank of {largest_rank(len(up), int(down.shape[1]))} or less."
        )
    new: Factors = factor_linear(block, name, rank)
    for module, value in ((new.down, down), (new.up, up)):
        module.weight = nn.Parameter(value.to(weight.device, weight.dtype), requires_grad=False)
    if new.up.bias is not None:
        new.up.bias = old.bias


def declare_factors(teacher: Teacher, student: Any, ranks: Mapping[Site, Mapping[str, int]]) -> None:
    """Say in the config of a student, which `apply` made of the teacher, which of its linear maps are factors.

    The student becomes of the type `billhook-<type>`.
    """
    config, row = student.config, teacher.architecture
    before, base = read_config(config), architectures.base_type(config.model_type)
    classes = pruned_classes(stock_classes(base)[0])
    config.__class__, student.__class__ = classes["AutoConfig"], classes["AutoModelForCausalLM"]
    blocks = structure.blocks_of(student, row)
    together = {site: {**before.factors.get(site, {}), **each} for site, each in ranks.items()}
    pruned = replace(before, factors={**before.factors, **together})
    write_config(config, pruned, row.blocks, row.parts(blocks[0], config))
    number_caches(blocks, skipped_parts(config))
