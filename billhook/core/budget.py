"""Budgets: how much must be removed, and its units. Plain values; no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from fractions import Fraction

from billhook.core.anatomy import Anatomy, SiteSize
from billhook.core.errors import BudgetError, RecipeError, nearest, option
from billhook.core.options import BasisRule, RankRule
from billhook.core.plan import Plan, Site, shorten


@dataclass(frozen=True, slots=True)
class BudgetUnit:
    """The unit of a budget: which moves a search may make, and the cost of a site.

    - `cost`: of one site; in units of `whole_blocks` a block costs 1.
    - `total`: the field of an anatomy that a share refers to; None: the cost of all sites together.
    - `fine`: costs per unit.
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
VOCABULARY = "vocabulary"  # a unit of tokens: rows of embedding and head, which no plan removes
_ALIASES = {"site": "sites", "block": "blocks", "param": "params", "parameters": "params", "": "params", "B": "bytes",
            "byte": "bytes", "Bkv": "kv", "flop": "flops"}  # fmt: skip
_SCALES = {"k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}
_COUNTED = ("sites", "attention", "mlp", "blocks", VOCABULARY)  # in whole numbers
_EXAMPLES = (
    "25% (of all parameters), 25%sites, 15sites, 8attention, 4mlp, 3blocks, 30Mparams, 100MB, 30%kv, 20%flops, 20%ms "
    "or 60%vocabulary"
)


@dataclass(frozen=True, slots=True)
class Budget:
    """The amount to remove: at least `amount` of `unit`, or that many percent of it.

    A plan of sites meets budgets of `UNITS`. One of the vocabulary is met before: see `rows_of`.
    """

    amount: Fraction
    unit: str
    share: bool

    @staticmethod
    def parse(text: str) -> Budget:
        """Parse `25%`, `25%sites`, `15sites`, `30Mparams`, `30%kv` … Raises BudgetError with the allowed spellings."""
        match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*(%?)\s*([A-Za-z]*)\s*", text)
        if not match:
            raise BudgetError(f"{shorten(text)!r} is not a budget. Write for example {_EXAMPLES}.")
        number, percent, word = match.groups()
        scale, unit = _parse_unit(word)
        if not percent and word in ("", *_SCALES):
            raise BudgetError(
                f"{text!r} has no unit: a share or a count? Write {number}% for a share of the parameters, "
                f"{number}%sites for a share of the sites, or a count such as 15sites."
            )
        if unit not in (known := (*UNITS, VOCABULARY)):
            near = "blocks" if word.removesuffix("s") == "layer" else nearest(word, known)
            guess = f" Did you mean {near}?" if near else ""
            raise BudgetError(f"{text!r} counts in {word!r}, which is not a unit.{guess} Units: {', '.join(known)}.")
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
        """Return the cost of `sites` in the unit's fine costs; a move of a `whole_blocks` unit costs 1."""
        unit, chosen = UNITS[self.unit], set(sites)
        return 1 if unit.whole_blocks else sum(unit.cost(size) for size in anatomy.sites if size.site in chosen)

    def removed_cost(self, anatomy: Anatomy, plan: Plan) -> int:
        """Return the cost that `plan` removes, in the unit's fine costs (ns for `ms`, else the unit)."""
        if UNITS[self.unit].whole_blocks:
            present = set(anatomy.sites_present())
            return len({site.block for site in present} - {site.block for site in present - plan.removed})
        unit = UNITS[self.unit]
        cost = self.cost(anatomy, plan.removed)
        if unit.total is None:  # units that count sites do not count channel groups
            return cost
        return cost + sum(unit.cost(replace(size, **asdict(lost))) for size, lost in anatomy.lost(plan))

    def target(self, anatomy: Anatomy) -> Fraction:
        """Return the least `removed_cost` that meets the budget; a share refers to the model as given."""
        unit = UNITS[self.unit]
        if not self.share:
            return self.amount * unit.fine
        if unit.total is not None:
            return self.amount / 100 * anatomy.total(unit.total)
        everything = Plan(frozenset(anatomy.sites_present()))
        return Fraction(math.ceil(self.amount / 100 * self.removed_cost(anatomy, everything)))

    def missing(self, anatomy: Anatomy, plan: Plan, share: Fraction) -> Budget | None:
        """Return what must be removed besides `plan` to meet a `share` of the budget; None where nothing must."""
        amount = share * self.target(anatomy) - self.removed_cost(anatomy, plan)
        return Budget(amount / UNITS[self.unit].fine, self.unit, False) if amount > 0 else None

    def is_met(self, anatomy: Anatomy, plan: Plan) -> bool:
        return self.removed_cost(anatomy, plan) >= self.target(anatomy)

    def share_of_sites(self, anatomy: Anatomy) -> Fraction | None:
        """Return which share of all that sites hold a share of the whole model is; None for other budgets.

        What no site holds, such as embeddings, is counted by a share of the model and cannot be removed.
        """
        unit = UNITS[self.unit]
        if not self.share or unit.total is None:
            return None
        held = self.removed_cost(anatomy, Plan(frozenset(anatomy.sites_present())))
        return Fraction(self.target(anatomy), held) if held else None

    def format(self, amount: Fraction | int) -> str:
        """Write a `removed_cost` in the unit: `1,234 params`, `0.52 ms`."""
        fine = UNITS[self.unit].fine
        return f"{math.ceil(amount):,} {self.unit}" if fine == 1 else f"{float(amount / fine):,.3f} {self.unit}"


def _parse_unit(word: str) -> tuple[int, str]:
    """Return (scale, unit) of `Mparams`, `kv`, `MB`; an unknown unit is returned unchanged."""
    for scale, rest in ((1, word), (_SCALES.get(word[:1], 0), word[1:])):
        unit = _ALIASES.get(rest, rest)
        if scale and unit in (*UNITS, VOCABULARY) and not (scale > 1 and not rest):
            return scale, unit
    return 1, word


def rows_of(budget: Budget, rows: int) -> int:
    """Return how many of the `rows` of a vocabulary a budget of it removes: tokens, and rows that are none."""
    assert budget.unit == VOCABULARY
    return math.ceil(budget.amount / 100 * rows) if budget.share else int(budget.amount)


def spell_budget(value: object) -> str:
    """A budget as text: a float between 0 and 1 is a share of the parameters, so 0.25 is 25%."""
    share = isinstance(value, float) and 0 < value < 1
    return f"{Decimal(str(value)) * 100:f}".rstrip("0").rstrip(".") + "%" if share else str(value)


def parse_vocabulary_share(text: str) -> Fraction:
    """Read how much of a vocabulary is removed: `60%`, or `60%vocabulary`. Raises BudgetError with what is allowed."""
    match = re.fullmatch(r"\s*([0-9]{1,3}(?:\.[0-9]{1,9})?)\s*%\s*(vocabulary)?\s*", text)
    if not match or not 0 < Fraction(match[1]) < 100:
        raise BudgetError(
            f"{shorten(text)!r} is no share of a vocabulary. Write a number between 0 and 100 and a percent sign, such "
            f"as 60%, or leave {option('remove')} out: then all tokens go that the text does not use."
        )
    return Fraction(match[1]) / 100


def parse_parameter_budget(text: str) -> Budget:
    """Read how many parameters are saved. Raises BudgetError for another unit."""
    budget = Budget.parse(text)
    if budget.unit != "params":
        raise BudgetError(
            f"{shorten(text)!r} counts {budget.unit}, and factors save parameters. Write 10% or 20Mparams."
        )
    return budget


def parse_rank_rule(text: str) -> RankRule:
    """Read what ranks of factors are chosen by: `loss` or `energy`. Raises BudgetError with what is allowed."""
    if text not in ("loss", "energy"):
        raise BudgetError(
            f"{option('ranks', shorten(text))} is no way to choose ranks. Write loss, what each direction changes the "
            "model's loss by, or energy, what it holds of the outputs' energy."
        )
    return "loss" if text == "loss" else "energy"


def parse_basis_rule(text: str) -> BasisRule:
    """Read how many bases a residual stream has: `one` or `boundary`. Raises BudgetError with what is allowed."""
    if text not in ("one", "boundary"):
        raise BudgetError(
            f"{option('bases', shorten(text))} is no choice of bases. Write one, for all boundaries, or boundary, one "
            "for each."
        )
    return "one" if text == "one" else "boundary"


def parse_width(text: str) -> int | Fraction:
    """Read a residual width: channels, `448`, or a share of the model's, `75%`. Raises BudgetError."""
    match = re.fullmatch(r"\s*([0-9]{1,7})\s*|\s*([0-9]{1,2}(?:\.[0-9]{1,9})?)\s*%\s*", text)
    if not match or not Fraction(match[1] or match[2]):
        raise BudgetError(
            f"{option('width', shorten(text))} is no width. Write channels, such as 448, or the share of the model's "
            "width that is left, such as 75%."
        )
    return int(match[1]) if match[1] else Fraction(match[2]) / 100


def parse_budgets(text: str) -> tuple[Budget, ...]:
    """Parse budgets that must all be met, separated by commas: `20%params,30%kv`. Raises BudgetError."""
    budgets = tuple(Budget.parse(piece) for piece in text.split(","))
    units = [budget.unit for budget in budgets]
    twice = next((unit for unit in units if units.count(unit) > 1), None)
    if twice:
        raise BudgetError(f"{text!r} has two budgets in {twice}. Keep the larger one.")
    return budgets


def parse_bytes(text: str) -> int:
    """`4GB`, `500MB` or `2.5GiB` in bytes. Raises RecipeError with the allowed spellings."""
    match = re.fullmatch(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*([MG])(i?)B\s*", text)
    if not match or float(match[1]) == 0:
        raise RecipeError(
            f"{option('memory', text)} is not an amount of memory. Write for example 4GB, 500MB or 2.5GiB."
        )
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** {"M": 2, "G": 3}[match[2]])
