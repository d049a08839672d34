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

from billhook.core.anatomy import GroupSize
from billhook.core.plan import Part
from billhook.models.modeling_billhook import set_attributes, set_parameter
from billhook.models.transformers_internals import inputs_first, is_linear

Config = Any  # a transformers config
GroupIndices = torch.Tensor  # [groups, entries]: entries of each group along an axis
MLP_INPUTS = ("gate_proj", "up_proj", "gate_up_proj", "fc1", "c_fc", "dense_h_to_4h")
MLP_OUTPUTS = ("down_proj", "fc2", "c_proj", "dense_4h_to_h")
ATTENTION_INPUTS = ("q_proj", "qkv_proj", "c_attn", "query_key_value")
ATTENTION_OUTPUTS = ("o_proj", "dense", "out_proj", "c_proj")
OF_EXPERTS = 8  # neurons of an expert come in so many: grouped products want 16 bytes between rows, in bfloat16 too

# What configs call the widths of a part; the first that one has counts.
CONFIG_FIELDS: dict[Part, tuple[str, ...]] = {
    "attention": ("num_attention_heads", "num_key_value_heads", "num_kv_heads"),
    "mlp": ("moe_intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim", "intermediate_size"),
}


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
    `norms`: parameters of norms over all groups together.
    """

    groups: int
    slots: tuple[ParameterSlice, ...]
    output: ParameterSlice
    heads: int = 0
    own_kv: bool = False
    experts: int = 1
    norms: tuple[str, ...] = ()


def find_layout(block: nn.Module, part: Part, path: str, config: Config) -> ChannelLayout | str:
    """The layout of a part, whose modules lie at `path` in its block ("" : in the block itself); or why it has none."""
    return _attention(block, path, config) if part == "attention" else _mlp(block, path)


def _called(module: nn.Module, names: Sequence[str]) -> str | None:
    """The first of `names` that a module has."""
    return next((name for name in names if hasattr(module, name)), None)


def _linears(module: nn.Module) -> set[str]:
    """What the linear modules right inside a part are called."""
    return {name for name, inside in module.named_children() if is_linear(inside)}


def _unknown(module: nn.Module, inputs: Sequence[str], outputs: Sequence[str]) -> str:
    """Why a part whose linear modules have other names has no groups."""
    has = ", ".join(sorted(_linears(module))) or "none"
    return (
        f"its linear modules are {has}, and known are {' or '.join(inputs)} before {' or '.join(outputs)} "
        "(billhook/width.py)"
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


def head_dim(config: Config) -> int:
    """Channels of one head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


# -- attention ------------------------------------------------------------------------------------------------------


