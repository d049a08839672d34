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

from billhook.data import TokenSet, token_set
from billhook.loading import Teacher, undisturbed
from billhook.losses import COUNTS_TARGETS, NEVER_NEGATIVE
from billhook.plan import Plan
from billhook.probe import channels, choose, gradients, passes
from billhook.probe.channels import GroupValues
from billhook.probe.choose import Ballot, Choice, Quality, Sums
from billhook.probe.measure import WAVE, Bench, Layout, waves
from billhook.probe.table import Documents, Known, Table
from billhook.problem import Unit
from billhook.records import Loss, Score
from billhook.repair import Repair

FADING = 0.8  # of what a round says about the next one, for moves that are not measured again


class Memo(Protocol):
    """What was measured before, and where to keep what is measured now."""

    def recall(self, plans: Sequence[Plan]) -> list[Known]:
        """All that is known of each plan."""

    def keep(self, quality: Quality, found: Mapping[tuple[Plan, Documents], Sums]) -> None:
        """File what was just measured: nats of each document of a group."""

    def settle(self, plan: Plan, loss: Loss) -> None:
        """File a loss that is known in full."""


class NoMemo:
    """Remembers nothing."""

    def recall(self, plans: Sequence[Plan]) -> list[Known]:
        return [Known() for _ in plans]

    def keep(self, quality: Quality, found: Mapping[tuple[Plan, Documents], Sums]) -> None:
        pass

    def settle(self, plan: Plan, loss: Loss) -> None:
        pass


Memos = Callable[[TokenSet, str], Memo]  # the memo of a token set and a loss


def _no_memo(tokens: TokenSet, loss: str) -> Memo:
    return NoMemo()


@dataclass(frozen=True, slots=True)
class Fast:
    """Racing: `shortlist` plans a round, by the ranking of the rounds before; `risk` as in `choose.race`."""

    shortlist: int = 12
    risk: float = 0.05


