"""The commands that make a run, or a point on its path, again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from billhook.core.plan import Plan
from billhook.core.results.json_form import JsonObject
from billhook.runs.recipe import CONDITIONS, TARGETS, Recipe, in_order, read_yaml, recipe_names

Values = Mapping[str, Any]


def prune_command(spec: JsonObject, store: Path) -> str:
    """The command of a pruning, from its recipe: what differs from a recipe of ours, or from the defaults."""
    base = _recipe_of(spec)
    start = {} if base is None else read_yaml(Path(base))
    named = {} if base is None else {"recipe": base}
    return _command(spec, named | _changed(spec, start), store, searched=base is None)


def point_command(spec: JsonObject, store: Path, plan: Plan, share: float) -> str:
    """The command that makes a point of the path. `share`: of the parameters, gone there.

    Removed sites are named. A plan that narrows sites names thousands of channels: it is asked for by its size, which
    leads there where the search takes the same path.
    """
    if plan.narrowed:
        fields = {name: value for name, value in spec.items() if name not in TARGETS}
        return prune_command({**fields, "remove": f"{100 * share:.3g}%params"}, store)
    unused = {name for condition in CONDITIONS for name in condition.names if "plan" in condition.unmet}
    fields = {name: value for name, value in spec.items() if name not in {*TARGETS, *unused, "set"}}
    return _command(spec, {"plan": str(plan)} | _changed(fields, {}), store, searched=False)


def _recipe_of(spec: Values) -> str | None:
    """The recipe of ours that a run began with: it has its words, and what differs can be typed."""
    if not spec.get("about"):
        return None
    for name in recipe_names():
        values = read_yaml(Path(name))
        if values.get("about") == spec["about"]:
            back = [key for key, value in values.items() if key in spec and not spec[key] and value and key != "about"]
            return name if not back else None
    return None


def _changed(spec: Values, start: Values) -> dict[str, Any]:
    """Fields of a recipe that are other than in `start`, or than the default."""
    fields = Recipe.model_fields
    told = {name: value for name, value in spec.items() if name in fields and name not in ("about", "model")}
    before = {name: start.get(name, fields[name].get_default()) for name in told}
    same = {name for name, value in told.items() if _plain(value) == _plain(before[name])}
    return {name: told[name] for name in in_order(told) if name not in same and told[name] is not None}


def _plain(value: Any) -> Any:
    return {name: str(each) for name, each in value.items()} if isinstance(value, Mapping) else value


def _command(spec: Values, options: Mapping[str, Any], store: Path, *, searched: bool) -> str:
    """`searched`: a search is named even where it is the default, as a size alone would choose a recipe of ours."""
    words = ["billhook", "prune", str(spec.get("model", "demo"))]
    given = dict(options)
    if searched and given.get("remove"):
        given = {"remove": given.pop("remove"), "search": spec.get("search", "swap"), **given}
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, Mapping):
            words += [word for key, each in value.items() for word in (flag, f"{key}={each}")]
        else:
            words += [flag] if value is True else [flag, str(value)]
    return shlex.join([*words, "--store", str(store)])
