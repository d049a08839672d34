"""The problem of a search: an anatomy, budgets, and protected sites. Plain values; no torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import combinations, groupby
from typing import cast

from billhook.core.anatomy import Anatomy, SiteSize
from billhook.core.budget import UNITS, Budget
from billhook.core.errors import BudgetError, PlanError
from billhook.core.plan import PARTS, Part, Plan, Site

NOTHING = Plan()
Move = tuple[Site, ...]
MoveKind = tuple[tuple[int, ...], frozenset[Part]]  # the cost of a move to each budget, and its parts

# A site, a block, or a span of blocks from its first to its last, by positions in the unpruned model.
ScoredUnit = Site | int | tuple[int, int]
_NAMED = {"shortened-llama": "first4,last2", "sleb": "first1,last1"}  # protection of the papers


@dataclass(frozen=True)
class Problem:
    """The problem of a search, which sees this and the losses that it requests, and nothing else.

    All `budgets` must be met. `protected`: sites that no search changes; those that no budget counts are added.
    `scores`: importance scores of sites, blocks and spans, higher = removal hurts more; None without a metric.
    `group_scores`: those of channel groups, in the order of the anatomy. `blocks_only`: sites are removed with their
    block alone, whatever the budgets count.
    """

    anatomy: Anatomy
    budgets: tuple[Budget, ...]
    protected: frozenset[Site] = frozenset()
    seed: int = 0
    scores: Mapping[ScoredUnit, float] | None = None
    group_scores: Mapping[Site, Sequence[float]] | None = None
    blocks_only: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "protected", self.protected | self.uncounted)

    def is_met(self, plan: Plan) -> bool:
        return self._suffices(self.removed_cost(plan))

    def is_valid(self, plan: Plan) -> bool:
        """Return whether a plan keeps at least one attention, one mlp, and all protected sites."""
        one_left = (any(s.part == part and s not in plan.removed for s in self._costs) for part in PARTS)
        return all(one_left) and plan.removed.isdisjoint(self.protected)

    @cached_property
    def targets(self) -> tuple[Fraction, ...]:
        """The least `removed_cost` that meets each budget."""
        return tuple(budget.target(self.anatomy) for budget in self.budgets)

    @cached_property
    def uncounted(self) -> frozenset[Site]:
        """The sites whose removal no budget counts, such as an mlp for a budget in kv."""
        return frozenset() if self.whole_blocks else frozenset(s for s, cost in self._costs.items() if not any(cost))

    def counts_groups(self, size: SiteSize) -> bool:
        """Return whether a budget counts a channel group of a site."""
        if size.group is None:
            return False
        one = replace(size, **asdict(size.group))
        return any(UNITS[b.unit].total is not None and UNITS[b.unit].cost(one) for b in self.budgets)

    @cached_property
    def _costs(self) -> dict[Site, tuple[int, ...]]:
        return {
            size.site: tuple(0 if UNITS[b.unit].whole_blocks else UNITS[b.unit].cost(size) for b in self.budgets)
            for size in sorted(self.anatomy.sites, key=lambda size: size.site)
        }

    # -- moves ------------------------------------------------------------------------------------------------------

    @property
    def whole_blocks(self) -> bool:
        """Whether moves remove whole blocks: nothing else may be removed, or one of the budgets counts them."""
        return self.blocks_only or any(UNITS[budget.unit].whole_blocks for budget in self.budgets)

    def groups(self, plan: Plan = NOTHING) -> list[Move]:
        """List the moves, sorted: sites or whole blocks that `plan` keeps and a budget counts."""
        left = [site for site in self._costs if site not in plan.removed]
        if self.whole_blocks:
            return [tuple(sites) for _, sites in groupby(left, key=lambda site: site.block)]
        return [(site,) for site in left if any(self.cost((site,)))]

    def removed_moves(self, plan: Plan) -> list[Move]:
        """List the removed sites of a plan as moves; sites that no budget counts one by one."""
        groups = [group for group in self.groups() if set(group) <= plan.removed]
        counted = {site for group in groups for site in group}
        return groups + [(site,) for site in plan.sites() if site not in counted]

    def moves(self, plan: Plan) -> list[Move]:
        """List the next moves in order: those that help an unmet budget.

        Moves are left out that remove the last site of a part, or put the budgets out of reach.
        """
        short = [spent < needed for spent, needed in zip(self.removed_cost(plan), self.targets, strict=True)]
        free = {group: self._kind(group) for group in self._free(plan)}
        count = Counter(free.values())
        enough = [set(keep) for keep, most in self._last(plan) if self._suffices(most)]
        if not enough:
            return []
        required = {kind for kind in set.intersection(*enough) if count[kind] == 1}  # whatever else is removed
        helps = {kind: not any(short) or any(c for c, s in zip(kind[0], short, strict=True) if s) for kind in count}
        return [group for group, kind in free.items() if helps[kind] and kind not in required]

    def cost(self, sites: Iterable[Site]) -> tuple[int, ...]:
        """Return the cost of removing `sites` to each budget, in its unit."""
        costs = [self._costs[site] for site in sites]
        return tuple(
            1 if UNITS[b.unit].whole_blocks else sum(cost[i] for cost in costs) for i, b in enumerate(self.budgets)
        )

    def removed_cost(self, plan: Plan) -> tuple[int, ...]:
        """Return what a plan removes, in the unit of each budget."""
        whole = [UNITS[b.unit].whole_blocks for b in self.budgets]
        cost = self.cost(plan.removed)
        parts = zip(self.budgets, whole, cost, strict=True)
        return tuple(b.removed_cost(self.anatomy, plan) if w or plan.narrowed else c for b, w, c in parts)

    def relative_cost(self, sites: Iterable[Site]) -> Fraction:
        """Return the cost of a move as a share of each target, summed over the budgets."""
        return sum((cost / needed for cost, needed in zip(self.cost(sites), self.targets, strict=True)), Fraction(0))

    def marginal_value(self, sites: Iterable[Site], plan: Plan) -> Fraction:
        """Return `relative_cost`, capped for each budget at what `plan` still lacks."""
        parts = zip(self.cost(sites), self.removed_cost(plan), self.targets, strict=True)
        return sum((min(Fraction(c), max(Fraction(0), n - s)) / n for c, s, n in parts), Fraction(0))

    # -- what can be reached ----------------------------------------------------------------------------------------

    def _free(self, plan: Plan) -> list[Move]:
        return [group for group in self.groups(plan) if not any(site in self.protected for site in group)]

    def _kind(self, group: Move) -> MoveKind:
        return self.cost(group), frozenset(site.part for site in group)

    def _last(self, plan: Plan) -> Iterator[tuple[tuple[MoveKind, ...], tuple[int, ...]]]:
        """Yield each choice of the last kept sites, and each budget's cost if all others are removed."""
        free = self._free(plan)
        removable = {site for group in free for site in group} | plan.removed
        missing = set(PARTS) - {site.part for site in self._costs if site not in removable}
        total = self.removed_cost(plan.without(*removable))
        kinds = list(dict.fromkeys(map(self._kind, free)))  # two of a kind are never kept for two parts
        for keep in (keep for n in range(len(missing) + 1) for keep in combinations(kinds, n)):
            if missing <= {part for _, parts in keep for part in parts}:
                yield keep, tuple(t - sum(cost[i] for cost, _ in keep) for i, t in enumerate(total))

    def _suffices(self, spent: Iterable[int]) -> bool:
        return all(s >= n for s, n in zip(spent, self.targets, strict=True))

    def reachable(self, plan: Plan = NOTHING) -> tuple[int, ...]:
        """Return the largest cost of each budget alone that a plan containing `plan` can remove."""
        return tuple(max(costs) for costs in zip(*(most for _, most in self._last(plan)), strict=True))

    def check(self) -> Problem:
        """Return the problem. Raises BudgetError, with the most that can be removed, if no plan meets the budgets."""
        for budget, needed in zip(self.budgets, self.targets, strict=True):
            if not needed:
                raise BudgetError(f"{budget} asks for nothing: this model has no {budget.unit} to remove.")
        if any(self._suffices(most) for _, most in self._last(NOTHING)):
            return self
        stay = "while one attention, one mlp and everything protected are kept. Ask for less, or protect less."
        for budget, most, needed in zip(
            self.budgets, self.reachable() or [0] * len(self.budgets), self.targets, strict=True
        ):
            if most < needed:
                raise BudgetError(
                    f"{budget} cannot be met: it asks for {budget.format(needed)}, and at most {budget.format(most)} "
                    f"can be removed {stay}"
                )
        raise BudgetError(f"{', '.join(map(str, self.budgets))} cannot all be met {stay}")


