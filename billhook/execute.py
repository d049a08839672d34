"""measure(ask) -> losses: the store first, then this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import cast

from billhook.data import TokenSet, first
from billhook.loading import Teacher
from billhook.plan import Ask, Plan
from billhook.probe import Memos, Probe
from billhook.probe.choose import Quality, Sums
from billhook.probe.table import Documents, Known, Pieces
from billhook.records import Loss
from billhook.store import Measured, Store

Told = Callable[[int, int, float], None]
JUDGED = 4  # candidates of a round, the best without a fold, are judged with one


def nobody(done: int, total: int, best: float) -> None:
    """Nobody listens."""


class Executor:
    """Answers Asks by a probe, and keeps what was asked and answered."""

    def __init__(self, probe: Probe) -> None:
        self._probes: dict[int | None, Probe] = {None: probe}
        self.rounds: list[tuple[Ask, list[Loss]]] = []

    def __call__(self, ask: Ask, told: Told = nobody) -> list[Loss]:
        """The losses of the plans asked for, in the same order. Safe to run twice.

        With `ask.best=k` the k lowest are in full, and others may be bounds. `told(done, total, lowest mean so far)`
        is called as the work goes on.
        """
        probe = self._probe(ask.tokens)
        found: dict[Plan, Loss] = {}
        lowest, total, furthest = float("inf"), len(ask.plans), 0

        def working(done: int) -> None:
            nonlocal furthest
            furthest = max(furthest, done, len(found))
            told(furthest, total, lowest)

        for plan, loss in probe.decide(ask.plans, ask.best, hints=ask.hints, below=ask.below, told=working):
            found[plan] = loss
            if not loss.bound:
                lowest = min(lowest, loss.mean)
                working(len(found))
        losses = [found[plan] for plan in ask.plans]
        self.rounds.append((ask, losses))
        told(total, total, lowest)
        return losses

    def _probe(self, tokens: int | None) -> Probe:
        """The probe over all calibration tokens, or over the first `tokens` of them."""
        whole = self._probes[None]
        if tokens is not None and tokens >= whole.tokens.tokens:
            return whole
        if tokens not in self._probes:
            assert tokens is not None
            self._probes[tokens] = whole.under(whole.loss, first(whole.tokens, tokens))
        return self._probes[tokens]


class Folding:
    """Answers Asks like an Executor, but judges the best candidates as they are after a fold.

    The fold of a plan depends on the plan and the training tokens alone, and not on how a search came to it, so that
    one that is resumed finds the same. The others come back as bounds, by what they are without it.
    """

    def __init__(self, plain: Executor, judge: Callable[[Plan], Loss]) -> None:
        """`judge`: the loss of a plan after its fold."""
        self.rounds: list[tuple[Ask, list[Loss]]] = []
        self._plain, self._judge = plain, judge

    def __call__(self, ask: Ask, told: Told = nobody) -> list[Loss]:
        """As `Executor.__call__`. What asks for fewer tokens is answered without folds: it only says where to look."""
        if ask.tokens is not None:
            return self._plain(ask, told)
        judged = set(ask.plans)
        found = {plan: Loss("", (), (), bound=True) for plan in ask.plans}
        if ask.best is not None and len(judged) > max(ask.best, JUDGED):
            few = Ask(ask.plans, best=max(ask.best, JUDGED), hints=ask.hints)
            found = dict(zip(ask.plans, self._plain(few, told), strict=True))
            full = sorted((loss.mean, i) for i, loss in enumerate(found.values()) if not loss.bound)
            judged = {ask.plans[i] for _, i in full[: max(ask.best, JUDGED)]}
        losses = [self._judge(plan) if plan in judged else replace(found[plan], bound=True) for plan in ask.plans]
        self.rounds.append((ask, losses))
        return losses


def memos(store: Store, run: str, teacher: Teacher) -> Memos:
    """Keeps measurements of a teacher in a store, in the name of a run."""

    def memo(tokens: TokenSet, loss: str) -> _Memo:
        return _Memo(store, Measured(teacher.fingerprint, tokens.hash, loss, teacher.compute), run)

    return memo


class _Memo:
    """The store as the probe sees it: whatever is measured is stored at once, and not measured again."""

    def __init__(self, store: Store, of: Measured, run: str) -> None:
        self._store, self._of, self._run = store, of, run

    def recall(self, plans: Sequence[Plan]) -> list[Known]:
        return [
            Known(self._store.loss(self._of, plan), cast(Pieces, self._store.pieces(self._of, plan))) for plan in plans
        ]

    def keep(self, quality: Quality, found: Mapping[tuple[Plan, Documents], Sums]) -> None:
        self._store.add_pieces(self._of, quality, found, self._run)

    def settle(self, plan: Plan, loss: Loss) -> None:
        self._store.add_loss(self._of, plan, loss, self._run)
