"""measure(ask) -> losses: the store first, then this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

from billhook.data import first
from billhook.plan import Ask, Plan
from billhook.probe import Probe
from billhook.probe.choose import Quality, Sums
from billhook.probe.table import Documents, Known, Pieces
from billhook.records import Loss
from billhook.store import Measured, Store

Told = Callable[[int, int, float], None]


def _nobody(done: int, total: int, best: float) -> None:
    """Nobody listens."""


class Executor:
    """Answers Asks. Whatever is measured is stored at once, and not measured again."""

    def __init__(self, probe: Probe, store: Store, run: str) -> None:
        self._probes: dict[int | None, Probe] = {None: probe}
        self._store, self._run = store, run
        self.rounds: list[tuple[Ask, list[Loss]]] = []

    def __call__(self, ask: Ask, told: Told = _nobody) -> list[Loss]:
        """The losses of the plans asked for, in the same order. Safe to run twice.

        With `ask.best=k` the k lowest are in full, and others may be bounds. `told(done, total, lowest mean so far)`
        is called as the work goes on.
        """
        probe = self._probe(ask.tokens)
        teacher = probe.teacher
        of = Measured(teacher.fingerprint, probe.tokens.hash, probe.loss, teacher.compute)
        found: dict[Plan, Loss] = {}
        lowest, total, furthest = float("inf"), len(ask.plans), 0

        def working(done: int) -> None:
            nonlocal furthest
            furthest = max(furthest, done, len(found))
            told(furthest, total, lowest)

        for plan, loss in probe.decide(ask.plans, ask.best, _Memo(self._store, of, self._run), working):
            found[plan] = loss
            if not loss.bound:
                self._store.add_loss(of, plan, loss, self._run)
                lowest = min(lowest, loss.mean)
                working(len(found))
        losses = [found[plan] for plan in ask.plans]
        self.rounds.append((ask, losses))
        told(total, total, lowest)
        return losses

    def _probe(self, tokens: int | None) -> Probe:
        """The probe over all calibration tokens, or over the first `tokens` of them."""
        if tokens not in self._probes:
            whole = self._probes[None]
            assert tokens is not None
            part = first(whole.tokens, tokens)
            whole.rest()  # both together would exceed the memory that one may have
            self._probes[tokens] = Probe(whole.teacher, part, whole.loss, memory=whole.memory, fast=whole.fast)
        return self._probes[tokens]


class _Memo:
    """The store as the probe sees it."""

    def __init__(self, store: Store, of: Measured, run: str) -> None:
        self._store, self._of, self._run = store, of, run

    def recall(self, plans: Sequence[Plan]) -> list[Known]:
        return [
            Known(self._store.loss(self._of, plan), cast(Pieces, self._store.pieces(self._of, plan))) for plan in plans
        ]

    def keep(self, quality: Quality, found: Mapping[tuple[Plan, Documents], Sums]) -> None:
        self._store.add_pieces(self._of, quality, found, self._run)
