"""What weights, gradients and activations say of channel groups, [groups] of every site that has some, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from billhook.core.errors import ModelError, option
from billhook.core.plan import Site
from billhook.engine import gradient_pass
from billhook.engine.bench import Measurer
from billhook.models import structure
from billhook.models.channel_groups import ChannelLayout, ParameterSlice
from billhook.models.device import to_float64

GroupValues = dict[Site, torch.Tensor]
OfWeight = Callable[[torch.Tensor], torch.Tensor]  # elementwise, of a parameter in float32

# (w, g, f) -> a value an element; f is None unless asked for
OfGradient = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class Inputs:
    """What an output projection reads, over all tokens: per channel [inputs], in float64.

    `mean`, `variance` (of n - 1), `square` (the mean of x²), `absolute` (the mean of |x|).
    """

    tokens: int
    mean: torch.Tensor
    variance: torch.Tensor
    square: torch.Tensor
    absolute: torch.Tensor


# (what is read, the projection's weight [outputs, inputs] in float64) -> a value a channel [inputs]
OfInputs = Callable[[Inputs, torch.Tensor], torch.Tensor]


def channel_layouts(bench: Measurer, index: int, block: nn.Module) -> Iterator[tuple[Site, ChannelLayout]]:
    """The sites of a block that have channel groups."""
    row, config = bench.teacher.architecture, bench.teacher.model.config
    for size in bench.teacher.anatomy.sites:
        if size.site.block == bench.teacher.positions[index] and size.groups:
            yield size.site, structure.channel_layout(block, size.site.part, row, config)


def group_sums(layout: ChannelLayout, slot: ParameterSlice, values: torch.Tensor, *, vector: bool) -> torch.Tensor:
    """Sums over the entries of each group, [groups], of values shaped like a parameter.

    `vector`: what stands at one entry is summed with its sign, and then counts without it.
    """
    values = to_float64(values)
    if layout.experts > 1:
        lines = values.movedim(slot.axis, 1).reshape(values.shape[0], values.shape[slot.axis], -1).sum(-1)
    else:
        lines = values.movedim(slot.axis, 0).reshape(1, values.shape[slot.axis], -1).sum(-1)
    lines = (lines.abs() if vector else lines).cpu()
    return lines[:, slot.index].sum(-1).flatten()


def groups_by_weights(bench: Measurer, function: OfWeight) -> GroupValues:
    """Sum of function(w) over the weights of every group."""
    found: GroupValues = {}
    for index, block in enumerate(bench.runner.blocks(range(bench.runner.depth))):
        for site, of in channel_layouts(bench, index, block):
            pieces = [group_sums(of, s, function(block.get_parameter(s.name).detach().float()), vector=False)
                      for s in of.slots]  # fmt: skip
            found[site] = torch.stack(pieces).sum(0)
    return require_finite(found)


def groups_by_gradients(
    bench: Measurer, functions: Mapping[str, tuple[OfGradient, bool]], fisher: bool
) -> dict[str, GroupValues]:
    """By name, the sum of function(w, g, f) over the weights of every group; summed by vectors where the entry says so.

    g and f as of `Probe.sum_over_gradients`. One pass for all of them.
    """
    found: dict[str, GroupValues] = {name: {} for name in functions}
    for index, block, slopes, squares in gradient_pass.gradients_by_block(bench, fisher):
        for site, of in channel_layouts(bench, index, block):
            for name, (function, vector) in functions.items():
                pieces = []
                for slot in of.slots:
                    w = block.get_parameter(slot.name).detach().float()
                    values = function(w, slopes[slot.name], squares[slot.name] if fisher else None)
                    pieces.append(group_sums(of, slot, values, vector=vector))
                found[name][site] = torch.stack(pieces).sum(0)
    order = bench.teacher.anatomy.sites_present()
    return {
        name: require_finite({site: values[site] for site in order if site in values}) for name, values in found.items()
    }


@torch.inference_mode()
def groups_by_inputs(bench: Measurer, function: OfInputs) -> GroupValues:
    """Mean over the channels of every group of function(what is read, weight), from one pass.

    Sites whose output projection is not one linear module, mixtures of experts, are left out.
    """
    trunk, found = bench.runner, GroupValues()
    streams = [trunk.embed(group.ids) for group in bench.groups]
    for index, block in enumerate(trunk.blocks(range(trunk.depth))):
        mine = {site: of for site, of in channel_layouts(bench, index, block) if of.experts == 1}
        heard: dict[Site, list[torch.Tensor]] = {site: [] for site in mine}
        handles = []
        for site, of in mine.items():
            module = block.get_submodule(of.output.name.removesuffix(".weight"))
            handles.append(module.register_forward_pre_hook(_into(heard[site])))
        try:
            streams = [trunk.call(index, block, x) for x in streams]
        finally:
            for handle in handles:
                handle.remove()
        for site, of in mine.items():
            pairs = zip(heard[site], bench.groups, strict=True)
            x = to_float64(torch.cat([x.reshape(*group.ids.shape, -1)[group.counted] for x, group in pairs]))
            told = Inputs(len(x), x.mean(0), x.var(0), x.square().mean(0), x.abs().mean(0))
            weight = to_float64(
                structure.as_outputs_by_inputs(block, of.output.name, block.get_parameter(of.output.name).detach())
            )
            found[site] = function(told, weight).cpu()[of.output.index].mean(-1)
    bench.check_finite(streams)
    return require_finite(found)


def _into(kept: list[torch.Tensor]) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def hear(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        kept.append(inputs[0])

    return hear


def require_finite(group_values: GroupValues) -> GroupValues:
    """The values themselves. Raises ModelError if one is not finite."""
    for site, values in group_values.items():
        if not math.isfinite(float(values.sum())):
            raise ModelError(
                f"A score of the channel groups of {site} is NaN or infinite. Take another metric, or compute with "
                f"{option('dtype', 'float32')}."
            )
    return group_values


def standardised(group_values: GroupValues, *, within: bool = True) -> GroupValues:
    """Values less the mean and divided by the deviation of their site's, or of all sites of the kind.

    Where all are equal they are 0.
    """
    told: GroupValues = {}
    for site, values in group_values.items():
        others = values if within else torch.cat([v for s, v in group_values.items() if s.part == site.part])
        deviation = float(others.std()) if len(others) > 1 else 0.0
        told[site] = (values - others.mean()) / deviation if deviation else torch.zeros_like(values)
    return told
