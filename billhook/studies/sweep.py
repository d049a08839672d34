"""Sweep: recipes against each other at several sizes, on several calibration texts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Unpack

from billhook.core import statistics
from billhook.core.budget import spell_budget
from billhook.core.errors import BudgetError, UsageError
from billhook.core.events import Event, EventListener, ignore_events
from billhook.core.options import Amount, SweepOptions, shows_options
from billhook.core.results.specs import SweepSpec, plain_options
from billhook.data.calibration import require_disjoint
from billhook.data.choice_tasks import load_items
from billhook.data.texts import external_sources
from billhook.data.token_sets import TokenSet
from billhook.engine.losses import parse_loss
from billhook.models.device import environment
from billhook.report import study_pages
from billhook.runs.choose_plan import with_site_times
from billhook.runs.recipe import Recipe, parse_recipe, with_overrides
from billhook.runs.store import STORE
from billhook.studies.run_study import open_study, several, write_study
from billhook.studies.trials import (
    SIZES,
    StudyContext,
    Trial,
    calibration_of,
    estimate_of,
    evaluate_trials,
    held_out_of,
    run_trial,
    trial_row,
)


@shows_options(SweepOptions, Recipe.model_fields)
def sweep(
    model: str | Path = "demo",
    recipes: str | Sequence[str] = ("billhook",),
    *,
    remove: Amount | Sequence[Amount] = ("10%", "20%", "30%"),
    data: str | Sequence[str] = ("pydoc",),
    eval_data: str | Sequence[str] = (),
    tasks: str | Sequence[str] = (),
    items: int = 200,
    out: str | Path | None = None,
    store: str | Path = STORE,
    watch: EventListener = ignore_events,
    **options: Unpack[SweepOptions],
) -> dict[str, Any]:
    """Recipes against each other at several sizes on several calibration texts; a page, and the table behind it.

    `recipes`: names of ours, or YAML files. `eval_data`: held-out texts (default: those of `data`); `tasks`: files of
    multiple-choice items, of which `items` are measured. `options`: fields of `Recipe` that overrule every recipe, such
    as `tokens`. Nothing that `store` holds is measured again, so that a sweep which was killed goes on.
    """
    texts = several(data)
    held_out = several(eval_data) or tuple(dict.fromkeys(filter(None, map(external_sources, texts))))
    if not held_out:
        raise UsageError("What a model writes itself proves nothing. Name a text to measure on: --eval-data FILE.")
    removes = tuple(map(spell_budget, [remove] if isinstance(remove, str | float) else remove))
    grid = Grid(several(recipes), removes, texts, held_out, several(tasks), items)
    first = recipes_of(grid, str(model), options)[0][1]
    spec = SweepSpec(
        *(str(model), grid.recipes, grid.removes, texts, several(eval_data), grid.tasks, items),
        options=plain_options(options),
    )
    with open_study(spec, first, Path(store), out, watch) as (bench, folder):
        return write_study(run_sweep(bench, grid, options), folder, study_pages.sweep_page, bench.store, bench.run)


def evaluation_sets(study: StudyContext, grid: Grid, recipe: Recipe) -> dict[str, TokenSet]:
    """Evaluation tokens by name: texts, and the halves of tasks that no search looks at."""
    sets = {source: held_out_of(study, source, recipe) for source in grid.texts}
    for file in grid.tasks:
        sets[file] = load_items(file, study.teacher, "evaluation", items=grid.items)
    return sets


# -- recipes against each other -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """What a sweep compares: every recipe at every size on every calibration text; the evaluation sets of all."""

    recipes: tuple[str, ...]
    removes: tuple[str, ...]
    datas: tuple[str, ...]
    texts: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    items: int = 200


def recipes_of(grid: Grid, model: str, common: Mapping[str, Any]) -> list[tuple[str, Recipe]]:
    """(name, recipe) of every combination, size by size; `common` options overrule those of the recipes.

    Raises RecipeError before anything is computed.
    """
    told = []
    for data, name, remove in itertools.product(grid.datas, grid.recipes, grid.removes):
        given = {"model": model, "remove": remove, "data": data, **common}
        told.append((Path(name).stem, parse_recipe(with_overrides(name, **given), f"The recipe {name}")))
    return told


def run_sweep(study: StudyContext, grid: Grid, common: Mapping[str, Any]) -> dict[str, Any]:
    """Every recipe at every size on every calibration text: losses, sizes, times, with intervals, and the front.

    A recipe that cannot meet a size (a run of blocks that would be the whole model) has a row that says why.
    """
    combinations = recipes_of(grid, study.teacher.name, common)
    base = combinations[0][1]
    sets = evaluation_sets(study, grid, base)
    tokens: dict[tuple[Any, ...], TokenSet] = {}
    trials: list[Trial] = []
    refused: list[dict[str, str]] = []
    for number, (name, recipe) in enumerate(combinations):
        at = {"recipe": name, "remove": str(recipe.remove), "data": Path(recipe.data).name}
        study.watch(Event("sweep", number, len(combinations), at))
        key = (recipe.data, parse_loss(recipe.loss).file, recipe.tokens, recipe.length, recipe.seed, recipe.field,
               recipe.self_share)  # fmt: skip
        if key not in tokens:
            tokens[key] = calibration_of(study, recipe)
            for held_out in sets.values():
                require_disjoint(tokens[key], held_out)
        try:
            trials.append(run_trial(study, name, recipe, tokens[key]))
        except BudgetError as error:
            refused.append({"recipe": name, "remove": str(recipe.remove), "data": recipe.data, "why": str(error)})
    teacher = evaluate_trials(study, base, trials, sets)
    anatomy = (
        study.teacher.anatomy if study.teacher.weights is not None else with_site_times(study.job(base), study.teacher)
    )
    rows = [trial_row(trial, teacher, sets, anatomy, base.seed) for trial in trials]
    _add_gaps_to_best(rows, trials, grid, base.seed)
    _add_text_changes(rows, trials, grid, base.seed)
    for row in rows:
        row["front"] = [size for size in SIZES if not any(_dominates(other, row, size) for other in rows)]
    return {
        "model": study.teacher.name,
        "fingerprint": study.teacher.fingerprint,
        "teacher": {name: estimate_of(result, name, sets, base.seed) for name, result in teacher.items()},
        "sizes": {size: anatomy.total(size) for size in SIZES},
        "rows": rows,
        "refused": refused,
        "calibration": [each.describe() for each in tokens.values()],
        "evaluation": {name: each.describe() for name, each in sets.items()},
        "batch": base.batch,
        "context": base.context,
        "environment": asdict(environment(str(study.teacher.device))),
    }


def _add_gaps_to_best(rows: list[dict[str, Any]], trials: Sequence[Trial], grid: Grid, seed: int) -> None:
    """On each text: how far each row is above the lowest of its size and calibration text, in nats, paired."""
    for remove, data in itertools.product(dict.fromkeys(t.remove for t in trials), grid.datas):
        alike = [i for i, trial in enumerate(trials) if (trial.remove, trial.data) == (remove, data)]
        for text in grid.texts if alike else ():
            best = min(alike, key=lambda i: trials[i].results[text].mean)
            for i in alike:
                gap = statistics.paired_difference(trials[best].results[text], trials[i].results[text], seed)
                ends = (0.0, 0.0) if i == best else (gap.low, gap.high)
                rows[i]["results"][text]["above_best"] = {"value": gap.value, "low": ends[0], "high": ends[1]}


def _add_text_changes(rows: list[dict[str, Any]], trials: Sequence[Trial], grid: Grid, seed: int) -> None:
    """Calibrated on another text than the first: what that changed for a recipe at a size, in nats, paired."""
    first = {(trial.recipe, trial.remove): trial for trial in trials if trial.data == grid.datas[0]}
    for row, trial in zip(rows, trials, strict=True):
        same = first.get((trial.recipe, trial.remove))
        if same is None or same is trial:
            continue
        for text in grid.texts:
            gap = statistics.paired_difference(same.results[text], trial.results[text], seed)
            row["results"][text]["above_first_text"] = {"value": gap.value, "low": gap.low, "high": gap.high}


def _dominates(a: Mapping[str, Any], b: Mapping[str, Any], size: str) -> bool:
    """Whether `a` is as small and as good as `b` in nats over all texts, and better in one of both."""
    nats = [math.fsum(r["nats"] for r in row["results"].values() if r["nats"] is not None) for row in (a, b)]
    sizes = [row["sizes"][size] for row in (a, b)]
    return (
        a["data"] == b["data"]
        and nats[0] <= nats[1]
        and sizes[0] <= sizes[1]
        and (nats[0], sizes[0]) != (nats[1], sizes[1])
    )
