"""What "a pruning" means: sites, plans, anatomies, and what a search asks for. Plain values; no torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast

from billhook.errors import PlanError, nearest

Part = Literal["attention", "mlp"]
PARTS: tuple[Part, ...] = ("attention", "mlp")


@dataclass(frozen=True, order=True, slots=True)
class Site:
    """One half of a block. `block` is its position in the unpruned model, from 0."""

    block: int
    part: Part

    def __str__(self) -> str:
        return f"{self.part}.{self.block}"

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
class GroupSize:
    """One channel group of a site in numbers; units as in SiteSize."""

    parameters: int
    bytes: int
    kv_bytes_per_token: int
    flops_per_token: int
    ns_per_token: int = 0


@dataclass(frozen=True, slots=True)
class SiteSize:
    """One site in numbers. Bytes are in the checkpoint's own dtype."""

    site: Site
    parameters: int
    bytes: int
    kv_bytes_per_token: int
    flops_per_token: int  # 2 per multiply-add of the weights that one token touches, without the attention scores
    ns_per_token: int = 0  # measured, where a budget counts time; see speed.cost_table
    groups: tuple[int, ...] = ()  # channel groups that it has, in numbers of the unpruned model; none: it cannot narrow
    group: GroupSize | None = None  # each of them
    experts: int = 1  # of which all keep as many groups; they are numbered expert by expert
    channels: int = 1  # of each group: a neuron has one, a KV group those of a head
    multiple: int = 1  # groups of an expert, or of the site, that stay: of which number they are a multiple


@dataclass(frozen=True, slots=True)
class SharedNorms:
    """What both sites of a block use and neither owns (a norm that they share): it goes with the whole block."""

    block: int
    parameters: int
    bytes: int
    kv_bytes_per_token: int = 0
    flops_per_token: int = 0
    ns_per_token: int = 0


@dataclass(frozen=True, slots=True)
class Unassigned:
    """What no site owns: embeddings, final norm, head; tied parameters once. Units as in SiteSize."""

    parameters: int
    bytes: int
    flops_per_token: int
    kv_bytes_per_token: int = 0
    ns_per_token: int = 0


@dataclass(frozen=True, slots=True)
class Anatomy:
    """A model's sites and their sizes. `sites` are those alive, in order of execution."""

    model_type: str
    blocks: int  # of the unpruned model
    sites: tuple[SiteSize, ...]
    rest: Unassigned
    shared: tuple[SharedNorms, ...] = ()

    def sites_present(self) -> tuple[Site, ...]:
        return tuple(size.site for size in self.sites)

    def total(self, what: str, plan: Plan = Plan()) -> int:
        """Sum of `parameters`, `bytes`, `kv_bytes_per_token` … over what `plan` leaves."""
        kept = [size for size in self.sites if size.site not in plan.removed]
        blocks = {size.site.block for size in kept}
        held = [*kept, *(shared for shared in self.shared if shared.block in blocks), self.rest]
        narrower = sum(int(getattr(size.group, what)) * count for size, count in self.narrowed(plan))
        return sum(int(getattr(size, what)) for size in held) - narrower

    def narrowed(self, plan: Plan) -> list[tuple[SiteSize, int]]:
        """The sites that `plan` narrows, and how many of their channel groups go."""
        kept = {narrow.site: len(narrow.groups) for narrow in plan.narrowed}
        return [(size, len(size.groups) - kept[size.site]) for size in self.sites if size.site in kept]

    def check(self, plan: Plan, protected: frozenset[Site] = frozenset()) -> Plan:
        """`plan` itself. Raises PlanError if it names a site that is not there, or removes what must stay."""
        alive = set(self.sites_present())
        for site in plan.sites():
            if not 0 <= site.block < self.blocks:
                raise PlanError(f"There is no {site}: the model has blocks 0 to {self.blocks - 1}.")
            if site not in alive:
                raise PlanError(f"{site} is already gone from this model. `billhook inspect` lists what is left.")
        self._check_groups(plan)
        hit = sorted((plan.removed | {narrow.site for narrow in plan.narrowed}) & protected)
        if hit:
            raise PlanError(f"The plan removes {', '.join(map(str, hit))}, which --protect keeps. Change one of them.")
        left = alive - plan.removed
        for part in PARTS:
            if not any(site.part == part for site in left):
                raise PlanError(f"The plan removes every {part} site. At least one of each kind must stay.")
        return plan

    def _check_groups(self, plan: Plan) -> None:
        """Raises PlanError for channel groups that are not there, none at all, or experts of different widths."""
        sizes = {size.site: size for size in self.sites}
        for site, kept in ((narrow.site, narrow.groups) for narrow in sorted(plan.narrowed)):
            if site not in sizes:
                raise PlanError(f"There is no {site} to be narrowed. `billhook inspect` lists what is left.")
            size = sizes[site]
            if not size.groups:
                raise PlanError(f"{site} has no channel groups that could go one by one. Remove it, or leave it.")
            if not kept:
                raise PlanError(
                    f"{site} would keep no channel group. A site that loses all of them is removed: {site}."
                )
            if missing := sorted(set(kept) - set(size.groups)):
                raise PlanError(f"{site} has no channel group {missing[0]}: it has {format_ranges(size.groups)}.")
            of_each, stay = len(size.groups) // size.experts, set(kept)
            shares = (size.groups[e * of_each : (e + 1) * of_each] for e in range(size.experts))
            counts = {len(stay.intersection(share)) for share in shares}
            if len(counts) > 1 or 0 in counts:
                raise PlanError(
                    f"{site} would keep {min(counts)} to {max(counts)} neurons of its experts, which share one shape. "
                    "Keep as many of each."
                )
            if max(counts) % size.multiple:
                raise PlanError(
                    f"{site} would keep {max(counts)} neurons of each expert. Keep a multiple of {size.multiple}."
                )


@dataclass(frozen=True, slots=True)
class MeasureRequest:
    """What a search wants measured. `full_results=k`: the k lowest losses in full, the others may come back as bounds.

    `tokens=n`: only the first n calibration tokens. `expected`: what the search expects of each plan, lower = better, in
    any unit; only their order counts, and only for what is measured first. `ceiling`: nats of every
    document; a plan that has more in all may come back as a bound, even if it is among the best.
    """

    plans: tuple[Plan, ...]
    full_results: int | None = None
    tokens: int | None = None
    expected: tuple[float, ...] | None = None
    ceiling: tuple[float, ...] | None = None
