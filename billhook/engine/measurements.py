"""Measurements of one batch of plans, piece by piece, and their cache. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from billhook.core.plan import Plan
from billhook.core.results.measured import Loss
from billhook.engine.racing import Piece, Quality, Sums

if TYPE_CHECKING:
    from billhook.data.token_sets import TokenSet

FADING = 0.8  # weight of a round's result in each later round, for moves that are not measured again
TINY = 1e-300  # nats that a loss of 0 is taken for, where it divides

DocumentIds = tuple[int, ...]  # of one group
Pieces = Mapping[Quality, Mapping[DocumentIds, Sums]]


@dataclass(frozen=True, slots=True)
class Known:
    """Cached measurements of a plan: its loss, or sums of document groups by quality."""

    loss: Loss | None = None
    pieces: Pieces = field(default_factory=dict)


class Cache(Protocol):
    """Cache of the measurements of one token set under one loss."""

    def lookup(self, plans: Sequence[Plan]) -> list[Known]:
        """Return the cached measurements of each plan."""

    def add_partial(self, quality: Quality, nats: Mapping[tuple[Plan, DocumentIds], Sums]) -> None:
        """Add new measurements: nats of each document of a group."""

    def add(self, plan: Plan, loss: Loss) -> None:
        """Add a loss that is known in full."""


class NoCache:
    """Cache that stores nothing."""

    def lookup(self, plans: Sequence[Plan]) -> list[Known]:
        return [Known() for _ in plans]

    def add_partial(self, quality: Quality, nats: Mapping[tuple[Plan, DocumentIds], Sums]) -> None:
        pass

    def add(self, plan: Plan, loss: Loss) -> None:
        pass


# The cache of a token set and a loss, measured in a dtype on a kind of device (`Teacher.compute_key`).
CacheFactory = Callable[["TokenSet", str, str], Cache]


def no_cache(tokens: TokenSet, loss: str, compute: str) -> Cache:
    """Return a cache that stores nothing."""
    return NoCache()


class PieceTable:
    """Sums of pieces by quality.

    - `documents[g]`: the documents of group g.
    - `recalled[p]`: the cached measurements of plan p. They count only once requested, so that a search decides as if
      it had measured them.
    - `instead`: a full piece may replace a bound, which does not change exact results.
    """

    def __init__(self, documents: Sequence[DocumentIds], recalled: Sequence[Known], instead: bool) -> None:
        self._documents, self._plans, self._instead = documents, len(recalled), instead
        self._sums: dict[Quality, dict[Piece, Sums]] = {"full": {}, "bound": {}, "sample": {}}
        self._recalled: dict[Quality, dict[Piece, Sums]] = {"full": {}, "bound": {}, "sample": {}}
        for plan, known in enumerate(recalled):
            for quality, by_group in known.pieces.items():
                for group, members in enumerate(documents):
                    if members in by_group:
                        self._recalled[quality][plan, group] = by_group[members]
            if known.loss is not None:
                for group, members in enumerate(documents):
                    self._recalled["full"][plan, group] = tuple(known.loss.sums[d] for d in members)

    def reuse(self, quality: Quality, pieces: Sequence[Piece]) -> list[Piece]:
        """Add the recalled ones of `pieces`; return those that must be measured."""
        for piece in pieces:
            for kind in (quality, "full") if self._instead else (quality,):
                if piece in self._recalled[kind]:
                    self._sums[kind][piece] = self._recalled[kind][piece]
        return [piece for piece in pieces if self.known(quality, piece) is None]

    def known(self, quality: Quality, piece: Piece) -> Sums | None:
        """Return a piece in this quality, or the full one where that may replace it; None if neither is known."""
        sums = self._sums[quality].get(piece)
        return self._sums["full"].get(piece) if sums is None and self._instead else sums

    def sums(self, quality: Quality, piece: Piece) -> Sums:
        """Return a piece that is known."""
        sums = self.known(quality, piece)
        assert sums is not None
        return sums

    def add(self, quality: Quality, sums: Mapping[Piece, Sums]) -> None:
        self._sums[quality].update(sums)

    def complete(self) -> set[int]:
        """Return the plans that are known in full."""
        groups = range(len(self._documents))
        return {p for p in range(self._plans) if all((p, g) in self._sums["full"] for g in groups)}

    def share(self) -> float:
        """Return the share of all pieces that are known in any quality."""
        known = self._sums["full"].keys() | self._sums["bound"].keys() | self._sums["sample"].keys()
        return len(known) / (self._plans * len(self._documents))

    def by_document(self, plan: int) -> dict[int, float]:
        """Return nats by document of one plan, for the groups that are known, each in its best quality."""
        nats: dict[int, float] = {}
        for group, members in enumerate(self._documents):
            known = [sums[plan, group] for sums in self._sums.values() if (plan, group) in sums]
            nats |= dict(zip(members, known[0], strict=True)) if known else {}
        return nats

    def nats_by_group(self, plan: int) -> list[float]:
        """Return the nats of a plan that is complete, by document group."""
        return [math.fsum(self._sums["full"][plan, g]) for g in range(len(self._documents))]

    def total(self, plan: int) -> float:
        """Return the nats of a plan that is complete."""
        return math.fsum(self.nats_by_group(plan))

    def most_measured(self) -> int:
        """Return the plan that was measured on the most groups; of several the one with the fewest nats."""
        nats = [self.by_document(plan) for plan in range(self._plans)]
        return min(range(self._plans), key=lambda p: (-len(nats[p]), math.fsum(nats[p].values()), p))

    def excess(self) -> float:
        """Return the largest share of a loss by which its bound exceeds it, of the plans that have both; 0 if none."""
        groups = range(len(self._documents))
        full, bound = self._sums["full"], self._sums["bound"]
        both = [p for p in range(self._plans) if all((p, g) in full and (p, g) in bound for g in groups)]
        ratios = [math.fsum(x for g in groups for x in bound[p, g]) / max(self.total(p), TINY) for p in both]
        return max([0.0, *(ratio - 1 for ratio in ratios)])

    def gap_to(self, plan: int, leader: int) -> float | None:
        """Return how far a plan is above another, in nats per group, over groups known in the same quality."""
        for quality in ("bound", "sample", "full"):
            sums = self._sums[quality]
            both = [g for g in range(len(self._documents)) if (plan, g) in sums and (leader, g) in sums]
            if both:
                return math.fsum(math.fsum(sums[plan, g]) - math.fsum(sums[leader, g]) for g in both) / len(both)
        return None


class EarlierRounds:
    """What earlier batches of plans tell of the next one: how hard document groups are, and how good moves."""

    def __init__(self) -> None:
        self._round = 0
        self._hardness: list[float] = []  # loss of the last round's best plan by group
        self._rises: dict[int, tuple[float, int]] = {}  # by move: the gap to the best, and its round

    def hardest(self, groups: int) -> list[int]:
        """Return the document groups, the one with the highest loss first."""
        return sorted(range(groups), key=lambda g: (-self._hardness[g] if self._hardness else 0, g))

    def expected(self, move: int) -> float:
        """Return the expected gap of a move to the best; -1, so that it comes first, if it was never measured.

        The gap shrinks with each round without a measurement, so that every move is measured again at some time.
        """
        if move not in self._rises:
            return -1.0
        rise, when = self._rises[move]
        return rise * FADING ** (self._round - when)

    def learn(self, moves: Sequence[int], table: PieceTable) -> None:
        """Learn from a batch. `moves`: what each of its plans does beyond what all of them do."""
        if len(moves) < 2:
            return
        self._round += 1
        complete = sorted(table.complete(), key=lambda p: (table.total(p), p))
        leader = complete[0] if complete else table.most_measured()
        if complete:
            self._hardness = table.nats_by_group(leader)
        for plan, move in enumerate(moves):
            if (rise := table.gap_to(plan, leader)) is not None:
                self._rises[move] = max(0.0, rise), self._round
