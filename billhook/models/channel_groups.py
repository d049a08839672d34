"""Channel groups: what a sublayer can lose and still be one. KV groups with their query heads, neurons of an MLP.

A layout says which entries of which parameters belong to each group; everything else follows from it: what a group
costs, how a part is masked, and how it is cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from billhook.core.plan import Part
from billhook.core.results.json_form import JsonObject
from billhook.models.architectures import (
    CONFIG_FIELDS,
    EXPERT_FIELDS,
    MODULE_EXPERTS,
    MODULE_WIDTHS,
    OF_EXPERTS_ONLY,
    Architecture,
    Config,
    head_dim,
    head_numbers,
)
from billhook.models.modeling_billhook import set_attributes, set_parameter
from billhook.models.transformers_internals import inputs_first, is_linear

GroupIndices = torch.Tensor  # [groups, entries]: entries of each group along an axis
Places = Sequence[Sequence[int]]  # of each expert, or of the part, its groups that stay
# By parameter, for each expert or once: entries along the axis of its slot. Under EXPERTS those that stay.
Entries = Mapping[str, Sequence[torch.Tensor]]
EXPERTS = ""


@dataclass(frozen=True)
class ParameterSlice:
    """A parameter of a block that has entries of its own for each group: `index` [groups, entries] along `axis`.

    Of a mixture of experts, whose parameters begin with an axis of experts, `index` is that of one expert.
    """

    name: str
    axis: int
    index: GroupIndices


@dataclass(frozen=True)
class ChannelLayout:
    """The channel groups of one part of a block: how many, and where each has its entries.

    `output`: the slot whose entries turn a group's channels into output. `heads`: query heads of a group, 0 of neurons;
    `own_kv`: whether a group has keys and values of its own. `experts`: groups are numbered expert by expert.
    `expert_rows`: other parameters with a row for each expert, the router's; none: no expert can be removed. `chooses`:
    the modules that know how many experts there are. `norms`: parameters of norms over all groups together.
    `never_zero`: slots whose entries stay where a group that is removed holds zeros: norms and sinks of its heads.
    """

    groups: int
    slots: tuple[ParameterSlice, ...]
    output: ParameterSlice
    heads: int = 0
    own_kv: bool = False
    experts: int = 1
    expert_rows: tuple[str, ...] = ()
    chooses: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    never_zero: tuple[str, ...] = ()


def find_layout(block: nn.Module, part: Part, row: Architecture, config: Config) -> ChannelLayout | str:
    """Return the layout of a part of a block, whose architecture has `row`; or why the part has none."""
    return _attention(block, row, config) if part == "attention" else _mlp(block, row)


def _linears(module: nn.Module) -> set[str]:
    """What the linear modules right inside a part are called."""
    return {name for name, inside in module.named_children() if is_linear(inside)}


def _unknown(module: nn.Module, inputs: Sequence[str], output: str) -> str:
    """Why a part whose linear modules have other names has no groups."""
    has = ", ".join(sorted(_linears(module))) or "none"
    return (
        f"its linear modules are {has}, and its architecture names {', '.join(inputs)} before {output} "
        "(billhook/models/architectures.py)"
    )


def _rows(groups: int, entries: int, start: int = 0) -> GroupIndices:
    """Entries of groups that lie one after another."""
    return start + torch.arange(groups * entries).view(groups, entries)


def _slots(block: nn.Module, name: str, index: GroupIndices) -> list[ParameterSlice]:
    """Weight and bias of the linear module `name`, by its outputs."""
    module = block.get_submodule(name)
    axis = 1 if inputs_first(module) else 0
    bias = [ParameterSlice(f"{name}.bias", 0, index)] if getattr(module, "bias", None) is not None else []
    return [ParameterSlice(f"{name}.weight", axis, index), *bias]


def _output(block: nn.Module, name: str, index: GroupIndices) -> ParameterSlice:
    """The weight of the linear module `name`, by its inputs."""
    return ParameterSlice(f"{name}.weight", 0 if inputs_first(block.get_submodule(name)) else 1, index)


def _inputs_of(module: nn.Module) -> int:
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    return int(weight.shape[0 if inputs_first(module) else 1])


def _outputs_of(module: nn.Module) -> int:
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    return int(weight.shape[1 if inputs_first(module) else 0])


# -- attention ------------------------------------------------------------------------------------------------------


def _attention(block: nn.Module, row: Architecture, config: Config) -> ChannelLayout | str:
    """KV groups with their query heads; where all heads share one key and value, single query heads."""
    path = row.attention
    module, dim = block.get_submodule(path), head_dim(config)
    if reason := row.no_groups(module, config):
        return reason
    if _linears(module) != {row.attention_output, *row.attention_inputs}:
        return _unknown(module, row.attention_inputs, row.attention_output)
    first = row.attention_inputs[0]
    heads = _inputs_of(getattr(module, row.attention_output)) // dim
    rows = _outputs_of(getattr(module, first)) // dim
    shared = row.shared_kv(config)
    if shared:
        kv = 1
    elif row.fused_attention == "in turn":
        kv = (rows - heads) // 2
    elif row.fused_attention == "by group":
        kv = rows // (row.queries_per_group(config) + 2)
    else:
        kv = _outputs_of(getattr(module, row.attention_inputs[1])) // dim
    groups, each = (heads, 1) if shared else (kv, heads // kv)
    slots: list[ParameterSlice] = []
    queries = _rows(groups, each * dim)
    if row.fused_attention == "in turn":  # all queries, all keys, all values
        own = () if shared else tuple(_rows(groups, dim, (heads + i * kv) * dim) for i in range(2))
        slots += _slots(block, f"{path}.{first}", torch.cat([queries, *own], 1))
    elif row.fused_attention == "by group":  # its queries, its key, its value
        slots += _slots(block, f"{path}.{first}", queries if shared else _rows(groups, (each + 2) * dim))
    else:
        slots += _slots(block, f"{path}.{first}", queries)
        for name in () if shared else row.attention_inputs[1:]:
            slots += _slots(block, f"{path}.{name}", _rows(groups, dim))
    of_heads, norms = _of_heads(module, row, (groups, each, 0 if shared else 1), dim)
    last = _output(block, f"{path}.{row.attention_output}", queries)
    never_zero = tuple(slot.name for slot in of_heads)
    return ChannelLayout(groups, (*slots, *of_heads, last), last, each, not shared, norms=norms, never_zero=never_zero)


def _of_heads(
    module: nn.Module, row: Architecture, counts: tuple[int, int, int], dim: int
) -> tuple[list[ParameterSlice], tuple[str, ...]]:
    """Slots of what heads have of their own besides channels, and which of them are norms over all heads together.

    `counts`: groups, queries a group, keys a group.
    """
    path, (groups, queries, keys) = row.attention, counts
    slots, norms = [], []
    for name, count in zip(row.head_norms, (queries, keys), strict=True):
        weight = getattr(getattr(module, name, None), "weight", None)
        if weight is None or tuple(weight.shape) == (dim,) or not count:
            continue  # none, or one that all heads share
        together = weight.dim() == 1
        norms += [f"{path}.{name}"] if together else []
        slots.append(ParameterSlice(f"{path}.{name}.weight", 0, _rows(groups, count * dim if together else count)))
    if hasattr(module, row.head_sinks):
        slots.append(ParameterSlice(f"{path}.{row.head_sinks}", 0, _rows(groups, queries)))
    return slots, tuple(norms)


# -- mlp ------------------------------------------------------------------------------------------------------------


def _mlp(block: nn.Module, row: Architecture) -> ChannelLayout | str:
    """Neurons: an entry of each input's outputs and of the output's inputs."""
    path = row.path("mlp")
    module = block.get_submodule(path)
    before = f"{path}." if path else ""
    if hasattr(module, row.experts):
        return _experts(module, before, row)
    wanted = {row.mlp_output, *row.mlp_inputs}
    if not wanted <= _linears(module) or (path and _linears(module) != wanted):
        return _unknown(module, row.mlp_inputs, row.mlp_output)
    neurons = _inputs_of(getattr(module, row.mlp_output))
    index = _rows(neurons, 1)
    both = torch.cat([index, neurons + index], 1) if row.fused_mlp else index
    slots = [slot for name in row.mlp_inputs for slot in _slots(block, f"{before}{name}", both)]
    last = _output(block, f"{before}{row.mlp_output}", index)
    return ChannelLayout(neurons, (*slots, last), last)


def _experts(mixture: nn.Module, path: str, row: Architecture) -> ChannelLayout:
    """Neurons of stacked experts, [experts, outputs, inputs], or turned, gate and up in turn."""
    turned, module, before = row.gate_and_up_in_turn, getattr(mixture, row.experts), f"{path}{row.experts}."
    down: torch.Tensor = getattr(module, row.expert_output)
    experts, neurons = int(down.shape[0]), int(down.shape[1 if turned else 2])
    index = _rows(neurons, 1)
    both = _rows(neurons, 2) if turned else torch.cat([index, neurons + index], 1)
    slots = [ParameterSlice(f"{before}{row.expert_input}", 2 if turned else 1, both)]
    if hasattr(module, f"{row.expert_input}_bias"):
        slots.append(ParameterSlice(f"{before}{row.expert_input}_bias", 1, both))
    last = ParameterSlice(f"{before}{row.expert_output}", 1 if turned else 2, index)
    own = {slot.name for slot in (*slots, last)}
    others = [name for name, _ in module.named_parameters(prefix=before[:-1]) if name not in own]
    router = getattr(mixture, row.router, None)
    choosing = [] if router is None else [name for name, _ in router.named_parameters(prefix=f"{path}{row.router}")]
    rows = tuple(name for name in (*choosing, *others) if choosing)
    chooses = (f"{path}{row.router}", before[:-1]) if choosing else ()
    return ChannelLayout(experts * neurons, (*slots, last), last, experts=experts, expert_rows=rows, chooses=chooses)


# -- what follows from a layout ---------------------------------------------------------------------------------------


def config_field_names(part: Part, config: Config) -> list[str]:
    """What the class of a config calls the widths of a part."""
    return [name for name in CONFIG_FIELDS[part] if hasattr(type(config), config.attribute_map.get(name, name))]


def _expert_field(config: Config) -> str:
    """What the file of a config calls the number of experts."""
    return next(name for name in EXPERT_FIELDS if name not in config.attribute_map and hasattr(config, name))


def config_fields(layout: ChannelLayout, kept: Places, config: Config) -> dict[str, int]:
    """The widths of a part that keeps these places, as the config spells them, and transformers' `per_layer_config`."""
    if layout.heads:
        (heads, *kv), count = config_field_names("attention", config), len(kept[0])
        return {heads: count * layout.heads} | dict.fromkeys(kv, count if layout.own_kv else 1)
    names = [name for name in config_field_names("mlp", config) if name != OF_EXPERTS_ONLY or layout.experts > 1]
    experts = sum(map(bool, kept))
    number = {} if experts == layout.experts else {_expert_field(config): experts}
    return {names[0]: max(map(len, kept)), **number}


