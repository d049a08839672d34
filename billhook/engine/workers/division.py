"""Division of document groups among workers. Pure: numbers of workers and of groups, no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

HERE = 0  # the number of the worker that is the coordinator itself
Owners = Mapping[int, int]  # the worker of each document group


@dataclass(frozen=True, slots=True)
class Division:
    """Number of workers that share a token set, of which `here` share the memory of one machine."""

    workers: int = 1
    here: int = 1


ALONE = Division()


def divided(owners: Owners, tokens: Sequence[int], workers: Collection[int]) -> dict[int, int]:
    """Return new owners, all of them among `workers`: as few groups as possible change hands.

    `tokens`: of each group. Groups without a worker go to those with the fewest tokens; then groups leave the worker
    with the most tokens, as long as that evens them out.
    """
    new = {group: owner for group, owner in owners.items() if owner in workers}
    load = dict.fromkeys(sorted(workers), 0)
    for group, owner in new.items():
        load[owner] += tokens[group]
    for group in sorted(range(len(tokens)), key=lambda g: (-tokens[g], g)):
        if group not in new:
            new[group] = min(load, key=lambda worker: (load[worker], worker))
            load[new[group]] += tokens[group]
    while True:
        most = max(load, key=lambda worker: (load[worker], -worker))
        least = min(load, key=lambda worker: (load[worker], worker))
        gap = load[most] - load[least]
        movable = [g for g, owner in new.items() if owner == most and tokens[g] < gap]
        if not movable:
            return new
        group = min(movable, key=lambda g: (abs(2 * tokens[g] - gap), -g))
        new[group] = least
        load[most] -= tokens[group]
        load[least] += tokens[group]


def interleaved(order: Sequence[int], owners: Owners) -> list[int]:
    """Return the groups of `order` in turns: the first of every worker, then the second of every worker, and so on."""
    taken: Counter[int] = Counter()
    turns: dict[int, int] = {}
    for group in order:
        turns[group] = taken[owners[group]]
        taken[owners[group]] += 1
    return sorted(order, key=turns.__getitem__)
