"""How much must go, and in what it is counted. Plain values; no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from fractions import Fraction

from billhook.core.anatomy import Anatomy, SiteSize
from billhook.core.errors import BudgetError, nearest
from billhook.core.plan import Plan, Site


@dataclass(frozen=True, slots=True)
class BudgetUnit:
    """How a budget is counted: which moves a search may make, and what a site is worth.

    `cost`: of one site; in units of `whole_blocks` a block is worth 1. `total`: the field of an anatomy that a share is
    of, the parts that no site owns included; None: of what all sites together cost. `fine`: costs a unit.
    """

    name: str
    whole_blocks: bool
    cost: Callable[[SiteSize], int]
    total: str | None = None
    fine: int = 1


UNITS: dict[str, BudgetUnit] = {
    unit.name: unit
    for unit in (
        BudgetUnit("sites", False, lambda size: 1),
        BudgetUnit("attention", False, lambda size: int(size.site.part == "attention")),
        BudgetUnit("mlp", False, lambda size: int(size.site.part == "mlp")),
        BudgetUnit("blocks", True, lambda size: 1),
        BudgetUnit("params", False, lambda size: size.parameters, "parameters"),
        BudgetUnit("bytes", False, lambda size: size.bytes, "bytes"),
        BudgetUnit("kv", False, lambda size: size.kv_bytes_per_token, "kv_bytes_per_token"),
        BudgetUnit("flops", False, lambda size: size.flops_per_token, "flops_per_token"),
        BudgetUnit("ms", False, lambda size: size.ns_per_token, "ns_per_token", 10**6),
    )
}
_ALIASES = {"site": "sites", "block": "blocks", "param": "params", "parameters": "params", "": "params", "B": "bytes",
            "byte": "bytes", "Bkv": "kv", "flop": "flops"}  # fmt: skip
_SCALES = {"k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}
_COUNTED = ("sites", "attention", "mlp", "blocks")  # in whole numbers
_EXAMPLES = (
    "25% (of all parameters), 25%sites, 15sites, 8attention, 4mlp, 3blocks, 30Mparams, 100MB, 30%kv, 20%flops or 20%ms"
)


@dataclass(frozen=True, slots=True)
class Budget:
    """What must go: at least `amount` of `unit`, or that many percent of it."""

    amount: Fraction
    unit: str
    share: bool

    @staticmethod
    def parse(text: str) -> Budget:
        """`25%`, `25%sites`, `15sites`, `30Mparams`, `30%kv` … Raises BudgetError with the allowed spellings."""
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*([A-Za-z]*)\s*", text)
        if not match:
            raise BudgetError(f"{text!r} is not a budget. Write for example {_EXAMPLES}.")
        number, percent, word = match.groups()
        scale, unit = _parse_unit(word)
        if not percent and word in ("", *_SCALES):
            raise BudgetError(
                f"{text!r} has no unit: a share or a count? Write {number}% for a share of the parameters, "
                f"{number}%sites for a share of the sites, or a count such as 15sites."
            )
        if unit not in UNITS:
            near = nearest(word, UNITS)
            guess = f" Did you mean {near}?" if near else ""
            raise BudgetError(f"{text!r} counts in {word!r}, which is no unit.{guess} Units: {', '.join(UNITS)}.")
        amount = Fraction(number) * scale
        if percent and (scale != 1 or amount > 100):
            raise BudgetError(f"{text!r} is not a share. A share is a number up to 100 and a percent sign.")
        if amount == 0:
            raise BudgetError(f"{text!r} removes nothing. Write for example {_EXAMPLES}.")
        if not percent and unit in _COUNTED and amount.denominator != 1:
            raise BudgetError(f"{text!r} is not a whole number of {unit}. Write {math.ceil(amount)}{unit}.")
        return Budget(amount, unit, bool(percent))

    def __str__(self) -> str:
        number = f"{Decimal(self.amount.numerator) / self.amount.denominator:f}"
        return f"{number}%{self.unit}" if self.share else f"{number}{self.unit}"

    def cost(self, anatomy: Anatomy, sites: Iterable[Site]) -> int:
        """What `sites` are worth to this budget, in its unit's fine costs; a group of a `whole_blocks` unit is 1."""
        unit, chosen = UNITS[self.unit], set(sites)
        return 1 if unit.whole_blocks else sum(unit.cost(size) for size in anatomy.sites if size.site in chosen)

    def removed_cost(self, anatomy: Anatomy, plan: Plan) -> int:
        """What `plan` takes away, in the unit's fine costs (ns for `ms`, else the unit itself)."""
        if UNITS[self.unit].whole_blocks:
            alive = set(anatomy.sites_present())
            return len({site.block for site in alive} - {site.block for site in alive - plan.removed})
        return self.cost(anatomy, plan.removed) + self._narrowed(anatomy, plan)

    def _narrowed(self, anatomy: Anatomy, plan: Plan) -> int:
        """What goes of sites that stay: units that count sites count none of it."""
        unit = UNITS[self.unit]
        if unit.total is None:
            return 0
        lost = anatomy.narrowed(plan)
        return sum(unit.cost(replace(size, **asdict(size.group))) * count for size, count in lost if size.group)

    def target(self, anatomy: Anatomy) -> Fraction:
        """What must go, as `removed_cost` counts: a share is of everything in the model as it was given."""
        unit = UNITS[self.unit]
        if not self.share:
            return self.amount * unit.fine
        if unit.total is not None:
            return self.amount / 100 * anatomy.total(unit.total)
        everything = Plan(frozenset(anatomy.sites_present()))
        return Fraction(math.ceil(self.amount / 100 * self.removed_cost(anatomy, everything)))

    def is_met(self, anatomy: Anatomy, plan: Plan) -> bool:
        return self.removed_cost(anatomy, plan) >= self.target(anatomy)

    def format(self, amount: Fraction | int) -> str:
        """An amount as `removed_cost` counts, in the unit: `1,234 params`, `0.52 ms`."""
        fine = UNITS[self.unit].fine
        return f"{math.ceil(amount):,} {self.unit}" if fine == 1 else f"{float(amount / fine):,.3f} {self.unit}"


def _parse_unit(word: str) -> tuple[int, str]:
    """(scale, unit) of what stands behind a number: `Mparams`, `kv`, `MB`; an unknown one comes back as it is."""
    for scale, rest in ((1, word), (_SCALES.get(word[:1], 0), word[1:])):
        unit = _ALIASES.get(rest, rest)
        if scale and unit in UNITS and not (scale > 1 and not rest):
            return scale, unit
    return 1, word


def spell_budget(value: object) -> str:
    """A budget as text: a float between 0 and 1 is a share of the parameters, so 0.25 is 25%."""
    share = isinstance(value, float) and 0 < value < 1
    return f"{Decimal(str(value)) * 100:f}".rstrip("0").rstrip(".") + "%" if share else str(value)


def parse_budgets(text: str) -> tuple[Budget, ...]:
    """Several budgets that must all be met, separated by commas: `20%params,30%kv`. Raises BudgetError."""
    budgets = tuple(Budget.parse(piece) for piece in text.split(","))
    units = [budget.unit for budget in budgets]
    twice = next((unit for unit in units if units.count(unit) > 1), None)
    if twice:
        raise BudgetError(f"{text!r} has two budgets in {twice}. Keep the larger one.")
    return budgets