def kept_positions(layout: ChannelLayout, alive: Sequence[int], groups: Sequence[int]) -> list[list[int]]:
    """Of each expert, or of the part, the places that stay: none of an expert that is removed.

    `alive`: the groups that the part has, by number.
    """
    place = {number: i for i, number in enumerate(alive)}
    each = layout.groups // layout.experts
    told: list[list[int]] = [[] for _ in range(layout.experts)]
    for number in groups:
        told[place[number] // each].append(place[number] % each)
    return [sorted(places) for places in told]


def _gone(slot: ParameterSlice, places: Sequence[int]) -> torch.Tensor:
    """Entries of the groups of a part, or of one expert, that are not at `places`."""
    away = torch.ones(len(slot.index), dtype=torch.bool)
    away[list(places)] = False
    return slot.index[away].flatten()


def _stay(slot: ParameterSlice, places: Sequence[int], size: int) -> torch.Tensor:
    """Entries, of `size`, of the groups of a part, or of one expert, at `places`, and those of no group."""
    stay = torch.ones(size, dtype=torch.bool)
    stay[_gone(slot, places)] = False
    return stay.nonzero().flatten()


def entries_of(
    block: nn.Module, layout: ChannelLayout, kept: Places, *, removed: bool
) -> dict[str, list[torch.Tensor]]:
    """Return on the CPU which entries of each parameter stay, or which are `removed`, and which experts stay.

    Parameters whose groups have the same entries share their tensors.
    """
    found: dict[str, list[torch.Tensor]] = {EXPERTS: [torch.tensor([e for e, places in enumerate(kept) if places])]}
    shared: dict[tuple[int, int], list[torch.Tensor]] = {}
    for slot in layout.slots:
        size = int(block.get_parameter(slot.name).shape[slot.axis])
        if (key := (id(slot.index), size)) not in shared:
            shared[key] = [_gone(slot, places) if removed else _stay(slot, places, size) for places in kept]
        found[slot.name] = shared[key]
    return found


def kept_tensor(
    tensor: torch.Tensor, layout: ChannelLayout, slot: ParameterSlice, kept: Places,
    entries: Sequence[torch.Tensor] = (),
) -> torch.Tensor:  # fmt: skip
    """What stays of a parameter; entries that belong to no group do. The weight of a norm over all heads is larger by
    the root of what is missing under it. `entries`: those that stay, as `entries_of` says."""
    numbers = entries or [_stay(slot, places, tensor.shape[slot.axis]).to(tensor.device) for places in kept]
    if len(kept) == 1:
        stays = tensor.index_select(slot.axis, numbers[0])
        of_norm = slot.name.removesuffix(".weight") in layout.norms
        return stays * math.sqrt(layout.groups / len(kept[0])) if of_norm else stays
    pieces = zip(tensor, numbers, kept, strict=True)
    return torch.stack([piece.index_select(slot.axis - 1, at) for piece, at, places in pieces if len(places)])


def _kept_rows(block: nn.Module, layout: ChannelLayout, entries: Entries) -> dict[str, torch.Tensor]:
    """Parameters with a row for each expert, of those that stay: {name in the block: tensor}; none if all do."""
    rows = entries[EXPERTS][0]
    if len(rows) == layout.experts:
        return {}
    tensors = {name: block.get_parameter(name).detach() for name in layout.expert_rows}
    return {name: tensor.index_select(0, rows.to(tensor.device)) for name, tensor in tensors.items()}


def expert_numbers(block: nn.Module, layout: ChannelLayout, kept: Places) -> dict[str, JsonObject]:
    """What modules must know of how many experts stay: {module: {attribute: number}}; nothing if all do."""
    experts = sum(map(bool, kept))
    if experts == layout.experts:
        return {}
    modules = {name: block.get_submodule(name) for name in layout.chooses}
    return {
        name: {field: experts for field in MODULE_EXPERTS if hasattr(module, field)} for name, module in modules.items()
    }


def cut_channels(
    block: nn.Module, row: Architecture, layout: ChannelLayout, config: Config, kept: Places, *,
    entries: Entries | None = None,
) -> JsonObject:  # fmt: skip
    """Cut the part of a block that has `layout` in place to its kept groups; returns what a checkpoint says of it.

    The parameters are new, the old ones untouched. A norm over all heads keeps its divisor: less of its input is left,
    and what is removed counts as zero, so that its weight and its epsilon carry the ratio. `entries`: those that stay,
    as `entries_of` says, on the device.
    """
    entries = entries_of(block, layout, kept, removed=False) if entries is None else entries
    count = sum(map(len, kept))
    shapes: dict[str, list[int]] = {}
    attributes = expert_numbers(block, layout, kept)
    for name, tensor in _kept_rows(block, layout, entries).items():
        set_parameter(block, name, tensor)
        shapes[name] = list(tensor.shape)
    for slot in layout.slots:
        whole = block.get_parameter(slot.name).detach()
        tensor = kept_tensor(whole, layout, slot, kept, [at.to(whole.device) for at in entries[slot.name]])
        if (name := slot.name.removesuffix(".weight")) in layout.norms:
            norm: Any = block.get_submodule(name)
            attributes[name] = {"variance_epsilon": norm.variance_epsilon * layout.groups / count}
        set_parameter(block, slot.name, tensor.contiguous())
        shapes[slot.name] = list(tensor.shape)
    if layout.heads:
        heads, kv = count * layout.heads, count if layout.own_kv else 1
        module = block.get_submodule(row.attention)
        attributes[row.attention] = head_numbers(module, row, heads, kv, head_dim(config))
    else:
        where = layout.output.name.rpartition(".")[0] if layout.experts > 1 else row.path("mlp")
        module = block.get_submodule(where)
        names = [name for name in MODULE_WIDTHS if hasattr(module, name)]
        attributes[where] = dict.fromkeys(names, max(map(len, kept))) | attributes.get(where, {})
    attributes = {name: values for name, values in attributes.items() if values}
    set_attributes(block, attributes)
    return {"shapes": shapes, "attributes": attributes}


def zeroed_weights(
    block: nn.Module, layout: ChannelLayout, kept: Places, entries: Entries | None = None
) -> Mapping[str, torch.Tensor]:
    """Parameters of a part, zero where groups do not stay: {name in the block: tensor}. Norms stay.

    They are whole but for experts that are removed: no weights of a router keep it from choosing one, so that these
    have no rows, and modules must know it (`expert_numbers`). `entries`: those that are removed, as `entries_of` says.
    """
    entries = entries_of(block, layout, kept, removed=True) if entries is None else entries
    told, stay = _kept_rows(block, layout, entries), entries[EXPERTS][0]
    for slot in layout.slots:
        if slot.name in layout.never_zero:
            continue
        tensor = block.get_parameter(slot.name).detach().clone()
        for expert, removed in enumerate(entries[slot.name]):
            piece = tensor if len(kept) == 1 else tensor[expert]
            piece.index_fill_(slot.axis - (len(kept) > 1), removed.to(tensor.device), 0)
        told[slot.name] = tensor if len(stay) == len(kept) else tensor.index_select(0, stay.to(tensor.device))
    return told
