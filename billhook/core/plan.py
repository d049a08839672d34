"""What "a pruning" means: sites, plans, anatomies, and what a search asks for. Plain values; no torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

from billhook.core.errors import PlanError, nearest

Part = Literal["attention", "mlp"]
PARTS: tuple[Part, ...] = ("attention", "mlp")


@dataclass(frozen=True, order=True, slots=True)
class Site:
    """One half of a block. `block` is its position in the unpruned model, from 0."""

    block: int
    part: Part

    def __str__(self) -> str:
        return f"{self.part}.{self.block}"

    def to_json(self) -> str:
        return str(self)

    @staticmethod
    def from_json(value: str) -> Site:
        return Site.parse(value)

    @staticmethod
    def parse(text: str) -> Site:
        """`attention.7` or `mlp.16`. Raises PlanError with the spelling that is meant."""
        match = re.fullmatch(r"\s*([A-Za-z_]+)[.:](\d+)\s*", text)
        if match and match[1] in PARTS:
            return Site(int(match[2]), cast(Part, match[1]))
        near = nearest(match[1], PARTS) if match else None
        guess = f" Did you mean {near}.{match[2]}?" if match and near else ""
        raise PlanError(f"{text.strip()!r} is not a site.{guess} A site is written attention.7 or mlp.16.")


@dataclass(frozen=True, order=True, slots=True)
class KeptGroups:
    """A site that stays with some of its channel groups: `groups`, ascending, in numbers of the unpruned model."""

    site: Site
    groups: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.site}[{format_ranges(self.groups)}]"

    def to_json(self) -> str:
        return str(self)

    @staticmethod
    def from_json(value: str) -> KeptGroups:
        return next(iter(Plan.parse([value]).narrowed))


def format_ranges(numbers: Iterable[int]) -> str:
    """`0-511 600` of ascending numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def parse_ranges(text: str) -> tuple[int, ...]:
    """What `format_ranges` wrote. Raises PlanError unless it ascends."""
    if not re.fullmatch(r"\s*\d+(-\d+)?(\s+\d+(-\d+)?)*\s*", text):
        raise PlanError(f"[{text}] does not say which channel groups stay. Write their numbers: [0-511 600].")
    told = [tuple(map(int, piece.split("-"))) for piece in text.split()]
    found = [number for piece in told for number in range(piece[0], piece[-1] + 1)]
    if found != sorted(set(found)) or any(piece[0] > piece[-1] for piece in told):
        raise PlanError(f"[{text}] does not ascend. Write every channel group once, in order: [0-511 600].")
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Plan:
    """What goes. Counts in positions of the unpruned model, so that removing one site renumbers nothing.

    `narrowed`: sites that stay with some of their channel groups; all others keep all that they have.
    """

    removed: frozenset[Site] = frozenset()
    narrowed: frozenset[KeptGroups] = frozenset()

    def __bool__(self) -> bool:
        """Whether anything goes."""
        return bool(self.removed or self.narrowed)

    def without(self, *sites: Site) -> Plan:
        """This plan with `sites` removed as well."""
        return self.combined_with(Plan(frozenset(sites)))

    def combined_with(self, step: Plan) -> Plan:
        """This plan with what `step` removes gone as well, and what it narrows as narrow as it says."""
        touched = step.removed | {narrow.site for narrow in step.narrowed}
        stay = frozenset(narrow for narrow in self.narrowed if narrow.site not in touched)
        return Plan(self.removed | step.removed, stay | step.narrowed)

    def sites(self) -> list[Site]:
        """The removed sites, sorted by block and, within a block, attention first."""
        return sorted(self.removed)

    def names(self) -> list[str]:
        """`["attention.7", "mlp.16", …]`, sorted as `sites()`."""
        return [str(site) for site in self.sites()]

    def narrowed_names(self) -> list[str]:
        """`["mlp.3[0-511 600]", …]`, sorted by site."""
        return [str(narrow) for narrow in sorted(self.narrowed)]

    def to_list(self) -> list[str]:
        """All of it, as `parse` reads it: `names()`, then `narrowed_names()`."""
        return [*self.names(), *self.narrowed_names()]

    def blocks(self) -> list[int]:
        """Blocks that lost both of their sites."""
        return sorted({s.block for s in self.removed if {Site(s.block, p) for p in PARTS} <= self.removed})

    def key(self) -> str:
        """16 hex digits. Equal plans have equal keys on every machine."""
        told: list[object] = [(s.block, s.part) for s in self.sites()]
        told += self.narrowed_names()
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return ",".join(self.to_list()) or "nothing"

    def to_json(self) -> dict[str, Any]:
        return {"removed": self.names(), "narrowed": self.narrowed_names(), "key": self.key()}

    @staticmethod
    def from_json(value: dict[str, Any]) -> Plan:
        return Plan.parse([*value["removed"], *value["narrowed"]])

    @staticmethod
    def parse(names: Iterable[str]) -> Plan:
        """A plan from what `names()` and `narrowed_names()` write. Raises PlanError on a malformed or repeated name."""
        sites: list[Site] = []
        narrowed: list[KeptGroups] = []
        for name in names:
            match = re.fullmatch(r"([^\[\]]*)\[([^\[\]]*)\]\s*", name)
            if match:
                narrowed.append(KeptGroups(Site.parse(match[1]), parse_ranges(match[2])))
            else:
                sites.append(Site.parse(name))
        every = [*sites, *(narrow.site for narrow in narrowed)]
        twice = sorted({s for s in every if every.count(s) > 1})
        if twice:
            raise PlanError(f"The plan names {', '.join(map(str, twice))} more than once. Name every site once.")
        return Plan(frozenset(sites), frozenset(narrowed))


@dataclass(frozen=True, slots=True)
class MeasureRequest:
    """What a search wants measured. `full_results=k`: the k lowest losses in full, the others may come back as bounds.

    `tokens=n`: only the first n calibration tokens. `expected`: what the search expects of each plan, lower = better,
    in any unit; only their order counts, and only for what is measured first. `ceiling`: nats of every document; a
    plan that has more in all may come back as a bound, even if it is among the best.
    """

    plans: tuple[Plan, ...]
    full_results: int | None = None
    tokens: int | None = None
    expected: tuple[float, ...] | None = None
    ceiling: tuple[float, ...] | None = None
