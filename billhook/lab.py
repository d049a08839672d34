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
from billhook.export.checkpoint import publish, staging_folder
from billhook.loading import Teacher
from billhook.losses import parse_loss
from billhook.plan import Anatomy, Plan, Site
from billhook.portions import disjoint_parts, mixed_sets
from billhook.proof import RunContext, environment, evaluate_plans
from billhook.recipe import Recipe, parse_recipe, with_overrides
from billhook.records import EvalResult, Event, EventListener
from billhook.scoring import compute_scores
from billhook.searching import (
    choose_plan,
    counts_time,
    load_token_sets,
    probe_of,
    recovery_tokens,
    task_calibration,
    text_spec,
    timing_of,
    with_site_times,
)
from billhook.store import Store
from billhook.tasks import load_items

TOGETHER = 6  # plans that are evaluated, and filed, at a time
SIZES = ("parameters", "bytes", "kv_bytes_per_token", "flops_per_token", "ns_per_token")


@dataclass(frozen=True)
class StudyContext:
    """What every experiment of a laboratory shares."""

    store: Store
    run: str
    teacher: Teacher
    watch: EventListener

    def job(self, recipe: Recipe) -> RunContext:
        return RunContext(recipe, self.store, self.run, Path(), self.watch, {})


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


def calibration_of(study: StudyContext, recipe: Recipe, least: int | None = None) -> TokenSet:
    """Calibration tokens of a recipe, `least` or more, from the half of its text that is not kept for evaluation."""
    task = task_calibration(recipe, study.teacher)
    if task is not None:
        return task
    wanted = replace(text_spec(recipe), eval_data=None, eval_tokens=64, eval_length=16, least=least)
    with study.teacher.lock:  # it may write some of it
        return load_token_sets(study.job(recipe), study.teacher, wanted)[0]


def held_out_of(study: StudyContext, source: str, recipe: Recipe) -> TokenSet:
    """Held-out tokens of a text, from the half of it that is never calibration."""
    wanted = replace(text_spec(recipe), data=source, eval_data=None, tokens=16, length=16, seed=0, self_share=0.0)
    return mixed_sets(wanted, study.teacher.model, study.teacher.tokenizer, study.watch)[1]


def evaluation_sets(study: StudyContext, grid: Grid, recipe: Recipe) -> dict[str, TokenSet]:
    """Evaluation tokens by name: texts, and the halves of tasks that no search looks at."""
    sets = {source: held_out_of(study, source, recipe) for source in grid.texts}
    for file in grid.tasks:
        sets[file] = load_items(file, study.teacher, "evaluation", items=grid.items)
    return sets


def run_trial(study: StudyContext, name: str, recipe: Recipe, calibration: TokenSet) -> Trial:
    """Search by a recipe, or recall what an earlier one found."""
    fingerprint = study.teacher.fingerprint
    passed = {"about": "", "model": "", "eval_data": None, "eval_tokens": 64, "eval_length": 16}
    later = ("recover", "recover_set", *(() if recipe.fold_in_search else ("recover_data", "recover_tokens",
             "recover_length")))  # fmt: skip
    passed |= {name: Recipe.model_fields[name].default for name in ("self_share", *later)}  # in the tokens, or after
    of: dict[str, Any] = {"recipe": recipe.model_copy(update=passed).model_dump(exclude_defaults=True),
                          "tokens": calibration.hash, "compute": study.teacher.compute_key}  # fmt: skip
    if counts_time(recipe):
        of["ns"] = timing_of(recipe, study.teacher)
    if recipe.fold_in_search:
        of["refitted"] = recovery_tokens(recipe, study.teacher, study.watch).hash
    known = study.store.cached(fingerprint, "plan", of)
    if known is None:
        resumed = study.store.cached(fingerprint, "attempt", of) is not None
        study.store.remember(fingerprint, "attempt", of, study.run, study.run)
        start = time.perf_counter()
        found = choose_plan(study.job(recipe), study.teacher, calibration, along=False)
        known = {
            "removed": found.plan.to_list(),
            "seconds": round(time.perf_counter() - start, 1),
            "site_evaluations": found.search_summary["site_evaluations"],
            "resumed": resumed,
        }
        study.store.remember(fingerprint, "plan", of, known, study.run)
    plan = Plan.parse(known["removed"])
    cost = (known["seconds"], known["site_evaluations"], known.get("resumed", False))
    return Trial(name, str(recipe.remove), recipe.data, plan, *cost)


