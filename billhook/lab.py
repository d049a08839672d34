"""The laboratory: methods against each other, tasks against each other, and how far a result can be trusted.

Everything is measured through one store and by the measuring engine: no student is built, nothing is measured twice,
and a laboratory that was killed goes on where it stopped.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from billhook import stats
from billhook.data import DOCUMENT_TOKENS, TokenSet
from billhook.errors import BudgetError, DataError
from billhook.export.checkpoint import appear, aside_of
from billhook.loading import Teacher
from billhook.losses import split_loss
from billhook.plan import Anatomy, Plan, Site
from billhook.portions import mixed_sets, parted
from billhook.proof import Job, environment, evaluated
from billhook.recipe import Recipe, combined, recipe_from
from billhook.records import EvalResult, Event, Watch
from billhook.scoring import scored
from billhook.searching import (
    counts_time,
    find,
    probe_of,
    recovery_tokens,
    sets_of,
    task_calibration,
    timed,
    timing_of,
    wanted_of,
)
from billhook.store import Store
from billhook.tasks import items_of

TOGETHER = 6  # plans that are evaluated, and filed, at a time
SIZES = ("parameters", "bytes", "kv_bytes_per_token", "flops_per_token", "ns_per_token")


@dataclass(frozen=True)
class Lab:
    """What every experiment of a laboratory shares."""

    store: Store
    run: str
    teacher: Teacher
    watch: Watch

    def job(self, recipe: Recipe) -> Job:
        return Job(recipe, self.store, self.run, Path(), self.watch, {})


@dataclass(frozen=True)
class Trial:
    """One recipe at one size on one calibration set, and the plan that came of it."""

    recipe: str
    remove: str
    data: str
    plan: Plan
    seconds: float
    site_evaluations: float
    resumed: bool  # an earlier attempt was interrupted, and what it took is not counted
    results: dict[str, EvalResult] = field(default_factory=dict)  # by evaluation set


def calibration_of(lab: Lab, recipe: Recipe, least: int | None = None) -> TokenSet:
    """Calibration tokens of a recipe, `least` or more, from the half of its text that is not kept for evaluation."""
    task = task_calibration(recipe, lab.teacher)
    if task is not None:
        return task
    wanted = replace(wanted_of(recipe), eval_data=None, eval_tokens=64, eval_length=16, least=least)
    with lab.teacher.lock:  # it may write some of it
        return sets_of(lab.job(recipe), lab.teacher, wanted)[0]


def held_out_of(lab: Lab, source: str, recipe: Recipe) -> TokenSet:
    """Held-out tokens of a text, from the half of it that is never calibration."""
    wanted = replace(wanted_of(recipe), data=source, eval_data=None, tokens=16, length=16, seed=0, self_share=0.0)
    return mixed_sets(wanted, lab.teacher.model, lab.teacher.tokenizer, lab.watch)[1]


def evaluation_sets(lab: Lab, grid: Grid, recipe: Recipe) -> dict[str, TokenSet]:
    """Evaluation tokens by name: texts, and the halves of tasks that no search looks at."""
    sets = {source: held_out_of(lab, source, recipe) for source in grid.texts}
    for file in grid.tasks:
        sets[file] = items_of(file, lab.teacher, "evaluation", items=grid.items)
    return sets


def tried(lab: Lab, name: str, recipe: Recipe, calibration: TokenSet) -> Trial:
    """Search by a recipe, or recall what an earlier one found."""
    fingerprint = lab.teacher.fingerprint
    passed = {"about": "", "model": "", "eval_data": None, "eval_tokens": 64, "eval_length": 16}
    later = ("recover", "recover_set", *(() if recipe.fold_in_search else ("recover_data", "recover_tokens",
             "recover_length")))  # fmt: skip
    passed |= {name: Recipe.model_fields[name].default for name in ("self_share", *later)}  # in the tokens, or after
    of: dict[str, Any] = {"recipe": recipe.model_copy(update=passed).model_dump(exclude_defaults=True),
                          "tokens": calibration.hash, "compute": lab.teacher.compute}  # fmt: skip
    if counts_time(recipe):
        of["ns"] = timing_of(recipe, lab.teacher)
    if recipe.fold_in_search:
        of["refitted"] = recovery_tokens(recipe, lab.teacher, lab.watch).hash
    known = lab.store.fact(fingerprint, "plan", of)
    if known is None:
        resumed = lab.store.fact(fingerprint, "attempt", of) is not None
        lab.store.add_fact(fingerprint, "attempt", of, lab.run, lab.run)
        start = time.perf_counter()
        found = find(lab.job(recipe), lab.teacher, calibration, along=False)
        known = {
            "removed": found.plan.entries(),
            "seconds": round(time.perf_counter() - start, 1),
            "site_evaluations": found.conducted["site_evaluations"],
            "resumed": resumed,
        }
        lab.store.add_fact(fingerprint, "plan", of, known, lab.run)
    plan = Plan.of(known["removed"])
    cost = (known["seconds"], known["site_evaluations"], known.get("resumed", False))
    return Trial(name, str(recipe.remove), recipe.data, plan, *cost)


def evaluate(lab: Lab, recipe: Recipe, trials: Sequence[Trial], sets: Mapping[str, TokenSet]) -> dict[str, EvalResult]:
    """Fill in the results of all trials; returns those of the teacher."""
    job = lab.job(recipe)
    plans = list(dict.fromkeys([Plan(), *(trial.plan for trial in trials)]))
    teacher: dict[str, EvalResult] = {}
    for name, tokens in sets.items():
        kind = "ppl" if tokens.choices is None else "pp"
        found: dict[Plan, EvalResult] = {}
        for start in range(0, len(plans), TOGETHER):
            some = plans[start : start + TOGETHER]
            found |= zip(some, evaluated(job, lab.teacher, some, tokens, kind), strict=True)
            lab.watch(Event("evaluate", len(found), len(plans), Path(name).name))
        teacher[name] = found[Plan()]
        for trial in trials:
            trial.results[name] = found[trial.plan]
    return teacher


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
        told.append((Path(name).stem, recipe_from(combined(name, **given), f"The recipe {name}")))
    return told


def sweep(lab: Lab, grid: Grid, common: Mapping[str, Any]) -> dict[str, Any]:
    """Every recipe at every size on every calibration text: losses, sizes, times, with intervals, and the front.

    A recipe that cannot meet a size (a run of blocks that would be the whole model) has a row that says why.
    """
    combinations = recipes_of(grid, lab.teacher.name, common)
    base = combinations[0][1]
    sets = evaluation_sets(lab, grid, base)
    tokens: dict[tuple[Any, ...], TokenSet] = {}
    trials: list[Trial] = []
    refused: list[dict[str, str]] = []
    for number, (name, recipe) in enumerate(combinations):
        lab.watch(Event("sweep", number, len(combinations), f"{name}, {recipe.remove}, {Path(recipe.data).name}"))
        key = (recipe.data, split_loss(recipe.loss)[1], recipe.tokens, recipe.length, recipe.seed, recipe.field,
               recipe.self_share)  # fmt: skip
        if key not in tokens:
            tokens[key] = calibration_of(lab, recipe)
            _apart(tokens[key], sets)
        try:
            trials.append(tried(lab, name, recipe, tokens[key]))
        except BudgetError as error:
            refused.append({"recipe": name, "remove": str(recipe.remove), "data": recipe.data, "why": str(error)})
    teacher = evaluate(lab, base, trials, sets)
    anatomy = lab.teacher.anatomy if lab.teacher.weights is not None else timed(lab.job(base), lab.teacher)
    rows = [_row(trial, teacher, sets, anatomy, base.seed) for trial in trials]
    _against_the_best(rows, trials, grid, base.seed)
    _against_the_first_text(rows, trials, grid, base.seed)
    for row in rows:
        row["front"] = [size for size in SIZES if not any(_dominates(other, row, size) for other in rows)]
    return {
        "model": lab.teacher.name,
        "fingerprint": lab.teacher.fingerprint,
        "teacher": {name: _interval(result, name, sets, base.seed) for name, result in teacher.items()},
        "sizes": {size: anatomy.total(size) for size in SIZES},
        "rows": rows,
        "refused": refused,
        "calibration": [each.describe() for each in tokens.values()],
        "evaluation": {name: each.describe() for name, each in sets.items()},
        "batch": base.batch,
        "context": base.context,
        "environment": asdict(environment(str(lab.teacher.device))),
    }


def _apart(calibration: TokenSet, sets: Mapping[str, TokenSet]) -> None:
    for name, tokens in sets.items():
        if twice := set(calibration.digests) & set(tokens.digests):
            raise DataError(
                f"{len(twice)} documents of {calibration.source} are in {name} too, so the comparison would be worth "
                "nothing. Give other text."
            )


def _interval(result: EvalResult, name: str, sets: Mapping[str, TokenSet], seed: int) -> dict[str, Any]:
    """Perplexity or accuracy with its 95% interval."""
    spread = stats.mean_interval(result, seed)
    text = sets[name].choices is None
    value, low, high = (stats.exp(x) if text else x for x in (spread.value, spread.low, spread.high))
    kind = "perplexity" if text else "accuracy"
    return {"kind": kind, "value": value, "low": low, "high": high, "nats": result.mean if text else None}


def _row(
    trial: Trial, teacher: Mapping[str, EvalResult], sets: Mapping[str, TokenSet], anatomy: Anatomy, seed: int
) -> dict[str, Any]:
    told: dict[str, Any] = {
        "recipe": trial.recipe,
        "remove": trial.remove,
        "data": trial.data,
        "removed": trial.plan.entries(),
        "attention": sum(site.part == "attention" for site in trial.plan.removed),
        "mlp": sum(site.part == "mlp" for site in trial.plan.removed),
        "sizes": {size: anatomy.total(size, trial.plan) for size in SIZES},
        "search_seconds": trial.seconds,
        "site_evaluations": trial.site_evaluations,
        "resumed": trial.resumed,
        "results": {},
    }
    for name, result in trial.results.items():
        change = stats.paired_difference(teacher[name], result, seed)
        told["results"][name] = _interval(result, name, sets, seed) | {
            "change": change.value, "change_low": change.low, "change_high": change.high, "reliable": change.reliable
        }  # fmt: skip
    return told


def _against_the_best(rows: list[dict[str, Any]], trials: Sequence[Trial], grid: Grid, seed: int) -> None:
    """On each text: how far each row is above the lowest of its size and calibration text, in nats, paired."""
    for remove, data in itertools.product(dict.fromkeys(t.remove for t in trials), grid.datas):
        alike = [i for i, trial in enumerate(trials) if (trial.remove, trial.data) == (remove, data)]
        for text in grid.texts if alike else ():
            best = min(alike, key=lambda i: trials[i].results[text].mean)
            for i in alike:
                gap = stats.paired_difference(trials[best].results[text], trials[i].results[text], seed)
                ends = (0.0, 0.0) if i == best else (gap.low, gap.high)
                rows[i]["results"][text]["above_best"] = {"value": gap.value, "low": ends[0], "high": ends[1]}


def _against_the_first_text(rows: list[dict[str, Any]], trials: Sequence[Trial], grid: Grid, seed: int) -> None:
    """Calibrated on another text than the first: what that changed for a recipe at a size, in nats, paired."""
    first = {(trial.recipe, trial.remove): trial for trial in trials if trial.data == grid.datas[0]}
    for row, trial in zip(rows, trials, strict=True):
        same = first.get((trial.recipe, trial.remove))
        if same is None or same is trial:
            continue
        for text in grid.texts:
            gap = stats.paired_difference(same.results[text], trial.results[text], seed)
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


# -- tasks against each other ---------------------------------------------------------------------------------------


def trade(lab: Lab, tasks: Sequence[str], items: int, common: Mapping[str, Any]) -> dict[str, Any]:
    """Pruned for task A, measured on task B: the accuracy of each pair, and what it lost, paired, with intervals.

    The first row is pruned by the loss of the recipe on text. Items that a search looks at are never measured.

    Source: Siddiqui et al. 2024, A deeper look at depth pruning of LLMs (arXiv 2407.16286).
    """
    given = {"model": lab.teacher.name, **common}
    stems = [Path(file).name.partition(".")[0] for file in tasks]
    names = {file: stem if stems.count(stem) == 1 else file for file, stem in zip(tasks, stems, strict=True)}
    base = recipe_from(given)
    recipes = [("text", base), *((names[file], recipe_from(given | {"loss": f"task:{file}"})) for file in tasks)]
    sets = {names[file]: items_of(file, lab.teacher, "evaluation", items=items) for file in tasks}
    trials = []
    for number, (name, recipe) in enumerate(recipes):
        lab.watch(Event("trade", number, len(recipes), f"pruned for {name}"))
        trials.append(tried(lab, name, recipe, calibration_of(lab, recipe)))
    teacher = evaluate(lab, base, trials, sets)
    rows = [_row(trial, teacher, sets, lab.teacher.anatomy, base.seed) for trial in trials]
    for trial, row in zip(trials, rows, strict=True):
        row["pruned_for"] = trial.recipe
        for name in sets:
            other = stats.paired_difference(trials[0].results[name], trial.results[name], base.seed)
            row["results"][name]["against_text"] = {"value": other.value, "low": other.low, "high": other.high}
    return {
        "model": lab.teacher.name,
        "remove": base.remove,
        "teacher": {name: _interval(result, name, sets, base.seed) for name, result in teacher.items()},
        "rows": rows,
        "evaluation": {name: each.describe() for name, each in sets.items()},
    }


# -- how far a result can be trusted --------------------------------------------------------------------------------


def stability(lab: Lab, metric: str, sizes: Sequence[int], draws: int, common: Mapping[str, Any]) -> dict[str, Any]:
    """Scores and plans over disjoint calibration sets: `draws` sets of each of `sizes` tokens, seed by seed.

    For each size: the mean Spearman correlation between the scores of two sets, and the mean overlap (Jaccard) of the
    plans that they lead to, with the range over the pairs.
    """
    told = []
    recipes = [recipe_from({"model": lab.teacher.name, **common, "tokens": size}) for size in sizes]
    enough = draws * (max(sizes) + DOCUMENT_TOKENS)  # a portion ends with its last document
    largest = recipes[sizes.index(max(sizes))].model_copy(update={"tokens": enough, "self_share": 0.0})
    whole = calibration_of(lab, largest, least=draws * max(sizes))
    parts = [parted(whole, size, draws) for size in sizes]
    for size, recipe, sets in zip(sizes, recipes, parts, strict=True):
        scores, plans = [], []
        for number, tokens in enumerate(sets):
            lab.watch(Event("stability", number, draws, f"{size} tokens"))
            job = lab.job(recipe.model_copy(update={"metric": metric}))
            scored_by = scored(job, probe_of(job.recipe, lab.teacher, tokens, job))["scores"]
            scores.append({unit: value for unit, value in scored_by.items() if isinstance(unit, Site)})
            plans.append(tried(lab, metric, recipe, tokens).plan)
        pairs = list(itertools.combinations(range(len(sets)), 2))
        told.append(
            {
                "tokens": size,
                "sets": len(sets),
                "rank_correlation": _spread([_spearman(scores[i], scores[j]) for i, j in pairs]),
                "overlap": _spread([_overlap(plans[i], plans[j]) for i, j in pairs]),
                "plans": [plan.entries() for plan in plans],
            }
        )
    return {"model": lab.teacher.name, "metric": metric, "search": recipes[0].search, "remove": recipes[0].remove,
            "data": whole.describe(), "sizes": told}  # fmt: skip


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": math.fsum(values) / len(values), "low": min(values), "high": max(values)}


def _overlap(a: Plan, b: Plan) -> float:
    mine, theirs = ({*plan.removed, *plan.narrowed} for plan in (a, b))
    return len(mine & theirs) / len(mine | theirs)


def _spearman(a: Mapping[Site, float], b: Mapping[Site, float]) -> float:
    """Spearman's rank correlation of two rankings of the same sites; ties have their mean rank."""
    sites = sorted(a)
    ranks = [stats.ranks([scores[site] for site in sites]) for scores in (a, b)]
    return stats.correlation(*ranks)


def filed(
    told: dict[str, Any], folder: Path, page: Callable[[dict[str, Any]], str], store: Store, run: str
) -> dict[str, Any]:
    """Write a result and its page, whole or not at all, and store it; the result with the place of the page."""
    told = told | {"page": str(folder / "index.html")}
    aside = aside_of(folder, "laboratory")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    (aside / "result.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    (aside / "index.html").write_text(page(told), encoding="utf-8")
    appear(aside, folder)
    store.update(run, result=told)
    return told