def _attention(block: nn.Module, path: str, config: Config) -> ChannelLayout | str:
    """KV groups with their query heads; where all heads share one key and value, single query heads."""
    module, dim = block.get_submodule(path), head_dim(config)
    if getattr(config, "alibi", False):
        return "its ALiBi slopes are made for all heads at once"
    if getattr(module, "qk_layernorm", False) and hasattr(getattr(module, "q_layernorm", None), "norms"):
        return "each head has a norm module of its own"
    output, fused = _called(module, ATTENTION_OUTPUTS), _called(module, ATTENTION_INPUTS)
    apart = ("k_proj", "v_proj") if fused == "q_proj" else ()
    if output is None or fused is None or _linears(module) != {output, fused, *apart}:
        return _unknown(module, ("q_proj, k_proj, v_proj", *ATTENTION_INPUTS[1:]), ATTENTION_OUTPUTS)
    heads = _inputs_of(getattr(module, output)) // dim
    rows = _outputs_of(getattr(module, fused)) // dim
    ratio = max(1, int(config.num_attention_heads) // int(getattr(config, "num_kv_heads", 0) or 1))  # of falcon
    shared = _multi_query(config)
    if shared:
        kv = 1
    elif fused == "q_proj":
        kv = _outputs_of(module.k_proj) // dim  # type: ignore[arg-type]
    elif fused != "query_key_value":
        kv = (rows - heads) // 2
    else:
        kv = rows // (ratio + 2) if getattr(config, "new_decoder_architecture", False) else heads
    groups, each = (heads, 1) if shared else (kv, heads // kv)
    slots: list[ParameterSlice] = []
    queries = _rows(groups, each * dim)
    if fused == "q_proj":
        slots += _slots(block, f"{path}.q_proj", queries)
        for name in () if shared else ("k_proj", "v_proj"):
            slots += _slots(block, f"{path}.{name}", _rows(groups, dim))
    elif fused != "query_key_value":  # all queries, all keys, all values
        own = () if shared else tuple(_rows(groups, dim, (heads + i * kv) * dim) for i in range(2))
        slots += _slots(block, f"{path}.{fused}", torch.cat([queries, *own], 1))
    else:  # group by group: its queries, its key, its value
        slots += _slots(block, f"{path}.{fused}", queries if shared else _rows(groups, (each + 2) * dim))
    norms = []
    for name, count in (("q_norm", each), ("k_norm", 0 if shared else 1)):
        weight = getattr(getattr(module, name, None), "weight", None)
        if weight is None or tuple(weight.shape) == (dim,) or not count:
            continue  # none, or one that all heads share
        together = weight.dim() == 1
        norms += [f"{path}.{name}"] if together else []
        slots.append(ParameterSlice(f"{path}.{name}.weight", 0, _rows(groups, count * dim if together else count)))
    if hasattr(module, "sinks"):
        slots.append(ParameterSlice(f"{path}.sinks", 0, _rows(groups, each)))
    last = _output(block, f"{path}.{output}", queries)
    return ChannelLayout(groups, (*slots, last), last, each, not shared, norms=tuple(norms))


def _multi_query(config: Config) -> bool:
    """Whether all heads of the unpruned model share one key and value."""
    if hasattr(config, "multi_query"):  # falcon
        return bool(config.multi_query and not config.new_decoder_architecture)
    return getattr(config, "num_key_value_heads", None) == 1


# -- mlp ------------------------------------------------------------------------------------------------------------


def _mlp(block: nn.Module, path: str) -> ChannelLayout | str:
    """Neurons: an entry of each input's outputs and of the output's inputs."""
    module = block.get_submodule(path)
    before = f"{path}." if path else ""
    if hasattr(module, "experts"):
        return _experts(module.experts, f"{before}experts.")  # type: ignore[arg-type]
    output = _called(module, MLP_OUTPUTS)
    inputs = [name for name in MLP_INPUTS if hasattr(module, name)]
    if output is None or not inputs or (path and _linears(module) != {output, *inputs}):
        return _unknown(module, MLP_INPUTS, MLP_OUTPUTS)
    neurons = _inputs_of(getattr(module, output))
    slots = []
    for name in inputs:
        index = _rows(neurons, 1)
        both = torch.cat([index, neurons + index], 1) if name == "gate_up_proj" else index
        slots += _slots(block, f"{before}{name}", both)
    last = _output(block, f"{before}{output}", _rows(neurons, 1))
    return ChannelLayout(neurons, (*slots, last), last)


def _experts(module: nn.Module, before: str) -> ChannelLayout | str:
    """Neurons of stacked experts. GPT-OSS has its weights [experts, inputs, outputs], gate and up in turn."""
    turned = bool(getattr(module, "is_transposed", False)) or hasattr(module, "gate_up_proj_bias")
    down: torch.Tensor = module.down_proj  # type: ignore[assignment]
    experts, neurons = int(down.shape[0]), int(down.shape[1 if turned else 2])
    index = _rows(neurons, 1)
    both = _rows(neurons, 2) if turned else torch.cat([index, neurons + index], 1)
    slots = [ParameterSlice(f"{before}gate_up_proj", 2 if turned else 1, both)]
    if hasattr(module, "gate_up_proj_bias"):
        slots.append(ParameterSlice(f"{before}gate_up_proj_bias", 1, both))
    last = ParameterSlice(f"{before}down_proj", 1 if turned else 2, index)
    return ChannelLayout(experts * neurons, (*slots, last), last, experts=experts)


# -- what follows from a layout ---------------------------------------------------------------------------------------


def group_size(block: nn.Module, layout: ChannelLayout, item_bytes: int, kv_bytes: int, picked: int) -> GroupSize:
    """One group in numbers. `kv_bytes`: of all heads of the part; `picked`: experts that a token meets."""
    parameters = flops = 0
    for slot in layout.slots:
        tensor = block.get_parameter(slot.name)
        own = tensor.numel() // tensor.shape[slot.axis] // layout.experts * int(slot.index.shape[1])
        parameters += own
        if tensor.dim() - (layout.experts > 1) == 2:
            flops += 2 * own
    share = picked / layout.experts if layout.experts > 1 else 1
    kv = kv_bytes // layout.groups if layout.own_kv else 0
    return GroupSize(parameters, parameters * item_bytes, kv, round(flops * share))


def config_field_names(part: Part, config: Config) -> list[str]:
    """What the class of a config calls the widths of a part."""
    return [name for name in CONFIG_FIELDS[part] if hasattr(type(config), config.attribute_map.get(name, name))]


def config_fields(layout: ChannelLayout, count: int, config: Config) -> dict[str, int]:
    """The widths of a part with `count` groups, as the config spells them, and transformers' `per_layer_config`."""
    if layout.heads:
        heads, *kv = config_field_names("attention", config)
        return {heads: count * layout.heads} | dict.fromkeys(kv, count if layout.own_kv else 1)
    names = [
        name for name in config_field_names("mlp", config) if name != "moe_intermediate_size" or layout.experts > 1
    ]
    return {names[0]: count // layout.experts}


def kept_positions(layout: ChannelLayout, alive: Sequence[int], groups: Sequence[int]) -> list[list[int]]:
    """Of each expert, or of the part, the places that stay. `alive`: the groups that it has, by number."""
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


def kept_tensor(
    tensor: torch.Tensor, layout: ChannelLayout, slot: ParameterSlice, kept: list[list[int]]
) -> torch.Tensor:
    """What stays of a parameter; entries that belong to no group do. The weight of a norm over all heads is larger by
    the root of what is missing under it."""

    def of_one(piece: torch.Tensor, places: list[int], axis: int) -> torch.Tensor:
        stay = torch.ones(piece.shape[axis], dtype=torch.bool)
        stay[_gone(slot, places)] = False
        return piece.index_select(axis, stay.nonzero().flatten().to(piece.device))

    if len(kept) == 1:
        stays = of_one(tensor, kept[0], slot.axis)
        return (
            stays * math.sqrt(layout.groups / len(kept[0]))
            if slot.name.removesuffix(".weight") in layout.norms
            else stays
        )
    return torch.stack([of_one(piece, places, slot.axis - 1) for piece, places in zip(tensor, kept, strict=True)])


def cut_channels(
    block: nn.Module, path: str, layout: ChannelLayout, config: Config, kept: list[list[int]]
) -> dict[str, Any]:
    """Cut the part of a block at `path` in place to the groups that stay; returns what a checkpoint must tell of it.

    The parameters are new, the old ones untouched. A norm over all heads keeps its divisor: less of its input is left,
    and what is gone counts as zero, so that its weight and its epsilon carry the ratio.
    """
    count = sum(map(len, kept))
    shapes: dict[str, list[int]] = {}
    attributes: dict[str, dict[str, Any]] = {}
    for slot in layout.slots:
        tensor = kept_tensor(block.get_parameter(slot.name).detach(), layout, slot, kept)
        if (name := slot.name.removesuffix(".weight")) in layout.norms:
            norm: Any = block.get_submodule(name)
            attributes[name] = {"variance_epsilon": norm.variance_epsilon * layout.groups / count}
        set_parameter(block, slot.name, tensor.contiguous())
        shapes[slot.name] = list(tensor.shape)
    if layout.heads:
        attributes[path] = _numbers(block.get_submodule(path), layout, count, config)
    else:
        where = layout.output.name.rpartition(".")[0] if layout.experts > 1 else path
        module = block.get_submodule(where)
        names = [name for name in ("intermediate_size", "intermediate_dim") if hasattr(module, name)]
        attributes[where] = dict.fromkeys(names, count // layout.experts)
    attributes = {name: values for name, values in attributes.items() if values}
    set_attributes(block, attributes)
    return {"shapes": shapes, "attributes": attributes}


def _numbers(module: Any, layout: ChannelLayout, count: int, config: Config) -> dict[str, Any]:
    """What an attention module must know of its heads, under whichever names it keeps that."""
    heads = count * layout.heads
    kv = count if layout.own_kv else 1
    values = {
        "num_heads": heads, "num_key_value_heads": kv, "num_key_value_groups": heads // kv, "num_kv_heads": kv,
        "split_size": heads * head_dim(config),
    }  # fmt: skip
    told: dict[str, Any] = {name: value for name, value in values.items() if hasattr(module, name)}
    if hasattr(module, "qkv_proj"):  # phi3 asks its config
        told["config"] = {"num_attention_heads": heads, "num_key_value_heads": kv}
    return told


def zeroed_weights(block: nn.Module, layout: ChannelLayout, kept: list[list[int]]) -> Mapping[str, torch.Tensor]:
    """Parameters of a part in whole, zero where groups do not stay: {name in the block: tensor}. Norms stay."""
    told: dict[str, torch.Tensor] = {}
    for slot in layout.slots:
        if "norm" in slot.name or slot.name.endswith("sinks"):
            continue
        tensor = block.get_parameter(slot.name).detach().clone()
        for expert, places in enumerate(kept):
            piece = tensor if len(kept) == 1 else tensor[expert]
            piece.index_fill_(slot.axis - (len(kept) > 1), _gone(slot, places).to(tensor.device), 0)
        told[slot.name] = tensor
    return told
