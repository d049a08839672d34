"""Passes over a whole model that score its sites, its blocks and the spans of its blocks.

Each reads every block once, whatever it computes, so that a model larger than memory is read from the file once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from billhook.core.errors import ModelError, ResourceError, option
from billhook.core.plan import PARTS, Part, Site
from billhook.core.problem import ScoredUnit
from billhook.core.results.measured import Score
from billhook.engine.bench import Measurer
from billhook.engine.blocks import KEPT, NEITHER, NO_ATTENTION, NO_MLP, BlockRunner
from billhook.engine.document_groups import DocumentGroup
from billhook.models import structure
from billhook.models.device import to_float64

Statistic = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # two of [tokens, width] -> [tokens]
OfWeight = Callable[[torch.Tensor], torch.Tensor]  # [..., outputs, inputs] -> a number
ELEMENTS_AT_A_TIME = 2**22  # of a weight, in float32


class DocumentMeans:
    """Sums over tokens, document by document, so that their mean has a standard error.

    `of`: of each group, the document of each of its tokens (if `last`, of the last token of each of its rows).
    """

    def __init__(self, groups: Sequence[DocumentGroup], last: bool = False) -> None:
        self.of: list[torch.Tensor] = []
        first = 0
        for group in groups:
            self.of.append(first + group.of[last_tokens(group) if last else slice(None)].cpu())
            first += len(group.documents)
        self._counts = to_float64(torch.cat(self.of).bincount(minlength=first))
        self._sums: dict[ScoredUnit, torch.Tensor] = defaultdict(lambda: torch.zeros_like(self._counts))

    def add(self, unit: ScoredUnit, documents: torch.Tensor, values: torch.Tensor) -> None:
        """`values` [tokens] of a unit, and the documents of the tokens."""
        self._sums[unit].index_add_(0, documents, to_float64(values.cpu()))

    def scores(self) -> dict[ScoredUnit, Score]:
        """The means."""
        return {unit: Score.of(sums.tolist(), self._counts.tolist()) for unit, sums in self._sums.items()}


def require_finite_scores(scores: dict[ScoredUnit, Score]) -> dict[ScoredUnit, Score]:
    """`scores` themselves. Raises ModelError if one is not finite."""
    for unit, score in scores.items():
        if not math.isfinite(score.value):
            name = unit if isinstance(unit, Site) else f"block {unit}"
            raise ModelError(
                f"The score of {name} is NaN or infinite: it divides by zero, or does not fit into the dtype. Take "
                f"another metric, or compute with {option('dtype', 'float32')}."
            )
    return scores


def last_tokens(group: DocumentGroup) -> torch.Tensor:
    """Where, among the tokens of a group that count, the last one of each row is: [rows]."""
    return group.counted.sum(1).cumsum(0) - 1


# -- before and after -----------------------------------------------------------------------------------------------


def mean_over_tokens(bench: Measurer, statistics: Mapping[str, Statistic]) -> dict[str, dict[ScoredUnit, Score]]:
    """Mean over tokens of each statistic(x, y), x and y [tokens, width] in float32, before and after each unit.

    A statistic that divides by zero gives scores that are not finite; others of the same pass are not spoilt.
    """
    trunk, groups = bench.runner, bench.groups
    means = {name: DocumentMeans(groups) for name in statistics}
    streams = [trunk.embed(group.ids) for group in groups]
    wanted = {KEPT, NO_MLP, NO_ATTENTION} if trunk.parallel else {KEPT, NO_MLP}
    for index, block in enumerate(trunk.blocks(range(trunk.depth))):
        done = trunk.step(index, block, [(x, wanted) for x in streams])
        for g, (x, after) in enumerate(zip(streams, done, strict=True)):
            for unit, before, then in _units(bench, index, x, after):
                pair = before[groups[g].counted].float(), then[groups[g].counted].float()
                for name, statistic in statistics.items():
                    means[name].add(unit, means[name].of[g], statistic(*pair))
        streams = [after[KEPT] for after in done]
    bench.check_finite(streams)
    return {name: found.scores() for name, found in means.items()}


def _units(
    bench: Measurer, index: int, x: torch.Tensor, after: dict[int, torch.Tensor]
) -> Iterator[tuple[ScoredUnit, torch.Tensor, torch.Tensor]]:
    """(site or block, stream before, stream after) of one block."""
    position = bench.teacher.positions[index]
    attention, mlp = _alive(bench, index)
    if attention:
        yield Site(position, "attention"), x, after[NO_MLP]
    if mlp:
        parallel = bench.runner.parallel
        yield Site(position, "mlp"), x if parallel else after[NO_MLP], after[NO_ATTENTION if parallel else KEPT]
    yield position, x, after[KEPT]


def _alive(bench: Measurer, index: int) -> tuple[bool, bool]:
    """Whether a block still has its attention, and its mlp."""
    position, alive = bench.teacher.positions[index], bench.teacher.anatomy.sites_present()
    return Site(position, "attention") in alive, Site(position, "mlp") in alive


def mean_over_spans(bench: Measurer, distance: Statistic, last: bool) -> dict[ScoredUnit, Score]:
    """Mean of distance(x, y), before and after every span of blocks, over all tokens or the last one of each row."""
    trunk, groups, positions = bench.runner, bench.groups, bench.teacher.positions
    means = DocumentMeans(groups, last)
    of = torch.cat(means.of)
    needed = 4 * (trunk.depth + 1) * len(of) * int(trunk.model.config.hidden_size)
    if not last and needed > bench.room:
        raise ResourceError(
            f"The streams between all blocks take {needed / 1e9:.2f} GB for {len(of):,} tokens, and there is room for "
            f"{bench.room / 1e9:.2f} GB. Use fewer {option('tokens')}, more {option('memory')}, or the last tokens "
            "of rows only."
        )

    def picked(streams: list[torch.Tensor]) -> torch.Tensor:
        some = [x[group.counted] for x, group in zip(streams, groups, strict=True)]
        some = [x[last_tokens(group)] for x, group in zip(some, groups, strict=True)] if last else some
        return torch.cat(some).float().cpu()

    streams = [trunk.embed(group.ids) for group in groups]
    kept = [picked(streams)]  # of each depth: [tokens, width]
    for index, block in enumerate(trunk.blocks(range(trunk.depth))):
        streams = [after[KEPT] for after in trunk.step(index, block, [(x, {KEPT}) for x in streams])]
        kept.append(picked(streams))
    bench.check_finite(streams)
    for start in range(trunk.depth):
        for end in range(start + 1, min(trunk.depth, start + trunk.depth - 1) + 1):  # not all blocks at once
            means.add((positions[start], positions[end - 1]), of, distance(kept[start], kept[end]))
    return require_finite_scores(means.scores())


# -- at the next MLP ------------------------------------------------------------------------------------------------


def mean_at_next_mlp(bench: Measurer, error: Statistic) -> dict[ScoredUnit, Score]:
    """Mean over tokens of error(f, g): what the next MLP adds, with and without a unit; behind the last, the end.

    An MLP that adds nothing at all, to no token, is passed over as if it were gone.
    """
    trunk, groups = bench.runner, bench.groups
    means = DocumentMeans(groups)
    streams = [trunk.embed(group.ids) for group in groups]
    waiting: list[tuple[list[ScoredUnit], list[torch.Tensor]]] = []  # units, and the streams without any one of them

    def judge(units: list[ScoredUnit], with_it: list[torch.Tensor], without: list[torch.Tensor]) -> None:
        for g, (f, other) in enumerate(zip(with_it, without, strict=True)):
            values = error(f[groups[g].counted].float(), other[groups[g].counted].float())
            for unit in units:
                means.add(unit, means.of[g], values)

    for index, block in enumerate(trunk.blocks(range(trunk.depth))):
        done = trunk.step(index, block, [(x, {KEPT, NO_ATTENTION, NO_MLP, NEITHER}) for x in streams])
        added = _added(trunk, streams, done)
        adds = any(bool(f[group.counted].any()) for f, group in zip(added, groups, strict=True))
        wanted = {KEPT} if not adds else {NO_ATTENTION} if trunk.parallel else {KEPT, NO_MLP}
        passed = []
        for units, others in waiting:
            after = trunk.step(index, block, [(x, wanted) for x in others])
            if adds:
                judge(units, added, _added(trunk, others, after))
            else:
                passed.append((units, [each[KEPT] for each in after]))
        waiting = passed
        for variant, units in _removals(bench, index):
            without = [each[variant] for each in done]
            if variant == NO_ATTENTION and adds and not trunk.parallel:  # its own block's MLP is the next one
                judge(units, added, [y - x for x, y in zip(streams, without, strict=True)])
            else:
                waiting.append((units, without))
        streams = [each[KEPT] for each in done]
    bench.check_finite(streams)
    for units, others in waiting:
        judge(units, streams, others)
    order: list[ScoredUnit] = [*bench.teacher.anatomy.sites_present(), *bench.teacher.positions]
    found = require_finite_scores(means.scores())
    return {unit: found[unit] for unit in order}


def _added(trunk: BlockRunner, before: list[torch.Tensor], after: list[dict[int, torch.Tensor]]) -> list[torch.Tensor]:
    """What the MLP of a block adds to each stream, as exactly as the dtype of the stream holds it."""
    if trunk.parallel:
        return [y[NO_ATTENTION] - x for x, y in zip(before, after, strict=True)]
    return [y[KEPT] - y[NO_MLP] for y in after]


def _removals(bench: Measurer, index: int) -> Iterable[tuple[int, list[ScoredUnit]]]:
    """(what is left of a block, the sites or block whose removal leaves it)."""
    position = bench.teacher.positions[index]
    attention, mlp = _alive(bench, index)
    left: dict[int, list[ScoredUnit]] = defaultdict(list)
    if attention:
        left[NO_ATTENTION if mlp else NEITHER].append(Site(position, "attention"))
    if mlp:
        left[NO_MLP if attention else NEITHER].append(Site(position, "mlp"))
    left[NEITHER].append(position)
    return left.items()


# -- weights --------------------------------------------------------------------------------------------------------


def sum_over_weights(bench: Measurer, function: OfWeight) -> dict[ScoredUnit, Score]:
    """Sum of function(w) over the weights of every site and block, w [..., outputs, inputs] in float32."""
    found: dict[ScoredUnit, Score] = {}
    for index, block in enumerate(bench.runner.blocks(range(bench.runner.depth))):
        found |= sums_over_parameters(bench, index, block, function, dict(block.named_parameters()))
    return found


def sums_over_parameters(
    bench: Measurer,
    index: int,
    block: nn.Module,
    function: Callable[..., torch.Tensor],
    *values: Mapping[str, torch.Tensor],
) -> dict[ScoredUnit, Score]:
    """Sum of function(…) over the parameters of one block, for its sites and itself.

    `values` are shaped like the parameters; function is given pieces of them, [..., outputs, inputs] in float32.
    Raises ModelError where a sum is not finite.
    """
    owners = structure.parameter_owners(block, bench.teacher.architecture, bench.teacher.model.config)
    total: dict[Part | None, list[float]] = defaultdict(list)
    for name, owner in owners.items():
        shaped = [structure.as_outputs_by_inputs(block, name, value[name].detach()) for value in values]
        rows = max(1, ELEMENTS_AT_A_TIME * len(shaped[0]) // max(1, shaped[0].numel()))
        for pieces in zip(*(value.split(rows) for value in shaped), strict=True):
            total[owner].append(float(function(*(piece.float() for piece in pieces))))
    position = bench.teacher.positions[index]
    found: dict[ScoredUnit, Score] = {}
    for part, alive in zip(PARTS, _alive(bench, index), strict=True):
        if alive:
            found[Site(position, part)] = Score(math.fsum(total[part]))
    found[position] = Score(math.fsum(x for some in total.values() for x in some))
    return require_finite_scores(found)
