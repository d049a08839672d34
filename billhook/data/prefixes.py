"""Shared prefixes: which inputs of a token set must be computed, and which prefixes are worth computing once.

The last token of a row is never an input. Rows with the same input are one `Input`. Inputs that share their first
tokens may form a `PrefixGroup`: the prefix is computed once, then the rest of each input on a copy of its KV cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from billhook.data.token_sets import TokenSet

MOST_INPUTS = 64  # per group
Readout = tuple[int, int, int]  # position, next token, row of the token set


@dataclass(frozen=True, slots=True)
class SharingCosts:
    """The least savings for which a prefix is shared.

    - `group`: tokens that a group must save; copies and padding of the cache cost about as much.
    - `length`: tokens that all groups with prefixes of one length must save; they need passes of their own.
    - `share`: the share of their positions that these must save; shorter passes are slower per token.
    """

    group: int = 16
    length: int = 96
    share: float = 1 / 3


@dataclass(frozen=True, slots=True)
class Input:
    """One input, and the positions that are read, from `first` on."""

    ids: tuple[int, ...]
    first: int
    readouts: tuple[Readout, ...]


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """Inputs whose first `shared` tokens are computed once; 0: a single input, which shares nothing."""

    inputs: tuple[Input, ...]
    shared: int

    @property
    def positions(self) -> int:
        """Token positions that it computes."""
        return self.shared + sum(len(x.ids) - self.shared for x in self.inputs)

    @property
    def longest(self) -> int:
        return max(len(x.ids) for x in self.inputs)

    @property
    def reads(self) -> int:
        """Upper bound of the positions that the head reads."""
        return sum(len(x.ids) - x.first for x in self.inputs)


def unique_inputs(tokens: TokenSet) -> list[Input]:
    """List the distinct inputs of a token set of choices, in the order of their tokens."""
    assert tokens.choices is not None, "only rows that are choices say where reading begins"
    reads: dict[tuple[int, ...], list[Readout]] = {}
    for row, (n, first) in enumerate(zip(tokens.lengths, tokens.choices.first, strict=True)):
        ids = tokens.rows[row, :n].tolist()
        reads.setdefault(tuple(ids[:-1]), []).extend((at - 1, ids[at], row) for at in range(first, n))
    return [Input(ids, min(at for at, _, _ in readouts), tuple(readouts)) for ids, readouts in sorted(reads.items())]


def group_by_prefix(
    inputs: Sequence[Input], longest: int | None, costs: SharingCosts = SharingCosts()
) -> list[PrefixGroup]:  # fmt: skip
    """Group sorted inputs so that they take the fewest positions; each shared prefix counts `costs.group` more.

    `longest`: length of the longest input that may share anything; None: any.
    """
    common = [_shared_length(a.ids, b.ids) for a, b in pairwise(inputs)]  # of each with the next
    best: list[tuple[int, int, int]] = [(0, 0, 0)]  # of the first i inputs: cost, start of the last group, shared
    for end, last in enumerate(inputs, 1):
        cheapest = (best[end - 1][0] + len(last.ids), end - 1, 0)
        shared, total = len(last.ids), len(last.ids)
        for start in range(end - 2, max(end - 1 - MOST_INPUTS, -1), -1):
            shared, total = min(shared, common[start]), total + len(inputs[start].ids)
            if shared == 0 or (longest is not None and max(len(inputs[start].ids), len(last.ids)) > longest):
                break
            cost = best[start][0] + total - (end - start - 1) * shared + costs.group
            cheapest = min(cheapest, (cost, start, shared))
        best.append(cheapest)
    groups, end = [], len(inputs)
    while end:
        _, start, shared = best[end]
        groups.append(PrefixGroup(tuple(inputs[start:end]), shared))
        end = start
    return groups[::-1]


def keep_worthwhile(
    groups: Sequence[PrefixGroup], costs: SharingCosts = SharingCosts()
) -> list[PrefixGroup]:  # fmt: skip
    """Split the groups that, with all others of as long a prefix, save less than `costs` asks."""
    saved: Counter[int] = Counter()
    whole: Counter[int] = Counter()
    for group in groups:
        total = sum(len(x.ids) for x in group.inputs)
        whole[group.shared] += total
        saved[group.shared] += total - group.positions
    worthwhile = {n for n, total in whole.items() if saved[n] >= max(costs.length, costs.share * total)}
    parts = ([g] if g.shared in worthwhile else [PrefixGroup((x,), 0) for x in g.inputs] for g in groups)
    return [group for part in parts for group in part]


def computed_positions(tokens: TokenSet) -> int:
    """Count the token positions that a model computes for a token set of choices, where it can share any prefix."""
    return sum(group.positions for group in keep_worthwhile(group_by_prefix(unique_inputs(tokens), None)))


def _shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Count the first tokens that are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def batch_groups(
    groups: Sequence[PrefixGroup], most_positions: int, most_reads: int, boundary: int | None = None
) -> Iterator[list[PrefixGroup]]:
    """Yield groups to compute together: prefixes of equal length, inputs of similar length, the longest first.

    A batch has at most `most_positions`, padding and cached ones too, and `most_reads`, unless one group has more.
    Inputs longer than `boundary` are in batches of their own.
    """
    batch: list[PrefixGroup] = []
    lines = longest = reads = 0
    for group in sorted(groups, key=lambda g: (-g.shared, -g.longest, g.inputs[0].ids)):
        more = lines + len(group.inputs), max(longest, group.longest), reads + group.reads
        full = more[0] * more[1] > most_positions or more[2] > most_reads
        full |= boundary is not None and group.longest <= boundary < longest
        if batch and (full or group.shared != batch[0].shared):
            yield batch
            batch, more = [], (len(group.inputs), group.longest, group.reads)
        batch.append(group)
        lines, longest, reads = more
    if batch:
        yield batch
