"""The main job, in order: load, calibrate, search, apply, evaluate, save, time, report."""

from __future__ import annotations

import datetime
import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

import billhook
from billhook import proof, report
from billhook.budget import parse_budgets
from billhook.data import TokenSet
from billhook.errors import FingerprintError
from billhook.export.adapter import save_adapter
from billhook.export.checkpoint import (
    check_target,
    publish,
    staging_folder,
    verify_round_trip,
    verify_streamed_round_trip,
    write_checkpoint,
)
from billhook.loading import Teacher
from billhook.losses import parse_loss
from billhook.plan import Anatomy, Plan
from billhook.portions import SOURCE_SEPARATOR, halves
from billhook.proof import RunContext
from billhook.recipe import Recipe
from billhook.records import EventListener, ignore_events
from billhook.recovering import RecoveryResult, load_recovery_tokens, recovery_options, run_recoveries
from billhook.searching import (
    choose_plan,
    counts_time,
    expected_losses,
    load_teacher,
    probe_of,
    problem_of,
    recovery_tokens,
    tokens_for,
    validate,
    validation_and_test,
)
from billhook.store import Run, Store
from billhook.surgery import apply, effective_plan
from billhook.vet import dtype_name

ZEROED = "The removed sites hold zeros: equal outputs everywhere, no speed-up."
ALONE = "Calibrated on the given text alone: this model cannot write its share of it here."
APART = (
    "The weights are those without the adapter, which is in the folder adapter beside them; all that was measured is "
    "both together, merged."
)
STREAMED = "The model was larger than the memory that it might use: read block by block, it was not timed nor asked."


