"""The main job, in order: load, calibrate, search, apply, evaluate, save, time, report."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from billhook.core.budget import parse_budgets
from billhook.core.errors import FingerprintError, either
from billhook.core.events import EventListener
from billhook.core.plan import Plan
from billhook.core.plan_files import find_path
from billhook.core.results.model import ExpectedSeconds, MemoryUse, WorkEstimate
from billhook.core.results.run import RunData, RunResult
from billhook.core.results.stored import Run
from billhook.data.splits import halves
from billhook.data.token_sets import TokenSet
from billhook.engine.losses import parse_loss
from billhook.methods.export import Student, export_student
from billhook.methods.export.checkpoint import check_target, publish, staging_folder
from billhook.models.device import free_memory
from billhook.models.load import Teacher
from billhook.models.surgery import apply
from billhook.runs import evaluation
from billhook.runs.choose_plan import choose_plan
from billhook.runs.job import RunContext, store_and_watch
from billhook.runs.prepare import NOTHING, counts_time, load_teacher, probe_of, problem_of, tokens_for, validate
from billhook.runs.recipe import Recipe
from billhook.runs.recovery import RecoveryResult, load_recovery_tokens, recovery_options, run_recoveries
from billhook.runs.result import Measured, Texts, run_result
from billhook.runs.search import expected_losses
from billhook.runs.store import Store

WriteReport = Callable[[RunResult, Path], None]  # writes the report of a result into a folder


def run_pruning(
    store: Store, run: Run, watch: EventListener, write_report: WriteReport, loaded: Mapping[str, Teacher] = NOTHING
) -> RunResult:
    """Carry out a filed run, from its beginning or from where an earlier attempt left it. Returns its result.

    `loaded`: models that need not be loaded, by name. Nothing appears at the run's `out` before everything in it is
    proven.
    """
    job = RunContext(
        Recipe(**run.spec), store, run.id, Path(run.out), store_and_watch(store, run.id, watch), {}, loaded
    )
    aside = staging_folder(job.out, job.run)
    with store.lock(run.id):
        finished = _finished(job)
        if finished is not None:
            store.update(run.id, state="done", result=finished.to_json())
            return finished
        store.update(run.id, state="running")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            result = _stages(job, run.fingerprints, aside, write_report)
            shutil.rmtree(work_folder(job), ignore_errors=True)
        except BaseException as error:
            shutil.rmtree(aside, ignore_errors=True)
            if not isinstance(error, KeyboardInterrupt):
                shutil.rmtree(work_folder(job), ignore_errors=True)
            store.update(run.id, state="interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
            raise
        store.update(run.id, state="done", result=result.to_json())
    return result


def work_folder(job: RunContext) -> Path:
    """Where a run keeps what its recoveries have found so far, beside its folder, until it is done."""
    return staging_folder(job.out, job.run).with_suffix(".recovery")


def _finished(job: RunContext) -> RunResult | None:
    """The result of a run that was killed after its folder was published and before the store knew."""
    report = job.out / "report.json"
    value = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
    return RunResult.from_json(value) if value.get("run") == job.run else None


def _stages(job: RunContext, bound: dict[str, str], aside: Path, write_report: WriteReport) -> RunResult:
    recipe = job.recipe
    given_folder = find_path(recipe.model)
    check_target(job.out, given_folder if given_folder is not None and given_folder.is_dir() else None)
    with job.stage("load"):
        teacher = load_teacher(recipe, job.watch, job.loaded)
        given = validate(recipe, teacher)
        recovery_options(recipe)
        streamed = teacher.weights is not None
        check_target(job.out, teacher.folder, int(1.05 * teacher.anatomy.total("bytes")))
    with job.stage("calibrate"):
        calibration, held_out = tokens_for(recipe, teacher, job.watch, job)
        _bind(job, bound, teacher, calibration)
        learn = load_recovery_tokens(job, teacher, held_out)
    with job.stage("search"):
        found = choose_plan(job, teacher, calibration, held_out, given)
        plan, proof_text = found.plan, test_text(recipe, held_out)
    got = RecoveryResult()
    if learn is not None:
        with job.stage("recover"):
            texts = ({} if calibration.choices else {"calibration": calibration}) | {"held-out": proof_text}
            got = run_recoveries(job, teacher, plan, learn=learn, texts=texts, work=work_folder(job))
    repair = got.repair
    with job.stage("apply"):
        student = apply(teacher, plan, stock=recipe.stock, repair=repair)
    with job.stage("evaluate"):
        perplexity = evaluation.compare_perplexity(job, teacher, plan, proof_text, repair)
        tasks = tuple(evaluation.task_accuracy(job, teacher, plan, file, repair) for file in task_files(recipe))
        answers = () if streamed else evaluation.sample_answers(teacher, student, job.watch)
    with job.stage("save"):
        probe_row = calibration.rows[:1, : calibration.lengths[0]]
        whole = Student(student, teacher, plan, probe_row, repair, got.base, got.adapter, job.watch)
        export_student(recipe.writes if got.adapter is None else "adapter", whole, aside)
    with job.stage("speed"):
        timed = None if streamed else evaluation.compare_speed(job, teacher, student, (plan, repair), aside)
    with job.stage("report"):
        tokens, measured = Texts(calibration, held_out, proof_text), Measured(perplexity, tasks, timed, answers)
        result = run_result(job, teacher, student, texts=tokens, choice=found, recovered=got, measured=measured)
        write_report(result, aside)
        publish(aside, job.out)
    return result


# -- the stages -----------------------------------------------------------------------------------------------------


def test_text(recipe: Recipe, held_out: TokenSet) -> TokenSet:
    """The held-out text on which a run proves its student: what no choice has seen."""
    return halves(held_out)[1] if recipe.margin is not None and recipe.margin.kind == "ppl" else held_out


def task_files(recipe: Recipe) -> list[str]:
    """The tasks that a recipe is about."""
    files = [parse_loss(recipe.loss).file, recipe.margin.file if recipe.margin else None]
    return sorted({file for file in files if file is not None})


def _bind(job: RunContext, bound: dict[str, str], teacher: Teacher, calibration: TokenSet) -> None:
    """Tie the run to its model and tokens, or see that they are still the same."""
    now = {"model": teacher.fingerprint, "tokens": calibration.hash}
    changed = [name for name in now if bound and bound.get(name) != now[name]]
    if changed:
        raise FingerprintError(
            f"Run {job.run} was begun with another {' and other '.join(changed)}: the files have changed since. Begin "
            f"a new run: {either('call prune', 'leave --resume out')}."
        )
    job.store.update(job.run, fingerprints=now)


# -- the plan of work -----------------------------------------------------------------------------------------------


def preview_run(recipe: Recipe, watch: EventListener, loaded: Mapping[str, Teacher] = NOTHING) -> WorkEstimate:
    """What a run would do: losses to measure, memory, time. Loads the model and times two losses; writes nothing."""
    teacher = load_teacher(recipe, watch, loaded)
    given = validate(recipe, teacher)
    calibration, held_out = tokens_for(recipe, teacher, watch)
    count = 1 if given is not None else _count(recipe, teacher)
    probe = probe_of(recipe, teacher, calibration)
    probe.losses([Plan()])
    start = time.perf_counter()
    probe.losses([Plan(frozenset(teacher.anatomy.sites_present()[:1]))])
    one = time.perf_counter() - start
    work = probe.arrange(len(teacher.anatomy.sites))
    evaluation = 2 * one * held_out.tokens / calibration.tokens
    return WorkEstimate(
        model=teacher.name,
        remove=recipe.remove or recipe.within or str(given),
        losses=count,
        data=RunData(calibration.info(), held_out.info()),
        memory=MemoryUse(teacher.weight_bytes, work.kept, free_memory(torch.device("cpu"))),
        work=work,
        disk_bytes=teacher.anatomy.total("bytes"),
        seconds=ExpectedSeconds(None if count is None else round(count * one, 1), round(evaluation, 1)),
    )


def _count(recipe: Recipe, teacher: Teacher) -> int | None:
    """How many losses the search asks for, if it says so; for half of the sites, where a margin or a time decides."""
    unknown = not recipe.budgets or counts_time(recipe)
    budgets = parse_budgets("50%sites") if unknown else recipe.budgets
    return expected_losses(recipe, problem_of(recipe, teacher.anatomy, budgets))
