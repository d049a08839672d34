"""What "a pruning" means: sites, plans, anatomies, budgets and problems. Plain values; no torch."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, cast

from billhook.errors import BudgetError, PlanError, nearest

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


@dataclass(frozen=True, slots=True)
class Shared:
    """What both sites of a block use and neither owns (a norm that they share): it goes with the whole block."""

    block: int
    parameters: int
    bytes: int
    kv_bytes_per_token: int = 0
    flops_per_token: int = 0


@dataclass(frozen=True, slots=True)
class Rest:
    """What no site owns: embeddings, final norm, head; tied parameters once. Units as in SiteSize."""

    parameters: int
    bytes: int
    flops_per_token: int
    kv_bytes_per_token: int = 0


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
        """Sum of `parameters`, `bytes`, `kv_bytes_per_token` or `flops_per_token` over what `plan` leaves."""
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
class Unit:
    """How a budget is counted: which moves a search may make, and what a move of sites is worth."""

    name: str
    whole_blocks: bool
    cost: Callable[[SiteSize], int]  # of one site; a block is worth the sum of its sites, halved where whole_blocks


UNITS: dict[str, Unit] = {
    unit.name: unit
    for unit in (
        Unit("sites", False, lambda size: 1),
        Unit("attention", False, lambda size: int(size.site.part == "attention")),
        Unit("mlp", False, lambda size: int(size.site.part == "mlp")),
        Unit("blocks", True, lambda size: 1),
        Unit("params", False, lambda size: size.parameters),
    )
}
_ALIASES = {"site": "sites", "block": "blocks", "param": "params", "parameters": "params", "": "params"}
_SCALES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}
_EXAMPLES = "25% (of all parameters), 25%sites, 15sites, 8attention, 4mlp, 3blocks or 30Mparams"


@dataclass(frozen=True, slots=True)
class Budget:
    """What must go: at least `amount` of `unit`, or that many percent of it."""

    amount: Fraction
    unit: str
    share: bool

    @staticmethod
    def parse(text: str) -> Budget:
        """`25%`, `25%sites`, `15sites`, `3blocks`, `30Mparams` … Raises BudgetError with the allowed spellings."""
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*([kMGB]?)\s*([a-z]*)\s*", text)
        if not match:
            raise BudgetError(f"{text!r} is not a budget. Write for example {_EXAMPLES}.")
        number, percent, scale, word = match.groups()
        if not percent and not word:
            raise BudgetError(
                f"{text!r} has no unit: a share or a count? Write {number}% for a share of the parameters, "
                f"{number}%sites for a share of the sites, or a count such as 15sites."
            )
        unit = _ALIASES.get(word, word)
        if unit not in UNITS:
            near = nearest(word, UNITS)
            guess = f" Did you mean {near}?" if near else ""
            raise BudgetError(f"{text!r} counts in {word!r}, which is no unit.{guess} Units: {', '.join(UNITS)}.")
        amount = Fraction(number) * (1 if percent else _SCALES[scale])
        if percent and (scale or amount > 100):
            raise BudgetError(f"{text!r} is not a share. A share is a number up to 100 and a percent sign.")
        if amount == 0:
            raise BudgetError(f"{text!r} removes nothing. Write for example {_EXAMPLES}.")
        if not percent and unit != "params" and amount.denominator != 1:
            raise BudgetError(f"{text!r} is not a whole number of {unit}. Write {math.ceil(amount)}{unit}.")
        return Budget(amount, unit, bool(percent))

    def __str__(self) -> str:
        number = str(self.amount) if self.amount.denominator == 1 else f"{float(self.amount):.12g}"
        return f"{number}%{self.unit}" if self.share else f"{number}{self.unit}"

    def spent(self, anatomy: Anatomy, plan: Plan) -> int:
        """What `plan` takes away, in this budget's unit."""
        unit = UNITS[self.unit]
        if unit.whole_blocks:
            alive = set(anatomy.alive())
            return sum(not _block(alive - plan.removed, b) and bool(_block(alive, b)) for b in range(anatomy.blocks))
        return sum(unit.cost(size) for size in anatomy.sites if size.site in plan.removed)

    def needed(self, anatomy: Anatomy) -> Fraction:
        """What must go, in this budget's unit: a share is of everything in the model as it was given."""
        if not self.share:
            return self.amount
        if self.unit == "params":
            return self.amount / 100 * anatomy.total("parameters")
        everything = Plan(frozenset(anatomy.alive()))
        return Fraction(math.ceil(self.amount / 100 * self.spent(anatomy, everything)))

    def met(self, anatomy: Anatomy, plan: Plan) -> bool:
        return self.spent(anatomy, plan) >= self.needed(anatomy)


