"""Measuring of pieces in two precisions: what only excludes plans in bfloat16, losses as the teacher computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from billhook.core.plan import Plan
from billhook.core.results.measured import Loss
from billhook.engine.bench import Measurer
from billhook.engine.measurements import Cache, DocumentIds, Known, Pieces
from billhook.engine.prefix_trie import WalkJob
from billhook.engine.racing import ROUGH, Quality, Sums
from billhook.engine.workers.shared import SharedMeasurer


def join(one: Measurer, new: Measurer) -> None:
    """Give a new measurer the bits of another one, and each half of the memory for streams of the one with less."""
    new.bits.add(one.bits.added())
    room = min(one.room, new.room) // 2
    for each in (one, new):
        each.limit_room(room)


class ScreenedMeasurer:
    """Measurer of pieces of which `rough`, for a copy of the teacher in bfloat16, measures bounds and samples.

    Both are of one kind: alone, or with a team.
    """

    def __init__(self, exact: Measurer | SharedMeasurer, rough: Measurer | SharedMeasurer) -> None:
        self._exact, self._rough, self.rounding = exact, rough, ROUGH

    @property
    def workers(self) -> int:
        """As `SharedMeasurer.workers`."""
        return self._exact.workers

    @property
    def abreast(self) -> int:
        """As `SharedMeasurer.abreast`."""
        return self._exact.abreast

    @property
    def bounds(self) -> bool:
        """As `Measurer.bounds`."""
        return self._rough.bounds

    def widened(self, excess: float) -> bool:
        """Widen `rounding` where bounds exceed losses by more, and return whether plans must be chosen again."""
        if excess <= self.rounding:
            return False
        self.rounding = 2 * excess
        return True

    def interleaved(self, order: Sequence[int]) -> list[int]:
        """As `Measurer.interleaved`."""
        return self._exact.interleaved(order)

    def masks(self, plans: Sequence[Plan]) -> list[int]:
        """As `Measurer.masks`: both give what is narrowed the same bits, since both get the same plans in turn."""
        self._rough.masks(plans)
        return self._exact.masks(plans)

    def begin(self, plans: int, base: int | None = None) -> None:
        """As `Measurer.begin`."""
        for each in (self._exact, self._rough):
            each.begin(plans, base)

    def release(self) -> None:
        """As `Measurer.release`."""
        for each in (self._exact, self._rough):
            each.release()

    def pieces(self, quality: Quality, jobs: Sequence[WalkJob]) -> Iterator[dict[WalkJob, Sums]]:
        """As `Measurer.pieces`."""
        yield from (self._exact if quality == "full" else self._rough).pieces(quality, jobs)


class ScreenedCache:
    """Cache of losses, and another of the bounds and samples that were computed in another dtype."""

    def __init__(self, exact: Cache, rough: Cache) -> None:
        self._exact, self._rough = exact, rough

    def lookup(self, plans: Sequence[Plan]) -> list[Known]:
        both = zip(self._exact.lookup(plans), self._rough.lookup(plans), strict=True)
        return [Known(exact.loss, {**_of(rough, full=False), **_of(exact, full=True)}) for exact, rough in both]

    def add_partial(self, quality: Quality, nats: Mapping[tuple[Plan, DocumentIds], Sums]) -> None:
        (self._exact if quality == "full" else self._rough).add_partial(quality, nats)

    def add(self, plan: Plan, loss: Loss) -> None:
        self._exact.add(plan, loss)


def _of(known: Known, *, full: bool) -> Pieces:
    """Return the pieces that are losses, or the others."""
    return {quality: sums for quality, sums in known.pieces.items() if (quality == "full") == full}