def run_pruning(store: Store, run: Run, watch: EventListener) -> dict[str, Any]:
    """Carry out a filed run, from its beginning or from where an earlier attempt left it. Returns its result.

    Nothing appears at the run's `out` before everything in it is proven.
    """
    job = RunContext(Recipe(**run.recipe), store, run.id, Path(run.out), watch, {})
    aside = staging_folder(job.out, job.run)
    with store.lock(run.id):
        finished = _finished(job)
        if finished is not None:
            store.update(run.id, state="done", result=finished)
            return finished
        store.update(run.id, state="running")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            result = _stages(job, run.fingerprints, aside)
            shutil.rmtree(work_folder(job), ignore_errors=True)
        except BaseException as error:
            shutil.rmtree(aside, ignore_errors=True)
            if not isinstance(error, KeyboardInterrupt):
                shutil.rmtree(work_folder(job), ignore_errors=True)
            store.update(run.id, state="interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
            raise
        store.update(run.id, state="done", result=result)
    return result


def work_folder(job: RunContext) -> Path:
    """Where a run keeps what its recoveries have found so far, beside its folder, until it is done."""
    return staging_folder(job.out, job.run).with_suffix(".recovery")


def _finished(job: RunContext) -> dict[str, Any] | None:
    """The result of a run that was killed after its folder appeared and before the store knew."""
    told = job.out / "report.json"
    result: dict[str, Any] = json.loads(told.read_text(encoding="utf-8")) if told.is_file() else {}
    return result if result.get("run") == job.run else None


def _stages(job: RunContext, bound: dict[str, str], aside: Path) -> dict[str, Any]:
    recipe = job.recipe
    given_folder = Path(recipe.model).expanduser()
    check_target(job.out, given_folder if given_folder.is_dir() else None)
    with job.stage("load"):
        teacher = load_teacher(recipe, job.watch)
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
        perplexity = proof.compare_perplexity(job, teacher, plan, proof_text, repair)
        tasks = [proof.task_accuracy(job, teacher, plan, file, repair) for file in task_files(recipe)]
        answers = [] if streamed else proof.sample_answers(teacher, student, job.watch)
    with job.stage("save"):
        saved = student if got.base is None else apply(teacher, plan, repair=got.base)
        write_checkpoint(saved, teacher.tokenizer, plan, aside, teacher=teacher, watch=job.watch)
        probe_row = calibration.rows[:1, : calibration.lengths[0]]
        if streamed:
            verify_streamed_round_trip(teacher, plan, aside, probe_row, repair=repair, watch=job.watch)
        else:
            verify_round_trip(saved, aside, probe_row, job.watch)
        if got.adapter is not None:
            save_adapter(got.adapter, aside, student, probe_row)
    with job.stage("speed"):
        timed = None if streamed else proof.compare_speed(job, teacher, student, (plan, repair), aside)
    with job.stage("report"):
        result = {
            **_describe(job, teacher, student, plan, _notes(recipe, teacher, calibration, got)),
            "data": {"calibration": calibration.describe(), "evaluation": proof_text.describe()},
            "seen": _seen(recipe, teacher, calibration, held_out, got),
            "steps": [step.to_json() for step in found.steps],
            "search": found.search_summary,
            "within": found.within,
            "perplexity": perplexity,
            "tasks": tasks,
            **_sizes(
                teacher.anatomy,
                effective_plan(teacher, plan, recipe.stock),
                repair.parameters(),
                teacher.dtype.itemsize,
            ),
            "recoveries": list(got.reports),
            "speed": timed,
            "answers": answers,
            "seconds": job.seconds,
        }
        _write_report(result, aside)
        publish(aside, job.out)
    return result


# -- the stages -----------------------------------------------------------------------------------------------------


def test_text(recipe: Recipe, held_out: TokenSet) -> TokenSet:
    """The held-out text on which a run proves its student: what no choice has seen."""
    return halves(held_out)[1] if recipe.margin is not None and recipe.margin.kind == "ppl" else held_out


def _seen(
    recipe: Recipe, teacher: Teacher, calibration: TokenSet, held_out: TokenSet, got: RecoveryResult
) -> list[str]:
    """Digests of all documents and items that a choice, a fit or an earlier pruning of this model has looked at."""
    found = {*calibration.digests, *got.seen}
    if recipe.margin is not None:
        found |= set(validation_and_test(recipe, recipe.margin, teacher, held_out)[0].digests)
    if recipe.fold_in_search:
        found |= set(recovery_tokens(recipe, teacher, ignore_events).digests)
    return sorted(found | set(proof.seen_digests(teacher.folder)))


def task_files(recipe: Recipe) -> list[str]:
    """The tasks that a recipe is about."""
    files = [parse_loss(recipe.loss)[1], recipe.margin.file if recipe.margin else None]
    return sorted({file for file in files if file is not None})


def _bind(job: RunContext, bound: dict[str, str], teacher: Teacher, calibration: TokenSet) -> None:
    """Tie the run to its model and tokens, or see that they are still the same."""
    now = {"model": teacher.fingerprint, "tokens": calibration.hash}
    changed = [name for name in now if bound and bound.get(name) != now[name]]
    if changed:
        raise FingerprintError(
            f"Run {job.run} was begun with another {' and other '.join(changed)}: the files have changed since. Begin "
            "a new run: leave --resume out."
        )
    job.store.update(job.run, bound=now)


# -- the report -----------------------------------------------------------------------------------------------------


def _notes(recipe: Recipe, teacher: Teacher, calibration: TokenSet, got: RecoveryResult) -> list[str]:
    text = calibration.choices is None and recipe.plan is None
    alone = text and recipe.self_share > 0 and "self" not in calibration.source.split(SOURCE_SEPARATOR)
    told = ((STREAMED, teacher.weights is not None), (APART, got.adapter is not None), (ALONE, alone))
    return [note for note, so in told if so]


def _describe(job: RunContext, teacher: Teacher, student: Any, plan: Plan, notes: list[str]) -> dict[str, Any]:
    device = str(teacher.device)
    zeroed = student.config.billhook.get("zeroed")
    return {
        "billhook": billhook.__version__,
        "run": job.run,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "kind": student.config.model_type + (", zeroed: no speed-up" if zeroed else ""),
        "note": " ".join([ZEROED, *notes] if zeroed else notes),
        "model": {
            "name": teacher.name,
            "type": teacher.anatomy.model_type,
            "fingerprint": teacher.fingerprint,
            "blocks": teacher.anatomy.blocks,
            "dtype": dtype_name(teacher.dtype),
            "compute_dtype": dtype_name(teacher.model.dtype),
            "device": device,
        },
        "out": str(job.out),
        "recipe": job.recipe.model_dump(),
        "environment": asdict(proof.environment(device)),
        "anatomy": anatomy_json(teacher.anatomy),
        "already_removed": teacher.removed_earlier.names(),
        "plan": {"removed": plan.names(), "narrowed": plan.narrowed_names(), "key": plan.key()},
        "loss": job.recipe.loss,
    }


def anatomy_json(anatomy: Anatomy) -> dict[str, Any]:
    """An anatomy as plain JSON: sites by name, and how many channel groups each has."""
    sites = [asdict(size) | {"site": str(size.site), "groups": len(size.groups)} for size in anatomy.sites]
    return {
        "model_type": anatomy.model_type, "blocks": anatomy.blocks, "sites": sites, "rest": asdict(anatomy.rest)
    }  # fmt: skip


def _sizes(anatomy: Anatomy, plan: Plan, patched: int, item_bytes: int) -> dict[str, Any]:
    """Totals of both sides; the student's with the `patched` parameters that a repair put in."""
    more = {
        "parameters": patched,
        "bytes": patched * item_bytes,
        "kv_bytes_per_token": 0,
        "flops_per_token": 2 * patched,
    }
    return {
        kind: {"teacher": anatomy.total(kind), "student": anatomy.total(kind, plan) + n} for kind, n in more.items()
    }


def _write_report(result: dict[str, Any], folder: Path) -> None:
    (folder / "report.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(report.run_page(result), encoding="utf-8")
    (folder / "README.md").write_text(report.model_card(result), encoding="utf-8")


# -- the plan of work -----------------------------------------------------------------------------------------------


def preview_run(recipe: Recipe, watch: EventListener) -> dict[str, Any]:
    """What a run would do: losses to measure, memory, time. Loads the model and times two losses; writes nothing."""
    teacher = load_teacher(recipe, watch)
    given = validate(recipe, teacher)
    calibration, held_out = tokens_for(recipe, teacher, watch)
    count = 1 if given is not None else _count(recipe, teacher)
    probe = probe_of(recipe, teacher, calibration)
    probe.losses([Plan()])
    start = time.perf_counter()
    probe.losses([Plan(frozenset(teacher.anatomy.sites_present()[:1]))])
    one = time.perf_counter() - start
    layout = probe.arrange(len(teacher.anatomy.sites))
    evaluation = 2 * one * held_out.tokens / calibration.tokens
    return {
        "model": teacher.name,
        "remove": recipe.remove or recipe.within or str(given),
        "losses": count,
        "data": {"calibration": calibration.describe(), "evaluation": held_out.describe()},
        "memory_bytes": {
            "weights": teacher.weight_bytes,
            "kept_for_the_search": layout.kept,
            "free": psutil.virtual_memory().available,
        },
        "layout": str(layout),
        "disk_bytes": teacher.anatomy.total("bytes"),
        "expected_seconds": {
            "search_at_most": None if count is None else round(count * one, 1),
            "evaluate": round(evaluation, 1),
        },
    }


def _count(recipe: Recipe, teacher: Teacher) -> int | None:
    """How many losses the search asks for, if it says so; for half of the sites, where a margin or a time decides."""
    unknown = not recipe.budgets or counts_time(recipe)
    budgets = parse_budgets("50%sites") if unknown else recipe.budgets
    return expected_losses(recipe, problem_of(recipe, teacher.anatomy, budgets))