def format_unit(unit: ScoredUnit) -> str:
    """Write `attention.3`, `3` for a block, `3-7` for a span of blocks."""
    return "-".join(map(str, unit)) if isinstance(unit, tuple) else str(unit)


def parse_unit(text: str) -> ScoredUnit:
    """Read the unit that `format_unit` wrote."""
    ends = text.split("-")
    if len(ends) == 2:
        return int(ends[0]), int(ends[1])
    return int(text) if text.isdigit() else Site.parse(text)


def parse_protection(text: str, anatomy: Anatomy) -> frozenset[Site]:
    """Parse protected sites: `attention.0,mlp.27-29,5-7,first4,last2`, sites, ranges of one part, or whole blocks.

    `shortened-llama` and `sleb` are the rules of these papers: first4,last2 and first1,last1. Raises PlanError for a
    malformed piece, or one outside the model.
    """
    sites: set[Site] = set()
    pieces = [piece for p in text.split(",") for piece in _NAMED.get(p.strip(), p).split(",")]
    for piece in filter(None, (p.strip() for p in pieces)):
        match = re.fullmatch(
            r"(?:(attention|mlp)\.)?(?:([0-9]{1,9})(?:-([0-9]{1,9}))?|(first|last)([0-9]{1,9}))", piece
        )
        if not match:
            raise PlanError(
                f"{piece!r} cannot be protected. Write attention.0, mlp.27-29, 0-3 (whole blocks), first4, last2 or "
                f"the rule of a paper: {', '.join(_NAMED)}."
            )
        if match[4]:
            count = int(match[5])
            first, last = (0, count - 1) if match[4] == "first" else (anatomy.blocks - count, anatomy.blocks - 1)
        else:
            first, last = int(match[2]), int(match[3] or match[2])
        if not 0 <= first <= last < anatomy.blocks:
            raise PlanError(f"{piece!r} is out of range: the model has blocks 0 to {anatomy.blocks - 1}.")
        parts = (cast(Part, match[1]),) if match[1] else PARTS
        sites |= {Site(block, part) for block in range(first, last + 1) for part in parts}
    return frozenset(sites)
