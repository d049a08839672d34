"""Sites, plans, and the measurement requests of a search. Plain values; no torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, cast

from billhook.core.errors import PlanError, nearest
from billhook.core.results.json_form import JsonObject

Part = Literal["attention", "mlp"]
PARTS: tuple[Part, ...] = ("attention", "mlp")
MOST_GROUPS = 2**22  # of one site of any model; a model in hand bounds them by its own


@dataclass(frozen=True, order=True, slots=True)
class Site:
    """The attention or the mlp of a block; `block`: its position in the unpruned model, from 0."""

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
        """Parse `attention.7` or `mlp.16`. Raises PlanError with the nearest spelling."""
        match = re.fullmatch(r"\s*([A-Za-z_]+)[.:]([0-9]{1,9})\s*", text)
        if match and match[1] in PARTS:
            return Site(int(match[2]), cast(Part, match[1]))
        near = nearest(match[1], PARTS) if match else None
        guess = f" Did you mean {near}.{match[2]}?" if match and near else ""
        raise PlanError(f"{shorten(text.strip())!r} is not a site.{guess} A site is written attention.7 or mlp.16.")


@dataclass(frozen=True, order=True, slots=True)
class KeptGroups:
    """A narrowed site and its kept channel groups, ascending, numbered as in the unpruned model."""

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
    """Write ascending numbers as `0-511 600`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def shorten(text: str, most: int = 60) -> str:
    """Return a text as a message shows it: its beginning."""
    return text if len(text) <= most else f"{text[:most]}…"


Ends = tuple[int, int]  # the first and the last number of a range


def parse_ends(text: str) -> list[Ends]:
    """Read the ends of ranges that `format_ranges` wrote, and build none. Raises PlanError unless they ascend."""
    if not re.fullmatch(r"\s*[0-9]{1,18}(-[0-9]{1,18})?(\s+[0-9]{1,18}(-[0-9]{1,18})?)*\s*", text):
        raise PlanError(
            f"[{shorten(text)}] does not list channel groups. Write the numbers of those to keep: [0-511 600]."
        )
    numbers = [tuple(map(int, piece.split("-"))) for piece in text.split()]
    ranges = [(ends[0], ends[-1]) for ends in numbers]
    flat = [number for first, last in ranges for number in ((first, last) if first != last else (first,))]
    if any(first > last for first, last in ranges) or any(a >= b for a, b in pairwise(flat)):
        raise PlanError(f"[{shorten(text)}] does not ascend. Write each channel group once, in order: [0-511 600].")
    return ranges


def parse_ranges(text: str) -> tuple[int, ...]:
    """Read what `format_ranges` wrote. Raises PlanError unless it ascends, and for more groups than any model has."""
    ranges = parse_ends(text)
    if ranges[-1][1] >= MOST_GROUPS:
        raise PlanError(f"[{shorten(text)}] names channel group {ranges[-1][1]}; no site has {MOST_GROUPS:,} of them.")
    return tuple(number for first, last in ranges for number in range(first, last + 1))


@dataclass(frozen=True, slots=True)
class Plan:
    """The sites to remove, and those to narrow with their kept channel groups; others are kept whole.

    Numbers are those of the unpruned model, so that removing one site renumbers nothing.
    """

    removed: frozenset[Site] = frozenset()
    narrowed: frozenset[KeptGroups] = frozenset()

    def __bool__(self) -> bool:
        """Return whether the plan removes or narrows anything."""
        return bool(self.removed or self.narrowed)

    def without(self, *sites: Site) -> Plan:
        """Return this plan with `sites` removed as well."""
        return self.combined_with(Plan(frozenset(sites)))

    def combined_with(self, step: Plan) -> Plan:
        """Return this plan followed by `step`; where both narrow a site, `step` decides."""
        touched = step.removed | {narrow.site for narrow in step.narrowed}
        untouched = frozenset(narrow for narrow in self.narrowed if narrow.site not in touched)
        return Plan(self.removed | step.removed, untouched | step.narrowed)

    def sites(self) -> list[Site]:
        """List the removed sites by block, attention first."""
        return sorted(self.removed)

    def names(self) -> list[str]:
        """List the removed sites' names: `["attention.7", "mlp.16", …]`."""
        return [str(site) for site in self.sites()]

    def narrowed_names(self) -> list[str]:
        """List the narrowed sites with their kept groups: `["mlp.3[0-511 600]", …]`."""
        return [str(narrow) for narrow in sorted(self.narrowed)]

    def to_list(self) -> list[str]:
        """List all names, as `parse` reads them: `names()`, then `narrowed_names()`."""
        return [*self.names(), *self.narrowed_names()]

    def blocks(self) -> list[int]:
        """List the blocks of which both sites are removed."""
        return sorted({s.block for s in self.removed if {Site(s.block, p) for p in PARTS} <= self.removed})

    def key(self) -> str:
        """Return 16 hex digits; equal plans have equal keys on all machines."""
        content = [*((s.block, s.part) for s in self.sites()), *self.narrowed_names()]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return ",".join(self.to_list()) or "nothing"

    def to_json(self) -> JsonObject:
        return {"removed": self.names(), "narrowed": self.narrowed_names(), "key": self.key()}

    @staticmethod
    def from_json(value: JsonObject) -> Plan:
        return Plan.parse([*value["removed"], *value["narrowed"]])

    @staticmethod
    def parse(names: Iterable[str]) -> Plan:
        """Parse what `to_list()` returns. Raises PlanError on a malformed or repeated name."""
        sites: list[Site] = []
        narrowed: list[KeptGroups] = []
        for name in names:
            site, kept = split_name(name)
            if kept is None:
                sites.append(site)
            else:
                narrowed.append(KeptGroups(site, parse_ranges(kept)))
        times = Counter([*sites, *(narrow.site for narrow in narrowed)])
        if twice := sorted(site for site, count in times.items() if count > 1):
            raise PlanError(
                f"The plan names {shorten(', '.join(map(str, twice)))} more than once. Name each site once."
            )
        return Plan(frozenset(sites), frozenset(narrowed))


def split_name(name: str) -> tuple[Site, str | None]:
    """Return the site of a name as `Plan.to_list` writes it, and what stands in its brackets, if it has some."""
    match = re.fullmatch(r"([^\[\]]*)\[([^\[\]]*)\]\s*", name)
    return (Site.parse(match[1]), match[2]) if match else (Site.parse(name), None)


Phase = Literal["", "exchanges", "alone", "pairs", "changes"]


@dataclass(frozen=True, slots=True)
class MeasureRequest:
    """Plans that a search wants measured.

    - `full_results=k`: measure the k lowest losses in full; the others may be returned as bounds.
    - `tokens=n`: only the first n calibration tokens.
    - `estimate`: the losses only say what to measure next. They are returned as lower bounds, all made in the same way.
    - `expected`: the search's estimate per plan, lower = better; only their order matters, for what is measured first.
    - `ceiling`: nats per document; a plan with a larger sum may be returned as a bound, even among the best.
    - `phase`: what the search does, for readers of its progress: `exchanges` of what the first plan removes, each site
      `alone`, `pairs` of them, or `changes` of widths; empty while it removes more and more.
    """

    plans: tuple[Plan, ...]
    full_results: int | None = None
    tokens: int | None = None
    estimate: bool = False
    expected: tuple[float, ...] | None = None
    ceiling: tuple[float, ...] | None = None
    phase: Phase = ""
