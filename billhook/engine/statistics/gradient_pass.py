"""Gradients of the negative log-likelihood by weights and by inputs of output projections, one block at a time.

A forward pass keeps the residual stream between all blocks. Then each block, from the last to the first, runs once
more with a graph, and backward. Memory: the model, those streams, and the gradients of one block; a model that is
larger than memory is read twice. The graph is built on stand-ins that share the teacher's tensors, so that neither its
parameters nor their `grad` and `requires_grad` change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from billhook.core.errors import ResourceError, option
from billhook.core.plan import Site
from billhook.core.problem import ScoredUnit
from billhook.core.results.measured import Score
from billhook.engine.bench import Measurer
from billhook.engine.blocks import BlockRunner
from billhook.engine.document_groups import DocumentGroup
from billhook.engine.head import Head
from billhook.engine.statistics.activation_passes import sums_over_parameters
from billhook.engine.statistics.group_pass import GroupPass, Passes, Step, Sums
from billhook.models import structure
from billhook.models.accelerator.spreading import copied
from billhook.models.device import to_float64

# (w, g, f), each [..., outputs, inputs] -> a number, or a value per element; f is None without `fisher`
GradientFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass(slots=True)
class _Batch:
    """Rows of equal length that pass a block together."""

    targets: torch.Tensor  # [predicted]: the next token of each position that has one
    places: torch.Tensor  # [predicted]: numbers of these positions, row after row
    streams: list[torch.Tensor]  # [rows, time, width] each: before the first block, the second …
    slope: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # of the loss by the last of `streams`

    @property
    def predicted(self) -> int:
        return len(self.places)

    def predicting(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values of the positions that predict a token: [predicted, ...] of [rows, time, ...]."""
        return values.flatten(0, 1).index_select(0, copied(self.places, values.device))


def sum_over_gradients(passes: Passes, function: GradientFunction, fisher: bool) -> dict[ScoredUnit, Score]:
    """Return the sum of function(w, g, f) over the weights of each site and block; see `Probe.sum_over_gradients`."""
    bench, sums = passes.bench, dict[int, dict[ScoredUnit, Score]]()
    for index, block, slopes, squares in gradients_by_block(passes, fisher):
        weights = dict(block.named_parameters())
        if fisher:
            sums[index] = sums_over_parameters(bench, index, block, function, weights, slopes, squares)
        else:
            sums[index] = sums_over_parameters(bench, index, block, lambda w, g: function(w, g, None), weights, slopes)
    return {unit: score for index in sorted(sums) for unit, score in sums[index].items()}


Gradients = dict[str, torch.Tensor]  # by parameter of a block, in float32


def gradients_by_block(passes: Passes, fisher: bool) -> Iterator[tuple[int, nn.Module, Gradients, Gradients]]:
    """Yield (index, block, gradients, mean squares of the gradients of rows if `fisher`), the last block first."""
    order = range(passes.bench.runner.depth)[::-1]
    run = partial(_gradient_sums, fisher=fisher)
    for index, (block, sums) in zip(order, passes.run(GroupPass(run, len(order), heavy=True)), strict=True):
        assert block is not None
        names = [name for name, _ in block.named_parameters()]
        squares = {name: sums["square", name] for name in names} if fisher else {}
        yield index, block, {name: sums["gradient", name] for name in names}, squares


@torch.inference_mode(False)  # what is computed inside that mode cannot have a graph
@torch.no_grad()
def _gradient_sums(bench: Measurer, numbers: Sequence[int], fisher: bool) -> Iterator[Step]:
    """Yield each block, the last one first, with the shares that these groups have in what `gradients_by_block` yields.

    Under ("gradient", name) and ("square", name), shaped like the parameter, in float32.
    """
    predicted = _predicted(bench.groups)
    for index, block, runner, batches in _backward(bench, numbers, copies=2 if fisher else 1):
        sums = _through_block(runner, index, block, batches, predicted, fisher=fisher)
        _count(bench, runner)
        yield block, sums


def _backward(
    bench: Measurer, numbers: Sequence[int], copies: int
) -> Iterator[tuple[int, nn.Module, BlockRunner, list[_Batch]]]:
    """Yield (index, block, its runner, the batches of these groups), the last block first.

    Whoever takes them moves each batch's `slope` to the stream before the block. `copies`: see `_check_room`.
    """
    groups = [bench.groups[g] for g in numbers]
    _check_room(bench, groups, copies)
    runner = BlockRunner(bench.teacher, bench.runner.chunk)  # the bench's own has recorded calls without graphs
    batches = _after_the_head(bench, runner, numbers, by_row=copies == 2)
    order = range(runner.depth)[::-1]
    for index, block in zip(order, runner.blocks(order), strict=True):
        yield index, block, runner, batches


