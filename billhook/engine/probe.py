"""The measuring engine: losses of many plans at once, at the least cost.

Plans are walked as a prefix trie over the model's own blocks (`prefix_trie`, `blocks`). Their losses need no logits of
the whole set (`head`). Where only the best plans are needed, others are dropped once excluded (`racing`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import and_

import torch

from billhook.core.plan import Plan
from billhook.core.problem import ScoredUnit
from billhook.core.results.measured import Loss, Score, WorkPlan
from billhook.data.token_sets import TokenSet, token_set
from billhook.engine.bench import Measurer
from billhook.engine.blocks import BlockRunner
from billhook.engine.choice_rows import row_sums
from billhook.engine.losses import loss_facts
from billhook.engine.measurements import Cache, CacheFactory, EarlierRounds, PieceTable, no_cache
from billhook.engine.racing import Decision, Selection, SelectionTask, measure_all, measure_best, race, tolerance_of
from billhook.engine.screening import ScreenedCache, ScreenedMeasurer, join
from billhook.engine.statistics import activation_passes, channel_statistics, gradient_pass
from billhook.engine.statistics.channel_statistics import GroupValues
from billhook.engine.statistics.group_pass import Passes
from billhook.engine.statistics.shared_passes import SharedPasses
from billhook.engine.workers.division import ALONE
from billhook.engine.workers.shared import SharedMeasurer
from billhook.engine.workers.team import Team
from billhook.models.accelerator.bfloat16 import bfloat16_copy
from billhook.models.load import Teacher, undisturbed
from billhook.models.repair import Repair


@dataclass(frozen=True, slots=True)
class RacingOptions:
    """Racing: `shortlist` plans in each round, by the ranking of earlier rounds; `risk`: see `racing.race`."""

    shortlist: int = 12
    risk: float = 0.05


class Probe:
    """Probe of one teacher on one token set under one loss: it measures plans and caches what helps the next plans.

    - `memory`: bytes for weights and activations together (None: half of what the machine has free).
    - `fast`: racing, for requests that need only the best.
    - `walk`: `layers` or `depth-first`, instead of choosing it by memory.
    - `cache_factory`: where measurements are cached.
    - `repaired`: a plan to measure under a repair of its blocks; only without a cache.
    - `team`: workers that share the losses of plans without a repair, and statistics.
    - `bfloat16`: bounds and samples, which only exclude plans, are computed in it where that is faster.

    While it measures, it swaps modules of the teacher's model and holds the teacher's lock.
    """

    def __init__(
        self, teacher: Teacher, tokens: TokenSet, loss: str, *, memory: int | None = None,
        fast: RacingOptions | None = None, walk: str | None = None, cache_factory: CacheFactory = no_cache,
        repaired: tuple[Plan, Repair] | None = None, team: Team | None = None, bfloat16: bool = False,
    ) -> None:  # fmt: skip
        self.teacher, self.tokens, self.loss, self.fast, self.memory = teacher, tokens, loss, fast, memory
        self._cache_factory, self._team, self._bfloat16 = cache_factory, team, bfloat16
        self._division = division = ALONE if team is None else team.division
        self._measurer = Measurer(teacher, tokens, loss, memory=memory, walk=walk, repaired=repaired, division=division)
        self._bench: Measurer | SharedMeasurer | ScreenedMeasurer = self._measurer  # what measures pieces
        self._passes = Passes(self._measurer)
        self._runners: list[BlockRunner | SharedMeasurer] = [self._measurer.runner]  # their work is this probe's
        self._others: list[Probe] = []  # theirs too
        if team is not None:
            self._bench = SharedMeasurer(self._measurer, tokens, loss, memory, team)
            self._passes = SharedPasses(self._measurer, self._bench, team)
            self._runners.append(self._bench)
        self._bfloat16_copy: Teacher | None = None  # the teacher itself where no copy is faster
        self._earlier = EarlierRounds()
        self._means: dict[str, tuple[activation_passes.Statistic, dict[ScoredUnit, Score]]] = {}
        self.tally: list[Counter[str]] = []  # of each batch: how many plans by kind of decision

    @property
    def layout(self) -> WorkPlan:
        """Arrangement of the last batch in memory."""
        return self._measurer.layout

    def arrange(self, plans: int) -> WorkPlan:
        """Return the arrangement of a batch of so many plans."""
        return self._measurer.arrange(plans)

    @property
    def site_evaluations(self) -> float:
        """Sites computed so far, one over the whole token set counting as 1; those of probes beside it too."""
        return self._computed() / sum(group.ids.numel() for group in self._measurer.groups)

    def _computed(self) -> int:
        return sum(runner.computed for runner in self._runners) + sum(probe._computed() for probe in self._others)

    def losses(self, plans: Sequence[Plan], best: int | None = None) -> list[Loss]:
        """Return the loss of each plan in the given order; with `best=k` all but the k lowest may be bounds.

        Raises ModelError, naming the block, if activations are not finite.
        """
        by_plan = dict(self.iter_losses(plans, best))
        return [by_plan[plan] for plan in plans]

    @torch.inference_mode()
    def iter_losses(
        self, plans: Sequence[Plan], best: int | None = None, *, expected: Sequence[float] | None = None,
        ceiling: Sequence[float] | None = None, on_progress: Callable[[int], None] = lambda done: None,
        estimate: bool = False,
    ) -> Iterator[tuple[Plan, Loss]]:  # fmt: skip
        """Yield (plan, loss) as soon as it is decided.

        - `expected`: the expected loss or rise of each plan, lower = better; racing begins with the lowest.
        - `ceiling`: nats of each document; a plan with a larger total is not needed.
        - `on_progress`: called with the number of plans' worth of work that is done.
        - `estimate`: only how plans compare is needed: all are measured as lower bounds, where such are cheaper.
        """
        expected_of = dict(zip(plans, expected, strict=True)) if expected is not None else {}
        plans = list(dict.fromkeys(plans))
        if not plans:
            return
        if estimate or ceiling is not None or (best is not None and best < len(plans)):
            self._screen()
        cache = self._cache()
        groups, masks = self._measurer.groups, self._bench.masks(plans)
        base = reduce(and_, masks)
        self._bench.begin(len(plans), base if len(plans) > 1 else None)
        exact = self.fast is None and not estimate
        table = PieceTable([group.documents for group in groups], cache.lookup(plans), instead=exact)
        number = {mask: plan for plan, mask in enumerate(masks)}
        hints = [expected_of[plan] for plan in plans] if expected_of else None
        bounds = estimate and self._bench.bounds
        done: set[int] = set()

        def follow(selection: Selection) -> Generator[tuple[Plan, Loss], None, list[Decision]]:
            """Measure what a selection requests, and yield losses."""
            request = next(selection)
            while True:
                quality = self._measurer.supported_quality("bound" if bounds else request.quality)
                uncached = [(g, masks[p]) for p, g in table.reuse(quality, request.pieces)]
                for nats in self._bench.pieces(quality, uncached):
                    table.add(quality, {(number[mask], g): sums for (g, mask), sums in nats.items()})
                    computed = {(plans[number[m]], groups[g].documents): sums for (g, m), sums in nats.items()}
                    cache.add_partial(quality, computed)
                    on_progress(max(len(done), int(len(plans) * table.share())))
                for plan in sorted(table.complete() - done):
                    done.add(plan)
                    loss = self._loss(table.by_document(plan), bound=False)
                    cache.add(plans[plan], loss)
                    yield plans[plan], loss
                try:
                    request = selection.send({piece: table.sums(quality, piece) for piece in request.pieces})
                except StopIteration as end:
                    decided: list[Decision] = end.value
                    return decided

        few = (None, None) if estimate else (best, ceiling)
        decisions = yield from follow(self._selection(masks, base, *few, hints))
        while isinstance(self._bench, ScreenedMeasurer) and self._bench.widened(table.excess()):
            decisions = yield from follow(self._selection(masks, base, *few, hints))
        told = ["bound" if bounds else decision for decision in decisions]
        self.tally.append(Counter("full" if p in done else decision for p, decision in enumerate(told)))
        self._earlier.learn([mask & ~base for mask in masks], table)
        for plan in sorted(set(range(len(plans))) - done):
            yield plans[plan], self._loss(table.by_document(plan), bound=True)

    def _selection(
        self, masks: list[int], base: int, best: int | None, limits: Sequence[float] | None,
        hints: Sequence[float] | None,
    ) -> Selection:  # fmt: skip
        """Return the generator that chooses the pieces to measure: all, with exact bounds, or by racing."""
        groups = self._measurer.groups
        order = tuple(self._bench.interleaved(self._earlier.hardest(len(groups))))
        workers, abreast = self._bench.workers, self._bench.abreast
        positive = loss_facts(self.loss).never_negative
        together = self.teacher.weights is not None or self._measurer.sizes.launches_count
        least = workers * (self.layout.wave if together else self.layout.wave // 4)
        ceiling = None if limits is None else {g: tuple(limits[d] for d in x.documents) for g, x in enumerate(groups)}
        task = SelectionTask(
            len(masks), best or len(masks), order, tuple(group.tokens for group in groups), least,
            together or abreast < workers, positive, ceiling, abreast, self._bench.rounding,
            tolerance_of(torch.finfo(self.teacher.model.dtype).eps, len(self.teacher.anatomy.sites)),
        )  # fmt: skip
        if (task.best >= len(masks) and limits is None) or (self.fast is None and not positive):
            return measure_all(task)
        if self.fast is None:
            return measure_best(task, self._bench.bounds)
        rises = list(hints) if hints is not None else [self._earlier.expected(mask & ~base) for mask in masks]
        unknown = 0 if hints is not None else sum(rise == -1.0 for rise in rises)
        few = max(task.best, self.fast.shortlist) + unknown
        shortlist = sorted(sorted(range(len(masks)), key=lambda p: (rises[p], p))[:few])
        return race(task, shortlist, self.fast.risk, self._bench.bounds)

    def _copy(self) -> Teacher | None:
        """Return the teacher's copy in bfloat16, made once; None where that is not faster, or not allowed."""
        if self._bfloat16_copy is None:
            allowed = self._bfloat16 and (self._team is None or self.memory is None)  # each worker has so much memory
            copy = bfloat16_copy(self.teacher, self.memory, self._division.here) if allowed else None
            self._bfloat16_copy = copy or self.teacher
        return None if self._bfloat16_copy is self.teacher else self._bfloat16_copy

    def _screen(self) -> None:
        """Measure bounds and samples in bfloat16 from now on, where that is faster."""
        useful = self.tokens.choices is None and (self.loss == "kl" or self.fast is not None)
        if not useful or isinstance(self._bench, ScreenedMeasurer) or (copy := self._copy()) is None:
            return
        rough = Measurer(copy, self.tokens, self.loss, memory=self.memory, division=self._division)
        join(self._measurer, rough)
        self._runners.append(rough.runner)
        beside: Measurer | SharedMeasurer = rough
        if self._team is not None:
            beside = SharedMeasurer(rough, self.tokens, self.loss, self.memory, self._team)
            self._runners.append(beside)
        self._bench = ScreenedMeasurer(self._bench, beside)

    def _cache(self) -> Cache:
        """Return the cache of this probe's measurements."""
        exact, copy = self._cache_factory(self.tokens, self.loss, self.teacher.compute_key), self._bfloat16_copy
        if copy is None or not isinstance(self._bench, ScreenedMeasurer):
            return exact
        return ScreenedCache(exact, self._cache_factory(self.tokens, self.loss, copy.compute_key))

    def _loss(self, sums: Mapping[int, float], bound: bool) -> Loss:
        """Return the loss with these sums by document, and the number of tokens, or items, that they count."""
        items = self.tokens.choices is not None
        counts = [int(items)] * len(self.tokens.clusters)
        if not items:
            lacking = int(loss_facts(self.loss).counts_targets)  # the last token of a row has no target
            for document, length in zip(self.tokens.documents, self.tokens.lengths, strict=True):
                counts[document] += length - lacking
        return Loss(self.loss, tuple(sums.get(d, 0.0) for d in range(len(counts))), tuple(counts), bound)

    def with_objective(self, loss: str, tokens: TokenSet | None = None) -> Probe:
        """Return a probe of this teacher under another loss, or on other tokens; this one releases its streams."""
        tokens = self.tokens if tokens is None else tokens
        if loss == self.loss and tokens.hash == self.tokens.hash:
            return self
        return self._beside(self.teacher, tokens, loss, self.fast)

    def without_racing(self, tokens: TokenSet) -> Probe:
        """Return a probe of this loss on `tokens` that excludes by bounds only; this one releases its streams."""
        return self._beside(self.teacher, tokens, self.loss, None)

    def for_estimates(self, tokens: TokenSet) -> Probe:
        """Return a probe for estimates on `tokens`, in bfloat16 where that is faster; this one releases its streams."""
        return self._beside(self._copy() or self.teacher, tokens, self.loss, self.fast)

    def _beside(self, teacher: Teacher, tokens: TokenSet, loss: str, fast: RacingOptions | None) -> Probe:
        """Return a probe whose work counts as this one's; this one releases its streams."""
        self.release_streams()
        probe = Probe(
            teacher, tokens, loss, memory=self.memory, fast=fast, cache_factory=self._cache_factory, team=self._team,
            bfloat16=self._bfloat16,
        )  # fmt: skip
        if teacher is self.teacher:
            probe._bfloat16_copy = self._bfloat16_copy
        self._others.append(probe)
        return probe

    @undisturbed
    @torch.inference_mode()
    def row_sums(self, plans: Sequence[Plan]) -> list[list[float]]:
        """Return the log-probability in nats of the choice in every row of the token set, for each plan in order.

        For token sets with choices: one walk for evaluations of many plans, without building a student.
        """
        return row_sums(self._measurer, plans)

    @undisturbed
    def loss_with_repair(self, plan: Plan, repair: Repair) -> Loss:
        """Return the loss of a plan under a repair of its blocks; it is not cached."""
        self._measurer.use_repair(plan, repair)
        self._measurer.own(range(len(self._measurer.groups)))
        self._bench, self._passes = self._measurer, Passes(self._measurer)  # others know no repair
        return self.losses([plan])[0]

    def release_streams(self) -> None:
        """Drop the cached streams; later measurements compute them again."""
        self._bench.release()

    # -- statistics for metrics -------------------------------------------------------------------------------------

    @undisturbed
    @torch.inference_mode()
    def mean_over_tokens(
        self, statistics: Mapping[str, activation_passes.Statistic]
    ) -> dict[str, dict[ScoredUnit, Score]]:
        """Return the mean over tokens of each statistic(x, y) for each site and block; one pass, cached.

        x, y: [tokens, width], float32, the residual stream before and after; a statistic returns [tokens].
        """
        cached = self._means
        uncached = {name: f for name, f in statistics.items() if name not in cached or cached[name][0] is not f}
        if uncached:
            computed = activation_passes.mean_over_tokens(self._passes, uncached)
            cached |= {name: (uncached[name], scores) for name, scores in computed.items()}
        return {name: dict(cached[name][1]) for name in statistics}

    @undisturbed
    @torch.inference_mode()
    def over_covariances(self, function: Callable[[activation_passes.Covariances], float]) -> dict[ScoredUnit, Score]:
        """Return function(covariances of the residual streams before and after it) for each site and block; one pass.

        Means are taken off; see `activation_passes.Covariances`.
        """
        return activation_passes.over_covariances(self._passes, function)

    @undisturbed
    @torch.inference_mode()
    def mean_over_spans(self, distance: activation_passes.Statistic, *, last: bool) -> dict[ScoredUnit, Score]:
        """Return the mean of distance(x, y) over rows' last tokens, or all tokens, for each span of blocks; one pass.

        x, y: [tokens, width], float32, the residual stream before and after the span. Raises ResourceError if all the
        streams between the blocks do not fit into the probe's memory.
        """
        return activation_passes.mean_over_spans(self._passes, distance, last)

    @undisturbed
    @torch.inference_mode()
    def mean_at_next_mlp(self, error: activation_passes.Statistic) -> dict[ScoredUnit, Score]:
        """Return the mean over tokens of error(f, g) for each site and block; one pass.

        f, g: [tokens, width], float32, with and without: what the next MLP adds, after the last MLP the last stream.
        """
        return activation_passes.mean_at_next_mlp(self._passes, error)

    @undisturbed
    @torch.inference_mode()
    def sum_over_weights(self, function: activation_passes.WeightFunction) -> dict[ScoredUnit, Score]:
        """Return the sum of function(w) over the weights of each site and block. w: [..., outputs, inputs], float32."""
        return activation_passes.sum_over_weights(self._measurer, function)

    @undisturbed
    def sum_over_gradients(
        self, function: gradient_pass.GradientFunction, *, fisher: bool = False
    ) -> dict[ScoredUnit, Score]:
        """Return the sum of function(w, g, f) over the weights of each site and block; all [..., outputs, inputs].

        - g: gradient of the mean negative log-likelihood of a predicted token, float32.
        - f, if `fisher` (else None): mean over rows, weighted by predicted tokens, of the squared gradient of a row's
          own mean.

        Raises ResourceError if the streams between the blocks do not fit into the probe's memory.
        """
        return gradient_pass.sum_over_gradients(self._passes, function, fisher)

    @undisturbed
    def groups_of_weights(self, function: activation_passes.WeightFunction) -> GroupValues:
        """Return the sum of function(w), elementwise in float32, over the weights of each channel group."""
        return channel_statistics.groups_by_weights(self._measurer, function)

    @undisturbed
    def groups_of_gradients(
        self, functions: Mapping[str, tuple[gradient_pass.GradientFunction, bool]], *, fisher: bool = False
    ) -> dict[str, GroupValues]:
        """Return by name the sum of function(w, g, f), elementwise, over each group's weights; one pass.

        g and f: see `sum_over_gradients`. With True beside a function, the values of each row or column of the group
        are first summed with their signs, and the absolute value counts.
        """
        return channel_statistics.groups_by_gradients(self._passes, functions, fisher)

    @undisturbed
    def groups_of_inputs(self, function: channel_statistics.InputFunction) -> GroupValues:
        """Return the mean over each group's channels of function(output projection's inputs, its weight); one pass."""
        return channel_statistics.groups_by_inputs(self._passes, function)

    @undisturbed
    def groups_of_products(self, function: channel_statistics.ProductFunction) -> GroupValues:
        """Return function(XᵀX per token of output projection's inputs X, its weight, channels of groups); one pass."""
        return channel_statistics.groups_by_products(self._passes, function)

    @undisturbed
    def groups_of_slopes(self, functions: Mapping[str, channel_statistics.SlopeFunction]) -> dict[str, GroupValues]:
        """Return by name function(output projection's inputs and slopes, its weight, channels of heads); one pass."""
        return channel_statistics.groups_by_slopes(self._passes, functions)

    @undisturbed
    def groups_of_experts(self, function: channel_statistics.ExpertFunction) -> GroupValues:
        """Return the mean of function(gates, outputs) over each expert's tokens, for all of its groups; one pass."""
        return channel_statistics.groups_by_experts(self._passes, function)

    @undisturbed
    def groups_of_ranges(self) -> GroupValues:
        """Return the relative range of each channel group's weights, summed over matrices."""
        return channel_statistics.groups_by_ranges(self._measurer)


@torch.inference_mode()
def logits(teacher: Teacher, plan: Plan, rows: torch.Tensor, repair: Repair | None = None) -> torch.Tensor:
    """Return the logits [rows, time, vocabulary], float32, of a teacher under `plan`, on token ids [rows, time].

    For few rows: a streamed teacher's blocks are read once. `repair`: a repair of the blocks.
    """
    tokens = token_set([tuple(row) for row in rows.tolist()], [0] * len(rows), [0], [""], "rows")
    return Measurer(teacher, tokens, "nll", repaired=None if repair is None else (plan, repair)).logits(plan)
