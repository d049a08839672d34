"""measure(ask) -> losses: the store first, then this machine."""

from __future__ import annotations

from collections.abc import Callable

from billhook.data import first
from billhook.plan import Ask
from billhook.probe import Probe
from billhook.records import Loss
from billhook.store import Measured, Store

Told = Callable[[int, int, float], None]


def _nobody(done: int, total: int, best: float) -> None:
    """Nobody listens."""


class Executor:
    """Answers Asks. Every loss is stored the moment it is known; what the store holds is not measured again."""

    def __init__(self, probe: Probe, store: Store, run: str) -> None:
        self._probes: dict[int | None, Probe] = {None: probe}
        self._store, self._run = store, run
        self.rounds: list[tuple[Ask, list[Loss]]] = []

    def __call__(self, ask: Ask, told: Told = _nobody) -> list[Loss]:
        """The losses of the plans asked for, in full and in the same order. Safe to run twice.

        `told(done, total, lowest mean so far)` is called after every loss.
        """
        probe = self._probe(ask.tokens)
        teacher = probe.teacher
        of = Measured(teacher.fingerprint, probe.tokens.hash, probe.loss, teacher.compute)
        known = {plan: loss for plan in ask.plans if (loss := self._store.loss(of, plan)) is not None}
        missing = [plan for plan in dict.fromkeys(ask.plans) if plan not in known]
        lowest = min((loss.mean for loss in known.values()), default=float("inf"))
        for plan, loss in zip(missing, probe.losses(missing), strict=True):
            self._store.add_loss(of, plan, loss, self._run)
            known[plan] = loss
            lowest = min(lowest, loss.mean)
            told(len(known), len(ask.plans), lowest)
        losses = [known[plan] for plan in ask.plans]
        self.rounds.append((ask, losses))
        told(len(ask.plans), len(ask.plans), lowest)
        return losses

    def _probe(self, tokens: int | None) -> Probe:
        """The probe over all calibration tokens, or over the first `tokens` of them."""
        if tokens not in self._probes:
            whole = self._probes[None]
            assert tokens is not None
            self._probes[tokens] = Probe(whole.teacher, first(whole.tokens, tokens), whole.loss)
        return self._probes[tokens]
