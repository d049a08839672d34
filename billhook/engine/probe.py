"""The measuring engine: losses of many plans at once, as cheaply as they can be had.

Plans are walked as a prefix trie over the model's own blocks (`walk`, `trunk`), their losses come without logits of
the whole set (`head`), and where only the best are wanted, plans are dropped as soon as that is certain (`choose`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from billhook.core.plan import Plan
from billhook.core.problem import ScoredUnit
from billhook.core.results.measured import Loss, Score, WorkPlan
from billhook.data.token_sets import TokenSet, token_set
from billhook.engine import activation_passes, channel_statistics, gradient_pass
from billhook.engine.bench import WAVE_TOKENS, Measurer, job_batches
from billhook.engine.channel_statistics import GroupValues
from billhook.engine.losses import loss_facts
from billhook.engine.measurements import DocumentIds, Known, PieceTable
from billhook.engine.racing import Decision, Quality, Selection, SelectionTask, Sums, measure_all, measure_best, race
from billhook.models.load import Teacher, undisturbed
from billhook.models.repair import Repair

FADING = 0.8  # of what a round says about the next one, for moves that are not measured again


class Cache(Protocol):
    """What was measured before, and where to keep what is measured now."""

    def lookup(self, plans: Sequence[Plan]) -> list[Known]:
        """All that is known of each plan."""

    def add_partial(self, quality: Quality, nats: Mapping[tuple[Plan, DocumentIds], Sums]) -> None:
        """File what was just measured: nats of each document of a group."""

    def add(self, plan: Plan, loss: Loss) -> None:
        """File a loss that is known in full."""


class NoCache:
    """Remembers nothing."""

    def lookup(self, plans: Sequence[Plan]) -> list[Known]:
        return [Known() for _ in plans]

    def add_partial(self, quality: Quality, nats: Mapping[tuple[Plan, DocumentIds], Sums]) -> None:
        pass

    def add(self, plan: Plan, loss: Loss) -> None:
        pass


CacheFactory = Callable[[TokenSet, str], Cache]  # the memo of a token set and a loss


def _no_cache(tokens: TokenSet, loss: str) -> Cache:
    return NoCache()


@dataclass(frozen=True, slots=True)
class RacingOptions:
    """Racing: `shortlist` plans a round, by the ranking of the rounds before; `risk` as in `choose.race`."""

    shortlist: int = 12
    risk: float = 0.05


class Probe:
    """Measures plans of one teacher on one token set under one loss, and keeps what helps the next plans.

    `memory`: bytes for weights and activations together (None: half of what the machine has free). `fast`: racing, for
    asks that want only the best. `walk`: `layers` or `depth-first`, instead of choosing it by memory. `memos`: where
    measurements are kept. While it measures, it swaps modules of the teacher's model and holds the teacher's lock.
    `loss_with_repair`: a plan that is measured under a repair of its blocks; then no memos.
    """

    def __init__(
        self,
        teacher: Teacher,
        tokens: TokenSet,
        loss: str,
        *,
        memory: int | None = None,
        fast: RacingOptions | None = None,
        walk: str | None = None,
        cache_factory: CacheFactory = _no_cache,
        repaired: tuple[Plan, Repair] | None = None,
    ) -> None:
        self.teacher, self.tokens, self.loss, self.fast, self.memory = teacher, tokens, loss, fast, memory
        self._cache_factory = cache_factory
        self._measurer = Measurer(teacher, tokens, loss, memory=memory, walk=walk, repaired=repaired)
        self._runners = [self._measurer.runner]  # whose work is counted as this probe's
        self._apart: Probe | None = None  # without memos, for plans that narrow sites
        self._hardness: list[float] = []  # of each group, by the best plan of the last round
        self._rises: dict[int, tuple[float, int]] = {}  # by move: how much worse than the best, and in which round
        self._round = 0
        self._means: dict[str, tuple[activation_passes.Statistic, dict[ScoredUnit, Score]]] = {}
        self.tally: list[Counter[str]] = []  # of each batch: how many plans were decided how

    @property
    def layout(self) -> WorkPlan:
        """How the last batch was arranged in memory."""
        return self._measurer.layout

    def arrange(self, plans: int) -> WorkPlan:
        """How a batch of so many plans would be arranged."""
        return self._measurer.arrange(plans)

    @property
    def site_evaluations(self) -> float:
        """Sublayers computed so far, each over the whole token set counting as one; those of `with_objective` too."""
        return sum(trunk.computed for trunk in self._runners) / sum(
            group.ids.numel() for group in self._measurer.groups
        )

    def losses(self, plans: Sequence[Plan], best: int | None = None) -> list[Loss]:
        """The loss of each plan in the order asked; with `best=k` all but the k lowest may be bounds.

        Raises ModelError, naming the block, if activations are not finite.
        """
        found = dict(self.iter_losses(plans, best))
        return [found[plan] for plan in plans]

    @torch.inference_mode()
    def iter_losses(
        self,
        plans: Sequence[Plan],
        best: int | None = None,
        *,
        expected: Sequence[float] | None = None,
        ceiling: Sequence[float] | None = None,
        on_progress: Callable[[int], None] = lambda done: None,
    ) -> Iterator[tuple[Plan, Loss]]:
        """(plan, loss) as soon as it is decided. `on_progress` hears how many plans' worth of work is done.

        `expected`: what is expected of each plan, lower = better; racing begins with those. `ceiling`: nats of each
        document; a plan with more in all is not wanted.
        """
        expected_of = dict(zip(plans, expected, strict=True)) if expected is not None else {}
        memo = self._cache_factory(self.tokens, self.loss)
        narrower = dict.fromkeys(each for each in plans if each.narrowed)
        for narrow in narrower:
            yield narrow, self._narrower(narrow, memo)
        self.tally += [Counter(full=len(narrower))] if narrower else []
        plans = list(dict.fromkeys(each for each in plans if not each.narrowed))
        if not plans:
            return
        bench, masks = self._measurer, [self._measurer.mask(plan) for plan in plans]
        base = masks[0]
        for mask in masks[1:]:
            base &= mask
        if len(plans) > 1:
            bench.walk.evict(base)
        bench.layout = bench.arrange(len(plans))
        table = PieceTable([group.documents for group in bench.groups], memo.lookup(plans), instead=self.fast is None)
        number = {mask: plan for plan, mask in enumerate(masks)}
        sizes = [group.tokens for group in bench.groups]
        choice = self._choice(
            masks, base, best, [expected_of[plan] for plan in plans] if expected_of else None, ceiling
        )
        done: set[int] = set()
        try:
            want = next(choice)
            while True:
                quality = bench.supported_quality(want.quality)
                missing = [(g, masks[p]) for p, g in table.reuse(quality, want.pieces)]
                for wave in job_batches(missing, sizes, bench.layout.wave, split=bench.layout.streamed):
                    found = bench.measure(quality, wave)
                    table.add(quality, {(number[mask], g): sums for (g, mask), sums in found.items()})
                    fresh = {(plans[number[m]], bench.groups[g].documents): sums for (g, m), sums in found.items()}
                    memo.add_partial(quality, fresh)
                    on_progress(max(len(done), int(len(plans) * table.share())))
                for plan in sorted(table.complete() - done):
                    done.add(plan)
                    loss = self._loss(table.by_document(plan), bound=False)
                    memo.add(plans[plan], loss)
                    yield plans[plan], loss
                want = choice.send({piece: table.sums(quality, piece) for piece in want.pieces})
        except StopIteration as end:
            verdicts: list[Decision] = end.value
        self.tally.append(Counter("full" if p in done else verdict for p, verdict in enumerate(verdicts)))
        self._learn(masks, base, table)
        for plan in sorted(set(range(len(plans))) - done):
            yield plans[plan], self._loss(table.by_document(plan), bound=True)

    def _narrower(self, plan: Plan, cache: Cache) -> Loss:
        """The loss of a plan that narrows sites, in full."""
        known = cache.lookup([plan])[0].loss
        if known is None:
            known = self._narrowed(plan).losses([Plan(plan.removed)])[0]
            cache.add(plan, known)
        return known

    def _narrowed(self, plan: Plan) -> Probe:
        """What measures a plan that narrows sites, in the place of the plan of its removals."""
        if self._apart is None:
            self._apart = Probe(self.teacher, self.tokens, self.loss, memory=self.memory)
            self._runners.append(self._apart._measurer.runner)
        self._measurer.walk.streams.clear()  # the room for streams is there once
        self._apart._measurer.use_narrowing(plan)
        return self._apart

    def _choice(
        self,
        masks: list[int],
        base: int,
        best: int | None,
        hints: Sequence[float] | None,
        below: Sequence[float] | None,
    ) -> Selection:
        groups = self._measurer.groups
        order = sorted(range(len(groups)), key=lambda g: (-self._hardness[g] if self._hardness else 0, g))
        tokens = tuple(group.tokens for group in groups)
        streamed, positive = self.teacher.weights is not None, loss_facts(self.loss).never_negative
        least = self.layout.wave if streamed else WAVE_TOKENS // 4
        ceiling = None if below is None else {g: tuple(below[d] for d in of.documents) for g, of in enumerate(groups)}
        ballot = SelectionTask(len(masks), best or len(masks), tuple(order), tokens, least, streamed, positive, ceiling)
        if (ballot.best >= len(masks) and below is None) or (self.fast is None and not positive):
            return measure_all(ballot)
        if self.fast is None:
            return measure_best(ballot, self._measurer.bounds)
        rises = list(hints) if hints is not None else [self._expected(mask & ~base) for mask in masks]
        unknown = 0 if hints is not None else sum(rise == -1.0 for rise in rises)
        few = max(ballot.best, self.fast.shortlist) + unknown
        shortlist = sorted(sorted(range(len(masks)), key=lambda p: (rises[p], p))[:few])
        return race(ballot, shortlist, self.fast.risk, self._measurer.bounds)

    def _expected(self, move: int) -> float:
        """How much worse than the best a move is likely to be; -1, so that it comes first, if it was never measured.

        What was not measured in the last rounds counts less and less, so that nothing is passed over for ever.
        """
        if move not in self._rises:
            return -1.0
        rise, when = self._rises[move]
        return rise * FADING ** (self._round - when)

    def _learn(self, masks: list[int], base: int, table: PieceTable) -> None:
        """What this batch says about the next one: which groups are hard, which moves promise most."""
        if len(masks) < 2:
            return
        self._round += 1
        complete = sorted(table.complete(), key=lambda p: (table.total(p), p))
        leader = complete[0] if complete else table.most_measured()
        if complete:
            self._hardness = [sum(table.sums("full", (leader, g))) for g in range(len(self._measurer.groups))]
        for plan, mask in enumerate(masks):
            if (rise := table.gap_to(plan, leader)) is not None:
                self._rises[mask & ~base] = max(0.0, rise), self._round

    def _loss(self, sums: Mapping[int, float], bound: bool) -> Loss:
        counts = [0] * len(self.tokens.clusters)
        if self.tokens.choices is not None:
            counts = [1] * len(counts)  # of items
            return Loss(self.loss, tuple(sums.get(d, 0.0) for d in range(len(counts))), tuple(counts), bound)
        lacking = int(loss_facts(self.loss).counts_targets)  # the last token of a row has no target
        for document, length in zip(self.tokens.documents, self.tokens.lengths, strict=True):
            counts[document] += length - lacking
        return Loss(self.loss, tuple(sums.get(d, 0.0) for d in range(len(counts))), tuple(counts), bound)

    def with_objective(self, loss: str, tokens: TokenSet | None = None) -> Probe:
        """A probe of the same teacher under another loss, or on other tokens; this one lets go of its streams."""
        tokens = self.tokens if tokens is None else tokens
        if loss == self.loss and tokens.hash == self.tokens.hash:
            return self
        self.release_streams()
        probe = Probe(self.teacher, tokens, loss, memory=self.memory, fast=self.fast, cache_factory=self._cache_factory)
        self._runners.append(probe._measurer.runner)
        return probe

    @undisturbed
    @torch.inference_mode()
    def row_sums(self, plans: Sequence[Plan]) -> list[list[float]]:
        """Log-probability in nats of the choice in every row of the token set, under each plan, in the order asked.

        For token sets with choices. What evaluations of many plans need, from one walk and without a student.
        """
        assert self.tokens.choices is not None, "only rows that are choices have sums of their own"
        narrower = dict.fromkeys(plan for plan in plans if plan.narrowed)
        found = {plan: self._narrowed(plan).row_sums([Plan(plan.removed)])[0] for plan in narrower}
        bench, whole = self._measurer, [plan for plan in plans if not plan.narrowed]
        masks = {bench.mask(plan): plan for plan in whole}
        bench.layout = bench.arrange(len(masks))
        found |= {plan: [0.0] * len(self.tokens.lengths) for plan in whole}
        jobs = [(g, mask) for g in range(len(bench.groups)) for mask in masks]
        sizes = [group.tokens for group in bench.groups]
        for wave in job_batches(jobs, sizes, bench.layout.wave, split=bench.layout.streamed):
            for (g, mask), nats in bench.row_nats("full", wave).items():
                for row, value in zip(bench.groups[g].rows, nats, strict=True):
                    found[masks[mask]][row] = -value
        return [list(found[plan]) for plan in plans]

    @undisturbed
    def loss_with_repair(self, plan: Plan, repair: Repair) -> Loss:
        """The loss of a plan under a repair of its blocks; kept nowhere."""
        self._measurer.use_repair(plan, repair)
        return self.losses([Plan(plan.removed)])[0]

    def release_streams(self) -> None:
        """Let go of the kept streams; what is needed again is computed again."""
        self._measurer.walk.streams.clear()

    # -- what metrics ask -------------------------------------------------------------------------------------------

    @undisturbed
    @torch.inference_mode()
    def mean_over_tokens(
        self, statistics: Mapping[str, activation_passes.Statistic]
    ) -> dict[str, dict[ScoredUnit, Score]]:
        """Mean over tokens of each statistic(x, y) of every site and block, all in one pass, which is not repeated.

        x, y: [tokens, width], float32, the residual stream before and after; a statistic gives [tokens].
        """
        known = self._means
        fresh = {name: of for name, of in statistics.items() if name not in known or known[name][0] is not of}
        if fresh:
            found = activation_passes.mean_over_tokens(self._measurer, fresh)
            known |= {name: (fresh[name], scores) for name, scores in found.items()}
        return {name: dict(known[name][1]) for name in statistics}

    @undisturbed
    @torch.inference_mode()
    def mean_over_spans(self, distance: activation_passes.Statistic, *, last: bool) -> dict[ScoredUnit, Score]:
        """Mean of distance(x, y) over the last tokens of rows, or over all tokens, of every span of blocks; one pass.

        x, y: [tokens, width], float32, the residual stream before and after the span. Raises ResourceError if all the
        streams between the blocks do not fit into the probe's memory.
        """
        return activation_passes.mean_over_spans(self._measurer, distance, last)

    @undisturbed
    @torch.inference_mode()
    def mean_at_next_mlp(self, error: activation_passes.Statistic) -> dict[ScoredUnit, Score]:
        """Mean over tokens of error(f, g) of every site and block, in one pass.

        f, g: [tokens, width], float32: what the next MLP adds to the residual stream, with and without the site or
        block; where there is no MLP behind it, the residual stream after the last block.
        """
        return activation_passes.mean_at_next_mlp(self._measurer, error)

    @undisturbed
    @torch.inference_mode()
    def sum_over_weights(self, function: activation_passes.OfWeight) -> dict[ScoredUnit, Score]:
        """Sum of function(w) over the weights of every site and block. w: [..., outputs, inputs], float32."""
        return activation_passes.sum_over_weights(self._measurer, function)

    @undisturbed
    def sum_over_gradients(
        self, function: gradient_pass.OfGradient, *, fisher: bool = False
    ) -> dict[ScoredUnit, Score]:
        """Sum of function(w, g, f) over the weights of every site and block, with the gradients of one block at a time.

        All [..., outputs, inputs], float32. g: gradient of the mean negative log-likelihood of a predicted token; f,
        if `fisher` (else None): mean over rows, weighted by predicted tokens, of the squared gradient of a row's own
        mean. Raises ResourceError if the streams between the blocks do not fit into the probe's memory.
        """
        return gradient_pass.sum_over_gradients(self._measurer, function, fisher)

    @undisturbed
    def groups_of_weights(self, function: channel_statistics.OfWeight) -> GroupValues:
        """Of every site with channel groups, the sum of function(w), elementwise in float32, over each's weights."""
        return channel_statistics.groups_by_weights(self._measurer, function)

    @undisturbed
    def groups_of_gradients(
        self, functions: Mapping[str, tuple[channel_statistics.OfGradient, bool]], *, fisher: bool = False
    ) -> dict[str, GroupValues]:
        """By name, the sum of function(w, g, f), elementwise, over each group's weights; g and f as above; one pass.

        With True beside it, the values of one row or column, that of the group's channel, are summed with their signs
        first, and count without it.
        """
        return channel_statistics.groups_by_gradients(self._measurer, functions, fisher)

    @undisturbed
    def groups_of_inputs(self, function: channel_statistics.OfInputs) -> GroupValues:
        """The mean over each group's channels of function(what its output projection reads, that weight); one pass."""
        return channel_statistics.groups_by_inputs(self._measurer, function)


@torch.inference_mode()
def logits(teacher: Teacher, plan: Plan, rows: torch.Tensor, repair: Repair | None = None) -> torch.Tensor:
    """Logits [rows, time, vocabulary], float32, of what `plan` leaves of a teacher, on token ids [rows, time].

    For few rows: of a streamed teacher every block is read once. `repair`: of its blocks.
    """
    count = len(rows)
    tokens = token_set([tuple(row) for row in rows.tolist()], [0] * count, [0], [""], "rows")
    bench = Measurer(teacher, tokens, "nll", repaired=None if repair is None else (plan, repair))
    if plan.narrowed and repair is None:
        bench.use_narrowing(plan)
    return bench.logits(plan)
