"""Passes over a whole model that score its sites, blocks and spans of blocks.

Each pass reads every block once, so that a model larger than memory is read from its file once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice

import torch
from torch import nn

from billhook.core.errors import ModelError, ResourceError, option
from billhook.core.plan import PARTS, Part, Site
from billhook.core.problem import ScoredUnit
from billhook.core.results.measured import Score
from billhook.engine.bench import Measurer
from billhook.engine.blocks import KEPT, NEITHER, NO_ATTENTION, NO_MLP, BlockRunner, BlockState, Streams
from billhook.engine.document_groups import DocumentGroup
from billhook.engine.statistics.group_pass import GroupPass, Passes, Step, Sums
from billhook.models import structure
from billhook.models.device import to_float64

Statistic = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # two of [tokens, width] -> [tokens]
WeightFunction = Callable[[torch.Tensor], torch.Tensor]  # [..., outputs, inputs] -> a number
ELEMENTS_AT_A_TIME = 2**22  # of a weight, in float32


class DocumentSums:
    """Sums over tokens by document, so that their mean has a standard error.

    `document_of`: for each group, the document of each token (if `last`, of the last token of each row).
    """

    def __init__(self, groups: Sequence[DocumentGroup], last: bool = False) -> None:
        self.document_of: list[torch.Tensor] = []
        first = 0
        for group in groups:
            self.document_of.append(first + group.document_of[last_tokens(group) if last else slice(None)].cpu())
            first += len(group.documents)
        self._counts = to_float64(torch.cat(self.document_of).bincount(minlength=first))
        self._values: dict[ScoredUnit, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)

    def add(self, unit: ScoredUnit, documents: torch.Tensor, values: torch.Tensor) -> None:
        """Add the `values` [tokens] of a unit, given the documents of the tokens. They stay on their device."""
        self._values[unit].append((documents, values))

    def sums(self) -> Sums:
        """Return the sums [documents] of each unit. All values leave the device at once."""
        sizes = [len(values) for pairs in self._values.values() for _, values in pairs]
        if not sizes:
            return {}
        found = [values for pairs in self._values.values() for _, values in pairs]
        values = torch.cat([values.to(found[0].device) for values in found]).cpu()
        parts = iter(to_float64(values).split(sizes))
        sums: Sums = {unit: torch.zeros_like(self._counts) for unit in self._values}
        for unit, pairs in self._values.items():
            for documents, _ in pairs:
                sums[unit].index_add_(0, documents, next(parts))
        return sums

    def score(self, sums: torch.Tensor) -> Score:
        """Return the mean over all tokens from the sums [documents] of all document groups."""
        return Score.of(sums.tolist(), self._counts.tolist())


def require_finite_scores(scores: dict[ScoredUnit, Score]) -> dict[ScoredUnit, Score]:
    """Return `scores`. Raises ModelError if one is not finite."""
    for unit, score in scores.items():
        if not math.isfinite(score.value):
            name = unit if isinstance(unit, Site) else f"block {unit}"
            raise ModelError(
                f"The score of {name} is NaN or infinite: it divides by zero, or does not fit into the dtype. Take "
                f"another metric, or compute with {option('dtype', 'float32')}."
            )
    return scores


def last_tokens(group: DocumentGroup) -> torch.Tensor:
    """Return the index, among the counted tokens of a group, of the last one in each row: [rows], on the CPU."""
    rows = group.counted.cpu() // group.ids.shape[1]
    return torch.cat((rows[1:] != rows[:-1], torch.ones(1, dtype=torch.bool))).nonzero()[:, 0]


# -- before and after -----------------------------------------------------------------------------------------------


def mean_over_tokens(passes: Passes, statistics: Mapping[str, Statistic]) -> dict[str, dict[ScoredUnit, Score]]:
    """Return the mean over tokens of each statistic(x, y), x and y [tokens, width] in float32, before and after a unit.

    A statistic that divides by zero gives scores that are not finite; others of the same pass are not affected.
    """
    means, scores = DocumentSums(passes.bench.groups), {name: dict[ScoredUnit, Score]() for name in statistics}
    for key, sums in passes.sums(partial(_sums_over_tokens, statistics=statistics)).items():
        assert isinstance(key, tuple)
        scores[key[0]][key[1]] = means.score(sums)
    return scores


def _sums_over_tokens(bench: Measurer, numbers: Sequence[int], statistics: Mapping[str, Statistic]) -> Iterator[Step]:
    """Yield the sums [documents] of each statistic and unit."""
    means = {name: DocumentSums(bench.groups) for name in statistics}
    for _, unit, g, *pair in _before_and_after(bench, numbers):
        for name, statistic in statistics.items():
            means[name].add(unit, means[name].document_of[g], statistic(*pair))
    yield None, {(name, unit): sums for name, mean in means.items() for unit, sums in mean.sums().items()}


def _before_and_after(
    bench: Measurer, numbers: Sequence[int]
) -> Iterator[tuple[int, ScoredUnit, int, torch.Tensor, torch.Tensor]]:
    """Yield (index of the block, unit, number of the group, x, y) in order of the blocks; one pass.

    x and y: the streams before and after the unit, of the counted tokens of the group, [tokens, width] in float32.
    """
    runner, groups = bench.runner, bench.groups
    streams = [runner.embed(groups[g].ids) for g in numbers]
    wanted = {KEPT, NO_MLP, NO_ATTENTION} if runner.parallel else {KEPT, NO_MLP}
    for index, block in enumerate(runner.blocks(range(runner.depth))):
        streams = runner.fetch(index, streams)
        done = runner.step(index, block, [(x, wanted) for x in streams])
        for g, x, after in zip(numbers, streams, done, strict=True):
            for unit, before, then in _units(bench, index, x, after):
                yield index, unit, g, groups[g].tokens_of(before).float(), groups[g].tokens_of(then).float()
        streams = [after[KEPT] for after in done]
    bench.check_finite(streams, numbers)


@dataclass(slots=True)
class Covariances:
    """Covariances [width, width] in float64 of the streams before (x) and after (y) a unit, over all tokens.

    `xy` has a row for each channel of x and a column for each of y.
    """

    xx: torch.Tensor
    xy: torch.Tensor
    yy: torch.Tensor


def over_covariances(passes: Passes, function: Callable[[Covariances], float]) -> dict[ScoredUnit, Score]:
    """Return function(covariances of the streams before and after it) for each site and block; one pass."""
    tokens = sum(group.tokens for group in passes.bench.groups)
    scores: dict[ScoredUnit, Score] = {}
    for _, moments in passes.run(GroupPass(_moments, passes.bench.runner.depth, heavy=True)):
        units: list[ScoredUnit] = list(dict.fromkeys(key[1] for key in moments if isinstance(key, tuple)))
        for unit in units:
            x, y = moments["sums", unit] / tokens
            means = torch.stack([a[:, None] * b for a, b in ((x, x), (x, y), (y, y))])
            scores[unit] = Score(function(Covariances(*(moments["products", unit] / tokens - means))))
    return scores


def _moments(bench: Measurer, numbers: Sequence[int]) -> Iterator[Step]:
    """Yield after each block, by unit, the sums [2, width] of x and y and their products [3, width, width], float64."""
    for _, of_block in groupby(_before_and_after(bench, numbers), key=lambda each: each[0]):
        moments: Sums = {}
        for _, unit, _, x, y in of_block:
            x, y = to_float64(x), to_float64(y)
            if ("sums", unit) not in moments:
                moments["sums", unit] = x.new_zeros(2, x.shape[1])
                moments["products", unit] = x.new_zeros(3, x.shape[1], x.shape[1])
            moments["sums", unit] += torch.stack((x.sum(0), y.sum(0)))
            for product, (a, b) in zip(moments["products", unit], ((x, x), (x, y), (y, y)), strict=True):
                product.addmm_(a.T, b)
        yield None, moments


def _units(
    bench: Measurer, index: int, x: torch.Tensor, after: Streams
) -> Iterator[tuple[ScoredUnit, torch.Tensor, torch.Tensor]]:
    """Yield (site or block, stream before, stream after) for the units of one block."""
    position = bench.teacher.positions[index]
    attention, mlp = _alive(bench, index)
    if attention:
        yield Site(position, "attention"), x, after[NO_MLP]
    if mlp:
        parallel = bench.runner.parallel
        yield Site(position, "mlp"), x if parallel else after[NO_MLP], after[NO_ATTENTION if parallel else KEPT]
    yield position, x, after[KEPT]


def _alive(bench: Measurer, index: int) -> tuple[bool, bool]:
    """Return whether a block still has its attention, and its mlp."""
    position, present = bench.teacher.positions[index], bench.teacher.anatomy.sites_present()
    return Site(position, "attention") in present, Site(position, "mlp") in present


def mean_over_spans(passes: Passes, distance: Statistic, last: bool) -> dict[ScoredUnit, Score]:
    """Return the mean of distance(x, y), before and after each span of blocks, over all tokens or each row's last."""
    means = DocumentSums(passes.bench.groups, last)
    sums = passes.sums(partial(_sums_over_spans, distance=distance, last=last))
    return require_finite_scores(_scores(means, sums))


