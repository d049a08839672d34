"""Where the sites, projections and channels of a loaded model are, and what they measure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from billhook.core.anatomy import Anatomy, GroupSize, SharedNorms, SiteSize, Unassigned
from billhook.core.errors import ModelError, PlanError
from billhook.core.plan import PARTS, Part, Site
from billhook.models import channel_groups
from billhook.models.architectures import (
    EXPERT_MULTIPLE,
    Architecture,
    Config,
    architecture_of,
    base_type,
    experts_per_token,
    head_dim,
)
from billhook.models.modeling_billhook import PatchModule
from billhook.models.pruned_config import PrunedConfig
from billhook.models.transformers_internals import inputs_first, is_linear

FEWEST_EXPERTS = 2  # of a mixture: a router of one has no choice, and the part would be a plain MLP


def blocks_of(model: nn.Module, row: Architecture) -> nn.ModuleList:
    """The list of decoder blocks. Raises ModelError if the model does not have what its row says."""
    try:
        blocks = model.get_submodule(row.blocks)
    except AttributeError as error:
        raise ModelError(f"The model has no {row.blocks}, where its architecture keeps the blocks: {error}.") from error
    if not isinstance(blocks, nn.ModuleList):
        raise ModelError(
            f"{row.blocks} is a {type(blocks).__name__} and not a list of blocks, where its architecture keeps the "
            "blocks. Correct its row in models/architectures.py."
        )
    return blocks


def site_modules(block: nn.Module, part: Part, row: Architecture, config: Config) -> list[nn.Module]:
    """The modules whose parameters are the site, norms of its own included. Raises ModelError for a row that names
    others than the block has."""
    names = row.parts(block, config)[part]
    wanted = (*names["zero"], *names["drop"])
    if missing := [name for name in wanted if not hasattr(block, name)]:
        raise ModelError(
            f"A block of this model has no {', '.join(missing)}, which its architecture names as its {part}: it has "
            f"{', '.join(name for name, _ in block.named_children())}. Correct its row in models/architectures.py."
        )
    return [getattr(block, name) for name in wanted]


def output_projection(block: nn.Module, part: Part, row: Architecture, config: Config) -> str | None:
    """The name inside `block` of the linear module whose output a part adds to the residual stream; None without one.

    Mixtures of experts have none: each token has its own.
    """
    if row.norm_before_sum:
        return None
    inside = {"attention": row.attention_output, "mlp": row.mlp_output}[part]
    name = f"{row.path(part)}.{inside}".removeprefix(".")
    try:
        module = block.get_submodule(name)
    except AttributeError:
        return None
    return name if is_linear(module) else None


def parameter_owners(block: nn.Module, row: Architecture, config: Config) -> dict[str, Part | None]:
    """{parameter of a block: the part that it belongs to, or None where both parts share it}."""
    of = {
        id(p): part for part in PARTS for module in site_modules(block, part, row, config) for p in module.parameters()
    }
    return {name: of.get(id(p)) for name, p in block.named_parameters()}


def as_outputs_by_inputs(block: nn.Module, name: str, value: torch.Tensor) -> torch.Tensor:
    """A view of `value`, shaped like the parameter `name` of a block, as [..., outputs, inputs].

    A bias, and the weight of a norm, have one input an output.
    """
    module = block.get_submodule(name.rpartition(".")[0])
    if value.dim() < 2 or name.endswith("bias"):
        return value[..., None]
    return value.transpose(-1, -2) if inputs_first(module) else value


def channel_layout(block: nn.Module, part: Part, row: Architecture, config: Config) -> channel_groups.ChannelLayout:
    """The channel groups of a part of a block. Raises PlanError where it has none, and says why."""
    of = channel_groups.find_layout(block, part, row, config)
    if isinstance(of, str):
        raise PlanError(f"This {part} cannot be narrowed: {of}. Remove it whole, or leave it.")
    return of


def anatomy(model: nn.Module, config: Config, pruned: PrunedConfig, *, item_bytes: int) -> Anatomy:
    """Return the sites of a loaded model and their sizes.

    `pruned`: what its config says of an earlier pruning; `item_bytes`: bytes of one parameter or cache entry in the
    checkpoint's dtype.
    """
    row, removed = architecture_of(config), pruned.removed.removed
    kv_bytes = 2 * row.kv_heads(config) * head_dim(config) * item_bytes
    sizes: list[SiteSize] = []
    shared: list[SharedNorms] = []
    owned: set[int] = set()
    for position, block in zip(pruned.kept_blocks, blocks_of(model, row), strict=True):
        for part in PARTS:
            site = Site(position, part)
            if site in removed:
                continue
            modules = site_modules(block, part, row, config)
            parameters = _parameters(modules)
            owned |= {id(p) for p in parameters}
            count = sum(p.numel() for p in parameters)
            of = channel_groups.find_layout(block, part, row, config)
            kv, group = (kv_bytes if part == "attention" else 0), None
            mine: tuple[int, ...] = ()
            experts = channels = fewest = 1
            expert = None
            if not isinstance(of, str):
                experts, channels = of.experts, int(of.output.index.shape[1]) // max(1, of.heads)
                mine, whole = pruned.group_ids(site, of.groups)
                kv = kv * of.groups // whole if of.own_kv else kv
                picked = experts_per_token(config)
                group = _group_size(block, of, item_bytes, kv, picked)
                if of.expert_rows:
                    expert, fewest = _expert_size(block, of, item_bytes), max(FEWEST_EXPERTS, picked)
            flops = _flops(modules, config)
            step = 1 if experts == 1 else EXPERT_MULTIPLE
            size = SiteSize(site, count, count * item_bytes, kv, flops, 0, mine, group, experts, channels, step)
            sizes.append(replace(size, expert=expert, fewest=fewest))
        common = [p for p in _parameters([block]) if id(p) not in owned]
        patched = any(isinstance(module, PatchModule) for module in block.modules())  # then the block is never removed
        owned |= set() if patched else {id(p) for p in common}
        if common and not patched:
            count, flops = sum(p.numel() for p in common), sum(2 * p.numel() for p in common if p.dim() == 2)
            shared.append(SharedNorms(position, count, count * item_bytes, flops_per_token=flops))
    rest = [p for p in _parameters([model]) if id(p) not in owned]
    count = sum(p.numel() for p in rest)
    head = model.get_output_embeddings()  # type: ignore[operator]
    head_flops = 2 * int(head.weight.numel()) if head is not None else 0
    others = Unassigned(count, count * item_bytes, head_flops)
    return Anatomy(base_type(config.model_type), pruned.blocks, tuple(sizes), others, tuple(shared))


def _group_size(
    block: nn.Module, layout: channel_groups.ChannelLayout, item_bytes: int, kv_bytes: int, picked: int
) -> GroupSize:
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


def _expert_size(block: nn.Module, layout: channel_groups.ChannelLayout, item_bytes: int) -> GroupSize:
    """What each expert has besides its groups, in numbers: its row of the router, and a bias of its output."""
    parameters = flops = 0
    for name in layout.expert_rows:
        tensor = block.get_parameter(name)
        own = tensor.numel() // layout.experts
        parameters += own
        if tensor.dim() == 2 and not name.endswith("bias"):
            flops += 2 * own
    return GroupSize(parameters, parameters * item_bytes, 0, flops)


def _parameters(modules: Iterable[nn.Module]) -> list[torch.Tensor]:
    """Every parameter once, tied ones too."""
    return list({id(p): p for module in modules for p in module.parameters()}.values())


def _flops(modules: Iterable[nn.Module], config: Config) -> int:
    """2 per weight that one token meets; of the experts (3-d weights) only those that the router picks."""
    picked = experts_per_token(config)
    flops = 0
    for module in modules:
        for name, p in module.named_parameters():
            if p.dim() == 3:
                flops += 2 * p.numel() * picked // p.shape[0]
            elif p.dim() == 2 and not name.endswith("bias"):
                flops += 2 * p.numel()
    return flops


def rope_boundary(config: Config) -> int | None:
    """Return the length above which rows have other rope factors, those of the longest row beside them; None: any has
    the same."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [each for each in parameters.values() if isinstance(each, dict)] or [parameters]
    original = getattr(config, "original_max_position_embeddings", None)
    most = getattr(config, "max_position_embeddings", None)
    found = {
        "longrope": [each.get("original_max_position_embeddings", original) for each in kinds],
        "dynamic": [most for _ in kinds],
    }
    lengths = [found[each["rope_type"]][i] for i, each in enumerate(kinds) if each.get("rope_type") in found]
    return min((length for length in lengths if length is not None), default=None)
