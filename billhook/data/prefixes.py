"""Rows that begin alike: what of a token set must be computed at all, and which beginnings are worth computing once.

Nothing is read after the last token of a row, so that it is never an input. Rows with the same input are one `Input`.
Inputs that share their first tokens may be a `PrefixGroup`: the shared prefix is computed once, then the rest of each
on copies of its KV cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from billhook.data.token_sets import TokenSet

SHARING_TOKENS = 16  # what a family must save: copies of the cache, and padding, cost about as much
BATCH_TOKENS = 96  # what all families with beginnings of one length must save: they take passes of their own
SHARE_SAVED = 1 / 3  # of their positions, at least: two passes over fewer tokens each are slower by the token
MOST_INPUTS = 64  # of one family
Readout = tuple[int, int, int]  # position, next token, row of the token set


@dataclass(frozen=True, slots=True)
class Input:
    """One input, and what is read of it, from position `first` on."""

    ids: tuple[int, ...]
    first: int
    readouts: tuple[Readout, ...]


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """Paths whose first `shared` tokens are the same and computed once; 0: one path, which shares nothing."""

    inputs: tuple[Input, ...]
    shared: int

    @property
    def positions(self) -> int:
        """How many token positions it takes."""
        return self.shared + sum(len(path.ids) - self.shared for path in self.inputs)

    @property
    def longest(self) -> int:
        return max(len(path.ids) for path in self.inputs)

    @property
    def reads(self) -> int:
        """How many positions the head looks at, at most."""
        return sum(len(path.ids) - path.first for path in self.inputs)


def unique_inputs(tokens: TokenSet) -> list[Input]:
    """The distinct inputs of a token set of choices, in the order of their tokens."""
    assert tokens.choices is not None, "only rows that are choices say where reading begins"
    reads: dict[tuple[int, ...], list[Readout]] = {}
    for row, (n, first) in enumerate(zip(tokens.lengths, tokens.choices.first, strict=True)):
        ids = tokens.rows[row, :n].tolist()
        reads.setdefault(tuple(ids[:-1]), []).extend((at - 1, ids[at], row) for at in range(first, n))
    return [Input(ids, min(at for at, _, _ in of), tuple(of)) for ids, of in sorted(reads.items())]


def group_by_prefix(paths: Sequence[Input], longest: int | None) -> list[PrefixGroup]:
    """Sorted paths as families that take the fewest positions in all; each shared beginning counts SHARING_TOKENS more.

    `longest`: the longest path that may share anything; None: any.
    """
    alike = [_shared_length(a.ids, b.ids) for a, b in pairwise(paths)]  # each with the next
    best: list[tuple[int, int, int]] = [(0, 0, 0)]  # of the first i paths: cost, where the last family begins, shared
    for end, last in enumerate(paths, 1):
        found = (best[end - 1][0] + len(last.ids), end - 1, 0)
        shared, total = len(last.ids), len(last.ids)
        for start in range(end - 2, max(end - 1 - MOST_INPUTS, -1), -1):
            shared, total = min(shared, alike[start]), total + len(paths[start].ids)
            if shared == 0 or (longest is not None and max(len(paths[start].ids), len(last.ids)) > longest):
                break
            cost = best[start][0] + total - (end - start - 1) * shared + SHARING_TOKENS
            found = min(found, (cost, start, shared))
        best.append(found)
    told, end = [], len(paths)
    while end:
        _, start, shared = best[end]
        told.append(PrefixGroup(tuple(paths[start:end]), shared))
        end = start
    return told[::-1]


def keep_worthwhile(groups: Sequence[PrefixGroup]) -> list[PrefixGroup]:
    """Families of which only those share that, with all others of as long a beginning, save BATCH_TOKENS and
    SHARE_SAVED of their positions."""
    saved: dict[int, int] = {}
    whole: dict[int, int] = {}
    for family in groups:
        total = sum(len(path.ids) for path in family.inputs)
        whole[family.shared] = whole.get(family.shared, 0) + total
        saved[family.shared] = saved.get(family.shared, 0) + total - family.positions
    told = []
    for family in groups:
        enough = saved[family.shared] >= max(BATCH_TOKENS, SHARE_SAVED * whole[family.shared])
        told += [family] if enough else [PrefixGroup((path,), 0) for path in family.inputs]
    return told


def _shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def batch_groups(groups: Sequence[PrefixGroup], most_positions: int, most_reads: int) -> Iterator[list[PrefixGroup]]:
    """Families that are computed together: with beginnings of equal length, paths of similar length, the longest first.

    At most so many positions, padding and cached ones too, and so many that are read, unless one family has more.
    """
    batch: list[PrefixGroup] = []
    lines = longest = reads = 0
    for family in sorted(groups, key=lambda f: (-f.shared, -f.longest, f.inputs[0].ids)):
        more = lines + len(family.inputs), max(longest, family.longest), reads + family.reads
        full = more[0] * more[1] > most_positions or more[2] > most_reads
        if batch and (full or family.shared != batch[0].shared):
            yield batch
            batch, more = [], (len(family.inputs), family.longest, family.reads)
        batch.append(family)
        lines, longest, reads = more
    if batch:
        yield batch