@dataclass(frozen=True, slots=True)
class Problem:
    """What a search is asked to solve. A search sees this and the losses it asks for, and nothing else."""

    anatomy: Anatomy
    budget: Budget
    protected: frozenset[Site] = frozenset()
    seed: int = 0

    def met(self, plan: Plan) -> bool:
        return self.budget.met(self.anatomy, plan)

    def missing(self, plan: Plan) -> float:
        """What must still go, in the budget's unit."""
        return float(self.budget.needed(self.anatomy) - self.budget.spent(self.anatomy, plan))

    def moves(self, plan: Plan) -> list[tuple[Site, ...]]:
        """What may go next, in order: single sites or whole blocks, as the unit counts; never the last of a part, nor
        what would put the budget out of reach."""
        unit = UNITS[self.budget.unit]
        left = [size for size in self.anatomy.sites if size.site not in plan.removed]
        if unit.whole_blocks:
            blocks = sorted({size.site.block for size in left})
            groups = [tuple(s.site for s in left if s.site.block == block) for block in blocks]
        else:
            groups = [(size.site,) for size in left if unit.cost(size) > 0]
        scarce = {part for part in PARTS if sum(size.site.part == part for size in left) == 1}
        free = [g for g in groups if not any(s in self.protected or s.part in scarce for s in g)]
        needed = self.budget.needed(self.anatomy)
        return [g for g in free if self.most(plan.without(*g)) >= needed]

    def most(self, plan: Plan = Plan()) -> int:
        """The most that can go, in the budget's unit, if `plan` does: one attention, one mlp, all protected stay."""
        unit = UNITS[self.budget.unit]
        total = self.budget.spent(self.anatomy, plan)
        left = [size for size in self.anatomy.sites if size.site not in plan.removed]
        if unit.whole_blocks:
            held = {size.site.block for size in left if size.site in self.protected}
            missing = set(PARTS) - {size.site.part for size in left if size.site.block in held}
            blocks = sorted({size.site.block for size in left} - held)
            free = [{size.site.part for size in left if size.site.block == block} for block in blocks]
            return total + len(free) - min(len(missing), 1 if any(missing <= parts for parts in free) else 2)
        for part in PARTS:  # all that is not protected, but for the smallest where nothing is
            sizes = [size for size in left if size.site.part == part]
            costs = [unit.cost(size) for size in sizes if size.site not in self.protected]
            total += sum(costs) - (min(costs, default=0) if len(costs) == len(sizes) else 0)
        return total

    def cost(self, sites: Iterable[Site]) -> int:
        """What removing `sites` is worth in the budget's unit; whole blocks count as one."""
        unit = UNITS[self.budget.unit]
        chosen = set(sites)
        return 1 if unit.whole_blocks else sum(unit.cost(size) for size in self.anatomy.sites if size.site in chosen)

    def check(self) -> Problem:
        """The problem itself. Raises BudgetError, with the most that can go, if no plan meets the budget."""
        most, needed = self.most(), math.ceil(self.budget.needed(self.anatomy))
        if most < needed:
            raise BudgetError(
                f"{self.budget} cannot be met: it asks for {needed:,} {self.budget.unit}, and at most {most:,} can go "
                "while one attention, one mlp and everything protected stay. Ask for less, or protect less."
            )
        return self


@dataclass(frozen=True, slots=True)
class Ask:
    """What a search wants measured. `best=k`: the k lowest losses in full, the others may come back as bounds.

    `tokens=n`: only the first n calibration tokens.
    """

    plans: tuple[Plan, ...]
    best: int | None = None
    tokens: int | None = None


def protection(text: str, anatomy: Anatomy) -> frozenset[Site]:
    """Sites that must stay, from `attention.0,mlp.27-29,5-7`: a site, a range of one part, or whole blocks.

    Raises PlanError if a piece cannot be read or lies outside the model.
    """
    sites: set[Site] = set()
    for piece in filter(None, (p.strip() for p in text.split(","))):
        match = re.fullmatch(r"(?:(attention|mlp)\.)?(\d+)(?:-(\d+))?", piece)
        if not match:
            raise PlanError(f"{piece!r} cannot be protected. Write attention.0, mlp.27-29 or 0-3 (whole blocks).")
        first, last = int(match[2]), int(match[3] or match[2])
        if first > last or last >= anatomy.blocks:
            raise PlanError(f"{piece!r} is out of range: the model has blocks 0 to {anatomy.blocks - 1}.")
        parts = (cast(Part, match[1]),) if match[1] else PARTS
        sites |= {Site(block, part) for block in range(first, last + 1) for part in parts}
    return frozenset(sites)


def _block(sites: Iterable[Site], block: int) -> list[Site]:
    return [site for site in sites if site.block == block]
