"""The anatomy of a model: sizes of its sites, blocks and channel groups."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from billhook.core.errors import PlanError, option
from billhook.core.plan import PARTS, Plan, Site, format_ranges, parse_ranges


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

    def to_json(self) -> dict[str, Any]:
        """Its fields; of channel groups how many there are under `groups`, and which under `numbers`."""
        own = {"site": str(self.site), "groups": len(self.groups), "numbers": format_ranges(self.groups)}
        return asdict(self) | own

    @staticmethod
    def from_json(value: dict[str, Any]) -> SiteSize:
        own = {name: each for name, each in value.items() if name != "numbers"}
        groups = parse_ranges(value["numbers"]) if value["numbers"] else ()
        group = None if value["group"] is None else GroupSize(**value["group"])
        return SiteSize(**own | {"site": Site.parse(value["site"]), "groups": groups, "group": group})


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
class ModelSizes:
    """A whole model in numbers; units as in SiteSize. Time is 0 where it was not measured."""

    parameters: int
    bytes: int
    kv_bytes_per_token: int
    flops_per_token: int
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

    def total(self, what: str, plan: Plan = Plan()) -> int:  # noqa: B008 - an immutable value
        """Sum of `parameters`, `bytes`, `kv_bytes_per_token` … over what `plan` leaves."""
        kept = [size for size in self.sites if size.site not in plan.removed]
        blocks = {size.site.block for size in kept}
        held = [*kept, *(shared for shared in self.shared if shared.block in blocks), self.rest]
        narrower = sum(int(getattr(size.group, what)) * count for size, count in self.narrowed(plan))
        return sum(int(getattr(size, what)) for size in held) - narrower

    def sizes(self, plan: Plan = Plan()) -> ModelSizes:  # noqa: B008 - an immutable value
        """All of the model's sizes after `plan`."""
        return ModelSizes(*(self.total(each.name, plan) for each in fields(ModelSizes)))

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
            raise PlanError(
                f"The plan removes {', '.join(map(str, hit))}, which {option('protect')} keeps. Change one of them."
            )
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