@dataclass(frozen=True)
class InputSlopes:
    """Inputs x of an output projection, over the positions that predict a token: per channel [inputs], in float64.

    `mean` of x; `absolute`: the sum of |x|; `slopes`: the sum of |dL/dx|, L the negative log-likelihood summed over
    all predicted tokens, in nats.
    """

    tokens: int
    mean: torch.Tensor
    absolute: torch.Tensor
    slopes: torch.Tensor


Outputs = Callable[[Measurer, int, nn.Module], Mapping[Site, str]]  # of a block by its index: names of modules


def slopes_by_block(passes: Passes, outputs: Outputs) -> Iterator[tuple[nn.Module, dict[Site, InputSlopes]]]:
    """Yield each block, the last one first, with the inputs and slopes of the modules that `outputs` names in it."""
    tokens = _predicted(passes.bench.groups)
    run = partial(_slope_sums, outputs=outputs)
    for block, sums in passes.run(GroupPass(run, passes.bench.runner.depth)):
        assert block is not None
        yield block, {
            site: InputSlopes(tokens, total / tokens, size, slope)
            for site, (total, size, slope) in sums.items() if isinstance(site, Site)
        }  # fmt: skip


@torch.inference_mode(False)
@torch.no_grad()
def _slope_sums(bench: Measurer, numbers: Sequence[int], outputs: Outputs) -> Iterator[Step]:
    """Yield each block, the last one first, with the sums of `_through_inputs` over these groups."""
    for index, block, runner, batches in _backward(bench, numbers, copies=0):
        sums = _through_inputs(runner, index, block, batches, outputs(bench, index, block))
        _count(bench, runner)
        yield block, sums


def _count(bench: Measurer, runner: BlockRunner) -> None:
    """Count what another runner has computed for the bench."""
    bench.runner.computed += runner.computed
    runner.computed = 0


def _after_the_head(bench: Measurer, runner: BlockRunner, numbers: Sequence[int], *, by_row: bool) -> list[_Batch]:
    """Return the batches after a forward pass, each with the slope by the stream after the last block."""
    batches = _batches(runner, [bench.groups[g] for g in numbers], 1 if by_row else runner.chunk)
    order = range(runner.depth)
    for index, block in zip(order, runner.blocks(order), strict=True):
        for batch in batches:
            batch.streams.append(runner.whole(index, block, batch.streams[-1]))
    for batch in batches:
        batch.streams[-1] = batch.streams[-1].to(batch.targets.device)
    if not bool(torch.stack([batch.predicting(batch.streams[-1]).isfinite().all() for batch in batches]).all()):
        final = dict(bench.walk.run([(g, 0) for g in numbers], layers=True))
        bench.check_finite([final[g, 0] for g in numbers], numbers)
    _through_head(runner, batches)
    return batches


def _predicted(groups: Sequence[DocumentGroup]) -> int:
    """Return the number of positions that predict a token."""
    return int((torch.cat([group.targets for group in groups]) >= 0).sum())


def _check_room(bench: Measurer, groups: Sequence[DocumentGroup], copies: int) -> None:
    """Raise ResourceError if streams and `copies` of a block's gradients would not fit into the probe's memory."""
    config, blocks = bench.teacher.model.config, structure.blocks_of(bench.teacher.model, bench.teacher.architecture)
    tokens = sum(group.ids.numel() for group in groups)
    streams = (len(blocks) + 1) * tokens * int(config.hidden_size) * int(bench.teacher.model.dtype.itemsize)
    largest = 4 * max(sum(p.numel() for p in block.parameters()) for block in blocks)
    needed = streams + largest * copies
    if needed > bench.room:
        raise ResourceError(
            f"Gradients take {needed / 1e9:.2f} GB besides the model ({streams / 1e9:.2f} GB of streams between the "
            f"blocks), and there is room for {bench.room / 1e9:.2f} GB. Use fewer {option('tokens')}, or more "
            f"{option('memory')}."
        )


def _batches(runner: BlockRunner, groups: Sequence[DocumentGroup], tokens: int) -> list[_Batch]:
    """Return batches of at most so many tokens, but of at least one row, with the streams before the first block.

    The CPU waits for the device twice, however many there are: for how many positions predict a token, and which.
    """
    pairs = [*_rows(groups, tokens)]
    masks = [targets.flatten() >= 0 for _, targets in pairs]
    counts = torch.stack([mask.sum() for mask in masks]).tolist()
    first, batches = 0, []
    for (ids, targets), places in zip(pairs, torch.cat(masks).nonzero()[:, 0].split(counts), strict=True):
        own = places - first
        batches.append(_Batch(targets.flatten().index_select(0, own), own, [runner.embed(ids)]))
        first += targets.numel()
    return batches


