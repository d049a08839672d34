"""What a size is answered with where no recipe is named: one of ours, by the time that it may take."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from billhook.core.budget import VOCABULARY, spell_budget
from billhook.core.errors import UnknownName, UsageError, option
from billhook.core.registry import OptionValues

STANDARD = "standard"
WHOLE_SITES = "billhook-depth"


@dataclass(frozen=True, slots=True)
class Effort:
    """`recipe`: the one that narrows each site as it pays; `others`: what overrules one that may not, with defaults.

    `own_share`: of the calibration text, which the model writes for `recipe` where a call names no text.
    """

    recipe: str
    others: OptionValues
    own_share: float = 0.0


EFFORTS: Mapping[str, Effort] = MappingProxyType({
    "quick": Effort("billhook-quick", {"fast": True, "finalists": 0, "recover": "fold?", "tokens": 512,
                                       "recover_tokens": 2048, "eval_tokens": 2048, "proof": "loss"}),
    STANDARD: Effort("billhook", {"fast": True, "finalists": 4, "recover": "fold?,lora?", "tokens": 2048,
                                  "recover_tokens": 32768, "eval_tokens": 8192}, own_share=0.5),
    "thorough": Effort("billhook-thorough", {"fast": True, "recover": "fold?,lora?", "recover_tokens": 262144},
                        own_share=0.5),
})  # fmt: skip


def recipe_of(
    given: Mapping[str, Any], recipe: str | Path | None = None, effort: str | None = None
) -> tuple[Path | None, OptionValues]:
    """The recipe that a call begins with, and what overrules it before what is `given` does.

    Without `recipe` it is ours for a size: a recipe of `effort` narrows sites, and the model writes half of the text
    where none is given; for a size in sites or blocks, a streamed model and other exports `billhook-depth` removes
    whole ones. None where `given` names another way to a
    plan, or cuts the vocabulary alone. Raises UnknownName for an effort that is none of EFFORTS, UsageError for one
    that has nothing to choose.
    """
    if effort is not None and effort not in EFFORTS:
        raise UnknownName("effort", effort, EFFORTS)
    ways = {"recipe": recipe, **{name: given.get(name) for name in ("search", "metric", "plan", "within")}}
    other = next((name for name, value in ways.items() if value), None)
    remove = given.get("remove")
    sizes = ",".join(map(spell_budget, remove if isinstance(remove, list | tuple) else [remove or ""])).split(",")
    of_plans = [size for size in sizes if size.strip() and not size.strip().endswith(VOCABULARY)]
    if effort is not None and (other or not of_plans):
        without = f"Leave {option(other)} out" if other else f"Give {option('remove', '20%')}"
        raise UsageError(f"{option('effort', effort)} chooses how a size is reached. {without}.")
    if other or not of_plans:
        return (None if recipe is None else Path(recipe)), {}
    chosen = EFFORTS[effort or STANDARD]
    whole = any(re.search(r"(sites?|attention|mlp|blocks?)\s*$", size) for size in of_plans)
    form = given.get("export", "transformers") != "transformers" or any(map(given.get, ("memory", "stock", "uniform")))
    if whole or form:
        return Path(WHOLE_SITES), chosen.others
    return Path(chosen.recipe), {} if given.get("data") else {"self_share": chosen.own_share}
