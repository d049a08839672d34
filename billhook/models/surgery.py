"""A model that behaves as if sites or channel groups were removed, and is whole again afterwards."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from billhook.core.errors import PlanError, option
from billhook.core.plan import PARTS, Plan, Site
from billhook.core.results.json_form import JsonObject
from billhook.models import architectures, channel_groups, modeling_billhook, structure
from billhook.models.accelerator.narrowed_parts import NarrowedPart
from billhook.models.load import Teacher, undisturbed
from billhook.models.modeling_billhook import number_caches, pruned_classes, remove_part, remove_skipped
from billhook.models.pruned_config import (
    NarrowedSite,
    PrunedConfig,
    fits_stock_shape,
    read_config,
    require_prunable,
    stock_shape,
    write_config,
)
from billhook.models.repair import NO_REPAIR, Patch, Repair, add_bias, patch_module
from billhook.models.transformers_internals import stock_classes


def masked_block(
    teacher: Teacher, plan: Plan, position: int, block: nn.Module
) -> tuple[dict[str, torch.Tensor], dict[str, JsonObject]]:
    """Weights of a block, by its own names, with which its parts compute as the narrower ones of a plan: zeros where
    channel groups are removed, no rows of experts that are. And what its modules must know then: {module: {attribute:
    number}}. `position`: of the block in the unpruned model; it must be in memory."""
    weights: dict[str, torch.Tensor] = {}
    numbers: dict[str, JsonObject] = {}
    sizes = {size.site: size for size in teacher.anatomy.sites}
    for each in (narrow for narrow in plan.narrowed if narrow.site.block == position):
        of = structure.channel_layout(block, each.site.part, teacher.architecture, teacher.model.config)
        kept = channel_groups.kept_positions(of, sizes[each.site].groups, each.groups)
        weights |= channel_groups.zeroed_weights(block, of, kept)
        numbers |= channel_groups.expert_numbers(block, of, kept)
    return weights, numbers


@contextmanager
def narrower(teacher: Teacher, parts: Collection[NarrowedPart], block: nn.Module) -> Iterator[None]:
    """Give a block, which must be in memory, narrower sites inside the context: cut, or with zeros."""
    if not parts:
        yield
        return
    row, config = teacher.architecture, teacher.model.config
    with restored(block):
        for part in parts:
            if part.cut:
                channel_groups.cut_channels(block, row, part.layout, config, part.kept, entries=part.entries)
                continue
            numbers = channel_groups.expert_numbers(block, part.layout, part.kept)
            for name, tensor in channel_groups.zeroed_weights(block, part.layout, part.kept, part.entries).items():
                modeling_billhook.set_parameter(block, name, tensor)
            modeling_billhook.set_attributes(block, numbers)
        yield


@contextmanager
def restored(block: nn.Module) -> Iterator[None]:
    """On leaving, give a block the modules, parameters and attributes that it has on entering."""
    own = [vars(module) for module in block.modules()]
    held = [kept for values in own for kept in (values, values["_parameters"], values["_modules"])]
    before: list[tuple[dict[str, Any], dict[str, Any]]] = [(kept, dict(kept)) for kept in held]
    try:
        yield
    finally:
        for kept, stood in before:
            kept.clear()
            kept.update(stood)


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


@undisturbed
def apply(teacher: Teacher, plan: Plan, *, stock: bool = False, repair: Repair = NO_REPAIR) -> Any:
    """What the plan leaves of the teacher's model, as a transformers model that can be saved and generates.

    A block that loses both sites is removed and the rest are renumbered; the config lists the original
    positions. Where only whole blocks are missing, or all blocks are as narrow, the class is the stock one; else it is
    `billhook-<type>`, or with `stock=True` the stock one whose removed sites hold zeros. `repair`: new
    weights, and patches in the place of sites; a block that has a patch stays. The student shares all other tensors
    with the teacher. Raises PlanError if the plan does not fit the teacher, or a patch the stock shape, and ModelError
    if nothing can be removed from the teacher.
    """
    teacher.anatomy.check(plan)
    if plan:
        require_prunable(teacher.pruned, teacher.name)
    row = teacher.architecture
    removed = Plan(teacher.removed_earlier.removed | plan.removed)
    earlier = dict(teacher.pruned.patches)
    patched = earlier | {site: patch.spec() for site, patch in repair.patches.items()}
    factors = {site: ranks for site, ranks in teacher.pruned.factors.items() if site not in plan.removed}
    shortcuts = teacher.pruned.shortcuts
    if stock:
        _require_stock_place(factors, patched, shortcuts)
    gone = set(removed.blocks()) - {site.block for site in patched}
    kept = [p for p in teacher.positions if p not in gone]
    lacking = [s for s in removed.sites() if s.block not in gone]

    student = shared_copy(teacher.model)
    config, path = student.config, row.blocks
    parts = row.parts(structure.blocks_of(student, row)[0], config)
    whole = {name: w for name, w in repair.weights.items() if w.shape == student.get_parameter(name).shape}
    assign_weights(student, whole)  # of parts that are cut next, too
    narrow = _narrowed(student, teacher, plan, repair)
    _set_blocks(student, path, [teacher.positions.index(p) for p in kept])
    for name in ("model_type", "auto_map"):  # left by from_pretrained; the class says them
        config.__dict__.pop(name, None)
    config.billhook = {}
    base = architectures.base_type(config.model_type)
    alike = bool(narrow) and (stock or not lacking) and fits_stock_shape(student, narrow, base)
    if alike:  # the stock config says how wide
        narrow = {site: replace(each, widths={}, module=None) for site, each in narrow.items()}
        _share_config(student)
    elif stock and narrow:
        raise _no_stock_place(f"a width of its own, as {min(narrow)} has")
    pruned = PrunedConfig(
        teacher.anatomy.blocks, tuple(kept), narrowed=narrow, patches=patched, factors=factors, shortcuts=shortcuts
    )
    if stock or not (lacking or factors or shortcuts or (narrow and not alike)):
        config.__class__, student.__class__ = stock_classes(base)
        write_config(config, replace(pruned, zeroed=tuple(lacking)), path, parts)
        number_caches(student.get_submodule(path), {})
        _zero(student, row, kept, lacking)
    else:
        classes = pruned_classes(stock_classes(base)[0])
        config.__class__, student.__class__ = classes["AutoConfig"], classes["AutoModelForCausalLM"]
        write_config(config, replace(pruned, lacking=tuple(lacking)), path, parts)
        remove_skipped(student)
        for site, module in _patch_modules(teacher, repair, parts).items():
            setattr(student.get_submodule(path)[kept.index(site.block)], parts[site.part]["zero"][0], module)
    rest = {student_name(teacher, old, kept): repair.weights[old] for old in repair.weights.keys() - whole.keys()}
    assign_weights(student, {name: weight for name, weight in rest.items() if name})
    return student


def stock_holds(teacher: Teacher, plan: Plan) -> bool:
    """Whether the stock type has models with the widths of a plan that narrows all sites of a part alike.

    Nothing is cut: an empty model is built, and its sites are measured.
    """
    config, row, widths = teacher.model.config, teacher.architecture, dict[str, int]()
    sizes = {size.site: size for size in teacher.anatomy.sites}
    for each in plan.narrowed:
        of = structure.channel_layout(teacher.block(each.site.block), each.site.part, row, config)
        kept = channel_groups.kept_positions(of, sizes[each.site].groups, each.groups)
        fields = channel_groups.config_fields(of, kept, config)
        if any(widths.setdefault(name, number) != number for name, number in fields.items()):
            return False
        if of.norms:  # their scale and epsilon change
            return False
    if any(each.site.part == "attention" for each in plan.narrowed):
        widths["head_dim"] = architectures.head_dim(config)
    built = stock_shape(config, teacher.anatomy.model_type, widths)
    if built is None:
        return False
    found = structure.anatomy(
        built, built.config, PrunedConfig(len(teacher.positions), tuple(range(len(teacher.positions)))), item_bytes=1
    )
    parameters = {size.site: size.parameters for size in found.sites}
    lost = {size.site: each.parameters for size, each in teacher.anatomy.lost(plan)}
    return all(
        parameters[Site(teacher.positions.index(size.site.block), size.site.part)]
        == size.parameters - lost.get(size.site, 0)
        for size in teacher.anatomy.sites
        if size.site not in plan.removed
    )


def _require_stock_place(factors: Collection[Site], patched: Collection[Site], shortcuts: bool) -> None:
    """Raise PlanError where an earlier pruning, or a repair, left what the stock shape cannot hold."""
    if factors:
        raise _no_stock_place(f"two factors of a weight, as {min(factors)} has")
    if shortcuts:
        raise _no_stock_place("matrices in the shortcuts around its sites")
    if patched:
        what = f"what stands at {min(patched)} now: a constant or a matrix of a repair"
        raise _no_stock_place(what, ", or recover by fold alone")


def _no_stock_place(what: str, instead: str = "") -> PlanError:
    """The refusal of what the stock shape cannot hold."""
    return PlanError(f"{option('stock', True)} has no place for {what}. Leave {option('stock')} out{instead}.")


def _narrowed(student: Any, teacher: Teacher, plan: Plan, repair: Repair) -> dict[Site, NarrowedSite]:
    """Cut what a plan narrows, in place. Returns every narrowed site that is kept, those of earlier prunings too."""
    config, row, pruned = teacher.model.config, teacher.architecture, teacher.pruned
    entries: dict[Site, NarrowedSite] = {}
    for site, before in pruned.narrowed.items():
        if site not in plan.removed:
            alike = {name: getattr(config, name) for name in channel_groups.config_field_names(site.part, config)}
            entries[site] = replace(before, widths=before.widths or alike)
    sizes = {size.site: size for size in teacher.anatomy.sites}
    for each in sorted(plan.narrowed):
        block = structure.blocks_of(student, row)[teacher.positions.index(each.site.block)]
        part, alive = each.site.part, sizes[each.site].groups
        of = structure.channel_layout(block, part, row, config)
        if of.experts > 1 and teacher.weights is not None:
            raise PlanError(
                f"{teacher.name} is larger than the memory, and the experts of {each.site} can only be narrowed in "
                f"memory. Narrow its attentions, with {option('set', {'parts': 'mha'})}, or give it more "
                f"{option('memory')}."
            )
        kept = channel_groups.kept_positions(of, alive, each.groups)
        module = channel_groups.cut_channels(block, row, of, config, kept)
        output = of.output.name.removesuffix(".weight")
        if each.site in repair.biases:
            add_bias(block.get_submodule(output), repair.biases[each.site])
        if (bias := dict(block.named_parameters()).get(f"{output}.bias")) is not None:
            module["shapes"][f"{output}.bias"] = list(bias.shape)
        whole = pruned.group_ids(each.site, of.groups)[1]
        widths = channel_groups.config_fields(of, kept, config)
        entries[each.site] = NarrowedSite(each.groups, whole, widths, module)
    return entries


def _share_config(student: Any) -> None:
    """Have every module read the one config: all of its numbers are theirs."""
    for module in student.modules():
        if isinstance(getattr(module, "config", None), modeling_billhook.LayerConfig):
            module.config = student.config


def _patch_modules(teacher: Teacher, repair: Repair, parts: Mapping[str, Any]) -> dict[Site, nn.Module]:
    """What stands where sites were: after earlier prunings, and after this one."""
    standing = {site: _place(teacher, site) for site in teacher.pruned.patches}
    for site, patch in repair.patches.items():
        device = teacher.block_device(teacher.positions.index(site.block))
        standing[site] = patch_module(patch, parts[site.part]["outputs"], device, teacher.model.dtype)
    return standing


def _place(teacher: Teacher, site: Site) -> nn.Module:
    """The module that stands where `site` was."""
    block = teacher.block(site.block)
    name = teacher.architecture.parts(block, teacher.model.config)[site.part]["zero"][0]
    module: nn.Module = getattr(block, name)
    return module


def student_name(teacher: Teacher, name: str, kept: Sequence[int]) -> str | None:
    """A student's name of a parameter of its teacher, whose block at position p is at `kept.index(p)`; None if removed.

    Of a tensor in the teacher's files likewise: what stands before the blocks may differ.
    """
    found = re.search(rf"(?:^|\.){re.escape(teacher.architecture.blocks.rsplit('.', 1)[-1])}\.(\d+)\.", name)
    if found is None:
        return name
    position = teacher.positions[int(found[1])]
    return f"{name[: found.start(1)]}{kept.index(position)}{name[found.end(1) :]}" if position in kept else None


def extract_repair(teacher: Teacher, plan: Plan, student: Any) -> Repair:
    """The repair with which `apply` makes this student of its teacher, by the tensors that they do not share."""
    shared = {id(p) for p in teacher.model.parameters()}
    kept = read_config(student.config).kept_blocks
    has = {name for name, _ in teacher.model.named_parameters(remove_duplicate=False)}
    path, weights, patches, biases = f"{teacher.architecture.blocks}.", {}, {}, {}
    places = {f"{s.part}.{kept.index(s.block)}": s for s in plan.sites() if s.block in kept}
    inside: list[str] = []
    names = {"attention": teacher.architecture.attention, "mlp": teacher.architecture.mlp[-1]}
    for place, site in places.items():
        name = f"{path}{place.partition('.')[2]}.{names[site.part]}"
        module = student.get_submodule(name)
        if isinstance(module, modeling_billhook.PatchModule):
            inside.append(f"{name}.")
            parts = {key.partition(".")[0]: value.detach().float() for key, value in module.named_parameters()}
            patches[site] = Patch(**parts)
    for name, parameter in student.named_parameters():
        if id(parameter) in shared or name.startswith(tuple(inside)):
            continue
        index, _, rest = name.removeprefix(path).partition(".")
        old = f"{path}{teacher.positions.index(kept[int(index)])}.{rest}" if name.startswith(path) else name
        if old in has:
            weights[old] = parameter.detach()
            continue
        block = teacher.block(kept[int(index)])
        outputs = {
            structure.output_projection(block, part, teacher.architecture, teacher.model.config): part for part in PARTS
        }
        biases[Site(kept[int(index)], outputs[rest.removesuffix(".bias")])] = parameter.detach().float()
    return Repair(weights, patches, biases)


def assign_weights(student: Any, weights: dict[str, torch.Tensor]) -> None:
    """Give a student new values of some parameters, in the dtype of what stood there."""
    fresh: dict[nn.Parameter, nn.Parameter] = {}
    for name, tensor in weights.items():
        old = student.get_parameter(name)
        device = tensor.device if old.device.type == "meta" else old.device
        value = tensor.to(device=device, dtype=old.dtype, copy=True)
        fresh[old] = nn.Parameter(value, requires_grad=False)
    replace_parameters(student, fresh)


def replace_parameters(student: Any, replacements: dict[nn.Parameter, nn.Parameter]) -> None:
    """Put new parameters in the place of old ones; tied ones stay tied, and who shares the old ones keeps them."""
    for module in student.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter in replacements:
                setattr(module, key, replacements[parameter])


def effective_plan(teacher: Teacher, plan: Plan, stock: bool) -> Plan:
    """The part of `plan` that leaves the checkpoint: all of it, or with `stock` only whole blocks."""
    gone = set(Plan(teacher.removed_earlier.removed | plan.removed).blocks())
    return Plan(frozenset(s for s in plan.removed if s.block in gone)) if stock else plan


def shared_copy(model: nn.Module) -> Any:
    """A new tree of modules and a new config over the same tensors."""
    memo: dict[int, Any] = {id(p): p for p in model.parameters()}
    memo |= {id(b): b for b in model.buffers()}
    return copy.deepcopy(model, memo)


def _set_blocks(student: Any, path: str, indices: list[int]) -> None:
    """Keep the blocks at `indices`, and trim everything in the config that speaks of blocks."""
    config = student.config
    blocks = student.get_submodule(path)
    if len(indices) == len(blocks):
        return
    owner, _, name = path.rpartition(".")
    setattr(student.get_submodule(owner), name, nn.ModuleList(blocks[i] for i in indices))
    config.per_layer_config = None
    architectures.keep_blocks(config, indices, len(blocks))


def _zero(student: Any, row: architectures.Architecture, kept: list[int], sites: list[Site]) -> None:
    """New zero tensors in the place of every weight of `sites`; their norms stay. The teacher's are not touched."""
    blocks = student.get_submodule(row.blocks)
    for site in sites:
        whole = row.attention if site.part == "attention" else row.mlp[-1]
        inner = row.mlp[:-1] if site.part == "mlp" else ()
        for name in (whole, *inner):
            for module in getattr(blocks[kept.index(site.block)], name).modules():
                for key, tensor in list(module.named_parameters(recurse=False)):
                    setattr(module, key, nn.Parameter(torch.zeros_like(tensor), requires_grad=False))
