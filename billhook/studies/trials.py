"""Trials of a study: a recipe applied to a model, and evaluated."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from billhook.core import statistics
from billhook.core.anatomy import Anatomy
from billhook.core.events import Event, EventListener
from billhook.core.files.cache_keys import AttemptKey, PlanKey, TrialPlan
from billhook.core.plan import Plan
from billhook.core.results.measured import EvalResult
from billhook.core.results.studies import Outcome, StudentOutcome, TrialResult
from billhook.data.token_sets import TokenSet
from billhook.engine.workers.team import Team
from billhook.models.load import Teacher
from billhook.runs.choose_plan import choose_plan, site_times_key
from billhook.runs.evaluation import evaluate_plans
from billhook.runs.job import RunContext
from billhook.runs.prepare import (
    calibration_spec,
    counts_time,
    load_calibration,
    read_held_out_half,
    recovery_tokens,
    task_calibration,
)
from billhook.runs.recipe import Recipe
from billhook.runs.store import Store

TOGETHER = 6  # plans that are evaluated, and filed, at a time


@dataclass(frozen=True)
class StudyContext:
    """What every trial of a study shares. `team`: the workers that recipes with these `workers` ask for."""

    store: Store
    run: str
    teacher: Teacher
    watch: EventListener
    workers: int | str = 1
    team: Team | None = None

    def job(self, recipe: Recipe) -> RunContext:
        team = self.team if recipe.workers == self.workers else None
        return RunContext(recipe, self.store, self.run, Path(), self.watch, {}, team=team)


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
    task = task_calibration(recipe, study.teacher, study.watch)
    if task is not None:
        return task
    job, spec = study.job(recipe), calibration_spec(recipe)
    with study.teacher.lock:  # it may write some of it
        return load_calibration(job, study.teacher, spec, self_share=recipe.self_share, least=least)


def held_out_of(study: StudyContext, source: str, recipe: Recipe) -> TokenSet:
    """Held-out tokens of a text, from the half of it that is never calibration."""
    return read_held_out_half(recipe, source, study.teacher, study.watch, seed=0)


def run_trial(study: StudyContext, name: str, recipe: Recipe, calibration: TokenSet) -> Trial:
    """Search by a recipe, or recall what an earlier one found."""
    passed = {"about": "", "model": "", "eval_data": None, "eval_tokens": 64, "eval_length": 16, "skills": "all"}
    later = ("recover", "recover_set", *(() if recipe.fold_in_search else ("recover_data", "recover_tokens",
             "recover_length")))  # fmt: skip
    apart = ("self_share", "workers", *later)  # in the tokens, without effect, or after
    passed |= {name: Recipe.model_fields[name].default for name in apart}
    key = PlanKey(
        *(study.teacher.fingerprint, recipe.model_copy(update=passed).model_dump(exclude_defaults=True)),
        *(calibration.hash, study.teacher.compute_key),
        site_times=site_times_key(recipe, study.teacher) if counts_time(recipe) else None,
        refitted_on=recovery_tokens(recipe, study.teacher, study.watch).hash if recipe.fold_in_search else None,
    )

    def search() -> TrialPlan:
        attempt = AttemptKey(study.teacher.fingerprint, key)
        resumed = study.store.remember(attempt, lambda: study.run, study.run) != study.run
        start = time.perf_counter()
        choice = choose_plan(study.job(recipe), study.teacher, calibration, along=False)
        seconds = round(time.perf_counter() - start, 1)
        return TrialPlan(choice.plan, seconds, choice.search_summary.site_evaluations, resumed)

    found = study.store.remember(key, search, study.run)
    cost = (found.seconds, found.site_evaluations, found.resumed)
    return Trial(name, str(recipe.remove), recipe.data, found.plan, *cost)


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
            study.watch(Event("evaluate", len(found), len(plans), {"set": Path(name).name}))
        teacher[name] = found[Plan()]
        for trial in trials:
            trial.results[name] = found[trial.plan]
    return teacher


def outcome_of(result: EvalResult, tokens: TokenSet, seed: int) -> Outcome:
    """Perplexity or accuracy of one model with its 95% interval."""
    estimate = statistics.mean_interval(result, seed)
    if tokens.choices is None:
        return Outcome("perplexity", estimate.mapped(statistics.exp_capped), result.mean)
    return Outcome("accuracy", estimate, None)


def trial_result(
    trial: Trial, teacher: Mapping[str, EvalResult], sets: Mapping[str, TokenSet], anatomy: Anatomy, seed: int
) -> TrialResult:
    """One trial as a value of a study's result: its plan, sizes, cost, and what it got on every set."""
    results = {}
    for name, result in trial.results.items():
        own = outcome_of(result, sets[name], seed)
        change = statistics.paired_difference(teacher[name], result, seed)
        results[name] = StudentOutcome(own.kind, own.estimate, own.nats, change)
    cost = (trial.seconds, trial.site_evaluations, trial.resumed)
    return TrialResult(
        trial.recipe, trial.remove, trial.data, trial.plan, anatomy.sizes(trial.plan), *cost, results=results
    )