def evaluate_trials(
    study: StudyContext, recipe: Recipe, trials: Sequence[Trial], sets: Mapping[str, TokenSet]
) -> dict[str, EvalResult]:
    """Fill in the results of all trials; returns those of the teacher."""
    job = study.job(recipe)
    plans = list(dict.fromkeys([Plan(), *(trial.plan for trial in trials)]))
    teacher: dict[str, EvalResult] = {}
    for name, tokens in sets.items():
        kind = "ppl" if tokens.choices is None else "pp"
        found: dict[Plan, EvalResult] = {}
        for start in range(0, len(plans), TOGETHER):
            some = plans[start : start + TOGETHER]
            found |= zip(some, evaluate_plans(job, study.teacher, some, tokens, kind), strict=True)
            study.watch(Event("evaluate", len(found), len(plans), Path(name).name))
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
        study.watch(Event("sweep", number, len(combinations), f"{name}, {recipe.remove}, {Path(recipe.data).name}"))
        key = (recipe.data, parse_loss(recipe.loss)[1], recipe.tokens, recipe.length, recipe.seed, recipe.field,
               recipe.self_share)  # fmt: skip
        if key not in tokens:
            tokens[key] = calibration_of(study, recipe)
            _require_disjoint(tokens[key], sets)
        try:
            trials.append(run_trial(study, name, recipe, tokens[key]))
        except BudgetError as error:
            refused.append({"recipe": name, "remove": str(recipe.remove), "data": recipe.data, "why": str(error)})
    teacher = evaluate_trials(study, base, trials, sets)
    anatomy = (
        study.teacher.anatomy if study.teacher.weights is not None else with_site_times(study.job(base), study.teacher)
    )
    rows = [_trial_row(trial, teacher, sets, anatomy, base.seed) for trial in trials]
    _add_gaps_to_best(rows, trials, grid, base.seed)
    _add_text_changes(rows, trials, grid, base.seed)
    for row in rows:
        row["front"] = [size for size in SIZES if not any(_dominates(other, row, size) for other in rows)]
    return {
        "model": study.teacher.name,
        "fingerprint": study.teacher.fingerprint,
        "teacher": {name: _interval(result, name, sets, base.seed) for name, result in teacher.items()},
        "sizes": {size: anatomy.total(size) for size in SIZES},
        "rows": rows,
        "refused": refused,
        "calibration": [each.describe() for each in tokens.values()],
        "evaluation": {name: each.describe() for name, each in sets.items()},
        "batch": base.batch,
        "context": base.context,
        "environment": asdict(environment(str(study.teacher.device))),
    }


def _require_disjoint(calibration: TokenSet, sets: Mapping[str, TokenSet]) -> None:
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
    value, low, high = (stats.exp_capped(x) if text else x for x in (spread.value, spread.low, spread.high))
    kind = "perplexity" if text else "accuracy"
    return {"kind": kind, "value": value, "low": low, "high": high, "nats": result.mean if text else None}


