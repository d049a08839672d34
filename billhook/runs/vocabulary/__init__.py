"""The vocabulary of a run's model: cut by its text, before the rest is pruned.

Here is what needs no torch: where a budget of the vocabulary has its place.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from billhook.core.errors import BudgetError, DataError, either, option
from billhook.data.texts import external_sources, require_given

if TYPE_CHECKING:
    from billhook.runs.recipe import Recipe, TextOptions


def require_text(recipe: Recipe) -> None:
    """Raise DataError where a budget of the vocabulary comes without text that says what the model is for."""
    if recipe.vocabulary is None:
        return
    if "data" not in recipe.model_fields_set:
        raise DataError(
            f"{option('remove', str(recipe.vocabulary))} removes the tokens that your text needs least, so it needs "
            f"text of the kind that the model is for: {option('data', 'my.jsonl')}"
        )
    if not external_sources(recipe.data):
        require_given(recipe.data)


def refuse_vocabulary(options: TextOptions) -> None:
    """Raise BudgetError for a budget of the vocabulary where models with the same tokens are compared."""
    budget = getattr(options, "vocabulary", None)
    if budget is not None:
        model = options.model
        typed = option("remove", str(budget)) if budget.share else ""
        first = either(f"billhook.cut_vocabulary({model!r}, ", f"billhook vocabulary {shlex.quote(model)} ")
        first += option("data", "FILE") + (either(", ", " ") + typed if typed else "") + either(")", "")
        raise BudgetError(
            f"{option('remove', str(budget))} cuts the vocabulary, which prune alone does. Cut it first, and give the "
            f"smaller model: {first}"
        )
