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


@dataclass(frozen=True, slots=True)
class Plan:
    """What goes. Counts in positions of the unpruned model, so that removing one site renumbers nothing."""

    removed: frozenset[Site] = frozenset()

    def without(self, *sites: Site) -> Plan:
        """This plan with `sites` removed as well."""
        return Plan(self.removed | set(sites))

    def sites(self) -> list[Site]:
        """The removed sites, sorted by block and, within a block, attention first."""
        return sorted(self.removed)

    def names(self) -> list[str]:
        """`["attention.7", "mlp.16", …]`, sorted as `sites()`."""
        return [str(site) for site in self.sites()]

    def blocks(self) -> list[int]:
        """Blocks that lost both of their sites."""
        return sorted({s.block for s in self.removed if {Site(s.block, p) for p in PARTS} <= self.removed})

    def key(self) -> str:
        """16 hex digits. Equal plans have equal keys on every machine."""
        text = json.dumps([(s.block, s.part) for s in self.sites()])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return ",".join(self.names()) or "nothing"

    @staticmethod
    def of(names: Iterable[str]) -> Plan:
        """A plan from site names. Raises PlanError on a malformed or repeated name."""
        sites = [Site.parse(name) for name in names]
        twice = sorted({s for s in sites if sites.count(s) > 1})
        if twice:
            raise PlanError(f"The plan names {', '.join(map(str, twice))} more than once. Name every site once.")
        return Plan(frozenset(sites))


@dataclass(frozen=True, slots=True)
class SiteSize:
    """One site in numbers. Bytes are in the checkpoint's own dtype."""

    site: Site
    parameters: int
    bytes: int
    kv_bytes_per_token: int
    flops_per_token: int  # 2 per multiply-add of the weights that one token touches, without the attention scores
    ns_per_token: int = 0  # measured, where a budget counts time; see speed.cost_table


@dataclass(frozen=True, slots=True)
class Shared:
    """What both sites of a block use and neither owns (a norm that they share): it goes with the whole block."""

    block: int
    parameters: int
    bytes: int
    kv_bytes_per_token: int = 0
    flops_per_token: int = 0
    ns_per_token: int = 0


@dataclass(frozen=True, slots=True)
class Rest:
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
    rest: Rest
    shared: tuple[Shared, ...] = ()

    def alive(self) -> tuple[Site, ...]:
        return tuple(size.site for size in self.sites)

    def total(self, what: str, plan: Plan = Plan()) -> int:
        """Sum of `parameters`, `bytes`, `kv_bytes_per_token` … over what `plan` leaves."""
        kept = [size for size in self.sites if size.site not in plan.removed]
        blocks = {size.site.block for size in kept}
        held = [*kept, *(shared for shared in self.shared if shared.block in blocks), self.rest]
        return sum(int(getattr(size, what)) for size in held)

    def check(self, plan: Plan, protected: frozenset[Site] = frozenset()) -> Plan:
        """`plan` itself. Raises PlanError if it names a site that is not there, or removes what must stay."""
        alive = set(self.alive())
        for site in plan.sites():
            if not 0 <= site.block < self.blocks:
                raise PlanError(f"There is no {site}: the model has blocks 0 to {self.blocks - 1}.")
            if site not in alive:
                raise PlanError(f"{site} is already gone from this model. `billhook inspect` lists what is left.")
        hit = sorted(plan.removed & protected)
        if hit:
            raise PlanError(f"The plan removes {', '.join(map(str, hit))}, which --protect keeps. Change one of them.")
        left = alive - plan.removed
        for part in PARTS:
            if not any(site.part == part for site in left):
                raise PlanError(f"The plan removes every {part} site. At least one of each kind must stay.")
        return plan


@dataclass(frozen=True, slots=True)
class Ask:
    """What a search wants measured. `best=k`: the k lowest losses in full, the others may come back as bounds.

    `tokens=n`: only the first n calibration tokens. `hints`: what the search expects of each plan, lower = better, in
    any unit; only their order counts, and only for what is measured first. `below`: nats of every
    document; a plan that has more in all may come back as a bound, even if it is among the best.
    """

    plans: tuple[Plan, ...]
    best: int | None = None
    tokens: int | None = None
    hints: tuple[float, ...] | None = None
    below: tuple[float, ...] | None = None
