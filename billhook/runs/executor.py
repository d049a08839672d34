"""measure(ask) -> losses: the store first, then this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import cast

from billhook.core.files.cache_keys import LossKey, PlanLossKey
from billhook.core.plan import MeasureRequest, Plan
from billhook.core.results.measured import Loss
from billhook.data.token_sets import TokenSet, truncate
from billhook.engine.measurements import CacheFactory, DocumentIds, Known, Pieces
from billhook.engine.probe import Probe
from billhook.engine.racing import Quality, Sums
from billhook.models.load import Teacher
from billhook.runs.store import Store

OnProgress = Callable[[int, int, float], None]
REFIT_CANDIDATES = 4  # candidates of a round, the best without a fold, are judged with one


def ignore_progress(done: int, total: int, best: float) -> None:
    """Nobody listens."""


class Executor:
    """Answers Asks by a probe, and keeps what was asked and answered."""

    def __init__(self, probe: Probe) -> None:
        self._whole = probe  # over all calibration tokens
        self._probes: dict[tuple[int, bool], Probe] = {}
        self.rounds: list[tuple[MeasureRequest, list[Loss]]] = []

    def __call__(self, ask: MeasureRequest, on_progress: OnProgress = ignore_progress) -> list[Loss]:
        """The losses of the plans asked for, in the same order. Safe to run twice.

        With `ask.full_results=k` the k lowest are in full, and others may be bounds; of an estimate all are bounds.
        `on_progress(done, total, lowest mean so far)` is called as the work proceeds.
        """
        probe = self._probe(ask.tokens, ask.estimate)
        found: dict[Plan, Loss] = {}
        lowest, total, furthest = float("inf"), len(ask.plans), 0

        def working(done: int) -> None:
            nonlocal furthest
            furthest = max(furthest, done, len(found))
            on_progress(furthest, total, lowest)

        for plan, loss in probe.iter_losses(
            ask.plans,
            ask.full_results,
            expected=ask.expected,
            ceiling=ask.ceiling,
            on_progress=working,
            estimate=ask.estimate,
        ):
            found[plan] = loss
            if not loss.bound or ask.estimate:
                lowest = min(lowest, loss.mean)
                working(len(found))
        losses = [found[plan] for plan in ask.plans]
        self.rounds.append((ask, losses))
        on_progress(total, total, lowest)
        return losses

    def _probe(self, tokens: int | None, estimate: bool) -> Probe:
        """The probe over all calibration tokens, or over the first `tokens` of them, for losses or for estimates."""
        whole = self._whole
        if tokens is None or tokens >= whole.tokens.tokens:
            return whole
        if (tokens, estimate) not in self._probes:
            picked = truncate(whole.tokens, tokens)
            self._probes[tokens, estimate] = (
                whole.for_estimates(picked) if estimate else whole.with_objective(whole.loss, picked)
            )
        return self._probes[tokens, estimate]


class RefitExecutor:
    """Answers Asks like an Executor, but judges the best candidates as they are after a fold.

    The fold of a plan depends on the plan and the training tokens alone, and not on how a search came to it, so that
    one that is resumed finds the same. The others come back as bounds, by what they are without it.
    """

    def __init__(self, plain: Executor, judge: Callable[[Plan], Loss]) -> None:
        """`judge`: the loss of a plan after its fold."""
        self.rounds: list[tuple[MeasureRequest, list[Loss]]] = []
        self._plain, self._judge = plain, judge

    def __call__(self, ask: MeasureRequest, on_progress: OnProgress = ignore_progress) -> list[Loss]:
        """As `Executor.__call__`. What asks for fewer tokens is answered without folds: it only says where to look."""
        if ask.tokens is not None:
            return self._plain(ask, on_progress)
        judged = set(ask.plans)
        found = {plan: Loss("", (), (), bound=True) for plan in ask.plans}
        if ask.full_results is not None and len(judged) > max(ask.full_results, REFIT_CANDIDATES):
            few = MeasureRequest(ask.plans, full_results=max(ask.full_results, REFIT_CANDIDATES), expected=ask.expected)
            found = dict(zip(ask.plans, self._plain(few, on_progress), strict=True))
            full = sorted((loss.mean, i) for i, loss in enumerate(found.values()) if not loss.bound)
            judged = {ask.plans[i] for _, i in full[: max(ask.full_results, REFIT_CANDIDATES)]}
        losses = [self._judge(plan) if plan in judged else replace(found[plan], bound=True) for plan in ask.plans]
        self.rounds.append((ask, losses))
        return losses


def store_cache(store: Store, run: str, teacher: Teacher) -> CacheFactory:
    """Keeps measurements of a teacher in a store, in the name of a run."""

    def memo(tokens: TokenSet, loss: str, compute: str) -> _StoreCache:
        return _StoreCache(store, LossKey(teacher.fingerprint, tokens.hash, loss, compute), run)

    return memo


class _StoreCache:
    """The store as the probe sees it: whatever is measured is stored at once, and not measured again."""

    def __init__(self, store: Store, key: LossKey, run: str) -> None:
        self._store, self._of, self._run = store, key, run

    def lookup(self, plans: Sequence[Plan]) -> list[Known]:
        return [
            Known(self._store.lookup(PlanLossKey(self._of, plan)), cast(Pieces, self._store.pieces(self._of, plan)))
            for plan in plans
        ]

    def add_partial(self, quality: Quality, nats: Mapping[tuple[Plan, DocumentIds], Sums]) -> None:
        self._store.add_pieces(self._of, quality, nats, self._run)

    def add(self, plan: Plan, loss: Loss) -> None:
        self._store.add_loss(self._of, plan, loss, self._run)
