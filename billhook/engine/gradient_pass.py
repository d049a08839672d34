"""Gradients of the negative log-likelihood by weights and by inputs of output projections, one block at a time.

A forward pass keeps the residual stream between all blocks. Then each block, from the last to the first, runs once
more with a graph, and backward. Memory: the model, those streams, and the gradients of one block; a model that is
larger than memory is read twice. The graph is built on stand-ins that share the teacher's tensors, so that neither its
parameters nor their `grad` and `requires_grad` change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from billhook.core.errors import ResourceError, option
from billhook.core.plan import Site
from billhook.core.problem import ScoredUnit
from billhook.core.results.measured import Score
from billhook.engine.activation_passes import sums_over_parameters
from billhook.engine.bench import Measurer
from billhook.engine.blocks import BlockRunner
from billhook.engine.document_groups import DocumentGroup
from billhook.engine.head import Head
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


def sum_over_gradients(bench: Measurer, function: GradientFunction, fisher: bool) -> dict[ScoredUnit, Score]:
    """Return the sum of function(w, g, f) over the weights of each site and block; see `Probe.sum_over_gradients`."""
    sums: dict[int, dict[ScoredUnit, Score]] = {}
    for index, block, slopes, squares in gradients_by_block(bench, fisher):
        weights = dict(block.named_parameters())
        if fisher:
            sums[index] = sums_over_parameters(bench, index, block, function, weights, slopes, squares)
        else:
            sums[index] = sums_over_parameters(bench, index, block, lambda w, g: function(w, g, None), weights, slopes)
    return {unit: score for index in sorted(sums) for unit, score in sums[index].items()}


Gradients = dict[str, torch.Tensor]  # by parameter of a block, in float32


@torch.inference_mode(False)  # what is computed inside that mode cannot have a graph
@torch.no_grad()
def gradients_by_block(bench: Measurer, fisher: bool) -> Iterator[tuple[int, nn.Module, Gradients, Gradients]]:
    """Yield (index, block, gradients, mean squares of the gradients of rows if `fisher`), the last block first."""
    _check_room(bench, 2 if fisher else 1)
    runner, batches = _after_the_head(bench, by_row=fisher)
    order = range(runner.depth)[::-1]
    for index, block in zip(order, runner.blocks(order), strict=True):
        yield index, block, *_through_block(runner, index, block, batches, fisher)


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


@torch.inference_mode(False)
@torch.no_grad()
def slopes_by_block(
    bench: Measurer, outputs: Callable[[int, nn.Module], Mapping[Site, str]]
) -> Iterator[tuple[nn.Module, dict[Site, InputSlopes]]]:
    """Yield each block, the last one first, with the inputs and slopes of the modules that `outputs` names in it."""
    _check_room(bench, 0)
    runner, batches = _after_the_head(bench, by_row=False)
    order = range(runner.depth)[::-1]
    for index, block in zip(order, runner.blocks(order), strict=True):
        yield block, _through_inputs(runner, index, block, batches, outputs(index, block))


def _after_the_head(bench: Measurer, *, by_row: bool) -> tuple[BlockRunner, list[_Batch]]:
    """Return a runner and the batches after a forward pass, each with the slope by the stream after the last block."""
    runner = BlockRunner(bench.teacher, bench.runner.chunk)  # the bench's own has recorded calls without graphs
    batches = _batches(runner, bench.groups, 1 if by_row else runner.chunk)
    order = range(runner.depth)
    for index, block in zip(order, runner.blocks(order), strict=True):
        for batch in batches:
            batch.streams.append(runner.call(index, block, batch.streams[-1]))
    for batch in batches:
        batch.streams[-1] = batch.streams[-1].to(batch.targets.device)
    if not bool(torch.stack([batch.predicting(batch.streams[-1]).isfinite().all() for batch in batches]).all()):
        final = dict(bench.walk.run([(g, 0) for g in range(len(bench.groups))], layers=True))
        bench.check_finite([final[g, 0] for g in range(len(bench.groups))])
    _through_head(runner, batches)
    return runner, batches


def _check_room(bench: Measurer, copies: int) -> None:
    """Raise ResourceError if streams and `copies` of a block's gradients would not fit into the probe's memory."""
    config, blocks = bench.teacher.model.config, structure.blocks_of(bench.teacher.model, bench.teacher.architecture)
    tokens = sum(group.ids.numel() for group in bench.groups)
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
    runner: BlockRunner, index: int, block: nn.Module, batches: Sequence[_Batch], fisher: bool
) -> tuple[Gradients, Gradients]:
    """Return gradients of the mean loss by each parameter, and their mean squares over rows if `fisher`, in float32.

    The loss is summed until the end, so that half precision has no tiny gradients to lose. Each batch's `slope` moves
    to the stream before the block.
    """
    predicted = sum(batch.predicted for batch in batches)
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in block.named_parameters()}
    squares = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in block.named_parameters()} if fisher else {}
    stand_ins = {name: p.detach().requires_grad_() for name, p in block.named_parameters()}
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
            y = runner.call(index, called, x)
        torch.autograd.backward(y, batch.slope.to(y.device))
        assert x.grad is not None
        batch.slope = x.grad
    for gradient in total.values():
        gradient /= predicted
    return total, squares


def _through_inputs(
    runner: BlockRunner, index: int, block: nn.Module, batches: Sequence[_Batch], outputs: Mapping[Site, str]
) -> dict[Site, InputSlopes]:
    """Return sums over the inputs of the named modules. Each batch's `slope` moves to the stream before the block."""
    read: dict[Site, list[torch.Tensor]] = {site: [] for site in outputs}
    sums: dict[Site, torch.Tensor] = {}
    handles = [
        block.get_submodule(name).register_forward_pre_hook(lambda m, inputs, of=read[site]: of.append(inputs[0]))
        for site, name in outputs.items()
    ]
    try:
        for batch in batches:
            x = batch.streams.pop().detach().requires_grad_()
            with torch.enable_grad():
                y = runner.call(index, block, x)
            inputs = {site: pieces.pop() for site, pieces in read.items()}
            batch.slope, *slopes = torch.autograd.grad(y, [x, *inputs.values()], batch.slope.to(y.device))
            for (site, h), g in zip(inputs.items(), slopes, strict=True):
                h, g = (to_float64(batch.predicting(each.detach().reshape(*y.shape[:2], -1))) for each in (h, g))
                found = torch.stack((h.sum(0), h.abs().sum(0), g.abs().sum(0)))
                sums[site] = sums[site] + found if site in sums else found
    finally:
        for handle in handles:
            handle.remove()
    tokens = sum(batch.predicted for batch in batches)
    return {site: InputSlopes(tokens, total / tokens, size, slope) for site, (total, size, slope) in sums.items()}
