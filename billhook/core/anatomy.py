"""The anatomy of a model: sizes of its sites, blocks and channel groups."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise

from billhook.core.errors import PlanError, option
from billhook.core.plan import (
    PARTS,
    Ends,
    KeptGroups,
    Plan,
    Site,
    format_ranges,
    parse_ends,
    parse_ranges,
    split_name,
)
from billhook.core.results.json_form import JsonObject

SEARCH_LIMITS = ("counts", "by_expert")  # of a site: what a search may do with it, and no size


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
    """One site in numbers. Bytes are in the checkpoint's dtype."""

    site: Site
    parameters: int
    bytes: int
    kv_bytes_per_token: int
    flops_per_token: int  # 2 per multiply-add of the weights that one token touches, without the attention scores
    ns_per_token: int = 0  # measured, where a budget counts time; see speed.cost_table
    groups: tuple[int, ...] = ()  # its channel groups, numbered as in the unpruned model; none: it cannot be narrowed
    group: GroupSize | None = None  # of each channel group
    experts: int = 1  # all keep equally many groups, which are numbered expert by expert
    channels: int = 1  # per group: one of a neuron, those of a head of a KV group
    multiple: int = 1  # the kept groups of an expert, or of the site, are a multiple of this
    counts: tuple[int, ...] = ()  # in how many groups a search may leave it, ascending; none: in any number
    expert: GroupSize | None = None  # of each expert, besides its groups: its row of the router; none: no expert can go
    fewest: int = 1  # experts that are kept at least: so many as a token meets, and two
    by_expert: bool = False  # whether a search removes whole experts instead of neurons of each

    @property
    def per_expert(self) -> int:
        """The channel groups of each expert, or of the site."""
        return len(self.groups) // self.experts

    def kept_experts(self, kept: Sequence[int]) -> list[int]:
        """Return how many of the ascending `kept` groups are those of each expert: none of one that is removed."""
        firsts = (bisect_left(kept, first) for first in self.groups[:: self.per_expert])
        return [after - before for before, after in pairwise((*firsts, len(kept)))]

    def lost(self, kept: Sequence[int]) -> GroupSize:
        """Return what the site loses where it keeps `kept` of its groups.

        A token meets as many experts as before: FLOPs and time shrink with the width of the experts that are kept.
        """
        assert self.group is not None, f"{self.site} has no channel groups"
        count = len(self.groups) - len(kept)
        experts = sum(map(bool, self.kept_experts(kept))) if self.experts > 1 else 1
        gone = self.experts - experts
        met = self.experts * (self.per_expert - len(kept) // max(1, experts))
        row = self.expert or GroupSize(0, 0, 0, 0)
        return GroupSize(
            self.group.parameters * count + row.parameters * gone,
            self.group.bytes * count + row.bytes * gone,
            self.group.kv_bytes_per_token * count,
            self.group.flops_per_token * met + row.flops_per_token * gone,
            self.group.ns_per_token * met,
        )

    def to_json(self) -> JsonObject:
        """Return the fields; `groups` is the number of channel groups, `numbers` their ranges."""
        changed = {"site": str(self.site), "groups": len(self.groups), "numbers": format_ranges(self.groups)}
        return {name: value for name, value in (asdict(self) | changed).items() if name not in SEARCH_LIMITS}

    @staticmethod
    def from_json(value: JsonObject) -> SiteSize:
        fields = {name: x for name, x in value.items() if name != "numbers"}
        groups = parse_ranges(value["numbers"]) if value["numbers"] else ()
        parts = {name: GroupSize(**value[name]) for name in ("group", "expert") if value.get(name) is not None}
        return SiteSize(**fields | {"site": Site.parse(value["site"]), "groups": groups} | parts)


@dataclass(frozen=True, slots=True)
class SharedNorms:
    """What both sites of a block use: norms, or matrices in its shortcuts; it is removed with the whole block."""

    block: int
    parameters: int
    bytes: int
    kv_bytes_per_token: int = 0
    flops_per_token: int = 0
    ns_per_token: int = 0


@dataclass(frozen=True, slots=True)
class Unassigned:
    """Parameters of no site: embeddings, final norm, head; tied ones once. Units as in SiteSize."""

    parameters: int
    bytes: int
    flops_per_token: int
    kv_bytes_per_token: int = 0
    ns_per_token: int = 0


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """A whole model in numbers; units as in SiteSize. Unmeasured time is 0."""

    parameters: int
    bytes: int
    kv_bytes_per_token: int
    flops_per_token: int
    ns_per_token: int = 0


@dataclass(frozen=True, slots=True)
class Anatomy:
    """A model's sites and their sizes; `sites`: those that it still has, in order of execution."""

    model_type: str
    blocks: int  # of the unpruned model
    sites: tuple[SiteSize, ...]
    rest: Unassigned
    shared: tuple[SharedNorms, ...] = ()

    def sites_present(self) -> tuple[Site, ...]:
        return tuple(size.site for size in self.sites)

    def total(self, what: str, plan: Plan = Plan()) -> int:  # noqa: B008 - an immutable value
        """Sum `parameters`, `bytes`, `kv_bytes_per_token` … over everything that `plan` keeps."""
        kept = [size for size in self.sites if size.site not in plan.removed]
        blocks = {size.site.block for size in kept}
        parts = [*kept, *(shared for shared in self.shared if shared.block in blocks), self.rest]
        lost = sum(int(getattr(each, what)) for _, each in self.lost(plan))
        return sum(int(getattr(size, what)) for size in parts) - lost

    def sizes(self, plan: Plan = Plan()) -> ModelSizes:  # noqa: B008 - an immutable value
        """Return all sizes of the model after `plan`."""
        return ModelSizes(*(self.total(each.name, plan) for each in fields(ModelSizes)))

    def lost(self, plan: Plan) -> list[tuple[SiteSize, GroupSize]]:
        """List the sites that `plan` narrows, with what each loses."""
        kept = {narrow.site: narrow.groups for narrow in plan.narrowed}
        return [(size, size.lost(kept[size.site])) for size in self.sites if size.site in kept and size.group]

    def parse(self, names: Iterable[str], protected: frozenset[Site] = frozenset()) -> Plan:
        """Return the plan of names as `Plan.to_list` writes them. Raises PlanError as `Plan.parse` and `check` do.

        The model bounds every range before any is built.
        """
        sizes, listed = {size.site: size for size in self.sites}, list(names)
        for name in listed:
            site, kept = split_name(name)
            size = sizes.get(site)
            if kept is None:
                continue
            if size is None or not size.groups:
                self.check(Plan(frozenset(), frozenset({KeptGroups(site, ())})))
            elif (missing := _first_missing(size.groups, parse_ends(kept))) is not None:
                raise _no_group(size, missing)
        return self.check(Plan.parse(listed), protected)

    def check(self, plan: Plan, protected: frozenset[Site] = frozenset()) -> Plan:
        """Return `plan`. Raises PlanError if it names a missing site, or removes a protected or last one."""
        present = set(self.sites_present())
        for site in plan.sites():
            if not 0 <= site.block < self.blocks:
                raise PlanError(f"There is no {site}: the model has blocks 0 to {self.blocks - 1}.")
            if site not in present:
                raise PlanError(f"{site} was already removed from this model. `billhook inspect` lists its sites.")
        self._check_groups(plan)
        touched = sorted((plan.removed | {narrow.site for narrow in plan.narrowed}) & protected)
        if touched:
            names = ", ".join(map(str, touched))
            raise PlanError(f"The plan removes {names}, which {option('protect')} keeps. Change one of them.")
        for part in PARTS:
            if not any(site.part == part for site in present - plan.removed):
                raise PlanError(f"The plan removes every {part} site. At least one of each kind must stay.")
        return plan

    def _check_groups(self, plan: Plan) -> None:
        """Raise PlanError for missing channel groups, none at all, too few experts, or some of different widths."""
        sizes = {size.site: size for size in self.sites}
        for site, kept in ((narrow.site, narrow.groups) for narrow in sorted(plan.narrowed)):
            if site not in sizes:
                raise PlanError(f"There is no {site} to be narrowed. `billhook inspect` lists the sites of the model.")
            size = sizes[site]
            if not size.groups:
                raise PlanError(f"{site} cannot be narrowed: it has no channel groups. Remove it or keep it whole.")
            if not kept:
                raise PlanError(f"{site} would keep no channel group. To remove the whole site, write {site}.")
            if missing := sorted(set(kept) - set(size.groups)):
                raise _no_group(size, missing[0])
            _check_experts(size, [count for count in size.kept_experts(kept) if count])


def _check_experts(size: SiteSize, counts: Sequence[int]) -> None:
    """Raise PlanError for counts of kept groups, one for each kept expert, that one shape cannot hold."""
    if len(set(counts)) > 1:
        raise PlanError(
            f"{size.site} keeps {min(counts)} to {max(counts)} neurons of its experts, which share one shape. Keep "
            "equally many of each, or none of an expert to remove it."
        )
    if len(counts) < size.experts and size.expert is None:
        raise PlanError(
            f"{size.site} would keep {len(counts)} of its {size.experts} experts, and its architecture names no router "
            "(billhook/models/architectures.py). Keep as many neurons of each expert."
        )
    if len(counts) < size.fewest:
        raise PlanError(
            f"{size.site} would keep {len(counts)} of its {size.experts} experts. Keep {size.fewest} or more: each "
            f"token meets as many. To remove the whole site, write {size.site}."
        )
    if counts[0] % size.multiple and counts[0] < size.per_expert:
        raise PlanError(f"{size.site} keeps {counts[0]} neurons of each expert. Keep a multiple of {size.multiple}.")


def _first_missing(groups: Sequence[int], ranges: Iterable[Ends]) -> int | None:
    """Return the lowest number of ascending ranges that is not among the ascending groups."""
    for first, last in ranges:
        start = bisect_left(groups, first)
        for place in range(start, start + last - first + 1):
            if place == len(groups) or groups[place] != first + place - start:
                return first + place - start
    return None


def _no_group(size: SiteSize, number: int) -> PlanError:
    return PlanError(f"{size.site} has no channel group {number}: it has {format_ranges(size.groups)}.")
