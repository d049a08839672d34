"""The recipes that come with Billhook, and what each makes, as it follows from search, budget and recoveries."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

from billhook.core.budget import UNITS
from billhook.methods.recover import adds, trains
from billhook.methods.search import SEARCHES, narrows
from billhook.runs.recipe import Recipe, parse_recipe, recipe_names, with_overrides


@dataclass(frozen=True, slots=True)
class BuiltinRecipe:
    """One built-in recipe: what it does, where it comes from, and what it makes at its own size.

    `makes`: `depth` removes sites or blocks, `width` narrows sites, `both` does either. `checkpoint`: a `stock` model
    type that every engine loads, or the `own` type of Billhook. `trains`: whether one of its recoveries does.
    """

    name: str
    summary: str
    paper: str
    makes: Literal["depth", "width", "both"]
    checkpoint: Literal["stock", "own"]
    trains: bool
    remove: str
    search: str
    recover: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "recover": list(self.recover)}


def builtin_recipes() -> list[BuiltinRecipe]:
    """Every built-in recipe, by name."""
    return [describe_recipe(name) for name in recipe_names()]


def describe_recipe(name: str) -> BuiltinRecipe:
    """The facts of one recipe, by its name or file."""
    recipe = parse_recipe(with_overrides(name))
    summary, paper = _summary(recipe.about)
    makes = made_by(recipe)
    size = recipe.remove or recipe.within or recipe.plan or ""
    checkpoint: Literal["stock", "own"] = "stock" if keeps_stock_type(recipe) else "own"
    return BuiltinRecipe(
        name,
        summary,
        paper,
        makes,
        checkpoint,
        any(map(trains, recipe.recoveries)),
        size,
        recipe.search,
        recipe.recoveries,
    )


def made_by(recipe: Recipe) -> Literal["depth", "width", "both"]:
    """What a search changes: one of channel groups narrows; one that chooses whole sites too does both."""
    if not narrows(recipe.search):
        return "depth"
    return "both" if SEARCHES.facts(recipe.search).whole_sites else "width"


def keeps_stock_type(recipe: Recipe) -> bool:
    """Whether the checkpoint of a recipe has the stock model type.

    It has where sites hold zeros, where whole blocks are removed, and where all blocks are narrowed alike, as far as
    the config of the type can say so; unless a recovery puts something in the place of what was removed.
    """
    inserts = any(adds(name, recipe.recover_set) for name in recipe.recoveries)
    whole_blocks = any(UNITS[budget.unit].whole_blocks for budget in recipe.budgets)
    alike = made_by(recipe) == "width" and recipe.uniform and not recipe.protect
    return recipe.stock or ((whole_blocks or alike) and not inserts)


def _summary(about: str) -> tuple[str, str]:
    """The first sentence of a description without what it cites, and what it cites: title, authors, arXiv number."""
    first = re.split(r"(?<!et al)\. (?=[A-Z])", about, maxsplit=1)[0].rstrip(".")
    cited = re.search(r" \(([^()]*arXiv [\d.]+)\)", first)
    return (first.replace(cited[0], "") if cited else first) + ".", cited[1] if cited else ""