def _scores(means: DocumentSums, sums: Sums) -> dict[ScoredUnit, Score]:
    return {unit: means.score(values) for unit, values in sums.items() if isinstance(unit, Site | int | tuple)}


def _sums_over_spans(bench: Measurer, numbers: Sequence[int], distance: Statistic, last: bool) -> Iterator[Step]:
    """Yield the sums [documents] of each span."""
    runner, groups, positions = bench.runner, [bench.groups[g] for g in numbers], bench.teacher.positions
    means = DocumentSums(bench.groups, last)
    documents = torch.cat([means.document_of[g] for g in numbers])
    needed = 4 * (runner.depth + 1) * len(documents) * int(runner.model.config.hidden_size)
    if not last and needed > bench.room:
        raise ResourceError(
            f"The streams between all blocks take {needed / 1e9:.2f} GB for {len(documents):,} tokens, and there is "
            f"room for {bench.room / 1e9:.2f} GB. Use fewer {option('tokens')}, more {option('memory')}, or the last "
            "tokens of rows only."
        )

    place = bench.teacher.device  # where all streams are compared
    lasts = [last_tokens(group).to(place) for group in groups] if last else []

    def picked(streams: list[torch.Tensor]) -> torch.Tensor:
        counted = [group.tokens_of(x).to(place) for x, group in zip(streams, groups, strict=True)]
        if last:
            counted = [x.index_select(0, at) for x, at in zip(counted, lasts, strict=True)]
        return torch.cat(counted).float()

    streams = [runner.embed(group.ids) for group in groups]
    kept = [picked(streams)]  # of each depth: [tokens, width]
    for index, block in enumerate(runner.blocks(range(runner.depth))):
        streams = [after[KEPT] for after in runner.step(index, block, [(x, {KEPT}) for x in streams])]
        kept.append(picked(streams))
    bench.check_finite(streams, numbers)
    for start in range(runner.depth):
        for end in range(start + 1, min(runner.depth, start + runner.depth - 1) + 1):  # not all blocks at once
            means.add((positions[start], positions[end - 1]), documents, distance(kept[start], kept[end]))
    yield None, means.sums()