def _trial_row(
    trial: Trial, teacher: Mapping[str, EvalResult], sets: Mapping[str, TokenSet], anatomy: Anatomy, seed: int
) -> dict[str, Any]:
    told: dict[str, Any] = {
        "recipe": trial.recipe,
        "remove": trial.remove,
        "data": trial.data,
        "removed": trial.plan.to_list(),
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


def _add_gaps_to_best(rows: list[dict[str, Any]], trials: Sequence[Trial], grid: Grid, seed: int) -> None:
    """On each text: how far each row is above the lowest of its size and calibration text, in nats, paired."""
    for remove, data in itertools.product(dict.fromkeys(t.remove for t in trials), grid.datas):
        alike = [i for i, trial in enumerate(trials) if (trial.remove, trial.data) == (remove, data)]
        for text in grid.texts if alike else ():
            best = min(alike, key=lambda i: trials[i].results[text].mean)
            for i in alike:
                gap = stats.paired_difference(trials[best].results[text], trials[i].results[text], seed)
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


def run_transfer(study: StudyContext, tasks: Sequence[str], items: int, common: Mapping[str, Any]) -> dict[str, Any]:
    """Pruned for task A, measured on task B: the accuracy of each pair, and what it lost, paired, with intervals.

    The first row is pruned by the loss of the recipe on text. Items that a search looks at are never measured.

    Source: Siddiqui et al. 2024, A deeper look at depth pruning of LLMs (arXiv 2407.16286).
    """
    given = {"model": study.teacher.name, **common}
    stems = [Path(file).name.partition(".")[0] for file in tasks]
    names = {file: stem if stems.count(stem) == 1 else file for file, stem in zip(tasks, stems, strict=True)}
    base = parse_recipe(given)
    recipes = [("text", base), *((names[file], parse_recipe(given | {"loss": f"task:{file}"})) for file in tasks)]
    sets = {names[file]: load_items(file, study.teacher, "evaluation", items=items) for file in tasks}
    trials = []
    for number, (name, recipe) in enumerate(recipes):
        study.watch(Event("trade", number, len(recipes), f"pruned for {name}"))
        trials.append(run_trial(study, name, recipe, calibration_of(study, recipe)))
    teacher = evaluate_trials(study, base, trials, sets)
    rows = [_trial_row(trial, teacher, sets, study.teacher.anatomy, base.seed) for trial in trials]
    for trial, row in zip(trials, rows, strict=True):
        row["pruned_for"] = trial.recipe
        for name in sets:
            other = stats.paired_difference(trials[0].results[name], trial.results[name], base.seed)
            row["results"][name]["against_text"] = {"value": other.value, "low": other.low, "high": other.high}
    return {
        "model": study.teacher.name,
        "remove": base.remove,
        "teacher": {name: _interval(result, name, sets, base.seed) for name, result in teacher.items()},
        "rows": rows,
        "evaluation": {name: each.describe() for name, each in sets.items()},
    }


# -- how far a result can be trusted --------------------------------------------------------------------------------


def run_stability(
    study: StudyContext, metric: str, sizes: Sequence[int], draws: int, common: Mapping[str, Any]
) -> dict[str, Any]:
    """Scores and plans over disjoint calibration sets: `draws` sets of each of `sizes` tokens, seed by seed.

    For each size: the mean Spearman correlation between the scores of two sets, and the mean overlap (Jaccard) of the
    plans that they lead to, with the range over the pairs.
    """
    told = []
    recipes = [parse_recipe({"model": study.teacher.name, **common, "tokens": size}) for size in sizes]
    enough = draws * (max(sizes) + DOCUMENT_TOKENS)  # a portion ends with its last document
    largest = recipes[sizes.index(max(sizes))].model_copy(update={"tokens": enough, "self_share": 0.0})
    whole = calibration_of(study, largest, least=draws * max(sizes))
    parts = [disjoint_parts(whole, size, draws) for size in sizes]
    for size, recipe, sets in zip(sizes, recipes, parts, strict=True):
        scores, plans = [], []
        for number, tokens in enumerate(sets):
            study.watch(Event("stability", number, draws, f"{size} tokens"))
            job = study.job(recipe.model_copy(update={"metric": metric}))
            scored_by = compute_scores(job, probe_of(job.recipe, study.teacher, tokens, job))["scores"]
            scores.append({unit: value for unit, value in scored_by.items() if isinstance(unit, Site)})
            plans.append(run_trial(study, metric, recipe, tokens).plan)
        pairs = list(itertools.combinations(range(len(sets)), 2))
        told.append(
            {
                "tokens": size,
                "sets": len(sets),
                "rank_correlation": _spread([_spearman(scores[i], scores[j]) for i, j in pairs]),
                "overlap": _spread([_overlap(plans[i], plans[j]) for i, j in pairs]),
                "plans": [plan.to_list() for plan in plans],
            }
        )
    return {"model": study.teacher.name, "metric": metric, "search": recipes[0].search, "remove": recipes[0].remove,
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


def write_study(
    result: dict[str, Any], folder: Path, page: Callable[[dict[str, Any]], str], store: Store, run: str
) -> dict[str, Any]:
    """Write a result and its page, whole or not at all, and store it; the result with the place of the page."""
    result = result | {"page": str(folder / "index.html")}
    aside = staging_folder(folder, "laboratory")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    (aside / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (aside / "index.html").write_text(page(result), encoding="utf-8")
    publish(aside, folder)
    store.update(run, result=result)
    return result