class Probe:
    """Measures plans of one teacher on one token set under one loss, and keeps what helps the next plans.

    `memory`: bytes for weights and activations together (None: half of what the machine has free). `fast`: racing, for
    asks that want only the best. `walk`: `layers` or `depth-first`, instead of choosing it by memory. `memos`: where
    measurements are kept. While it measures, it swaps modules of the teacher's model and holds the teacher's lock.
    `mended`: a plan that is measured under a repair of its blocks; then no memos.
    """

    def __init__(
        self,
        teacher: Teacher,
        tokens: TokenSet,
        loss: str,
        *,
        memory: int | None = None,
        fast: Fast | None = None,
        walk: str | None = None,
        memos: Memos = _no_memo,
        mended: tuple[Plan, Repair] | None = None,
    ) -> None:
        self.teacher, self.tokens, self.loss, self.fast, self.memory = teacher, tokens, loss, fast, memory
        self._memos = memos
        self._bench = Bench(teacher, tokens, loss, memory=memory, walk=walk, mended=mended)
        self._trunks = [self._bench.trunk]  # whose work is counted as this probe's
        self._apart: Probe | None = None  # without memos, for plans that narrow sites
        self._hardness: list[float] = []  # of each group, by the best plan of the last round
        self._rises: dict[int, tuple[float, int]] = {}  # by move: how much worse than the best, and in which round
        self._round = 0
        self._means: dict[str, tuple[passes.Statistic, dict[Unit, Score]]] = {}
        self.tally: list[Counter[str]] = []  # of each batch: how many plans were decided how

    @property
    def layout(self) -> Layout:
        """How the last batch was arranged in memory."""
        return self._bench.layout

    def arrange(self, plans: int) -> Layout:
        """How a batch of so many plans would be arranged."""
        return self._bench.arrange(plans)

    @property
    def site_evaluations(self) -> float:
        """Sublayers computed so far, each over the whole token set counting as one; those of `under` too."""
        return sum(trunk.computed for trunk in self._trunks) / sum(group.ids.numel() for group in self._bench.groups)

    def losses(self, plans: Sequence[Plan], best: int | None = None) -> list[Loss]:
        """The loss of each plan in the order asked; with `best=k` all but the k lowest may be bounds.

        Raises ModelError, naming the block, if activations are not finite.
        """
        found = dict(self.decide(plans, best))
        return [found[plan] for plan in plans]

    @torch.inference_mode()
    def decide(
        self,
        plans: Sequence[Plan],
        best: int | None = None,
        *,
        hints: Sequence[float] | None = None,
        below: Sequence[float] | None = None,
        told: Callable[[int], None] = lambda done: None,
    ) -> Iterator[tuple[Plan, Loss]]:
        """(plan, loss) as soon as it is decided. `told` hears how many plans' worth of work is done.

        `hints`: what is expected of each plan, lower = better; racing begins with those. `below`: nats of each
        document; a plan with more in all is not wanted.
        """
        expected = dict(zip(plans, hints, strict=True)) if hints is not None else {}
        memo = self._memos(self.tokens, self.loss)
        narrower = dict.fromkeys(each for each in plans if each.narrowed)
        for narrow in narrower:
            yield narrow, self._narrower(narrow, memo)
        self.tally += [Counter(full=len(narrower))] if narrower else []
        plans = list(dict.fromkeys(each for each in plans if not each.narrowed))
        if not plans:
            return
        bench, masks = self._bench, [self._bench.mask(plan) for plan in plans]
        base = masks[0]
        for mask in masks[1:]:
            base &= mask
        if len(plans) > 1:
            bench.walk.forget(base)
        bench.layout = bench.arrange(len(plans))
        table = Table([group.documents for group in bench.groups], memo.recall(plans), instead=self.fast is None)
        number = {mask: plan for plan, mask in enumerate(masks)}
        sizes = [group.tokens for group in bench.groups]
        choice = self._choice(masks, base, best, [expected[plan] for plan in plans] if expected else None, below)
        done: set[int] = set()
        try:
            want = next(choice)
            while True:
                quality = bench.affordable(want.quality)
                missing = [(g, masks[p]) for p, g in table.take(quality, want.pieces)]
                for wave in waves(missing, sizes, bench.layout.wave, split=bench.layout.streamed):
                    found = bench.measure(quality, wave)
                    table.add(quality, {(number[mask], g): sums for (g, mask), sums in found.items()})
                    fresh = {(plans[number[m]], bench.groups[g].documents): sums for (g, m), sums in found.items()}
                    memo.keep(quality, fresh)
                    told(max(len(done), int(len(plans) * table.share())))
                for plan in sorted(table.complete() - done):
                    done.add(plan)
                    loss = self._loss(table.by_document(plan), bound=False)
                    memo.settle(plans[plan], loss)
                    yield plans[plan], loss
                want = choice.send({piece: table.sums(quality, piece) for piece in want.pieces})
        except StopIteration as end:
            verdicts: list[choose.Verdict] = end.value
        self.tally.append(Counter("full" if p in done else verdict for p, verdict in enumerate(verdicts)))
        self._learn(masks, base, table)
        for plan in sorted(set(range(len(plans))) - done):
            yield plans[plan], self._loss(table.by_document(plan), bound=True)

    def _narrower(self, plan: Plan, memo: Memo) -> Loss:
        """The loss of a plan that narrows sites, in full."""
        known = memo.recall([plan])[0].loss
        if known is None:
            known = self._narrowed(plan).losses([Plan(plan.removed)])[0]
            memo.settle(plan, known)
        return known

    def _narrowed(self, plan: Plan) -> Probe:
        """What measures a plan that narrows sites, in the place of the plan of its removals."""
        if self._apart is None:
            self._apart = Probe(self.teacher, self.tokens, self.loss, memory=self.memory)
            self._trunks.append(self._apart._bench.trunk)
        self._bench.walk.streams.clear()  # the room for streams is there once
        self._apart._bench.narrow(plan)
        return self._apart

    def _choice(
        self,
        masks: list[int],
        base: int,
        best: int | None,
        hints: Sequence[float] | None,
        below: Sequence[float] | None,
    ) -> Choice:
        groups = self._bench.groups
        order = sorted(range(len(groups)), key=lambda g: (-self._hardness[g] if self._hardness else 0, g))
        tokens = tuple(group.tokens for group in groups)
        streamed, positive = self.teacher.weights is not None, self.loss in NEVER_NEGATIVE
        least = self.layout.wave if streamed else WAVE // 4
        ceiling = None if below is None else {g: tuple(below[d] for d in of.documents) for g, of in enumerate(groups)}
        ballot = Ballot(len(masks), best or len(masks), tuple(order), tokens, least, streamed, positive, ceiling)
        if (ballot.best >= len(masks) and below is None) or (self.fast is None and not positive):
            return choose.everything(ballot)
        if self.fast is None:
            return choose.exact(ballot, self._bench.bounds)
        rises = list(hints) if hints is not None else [self._expected(mask & ~base) for mask in masks]
        unknown = 0 if hints is not None else sum(rise == -1.0 for rise in rises)
        few = max(ballot.best, self.fast.shortlist) + unknown
        shortlist = sorted(sorted(range(len(masks)), key=lambda p: (rises[p], p))[:few])
        return choose.race(ballot, shortlist, self.fast.risk, self._bench.bounds)

    def _expected(self, move: int) -> float:
        """How much worse than the best a move is likely to be; -1, so that it comes first, if it was never measured.

        What was not measured in the last rounds counts less and less, so that nothing is passed over for ever.
        """
        if move not in self._rises:
            return -1.0
        rise, when = self._rises[move]
        return rise * FADING ** (self._round - when)

    def _learn(self, masks: list[int], base: int, table: Table) -> None:
        """What this batch says about the next one: which groups are hard, which moves promise most."""
        if len(masks) < 2:
            return
        self._round += 1
        complete = sorted(table.complete(), key=lambda p: (table.total(p), p))
        leader = complete[0] if complete else table.furthest()
        if complete:
            self._hardness = [sum(table.sums("full", (leader, g))) for g in range(len(self._bench.groups))]
        for plan, mask in enumerate(masks):
            if (rise := table.rise(plan, leader)) is not None:
                self._rises[mask & ~base] = max(0.0, rise), self._round

    def _loss(self, sums: Mapping[int, float], bound: bool) -> Loss:
        counts = [0] * len(self.tokens.clusters)
        if self.tokens.choices is not None:
            counts = [1] * len(counts)  # of items
            return Loss(self.loss, tuple(sums.get(d, 0.0) for d in range(len(counts))), tuple(counts), bound)
        for document, length in zip(self.tokens.documents, self.tokens.lengths, strict=True):
            counts[document] += length - int(self.loss in COUNTS_TARGETS)
        return Loss(self.loss, tuple(sums.get(d, 0.0) for d in range(len(counts))), tuple(counts), bound)

    def under(self, loss: str, tokens: TokenSet | None = None) -> Probe:
        """A probe of the same teacher under another loss, or on other tokens; this one lets go of its streams."""
        tokens = self.tokens if tokens is None else tokens
        if loss == self.loss and tokens.hash == self.tokens.hash:
            return self
        self.rest()
        probe = Probe(self.teacher, tokens, loss, memory=self.memory, fast=self.fast, memos=self._memos)
        self._trunks.append(probe._bench.trunk)
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
        bench, whole = self._bench, [plan for plan in plans if not plan.narrowed]
        masks = {bench.mask(plan): plan for plan in whole}
        bench.layout = bench.arrange(len(masks))
        found |= {plan: [0.0] * len(self.tokens.lengths) for plan in whole}
        jobs = [(g, mask) for g in range(len(bench.groups)) for mask in masks]
        sizes = [group.tokens for group in bench.groups]
        for wave in waves(jobs, sizes, bench.layout.wave, split=bench.layout.streamed):
            for (g, mask), nats in bench.row_nats("full", wave).items():
                for row, value in zip(bench.groups[g].rows, nats, strict=True):
                    found[masks[mask]][row] = -value
        return [list(found[plan]) for plan in plans]

    @undisturbed
    def mended(self, plan: Plan, repair: Repair) -> Loss:
        """The loss of a plan under a repair of its blocks; kept nowhere."""
        self._bench.mend(plan, repair)
        return self.losses([Plan(plan.removed)])[0]

    def rest(self) -> None:
        """Let go of the kept streams; what is needed again is computed again."""
        self._bench.walk.streams.clear()

    # -- what metrics ask -------------------------------------------------------------------------------------------

    @undisturbed
    @torch.inference_mode()
    def mean_over_tokens(self, statistics: Mapping[str, passes.Statistic]) -> dict[str, dict[Unit, Score]]:
        """Mean over tokens of each statistic(x, y) of every site and block, all in one pass, which is not repeated.

        x, y: [tokens, width], float32, the residual stream before and after; a statistic gives [tokens].
        """
        known = self._means
        fresh = {name: of for name, of in statistics.items() if name not in known or known[name][0] is not of}
        if fresh:
            found = passes.mean_over_tokens(self._bench, fresh)
            known |= {name: (fresh[name], scores) for name, scores in found.items()}
        return {name: dict(known[name][1]) for name in statistics}

    @undisturbed
    @torch.inference_mode()
    def mean_over_spans(self, distance: passes.Statistic, *, last: bool) -> dict[Unit, Score]:
        """Mean of distance(x, y) over the last tokens of rows, or over all tokens, of every span of blocks; one pass.

        x, y: [tokens, width], float32, the residual stream before and after the span. Raises ResourceError if all the
        streams between the blocks do not fit into the probe's memory.
        """
        return passes.mean_over_spans(self._bench, distance, last)

    @undisturbed
    @torch.inference_mode()
    def mean_at_next_mlp(self, error: passes.Statistic) -> dict[Unit, Score]:
        """Mean over tokens of error(f, g) of every site and block, in one pass.

        f, g: [tokens, width], float32: what the next MLP adds to the residual stream, with and without the site or
        block; where there is no MLP behind it, the residual stream after the last block.
        """
        return passes.mean_at_next_mlp(self._bench, error)

    @undisturbed
    @torch.inference_mode()
    def sum_over_weights(self, function: passes.OfWeight) -> dict[Unit, Score]:
        """Sum of function(w) over the weights of every site and block. w: [..., outputs, inputs], float32."""
        return passes.sum_over_weights(self._bench, function)

    @undisturbed
    def sum_over_gradients(self, function: gradients.OfGradient, *, fisher: bool = False) -> dict[Unit, Score]:
        """Sum of function(w, g, f) over the weights of every site and block, with the gradients of one block at a time.

        All [..., outputs, inputs], float32. g: gradient of the mean negative log-likelihood of a predicted token; f,
        if `fisher` (else None): mean over rows, weighted by predicted tokens, of the squared gradient of a row's own
        mean. Raises ResourceError if the streams between the blocks do not fit into the probe's memory.
        """
        return gradients.sum_over_gradients(self._bench, function, fisher)

    @undisturbed
    def groups_of_weights(self, function: channels.OfWeight) -> GroupValues:
        """Of every site with channel groups, the sum of function(w), elementwise in float32, over each's weights."""
        return channels.by_weights(self._bench, function)

    @undisturbed
    def groups_of_gradients(
        self, functions: Mapping[str, tuple[channels.OfGradient, bool]], *, fisher: bool = False
    ) -> dict[str, GroupValues]:
        """By name, the sum of function(w, g, f), elementwise, over each group's weights; g and f as above; one pass.

        With True beside it, the values of one row or column, that of the group's channel, are summed with their signs
        first, and count without it.
        """
        return channels.by_gradients(self._bench, functions, fisher)

    @undisturbed
    def groups_of_inputs(self, function: channels.OfInputs) -> GroupValues:
        """The mean over each group's channels of function(what its output projection reads, that weight); one pass."""
        return channels.by_inputs(self._bench, function)


@torch.inference_mode()
def logits(teacher: Teacher, plan: Plan, rows: torch.Tensor, repair: Repair | None = None) -> torch.Tensor:
    """Logits [rows, time, vocabulary], float32, of what `plan` leaves of a teacher, on token ids [rows, time].

    For few rows: of a streamed teacher every block is read once. `repair`: of its blocks.
    """
    count = len(rows)
    tokens = token_set([tuple(row) for row in rows.tolist()], [0] * count, [0], [""], "rows")
    bench = Bench(teacher, tokens, "nll", mended=None if repair is None else (plan, repair))
    if plan.narrowed and repair is None:
        bench.narrow(plan)
    return bench.logits(plan)