def _rows(groups: Sequence[DocumentGroup], tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (ids, targets) [rows, time] of at most so many tokens, but of at least one row."""
    by_time: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for group in groups:
        targets = torch.full_like(group.ids, -100, device=group.targets.device)  # the head's
        targets.view(-1)[group.counted.to(targets.device)] = group.targets
        by_time.setdefault(group.ids.shape[1], []).append((group.ids, targets))
    for time, pairs in by_time.items():
        rows = max(1, tokens // time)
        ids, targets = (torch.cat(parts).split(rows) for parts in zip(*pairs, strict=True))
        yield from zip(ids, targets, strict=True)


def _through_head(runner: BlockRunner, batches: Sequence[_Batch]) -> None:
    """Set each batch's slope of the summed loss by the stream after the last block, through head and final norm."""
    hidden = [batch.predicting(runner.final_norm(batch.streams[-1])) for batch in batches]
    targets = torch.cat([batch.targets for batch in batches])
    slopes = Head(runner.teacher, "nll", 0).nll_gradients(torch.cat(hidden), targets)
    for batch, slope in zip(batches, slopes.split([len(h) for h in hidden]), strict=True):
        x = batch.streams.pop().detach().requires_grad_()
        with torch.enable_grad():
            read = batch.predicting(runner.final_norm(x))
        (batch.slope,) = torch.autograd.grad(read, x, slope)


def _through_block(
    runner: BlockRunner, index: int, block: nn.Module, batches: Sequence[_Batch], predicted: int, *, fisher: bool
) -> Sums:
    """Return the shares of the batches in the gradients of the mean loss by each parameter, in float32.

    If `fisher`, in the mean squares of the gradients of rows too. The loss is summed until the end, so that half
    precision has no tiny gradients to lose. Each batch's `slope` moves to the stream before the block. `predicted`:
    predicted tokens of the whole text.
    """
    stand_ins = {name: p.detach().requires_grad_() for name, p in block.named_parameters()}
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in stand_ins.items()}
    squares = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in stand_ins.items()} if fisher else {}
    share = 0.0  # of the batch at work, if it is one row: 1 / its predicted tokens / all predicted tokens

    def called(*args: Any, **kwargs: Any) -> Any:
        return functional_call(block, stand_ins, args, kwargs)

    def keep(name: str) -> Callable[[torch.Tensor], None]:
        def hook(weight: torch.Tensor) -> None:
            assert weight.grad is not None
            gradient = weight.grad.float()
            weight.grad = None
            total[name] += gradient
            if fisher:
                squares[name].addcmul_(gradient, gradient, value=share)

        return hook

    for name, weight in stand_ins.items():
        weight.register_post_accumulate_grad_hook(keep(name))
    for batch in batches:
        share = 1 / (max(1, batch.predicted) * predicted)
        x = batch.streams.pop().detach().requires_grad_()
        with torch.enable_grad():
            y = runner.whole(index, called, x)
        torch.autograd.backward(y, batch.slope.to(y.device))
        assert x.grad is not None
        batch.slope = x.grad
    for gradient in total.values():
        gradient /= predicted
    return {(kind, name): each[name] for kind, each in (("gradient", total), ("square", squares)) for name in each}


def _through_inputs(
    runner: BlockRunner, index: int, block: nn.Module, batches: Sequence[_Batch], outputs: Mapping[Site, str]
) -> Sums:
    """Return by site Σ x, Σ |x| and Σ |slope| [3, inputs] over the inputs x of the named modules, in float64.

    Each batch's `slope` moves to the stream before the block.
    """
    read: dict[Site, list[torch.Tensor]] = {site: [] for site in outputs}
    sums: Sums = {}
    handles = [
        block.get_submodule(name).register_forward_pre_hook(lambda m, inputs, of=read[site]: of.append(inputs[0]))
        for site, name in outputs.items()
    ]
    try:
        for batch in batches:
            x = batch.streams.pop().detach().requires_grad_()
            with torch.enable_grad():
                y = runner.whole(index, block, x)
            inputs = {site: pieces.pop() for site, pieces in read.items()}
            batch.slope, *slopes = torch.autograd.grad(y, [x, *inputs.values()], batch.slope.to(y.device))
            for (site, h), g in zip(inputs.items(), slopes, strict=True):
                h, g = (to_float64(batch.predicting(each.detach().reshape(*y.shape[:2], -1))) for each in (h, g))
                found = torch.stack((h.sum(0), h.abs().sum(0), g.abs().sum(0)))
                sums[site] = sums[site] + found if site in sums else found
    finally:
        for handle in handles:
            handle.remove()
    return sums
