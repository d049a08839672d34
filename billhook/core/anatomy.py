"""The anatomy of a model: sizes of its sites, blocks and channel groups."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields

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

    def to_json(self) -> JsonObject:
        """Return the fields; `groups` is the number of channel groups, `numbers` their ranges."""
        changed = {"site": str(self.site), "groups": len(self.groups), "numbers": format_ranges(self.groups)}
        return {name: value for name, value in (asdict(self) | changed).items() if name != "counts"}

    @staticmethod
    def from_json(value: JsonObject) -> SiteSize:
        fields = {name: x for name, x in value.items() if name != "numbers"}
        groups = parse_ranges(value["numbers"]) if value["numbers"] else ()
        group = None if value["group"] is None else GroupSize(**value["group"])
        return SiteSize(**fields | {"site": Site.parse(value["site"]), "groups": groups, "group": group})


@dataclass(frozen=True, slots=True)
class SharedNorms:
    """A norm that both sites of a block use; it is removed with the whole block."""

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
        narrowed = sum(int(getattr(size.group, what)) * count for size, count in self.narrowed(plan))
        return sum(int(getattr(size, what)) for size in parts) - narrowed

    def sizes(self, plan: Plan = Plan()) -> ModelSizes:  # noqa: B008 - an immutable value
        """Return all sizes of the model after `plan`."""
        return ModelSizes(*(self.total(each.name, plan) for each in fields(ModelSizes)))

    def narrowed(self, plan: Plan) -> list[tuple[SiteSize, int]]:
        """List the sites that `plan` narrows, with the number of their removed channel groups."""
        kept = {narrow.site: len(narrow.groups) for narrow in plan.narrowed}
        return [(size, len(size.groups) - kept[size.site]) for size in self.sites if size.site in kept]

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
        """Raise PlanError for missing channel groups, none at all, or experts of different widths."""
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
            per_expert = len(size.groups) // size.experts
            shares = (size.groups[e * per_expert : (e + 1) * per_expert] for e in range(size.experts))
            counts = {len(set(kept).intersection(share)) for share in shares}
            if len(counts) > 1 or 0 in counts:
                raise PlanError(
                    f"{site} keeps {min(counts)} to {max(counts)} neurons of its experts, which share one shape. Keep "
                    "equally many of each."
                )
            if max(counts) % size.multiple:
                raise PlanError(
                    f"{site} keeps {max(counts)} neurons of each expert. Keep a multiple of {size.multiple}."
                )


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