# -- at the next MLP ------------------------------------------------------------------------------------------------


def mean_at_next_mlp(passes: Passes, error: Statistic) -> dict[ScoredUnit, Score]:
    """Return the mean over tokens of error(f, g): what the next MLP adds, with and without a unit.

    After the last MLP, f and g are the streams after the last block. An MLP that adds nothing to any token is skipped.
    """
    bench = passes.bench
    run = partial(_sums_at_next_mlp, error=error)
    sums = passes.sums(run)
    adding, parts = sums[ADDS]
    if bool(((adding > 0) & (adding < parts)).any()):  # an MLP is skipped in some parts of the text only
        sums = Passes(bench).sums(run)
    order: list[ScoredUnit] = [*bench.teacher.anatomy.sites_present(), *bench.teacher.positions]
    scores = require_finite_scores(_scores(DocumentSums(bench.groups), sums))
    return {unit: scores[unit] for unit in order}


ADDS = "adds"  # [2, blocks]: in how many parts of the text the MLP of a block adds something, and how many there are


def _sums_at_next_mlp(bench: Measurer, numbers: Sequence[int], error: Statistic) -> Iterator[Step]:
    """Yield the sums [documents] of each unit, and `ADDS`, where these groups are one part of the text."""
    runner, groups = bench.runner, [bench.groups[g] for g in numbers]
    means, adding = DocumentSums(bench.groups), torch.zeros(bench.runner.depth)
    documents = [means.document_of[g] for g in numbers]
    streams = [runner.embed(group.ids) for group in groups]
    waiting: list[tuple[list[ScoredUnit], list[torch.Tensor]]] = []  # units, and the streams without any one of them

    def add_errors(units: list[ScoredUnit], with_unit: list[torch.Tensor], without: list[torch.Tensor]) -> None:
        for g, (f, other) in enumerate(zip(with_unit, without, strict=True)):
            values = error(groups[g].tokens_of(f).float(), groups[g].tokens_of(other).float())
            for unit in units:
                means.add(unit, documents[g], values)

    for index, block in enumerate(runner.blocks(range(runner.depth))):
        streams = runner.fetch(index, streams)
        done = runner.step(index, block, [(x, {KEPT, NO_ATTENTION, NO_MLP, NEITHER}) for x in streams])
        added = _added(runner, streams, done)
        adds = bool(torch.stack([group.tokens_of(f).any() for f, group in zip(added, groups, strict=True)]).any())
        adding[index] = adds
        wanted = {KEPT} if not adds else {NO_ATTENTION} if runner.parallel else {KEPT, NO_MLP}
        still_waiting = []
        for units, others in waiting:
            others = runner.fetch(index, others)
            after = runner.step(index, block, [(x, wanted) for x in others])
            if adds:
                add_errors(units, added, _added(runner, others, after))
            else:
                still_waiting.append((units, [variants[KEPT] for variants in after]))
        waiting = still_waiting
        for variant, units in _removals(bench, index):
            without = [variants[variant] for variants in done]
            if variant == NO_ATTENTION and adds and not runner.parallel:  # the MLP of the same block is the next one
                add_errors(units, added, [y - x for x, y in zip(streams, without, strict=True)])
            else:
                waiting.append((units, without))
        streams = [variants[KEPT] for variants in done]
    bench.check_finite(streams, numbers)
    for units, others in waiting:
        add_errors(units, streams, others)
    yield None, {ADDS: torch.stack((adding, torch.ones_like(adding)))} | means.sums()


