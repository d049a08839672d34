"""What a search is asked to solve: an anatomy, what must go, and what must stay. Plain values; no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import combinations
from typing import cast

from billhook.budget import UNITS, Budget
from billhook.errors import BudgetError, PlanError
from billhook.plan import PARTS, Anatomy, Part, Plan, Site

NOTHING = Plan()
Move = tuple[Site, ...]
Unit = Site | int | tuple[int, int]  # what a score is of: a site, a block, or a run of blocks from first to last
_NAMED = {"shortened-llama": "first4,last2", "sleb": "first1,last1"}  # protection of the papers


@dataclass(frozen=True)
class Problem:
    """What a search is asked to solve. A search sees this and the losses it asks for, and nothing else.

    `budgets` must all be met. `scores`: of sites, blocks and runs by a metric, higher = removal hurts more; None where
    no metric was asked for.
    """

    anatomy: Anatomy
    budgets: tuple[Budget, ...]
    protected: frozenset[Site] = frozenset()
    seed: int = 0
    scores: Mapping[Unit, float] | None = None

    def met(self, plan: Plan) -> bool:
        return all(spent >= needed for spent, needed in zip(self.spent(plan), self.needed, strict=True))

    def legal(self, plan: Plan) -> bool:
        """Whether a plan leaves one attention, one mlp and all that is protected."""
        left = {site.part for site in self.anatomy.alive() if site not in plan.removed}
        return left == set(PARTS) and not plan.removed & self.protected

    @cached_property
    def needed(self) -> tuple[Fraction, ...]:
        """What each budget needs, as `Budget.spent` counts."""
        return tuple(budget.needed(self.anatomy) for budget in self.budgets)

    @cached_property
    def _costs(self) -> dict[Site, tuple[int, ...]]:
        return {
            size.site: tuple(0 if UNITS[b.unit].whole_blocks else UNITS[b.unit].cost(size) for b in self.budgets)
            for size in self.anatomy.sites
        }

    # -- moves ------------------------------------------------------------------------------------------------------

    @property
    def whole_blocks(self) -> bool:
        """Whether blocks go as a whole: one of the budgets counts them."""
        return any(UNITS[budget.unit].whole_blocks for budget in self.budgets)

    def groups(self, plan: Plan = NOTHING) -> list[Move]:
        """What may move at all, in order: sites or whole blocks that `plan` leaves and some budget counts."""
        left = [site for site in self.anatomy.alive() if site not in plan.removed]
        if self.whole_blocks:
            blocks = sorted({site.block for site in left})
            return [tuple(site for site in left if site.block == block) for block in blocks]
        return [(site,) for site in left if any(self.cost((site,)))]

    def moves(self, plan: Plan) -> list[Move]:
        """What may go next, in order: groups that help a budget which is not met; never the last of a part, nor what
        would put the budgets out of reach."""
        left = [site for site in self.anatomy.alive() if site not in plan.removed]
        scarce = {part for part in PARTS if sum(site.part == part for site in left) == 1}
        free = [g for g in self.groups(plan) if not any(s in self.protected or s.part in scarce for s in g)]
        short = [spent < needed for spent, needed in zip(self.spent(plan), self.needed, strict=True)]
        if any(short):
            free = [g for g in free if any(cost for cost, s in zip(self.cost(g), short, strict=True) if s)]
        return [g for g in free if self._in_reach(plan.without(*g))]

    def cost(self, sites: Iterable[Site]) -> tuple[int, ...]:
        """What a move of `sites` is worth to each budget, in its unit."""
        costs = [self._costs[site] for site in sites]
        return tuple(
            1 if UNITS[b.unit].whole_blocks else sum(cost[i] for cost in costs) for i, b in enumerate(self.budgets)
        )

    def spent(self, plan: Plan) -> tuple[int, ...]:
        """What a plan takes away, of each budget."""
        whole = [UNITS[b.unit].whole_blocks for b in self.budgets]
        cost = self.cost(plan.removed)
        return tuple(b.spent(self.anatomy, plan) if w else c for b, w, c in zip(self.budgets, whole, cost, strict=True))

    def weight(self, sites: Iterable[Site]) -> Fraction:
        """What a move is worth, as a share of what the budgets need, summed over them."""
        return sum((cost / needed for cost, needed in zip(self.cost(sites), self.needed, strict=True)), Fraction(0))

    def worth(self, sites: Iterable[Site], plan: Plan) -> Fraction:
        """As `weight`, but no more of each budget than `plan` still lacks."""
        each = zip(self.cost(sites), self.spent(plan), self.needed, strict=True)
        return sum((min(Fraction(c), max(Fraction(0), n - s)) / n for c, s, n in each), Fraction(0))

    # -- what can be reached ----------------------------------------------------------------------------------------

    def _most(self, plan: Plan) -> Iterator[tuple[int, ...]]:
        """What each budget gets if all goes that can: one for every choice of what stays as the last of its part."""
        free: list[Move] = []
        held: set[Part] = set()
        groups = self.groups(plan)
        moving = {site for group in groups for site in group}
        for group in groups:
            if any(site in self.protected for site in group):
                held |= {site.part for site in group}
            else:
                free.append(group)
        held |= {s.part for s in self.anatomy.alive() if s not in plan.removed and s not in moving}
        total = [spent + sum(self.cost(g)[i] for g in free) for i, spent in enumerate(self.spent(plan))]
        missing = set(PARTS) - held
        kinds = sorted({(self.cost(g), frozenset(s.part for s in g)) for g in free}, key=lambda kind: kind[0])
        # Two of a kind never stay for two different parts, unless a block lacks a part.
        enough = [keep for n in range(3) for keep in combinations(kinds, n) if missing <= _parts(keep)]
        for keep in enough:
            yield tuple(t - sum(cost[i] for cost, _ in keep) for i, t in enumerate(total))

    def _in_reach(self, plan: Plan) -> bool:
        return any(all(m >= n for m, n in zip(most, self.needed, strict=True)) for most in self._most(plan))

    def most(self, plan: Plan = NOTHING) -> tuple[int, ...]:
        """The most that each budget alone can get, if `plan` goes: one attention, one mlp, all protected stay."""
        return tuple(max(of_one) for of_one in zip(*self._most(plan), strict=True))

    def check(self) -> Problem:
        """The problem itself. Raises BudgetError, with the most that can go, if no plan meets the budgets."""
        if self._in_reach(Plan()):
            return self
        stay = "while one attention, one mlp and everything protected stay. Ask for less, or protect less."
        for budget, most, needed in zip(self.budgets, self.most() or [0] * len(self.budgets), self.needed, strict=True):
            if most < needed:
                raise BudgetError(
                    f"{budget} cannot be met: it asks for {budget.show(needed)}, and at most {budget.show(most)} can "
                    f"go {stay}"
                )
        raise BudgetError(f"{', '.join(map(str, self.budgets))} cannot all be met {stay}")


def _parts(groups: Iterable[tuple[tuple[int, ...], frozenset[Part]]]) -> set[Part]:
    return {part for _, parts in groups for part in parts}


def unit_name(unit: Unit) -> str:
    """`attention.3`, `3` for a block, `3-7` for a run of blocks."""
    return "-".join(map(str, unit)) if isinstance(unit, tuple) else str(unit)


def read_unit(text: str) -> Unit:
    """The unit that `unit_name` wrote."""
    ends = text.split("-")
    if len(ends) == 2:
        return int(ends[0]), int(ends[1])
    return int(text) if text.isdigit() else Site.parse(text)


def protection(text: str, anatomy: Anatomy) -> frozenset[Site]:
    """Sites that must stay, from `attention.0,mlp.27-29,5-7,first4,last2`: a site, a range of one part, whole blocks.

    `shortened-llama` and `sleb` are the rules of these papers: first4,last2 and first1,last1. Raises PlanError if a
    piece cannot be read or lies outside the model.
    """
    sites: set[Site] = set()
    pieces = [piece for p in text.split(",") for piece in _NAMED.get(p.strip(), p).split(",")]
    for piece in filter(None, (p.strip() for p in pieces)):
        match = re.fullmatch(r"(?:(attention|mlp)\.)?(?:(\d+)(?:-(\d+))?|(first|last)(\d+))", piece)
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
