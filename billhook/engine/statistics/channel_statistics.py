"""Statistics of channel groups by weights, gradients and activations: [groups] for each site with groups, float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from billhook.core.errors import ModelError, option
from billhook.core.plan import Site
from billhook.engine.bench import Measurer
from billhook.engine.statistics.activation_passes import WeightFunction
from billhook.engine.statistics.gradient_pass import GradientFunction, InputSlopes, gradients_by_block, slopes_by_block
from billhook.engine.statistics.group_pass import GroupPass, Passes, Step
from billhook.models import structure
from billhook.models.channel_groups import ChannelLayout, ParameterSlice
from billhook.models.device import to_float64

GroupValues = dict[Site, torch.Tensor]


@dataclass(frozen=True)
class Inputs:
    """Inputs of an output projection over all tokens: per channel [inputs], in float64.

    `mean`, `variance` (of n - 1), `square` (the mean of x²), `absolute` (the mean of |x|).
    """

    tokens: int
    mean: torch.Tensor
    variance: torch.Tensor
    square: torch.Tensor
    absolute: torch.Tensor


# (inputs, the projection's weight [outputs, inputs] in float64) -> a value per channel [inputs]
InputFunction = Callable[[Inputs, torch.Tensor], torch.Tensor]
# (XᵀX / tokens of the projection's inputs X [tokens, inputs], its weight [outputs, inputs], channels [groups, channels
# of each]) -> a value per group [groups]; all in float64 but the channels' numbers
ProductFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# (inputs and slopes of the output projection, its weight [outputs, inputs], channels [groups, heads, channels of each;
# a neuron is a head of one channel]) -> a value per group [groups]; all in float64 but the channels' numbers
SlopeFunction = Callable[[InputSlopes, torch.Tensor, torch.Tensor], torch.Tensor]

# (gates of experts [pairs], their outputs [pairs, width]), float64, of pairs of a token and an expert that its router
# chose; a gate is what the model multiplies the output with -> a value per pair [pairs]
ExpertFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def channel_layouts(bench: Measurer, index: int, block: nn.Module) -> Iterator[tuple[Site, ChannelLayout]]:
    """Yield the sites of a block that have channel groups, with their layouts."""
    row, config = bench.teacher.architecture, bench.teacher.model.config
    for size in bench.teacher.anatomy.sites:
        if size.site.block == bench.teacher.positions[index] and size.groups:
            yield size.site, structure.channel_layout(block, size.site.part, row, config)


def group_sums(layout: ChannelLayout, slot: ParameterSlice, values: torch.Tensor, *, vector: bool) -> torch.Tensor:
    """Return the sums over the entries of each group, [groups], of values shaped like a parameter.

    `vector`: the values of one entry are summed with their signs, and the absolute value of that sum counts.
    """
    values = to_float64(values)
    if layout.experts > 1:
        lines = values.movedim(slot.axis, 1).reshape(values.shape[0], values.shape[slot.axis], -1).sum(-1)
    else:
        lines = values.movedim(slot.axis, 0).reshape(1, values.shape[slot.axis], -1).sum(-1)
    lines = (lines.abs() if vector else lines).cpu()
    return lines[:, slot.index].sum(-1).flatten()


def groups_by_weights(bench: Measurer, function: WeightFunction) -> GroupValues:
    """Return the sum of function(w), elementwise, over the weights of each group."""
    values: GroupValues = {}
    for index, block in enumerate(bench.runner.blocks(range(bench.runner.depth))):
        for site, layout in channel_layouts(bench, index, block):
            pieces = [group_sums(layout, s, function(block.get_parameter(s.name).detach().float()), vector=False)
                      for s in layout.slots]  # fmt: skip
            values[site] = torch.stack(pieces).sum(0)
    return require_finite(values)


def groups_by_ranges(bench: Measurer) -> GroupValues:
    """Return the mean over the channels of each group of Σ over its matrices of r / the largest r of the site.

    r of a channel in a matrix: the largest minus the smallest of its weights, each counted from 0.
    """
    values: GroupValues = {}
    for index, block in enumerate(bench.runner.blocks(range(bench.runner.depth))):
        for site, layout in channel_layouts(bench, index, block):
            if layout.experts > 1:
                continue
            pieces = []
            for slot in layout.slots:
                w = block.get_parameter(slot.name).detach()
                if w.ndim == 2:
                    lines = to_float64(w.movedim(slot.axis, 0))
                    ranges = (lines.amax(1).clamp(min=0) - lines.amin(1).clamp(max=0)).cpu()[slot.index]
                    pieces.append((ranges / ranges.max().clamp(min=1e-300)).mean(-1))
            values[site] = torch.stack(pieces).sum(0)
    return require_finite(values)


def groups_by_gradients(
    passes: Passes, functions: Mapping[str, tuple[GradientFunction, bool]], fisher: bool
) -> dict[str, GroupValues]:
    """Return by name the sum of function(w, g, f), elementwise, over the weights of each group; from one pass.

    `functions`: each with whether to sum by vectors (see `group_sums`). g and f: see `Probe.sum_over_gradients`.
    """
    bench, sums = passes.bench, {name: GroupValues() for name in functions}
    for index, block, slopes, squares in gradients_by_block(passes, fisher):
        for site, layout in channel_layouts(bench, index, block):
            for name, (function, vector) in functions.items():
                pieces = []
                for slot in layout.slots:
                    w = block.get_parameter(slot.name).detach().float()
                    values = function(w, slopes[slot.name], squares[slot.name] if fisher else None)
                    pieces.append(group_sums(layout, slot, values, vector=vector))
                sums[name][site] = torch.stack(pieces).sum(0)
    order = bench.teacher.anatomy.sites_present()
    return {name: require_finite({s: by_site[s] for s in order if s in by_site}) for name, by_site in sums.items()}


def _layouts(bench: Measurer, index: int, block: nn.Module) -> dict[Site, ChannelLayout]:
    """Return the layouts of sites whose output projection is one linear module: of no mixture of experts."""
    return {site: layout for site, layout in channel_layouts(bench, index, block) if layout.experts == 1}


def _outputs(bench: Measurer, index: int, block: nn.Module) -> dict[Site, str]:
    """Return the names of their output projections."""
    return {site: of.output.name.removesuffix(".weight") for site, of in _layouts(bench, index, block).items()}


def _output_weight(layout: ChannelLayout, block: nn.Module) -> torch.Tensor:
    """Return the weight of an output projection, [outputs, inputs] in float64."""
    name = layout.output.name
    return to_float64(structure.as_outputs_by_inputs(block, name, block.get_parameter(name).detach()))


def groups_by_slopes(passes: Passes, functions: Mapping[str, SlopeFunction]) -> dict[str, GroupValues]:
    """Return by name function(inputs and slopes of the output projection, its weight, channels of heads); one pass.

    Sites whose output projection is not one linear module, mixtures of experts, are left out.
    """
    bench, values = passes.bench, {name: GroupValues() for name in functions}
    order = range(bench.runner.depth)[::-1]
    for index, (block, slopes) in zip(order, slopes_by_block(passes, _outputs), strict=True):
        for site, layout in _layouts(bench, index, block).items():
            found, weight = slopes[site], _output_weight(layout, block)
            channels = layout.output.index.to(found.mean.device).view(layout.groups, max(1, layout.heads), -1)
            for name, function in functions.items():
                values[name][site] = function(found, weight, channels).cpu()
    sites = bench.teacher.anatomy.sites_present()
    return {name: require_finite({s: by_site[s] for s in sites if s in by_site}) for name, by_site in values.items()}


@torch.inference_mode()
def groups_by_inputs(passes: Passes, function: InputFunction) -> GroupValues:
    """Return the mean over the channels of each group of function(inputs, weight), from one pass.

    Sites whose output projection is not one linear module, mixtures of experts, are left out.
    """
    bench, group_values = passes.bench, GroupValues()
    asked = GroupPass(_input_moments, bench.runner.depth)
    for index, (block, sums) in enumerate(passes.run(asked)):
        assert block is not None
        for site, layout in _layouts(bench, index, block).items():
            moments = [of for key, of in sums.items() if isinstance(key, tuple) and key[0] == site]
            values = function(_together(torch.stack(moments)), _output_weight(layout, block))
            group_values[site] = values[layout.output.index.to(values.device)].mean(-1).cpu()
    return require_finite(group_values)


def _input_moments(bench: Measurer, numbers: Sequence[int]) -> Iterator[Step]:
    """Yield each block and, by (site, first of these groups), `_moments` of the inputs of output projections.

    Moments of other groups stand beside them: sums of squares around different means do not add up.
    """
    for block, inputs in _inputs_by_block(bench, numbers):
        yield block, {(site, numbers[0]): _moments(x) for site, x in inputs.items()}


def _moments(x: torch.Tensor) -> torch.Tensor:
    """Return n, mean, the sum of squares around it, mean of x² and of |x| of inputs x [tokens, inputs]: [5, inputs]."""
    n, mean = torch.full_like(x[0], len(x)), x.mean(0)
    return torch.stack((n, mean, (x - mean).square().sum(0), x.square().mean(0), x.abs().mean(0)))


def _together(moments: torch.Tensor) -> Inputs:
    """Return the statistics of all inputs from the `_moments` of their parts, [parts, 5, inputs]."""
    n, means, around, squares, sizes = moments.unbind(1)
    tokens = n.sum(0)
    mean = (n * means).sum(0) / tokens
    variance = (around + n * (means - mean).square()).sum(0) / (tokens - 1)
    square, absolute = ((n * of).sum(0) / tokens for of in (squares, sizes))
    return Inputs(int(tokens[0]), mean, variance, square, absolute)


@torch.inference_mode()
def groups_by_products(passes: Passes, function: ProductFunction) -> GroupValues:
    """Return function(XᵀX per token of the output projection's inputs X, its weight, channels of each group); one pass.

    Sites whose output projection is not one linear module, mixtures of experts, are left out.
    """
    bench, group_values = passes.bench, GroupValues()
    tokens = sum(group.tokens for group in bench.groups)
    for index, (block, sums) in enumerate(passes.run(GroupPass(_input_products, bench.runner.depth, heavy=True))):
        assert block is not None
        for site, layout in _layouts(bench, index, block).items():
            channels = layout.output.index.to(sums[site].device)
            group_values[site] = function(sums[site] / tokens, _output_weight(layout, block), channels).cpu()
    return require_finite(group_values)


def _input_products(bench: Measurer, numbers: Sequence[int]) -> Iterator[Step]:
    """Yield each block and, by site, XᵀX [inputs, inputs] of the inputs X of its output projection."""
    for block, inputs in _inputs_by_block(bench, numbers):
        yield block, {site: x.T @ x for site, x in inputs.items()}


def _inputs_by_block(
    bench: Measurer, numbers: Sequence[int]
) -> Iterator[tuple[nn.Module, dict[Site, torch.Tensor]]]:  # fmt: skip
    """Yield each block with the inputs [tokens, inputs] of its output projections, in float64; one pass."""
    runner, groups = bench.runner, [bench.groups[g] for g in numbers]
    streams = [runner.embed(group.ids) for group in groups]
    for index, block in enumerate(runner.blocks(range(runner.depth))):
        captured: dict[Site, list[torch.Tensor]] = {}
        handles = []
        for site, name in _outputs(bench, index, block).items():
            captured[site] = []
            handles.append(block.get_submodule(name).register_forward_pre_hook(_capture_into(captured[site])))
        try:
            streams = [runner.whole(index, block, x) for x in streams]
        finally:
            for handle in handles:
                handle.remove()
        inputs: dict[Site, torch.Tensor] = {}
        for site, found in captured.items():
            pairs = zip(found, groups, strict=True)
            inputs[site] = to_float64(torch.cat([g.tokens_of(x.reshape(*g.ids.shape, -1)) for x, g in pairs]))
        yield block, inputs
    bench.check_finite(streams, numbers)


@torch.inference_mode()
def groups_by_experts(passes: Passes, function: ExpertFunction) -> GroupValues:
    """Return for each expert the mean of function(gates, outputs) over the tokens that its router sends it.

    All groups of an expert have its value; it is 0 of an expert that no token meets. Sites without experts are left
    out. One pass, in which experts compute twice.
    """
    bench, group_values = passes.bench, GroupValues()
    asked = GroupPass(partial(_expert_sums, function=function), bench.runner.depth)
    for index, (block, sums) in enumerate(passes.run(asked)):
        assert block is not None
        for site, layout in channel_layouts(bench, index, block):
            if layout.experts > 1:
                values, counts = sums[site]
                each = values / counts.clamp(min=1)
                group_values[site] = each.repeat_interleave(layout.groups // layout.experts)
    return require_finite(group_values)


def _expert_sums(bench: Measurer, numbers: Sequence[int], function: ExpertFunction) -> Iterator[Step]:
    """Yield each block and, by site, the sums of the function's values and their numbers, [2, experts]."""
    runner, groups = bench.runner, [bench.groups[g] for g in numbers]
    streams = [runner.embed(group.ids) for group in groups]
    for index, block in enumerate(runner.blocks(range(runner.depth))):
        mixtures = [(site, layout) for site, layout in channel_layouts(bench, index, block) if layout.experts > 1]
        if not mixtures:
            streams = [runner.whole(index, block, x) for x in streams]
            yield block, {}
            continue
        ((site, layout),) = mixtures  # an attention has no experts
        module = block.get_submodule(layout.output.name.rpartition(".")[0])
        routed: list[tuple[torch.Tensor, ...]] = []
        handle = module.register_forward_pre_hook(lambda m, inputs, routed=routed: routed.append(inputs))
        try:
            streams = [runner.whole(index, block, x) for x in streams]
        finally:
            handle.remove()
        sums = torch.zeros(2, layout.experts, dtype=torch.float64)
        for inputs, group in zip(routed, groups, strict=True):
            x, chosen, gates = (group.tokens_of(each.reshape(*group.ids.shape, -1)) for each in inputs)
            pairs = chosen.reshape(-1, 1)
            outputs = module(x.repeat_interleave(chosen.shape[1], 0), pairs, torch.ones_like(gates.reshape(-1, 1)))
            values = function(to_float64(gates.flatten()), to_float64(outputs)).cpu()
            sums[0].index_add_(0, pairs[:, 0].cpu(), values.double())
            sums[1] += pairs[:, 0].cpu().bincount(minlength=layout.experts)
        yield block, {site: sums}
    bench.check_finite(streams, numbers)


def _capture_into(captured: list[torch.Tensor]) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def capture(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        captured.append(inputs[0])

    return capture


def require_finite(group_values: GroupValues) -> GroupValues:
    """Return the values. Raises ModelError if one is not finite."""
    for site, values in group_values.items():
        if not math.isfinite(float(values.sum())):
            raise ModelError(
                f"A score of the channel groups of {site} is NaN or infinite. Take another metric, or "
                f"compute with {option('dtype', 'float32')}."
            )
    return group_values


def standardised(group_values: GroupValues, *, within: bool = True) -> GroupValues:
    """Return the values less the mean, divided by the standard deviation; 0 where all are equal.

    Mean and deviation are those of the site, or without `within` those of all sites of its part.
    """
    scaled: GroupValues = {}
    for site, values in group_values.items():
        peers = values if within else torch.cat([v for s, v in group_values.items() if s.part == site.part])
        deviation = float(peers.std()) if len(peers) > 1 else 0.0
        scaled[site] = (values - peers.mean()) / deviation if deviation else torch.zeros_like(values)
    return scaled
