"""Low-rank updates of linear maps as values: how they begin, grow, are cut by a plan, and merged into a student.

They have the names and shapes of the teacher's maps, whatever a plan removes, so that a plan renumbers none.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from billhook.core.plan import Plan
from billhook.methods.recover import RecoveryTask, linear_maps
from billhook.models import channel_groups, structure
from billhook.models.load import Teacher
from billhook.models.pruned_config import read_config
from billhook.models.repair import Repair
from billhook.models.surgery import apply, extract_repair
from billhook.models.transformers_internals import inputs_first, is_linear

GROWTH = 2  # times the rank of a map that grows


@dataclass(frozen=True, slots=True)
class LowRank:
    """Two factors of what is added to a linear map: a scale · up · down. On the CPU, in float32.

    `down` [rank, inputs]; `up` [outputs, rank].
    """

    down: torch.Tensor
    up: torch.Tensor

    @property
    def rank(self) -> int:
        return len(self.down)


Updates = Mapping[str, LowRank]  # by the teacher's names of its linear maps, with the shapes that they have there


def first_updates(teacher: Teacher, rank: int, seed: int) -> Updates:
    """Return updates of all linear maps in the blocks that change nothing: random `down`, and `up` of zeros."""
    draw, updates = torch.Generator().manual_seed(seed), dict[str, LowRank]()
    for i, block in enumerate(structure.blocks_of(teacher.model, teacher.architecture)):
        for name in linear_maps(block):
            weight = structure.as_outputs_by_inputs(block, f"{name}.weight", block.get_parameter(f"{name}.weight"))
            outputs, inputs = weight.shape
            updates[f"{teacher.architecture.blocks}.{i}.{name}"] = LowRank(
                _random(rank, inputs, draw), torch.zeros(outputs, rank)
            )
    return updates


def _random(rank: int, inputs: int, draw: torch.Generator) -> torch.Tensor:
    """Return rows as peft draws them, uniform within ± 1 / √inputs: [rank, inputs]."""
    return torch.rand(rank, inputs, generator=draw).mul_(2).sub_(1).div_(inputs**0.5)


def grown(updates: Updates, gains: Mapping[str, float], most: int, seed: int) -> Updates:
    """Return the updates in which the half of the maps with the larger gains has twice the rank, `most` at most.

    What they add to the maps is the same: new rows of `down` are random, and new columns of `up` zero.
    """
    draw, larger = torch.Generator().manual_seed(seed), dict(updates)
    ranked = sorted(gains, key=lambda name: (-gains[name], name))
    for name in ranked[: (len(ranked) + 1) // 2]:
        old = updates[name]
        more = min(GROWTH * old.rank, most) - old.rank
        down = torch.cat([old.down, _random(more, old.down.shape[1], draw)])
        larger[name] = LowRank(down, torch.cat([old.up, torch.zeros(len(old.up), more)], 1))
    return larger


def save_updates(updates: Updates, file: Path) -> None:
    """Write updates aside and give them their name: a safetensors file."""
    aside = file.with_suffix(".partial")
    save_file({f"{part} {name}": getattr(of, part) for name, of in updates.items() for part in ("down", "up")}, aside)
    aside.rename(file)


def read_updates(file: Path) -> Updates:
    """Return what `save_updates` wrote."""
    tensors = load_file(file)
    names = [name.removeprefix("down ") for name in tensors if name.startswith("down ")]
    return {name: LowRank(tensors[f"down {name}"], tensors[f"up {name}"]) for name in names}


# -- updates of a student ---------------------------------------------------------------------------------------------


def maps_of(teacher: Teacher, student: Any) -> dict[str, str]:
    """Return the names of a student's linear maps in its blocks, each with the teacher's name of the map."""
    path, kept = teacher.architecture.blocks, read_config(student.config).kept_blocks
    return {
        f"{path}.{i}.{name}": f"{path}.{teacher.positions.index(kept[i])}.{name}"
        for i, block in enumerate(structure.blocks_of(student, teacher.architecture))
        for name in linear_maps(block)
    }


def kept_entries(teacher: Teacher, plan: Plan) -> dict[str, tuple[bool, torch.Tensor]]:
    """Return the entries of linear maps that a plan narrows: whether they are inputs, and those that are kept."""
    row, found = teacher.architecture, dict[str, tuple[bool, torch.Tensor]]()
    sizes = {size.site: size for size in teacher.anatomy.sites}
    for each in plan.narrowed:
        block, index = teacher.block(each.site.block), teacher.positions.index(each.site.block)
        layout = structure.channel_layout(block, each.site.part, row, teacher.model.config)
        places = channel_groups.kept_positions(layout, sizes[each.site].groups, each.groups)
        entries = channel_groups.entries_of(block, layout, places, removed=False)
        for slot in layout.slots:
            name, _, kind = slot.name.rpartition(".")
            if kind == "weight" and is_linear(module := block.get_submodule(name)):
                inputs = slot.axis == (0 if inputs_first(module) else 1)
                found[f"{row.blocks}.{index}.{name}"] = inputs, entries[slot.name][0]
    return found


def cut(of: LowRank, inputs: bool, entries: torch.Tensor) -> LowRank:
    """Return what is left of an update of a map that keeps these `entries`, of its `inputs` or of its outputs."""
    return LowRank(of.down[:, entries], of.up) if inputs else LowRank(of.down, of.up[entries])


def put_back(of: LowRank, inputs: bool, entries: torch.Tensor, new: LowRank) -> LowRank:
    """Return an update with a `new` one of the same rank in the place of what `cut` leaves of it."""
    if inputs:
        return LowRank(of.down.index_copy(1, entries, new.down), new.up)
    return LowRank(new.down, of.up.index_copy(0, entries, new.up))


def cut_to(teacher: Teacher, plan: Plan, updates: Updates) -> Updates:
    """Return what a plan leaves of the updates of all maps that it narrows; the others as they are."""
    return {**updates, **{name: cut(updates[name], *kept) for name, kept in kept_entries(teacher, plan).items()}}


@torch.no_grad()
def merged(task: RecoveryTask, updates: Updates, scale: float) -> Repair:
    """Return the task's repair with W + scale · up · down in the place of each weight W of its student.

    Summed in float32, and held in the dtype of W in host memory, weight by weight: the device holds W and no more.
    """
    student, own = apply(task.teacher, task.plan, repair=task.repair), cut_to(task.teacher, task.plan, updates)
    for name, of in maps_of(task.teacher, student).items():
        module = student.get_submodule(name)
        old: torch.Tensor = module.weight
        change = scale * (own[of].up.to(old.device) @ own[of].down.to(old.device))
        new = old.float() + (change.T if inputs_first(module) else change)
        module.weight = nn.Parameter(new.to(old.dtype).cpu(), requires_grad=False)
    return extract_repair(task.teacher, task.plan, student)


def peft_model(student: Any, config: Any, seed: int) -> Any:
    """Return peft's model over a student, in place, whose first updates are drawn from the seed alone."""
    import peft

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses an old name of transformers
        torch.manual_seed(seed)
        return peft.get_peft_model(student, config)


def with_updates(student: Any, updates: Updates, scale: float) -> Any:
    """Return peft's model over a student, in place, with these updates of its linear maps, by their names in it."""
    import peft

    ranks = {re.escape(name): of.rank for name, of in updates.items()}
    scaled = {name: scale * rank for name, rank in ranks.items()}
    transposed = any(inputs_first(student.get_submodule(name)) for name in updates)
    config = peft.LoraConfig(
        target_modules=list(updates), rank_pattern=ranks, alpha_pattern=scaled, fan_in_fan_out=transposed
    )
    adapted = peft_model(student, config, seed=0)  # what is drawn is overwritten
    for name, of in updates.items():
        layer = student.get_submodule(name)
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(of.down)
            layer.lora_B["default"].weight.copy_(of.up)
    return adapted
