"""Transfer: what adapting to one task costs on others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from billhook.core import statistics
from billhook.core.errors import UsageError, option
from billhook.core.events import Event, EventListener, ignore_events
from billhook.core.options import StudyOptions, shows_options
from billhook.core.results.specs import TransferSpec, plain_options
from billhook.core.results.studies import TransferResult, TrialResult
from billhook.data.choice_tasks import load_items
from billhook.models.device import environment
from billhook.models.load import Model, loaded_by_name, name_of
from billhook.runs.recipe import Recipe, parse_recipe, require_effect
from billhook.runs.store import STORE
from billhook.studies.run_study import open_study, several, write_study
from billhook.studies.trials import (
    StudyContext,
    Trial,
    calibration_of,
    evaluate_trials,
    outcome_of,
    run_trial,
    trial_result,
)


@shows_options(StudyOptions, Recipe.model_fields)
def transfer(
    model: Model = "demo",
    tasks: str | Sequence[str] = (),
    *,
    items: int = 200,
    out: str | Path | None = None,
    store: str | Path = STORE,
    watch: EventListener = ignore_events,
    **options: Unpack[StudyOptions],
) -> TransferResult:
    """What adapting to one task costs on others: pruned for each of `tasks`, measured on each, with paired intervals.

    `tasks`: files of multiple-choice items, of which `items` are measured and others calibrated on. `options`: fields
    of `Recipe`; `remove` is needed.
    """
    if not tasks:
        raise UsageError(
            "There is no task to prune for. Name files of multiple-choice items: "
            f"{option('tasks', ['a.jsonl', 'b.jsonl'])}."
        )
    first = parse_recipe({"model": name_of(model), **options}, "The call")
    require_effect(options, first)
    spec = TransferSpec(name_of(model), several(tasks), items, plain_options(options))
    with open_study(spec, first, Path(store), out, watch, loaded=loaded_by_name(model)) as (study, folder):
        result = run_transfer(study, several(tasks), items, options)
        return write_study(result, folder, study.store, study.run)


# -- tasks against each other ---------------------------------------------------------------------------------------


def run_transfer(study: StudyContext, tasks: Sequence[str], items: int, common: Mapping[str, Any]) -> TransferResult:
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
        study.watch(Event("transfer", number, len(recipes), {"pruned_for": name}))
        trials.append(run_trial(study, name, recipe, calibration_of(study, recipe)))
    teacher = evaluate_trials(study, base, trials, sets)
    seed, anatomy = base.seed, study.teacher.anatomy
    results = [_against_text(trial_result(t, teacher, sets, anatomy, seed), t, trials[0], seed) for t in trials]
    return TransferResult(
        study.teacher.name,
        study.teacher.fingerprint,
        remove=str(base.remove),
        teacher={name: outcome_of(result, sets[name], seed) for name, result in teacher.items()},
        sizes=anatomy.sizes(),
        trials=tuple(results),
        evaluation={name: each.info() for name, each in sets.items()},
        environment=environment(study.teacher.place),
    )


def _against_text(result: TrialResult, trial: Trial, on_text: Trial, seed: int) -> TrialResult:
    """The result with paired differences to the trial that was pruned on text."""
    outcomes = {}
    for name, outcome in result.results.items():
        gap = statistics.paired_difference(on_text.results[name], trial.results[name], seed)
        outcomes[name] = replace(outcome, against_text=gap)
    return replace(result, results=outcomes)