def _added(runner: BlockRunner, before: list[torch.Tensor], after: list[Streams]) -> list[torch.Tensor]:
    """Return what the MLP of a block adds to each stream, as exactly as the dtype of the stream holds it."""
    if runner.parallel:
        return [y[NO_ATTENTION] - x for x, y in zip(before, after, strict=True)]
    return [y[KEPT] - y[NO_MLP] for y in after]


def _removals(bench: Measurer, index: int) -> Iterable[tuple[BlockState, list[ScoredUnit]]]:
    """Return pairs (state of a block, the sites or block whose removal leaves it)."""
    position = bench.teacher.positions[index]
    attention, mlp = _alive(bench, index)
    units: dict[BlockState, list[ScoredUnit]] = defaultdict(list)
    if attention:
        units[NO_ATTENTION if mlp else NEITHER].append(Site(position, "attention"))
    if mlp:
        units[NO_MLP if attention else NEITHER].append(Site(position, "mlp"))
    units[NEITHER].append(position)
    return units.items()


# -- weights --------------------------------------------------------------------------------------------------------


def sum_over_weights(bench: Measurer, function: WeightFunction) -> dict[ScoredUnit, Score]:
    """Return the sum of function(w) over the weights of each site and block, w [..., outputs, inputs] in float32."""
    scores: dict[ScoredUnit, Score] = {}
    for index, block in enumerate(bench.runner.blocks(range(bench.runner.depth))):
        scores |= sums_over_parameters(bench, index, block, function, dict(block.named_parameters()))
    return scores


def sums_over_parameters(
    bench: Measurer, index: int, block: nn.Module, function: Callable[..., torch.Tensor],
    *values: Mapping[str, torch.Tensor],
) -> dict[ScoredUnit, Score]:  # fmt: skip
    """Return the sum of function(…) over the parameters of one block, for its sites and for the block.

    `values` are shaped like the parameters; `function` gets pieces of them, [..., outputs, inputs] in float32.
    Raises ModelError where a sum is not finite.
    """
    owners = structure.parameter_owners(block, bench.teacher.architecture, bench.teacher.model.config)
    total: dict[Part | None, list[torch.Tensor]] = defaultdict(list)
    for name, owner in owners.items():
        shaped = [structure.as_outputs_by_inputs(block, name, value[name].detach()) for value in values]
        rows = max(1, ELEMENTS_AT_A_TIME * len(shaped[0]) // max(1, shaped[0].numel()))
        for pieces in zip(*(value.split(rows) for value in shaped), strict=True):
            total[owner].append(torch.as_tensor(function(*(piece.float() for piece in pieces))))
    found = [each.reshape(1) for owned in total.values() for each in owned]
    numbers = torch.cat([each.to(found[0].device) for each in found]).tolist() if found else []  # one wait
    left = iter(numbers)
    sums = {owner: math.fsum(islice(left, len(owned))) for owner, owned in total.items()}
    position = bench.teacher.positions[index]
    scores: dict[ScoredUnit, Score] = {}
    for part, present in zip(PARTS, _alive(bench, index), strict=True):
        if present:
            scores[Site(position, part)] = Score(sums.get(part, 0.0))
    scores[position] = Score(math.fsum(numbers))
    return require_finite_scores(scores)
