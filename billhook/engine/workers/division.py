"""Division of document groups among workers. Pure: numbers of workers and of groups, no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

HERE = 0  # the number of the worker that is the coordinator itself
LEAST_TURNS = 4  # in which all document groups are measured, so that a bad plan is dropped after the first of them
Owners = Mapping[int, tuple[int, ...]]  # the team of workers that share each document group


@dataclass(frozen=True, slots=True)
class Division:
    """Number of workers that share a token set, of which `here` share the memory of one machine."""

    workers: int = 1
    here: int = 1


ALONE = Division()


def teams(groups: int, workers: Collection[int]) -> list[tuple[int, ...]]:
    """Return the workers in teams. Each team owns document groups together.

    Everyone is alone, unless they would then measure all groups in fewer than `LEAST_TURNS`. Otherwise there are as
    many teams as that allows, or up to half as many, so that as few workers as possible are in larger teams.
    """
    most = max(1, groups // LEAST_TURNS)
    count = len(workers)
    if count > most:
        count = max(range(most, most // 2, -1), key=lambda number: len(workers) // number * number)
    return [tuple(sorted(workers)[first::count]) for first in range(count)]


def divided(owners: Owners, tokens: Sequence[int], workers: Collection[int]) -> dict[int, tuple[int, ...]]:
    """Return new owners of all document groups, all of them among `workers`. `tokens`: of each group.

    As few groups as possible change hands as long as everyone is alone.
    """
    found = teams(len(tokens), workers)
    alone = len(found) == len(workers)
    number = {own: team for team, own in enumerate(found)}
    before = {group: number[own] for group, own in owners.items() if alone and own in number}
    return {group: found[team] for group, team in _given_out(before, tokens, range(len(found))).items()}


def _given_out(before: Mapping[int, int], tokens: Sequence[int], teams: Collection[int]) -> dict[int, int]:
    """Return the team of each document group: as few groups as possible change hands.

    Groups without a team go to those with the fewest tokens; then groups leave the team with the most tokens, as long
    as that evens them out.
    """
    new = dict(before)
    load = dict.fromkeys(teams, 0)
    for group, owner in new.items():
        load[owner] += tokens[group]
    for group in sorted(range(len(tokens)), key=lambda g: (-tokens[g], g)):
        if group not in new:
            new[group] = min(load, key=lambda team: (load[team], team))
            load[new[group]] += tokens[group]
    while True:
        most = max(load, key=lambda team: (load[team], -team))
        least = min(load, key=lambda team: (load[team], team))
        gap = load[most] - load[least]
        movable = [g for g, owner in new.items() if owner == most and tokens[g] < gap]
        if not movable:
            return new
        group = min(movable, key=lambda g: (abs(2 * tokens[g] - gap), -g))
        new[group] = least
        load[most] -= tokens[group]
        load[least] += tokens[group]


def left(owners: Owners, tokens: Sequence[int], workers: Collection[int]) -> dict[int, tuple[int, ...]]:
    """Return the owners that are still among `workers`; all are divided anew where a group has none."""
    remaining = {group: tuple(owner for owner in own if owner in workers) for group, own in owners.items()}
    return remaining if all(remaining.values()) else divided(owners, tokens, workers)


def owned(owners: Owners, worker: int) -> frozenset[int]:
    """Return the document groups of a worker."""
    return frozenset(group for group, own in owners.items() if worker in own)


def abreast(owners: Owners) -> int:
    """Return how many document groups are measured at the same time: one by each team."""
    return len(set(owners.values()))


def interleaved(order: Sequence[int], owners: Owners) -> list[int]:
    """Return the groups of `order` in turns: the first of every team, then the second of every team, and so on."""
    taken: Counter[tuple[int, ...]] = Counter()
    turns: dict[int, int] = {}
    for group in order:
        turns[group] = taken[owners[group]]
        taken[owners[group]] += 1
    return sorted(order, key=turns.__getitem__)
