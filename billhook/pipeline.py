"""The main job, in order: load, calibrate, search, apply, evaluate, save, time, report."""

from __future__ import annotations

import datetime
import json
import math
import random
import shutil
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import psutil

import billhook
from billhook import proof, report
from billhook.audit import audited, conduct, with_words
from billhook.budget import read_budgets
from billhook.data import TokenSet, Wanted, token_sets
from billhook.errors import FingerprintError, PlanError
from billhook.execute import Executor, Told
from billhook.export.checkpoint import appear, aside_of, check_equal, check_streamed, check_target, write
from billhook.loading import Teacher, load
from billhook.losses import LOSSES
from billhook.plan import Anatomy, Ask, Plan
from billhook.probe import Fast, Probe
from billhook.problem import Problem, protection
from billhook.proof import Job
from billhook.recipe import Recipe, read_plan
from billhook.records import Event, Loss, Step, Watch, steps
from billhook.search import SEARCHES, settle
from billhook.store import Run, Store
from billhook.surgery import apply, leaves
from billhook.vet import dtype_name

ZEROED = "The removed sites hold zeros: equal outputs everywhere, no speed-up."
STREAMED = "The model was larger than the memory that it might use: read block by block, it was not timed nor asked."


def execute(store: Store, run: Run, watch: Watch) -> dict[str, Any]:
    """Carry out a filed run, from its beginning or from where an earlier attempt left it. Returns its result.

    Nothing appears at the run's `out` before everything in it is proven.
    """
    job = Job(Recipe(**run.recipe), store, run.id, Path(run.out), watch, {})
    aside = aside_of(job.out, job.run)
    with store.hold(run.id):
        finished = _finished(job)
        if finished is not None:
            store.update(run.id, state="done", result=finished)
            return finished
        store.update(run.id, state="running")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            result = _stages(job, run.bound, aside)
        except BaseException as error:
            shutil.rmtree(aside, ignore_errors=True)
            store.update(run.id, state="interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
            raise
        store.update(run.id, state="done", result=result)
    return result


def _finished(job: Job) -> dict[str, Any] | None:
    """The result of a run that was killed after its folder appeared and before the store knew."""
    told = job.out / "report.json"
    result: dict[str, Any] = json.loads(told.read_text(encoding="utf-8")) if told.is_file() else {}
    return result if result.get("run") == job.run else None


def _stages(job: Job, bound: dict[str, str], aside: Path) -> dict[str, Any]:
    recipe = job.recipe
    given_folder = Path(recipe.model).expanduser()
    check_target(job.out, given_folder if given_folder.is_dir() else None)
    with job.stage("load"):
        teacher = teacher_of(recipe, job.watch)
        problem, given = targets(recipe, teacher)
        streamed = teacher.weights is not None
        check_target(job.out, teacher.folder, int(1.05 * teacher.anatomy.total("bytes")))
    with job.stage("calibrate"):
        calibration, held_out = tokens_for(recipe, teacher, job.watch)
        _bind(job, bound, teacher, calibration)
    with job.stage("search"):
        plan, told, conducted = find(job, teacher, calibration, problem, given)
    with job.stage("apply"):
        student = apply(teacher, plan, stock=recipe.stock)
    with job.stage("evaluate"):
        perplexity = proof.perplexity(job, teacher, student, plan, held_out)
        answers = [] if streamed else proof.answers(teacher, student, job.watch)
    with job.stage("save"):
        write(student, teacher.tokenizer, plan, aside, teacher=teacher, watch=job.watch)
        probe_row = calibration.rows[:1, : calibration.lengths[0]]
        if streamed:
            check_streamed(teacher, plan, aside, probe_row, job.watch)
        else:
            check_equal(student, aside, probe_row, job.watch)
    with job.stage("speed"):
        timed = None if streamed else proof.measured_speed(job, teacher, student, plan, aside)
    with job.stage("report"):
        result = {
            **_describe(job, teacher, student, plan),
            "data": {"calibration": calibration.describe(), "evaluation": held_out.describe()},
            "steps": [step.to_json() for step in told],
            "search": conducted,
            "perplexity": perplexity,
            **_sizes(teacher.anatomy, leaves(teacher, plan, recipe.stock)),
            "speed": timed,
            "answers": answers,
            "seconds": job.seconds,
        }
        _write_report(result, aside)
        appear(aside, job.out)
    return result


# -- the stages -----------------------------------------------------------------------------------------------------


def teacher_of(recipe: Recipe, watch: Watch) -> Teacher:
    """The model of a recipe, loaded as the recipe says."""
    return load(
        recipe.model, device=recipe.device, dtype=recipe.dtype, trust_remote_code=recipe.trust_remote_code,
        memory=recipe.memory_bytes, watch=watch,
    )  # fmt: skip


def targets(recipe: Recipe, teacher: Teacher) -> tuple[Problem | None, Plan | None]:
    """The problem to solve, or the plan that was given. Raises UsageError before anything is computed."""
    LOSSES[recipe.loss], SEARCHES[recipe.search]
    protected = protection(recipe.protect, teacher.anatomy)
    lost = sorted(site for site in teacher.removed.removed if site.block in teacher.positions)
    if recipe.stock and lost:
        raise PlanError(
            f"--stock needs weights for every site that stays in the shape, and {', '.join(map(str, lost))} went in an "
            "earlier pruning. Leave --stock out, or start from the unpruned model."
        )
    if recipe.plan is not None:
        plan = read_plan(recipe.plan, teacher.anatomy, teacher.fingerprint)
        if not plan.removed:
            raise PlanError(f"--plan {recipe.plan!r} removes nothing. Name sites to remove: attention.7,mlp.16.")
        return None, teacher.anatomy.check(plan, protected)
    assert recipe.remove is not None
    return Problem(teacher.anatomy, read_budgets(recipe.remove), protected, recipe.seed).check(), None


def tokens_for(recipe: Recipe, teacher: Teacher, watch: Watch) -> tuple[TokenSet, TokenSet]:
    """Calibration and held-out tokens of a recipe."""
    wanted = Wanted(
        *(recipe.data, recipe.eval_data, recipe.field),
        *(recipe.tokens, recipe.length, recipe.eval_tokens, recipe.eval_length, recipe.seed),
    )
    return token_sets(wanted, teacher.model, teacher.tokenizer, watch)


def _bind(job: Job, bound: dict[str, str], teacher: Teacher, calibration: TokenSet) -> None:
    """Tie the run to its model and tokens, or see that they are still the same."""
    now = {"model": teacher.fingerprint, "tokens": calibration.hash}
    changed = [name for name in now if bound and bound.get(name) != now[name]]
    if changed:
        raise FingerprintError(
            f"Run {job.run} was begun with another {' and other '.join(changed)}: the files have changed since. Begin "
            "a new run: leave --resume out."
        )
    job.store.update(job.run, bound=now)


def find(
    job: Job, teacher: Teacher, calibration: TokenSet, problem: Problem | None, given: Plan | None
) -> tuple[Plan, list[Step], dict[str, Any]]:
    """The plan, the steps to it, and how the search decided: by search, or the given plan as a single step."""
    probe = probe_of(job.recipe, teacher, calibration)
    measure = Executor(probe, job.store, job.run)
    if problem is None:
        assert given is not None
        path = [given]
    else:
        total = count_losses(job.recipe.search, problem, job.recipe.seed)
        path = settle(SEARCHES[job.recipe.search](problem), partial(_round, job, problem, measure, total))
    rounds, conducted = list(measure.rounds), conduct(probe)
    if job.recipe.audit:
        probe.rest()
        conducted["audit"] = _audit(job, teacher, calibration, rounds)
    conducted = with_words(conducted)
    if not path or not path[-1].removed:
        return Plan(), [], conducted
    told = _teller(job, "along the path", before=0, total=len(path))
    measured = {plan for ask, losses in rounds for plan, loss in zip(ask.plans, losses, strict=True) if not loss.bound}
    on_path = measure(Ask(tuple(path)), *([] if measured.issuperset(path) else [told]))
    found = steps(path, [(ask.plans, losses) for ask, losses in rounds], on_path, problem.cost if problem else len)
    return path[-1], found, conducted


def probe_of(recipe: Recipe, teacher: Teacher, calibration: TokenSet) -> Probe:
    """The measuring engine as a recipe wants it."""
    fast = Fast(recipe.shortlist, recipe.risk) if recipe.fast else None
    return Probe(teacher, calibration, recipe.loss, memory=recipe.memory_bytes, fast=fast)


def _audit(
    job: Job, teacher: Teacher, calibration: TokenSet, rounds: list[tuple[Ask, list[Loss]]]
) -> list[dict[str, Any]]:
    """Every round again, exactly."""
    exact = Executor(Probe(teacher, calibration, job.recipe.loss, memory=job.recipe.memory_bytes), job.store, job.run)
    numbered = iter(range(len(rounds)))

    def measure(ask: Ask) -> list[Loss]:
        job.watch(Event("audit", next(numbered), len(rounds), "every candidate again"))
        return exact(ask)

    told = audited(rounds, measure)
    job.watch(Event("audit", len(rounds), len(rounds), "done"))
    return told


def _round(job: Job, problem: Problem, measure: Executor, total: int, ask: Ask) -> list[Loss]:
    """Measure one Ask of a search that has `total` losses to measure, and show how far it is."""
    if not ask.plans:
        return measure(ask)
    common = Plan(frozenset.intersection(*(plan.removed for plan in ask.plans)))
    each = zip(problem.budgets, problem.spent(common), problem.needed, strict=True)
    sofar = ", ".join(f"{b.show(spent).split()[0]} of {b.show(need)} gone" for b, spent, need in each)
    before = sum(len(earlier.plans) for earlier, _ in measure.rounds)
    losses = measure(ask, _teller(job, sofar, before=before, total=total))
    best = min((loss for loss in losses if not loss.bound), key=lambda loss: loss.mean)
    chosen = ask.plans[losses.index(best)]
    job.store.add_event(job.run, Event("search", before + len(losses), total, f"{chosen}: {best.mean:.6f}"))
    return losses


def _teller(job: Job, sofar: str, *, before: int, total: int) -> Told:
    """Shows every loss of one Ask: `before` of `total` losses were known when it began."""

    def told(done: int, of: int, lowest: float) -> None:
        known = f", lowest {job.recipe.loss} {lowest:.4f}" if math.isfinite(lowest) else ""
        job.watch(Event("search", before + done, total, sofar + known))

    return told


# -- the report -----------------------------------------------------------------------------------------------------


def _describe(job: Job, teacher: Teacher, student: Any, plan: Plan) -> dict[str, Any]:
    device = str(teacher.device)
    zeroed = student.config.billhook.get("zeroed")
    return {
        "billhook": billhook.__version__,
        "run": job.run,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "kind": student.config.model_type + (", zeroed: no speed-up" if zeroed else ""),
        "note": " ".join(([ZEROED] if zeroed else []) + ([STREAMED] if teacher.weights is not None else [])),
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
        "already_removed": teacher.removed.names(),
        "plan": {"removed": plan.names(), "key": plan.key()},
        "loss": job.recipe.loss,
    }


def anatomy_json(anatomy: Anatomy) -> dict[str, Any]:
    """An anatomy as plain JSON: sites by name."""
    sites = [asdict(size) | {"site": str(size.site)} for size in anatomy.sites]
    return {
        "model_type": anatomy.model_type, "blocks": anatomy.blocks, "sites": sites, "rest": asdict(anatomy.rest)
    }  # fmt: skip


def _sizes(anatomy: Anatomy, plan: Plan) -> dict[str, Any]:
    kinds = ("parameters", "bytes", "kv_bytes_per_token", "flops_per_token")
    return {kind: {"teacher": anatomy.total(kind), "student": anatomy.total(kind, plan)} for kind in kinds}


def _write_report(result: dict[str, Any], folder: Path) -> None:
    (folder / "report.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(report.page(result), encoding="utf-8")
    (folder / "README.md").write_text(report.card(result), encoding="utf-8")


# -- the plan of work -----------------------------------------------------------------------------------------------


def dry_run(recipe: Recipe, watch: Watch) -> dict[str, Any]:
    """What a run would do: losses to measure, memory, time. Loads the model and times two losses; writes nothing."""
    teacher = teacher_of(recipe, watch)
    problem, given = targets(recipe, teacher)
    calibration, held_out = tokens_for(recipe, teacher, watch)
    count = 1 if problem is None else count_losses(recipe.search, problem, recipe.seed)
    probe = probe_of(recipe, teacher, calibration)
    probe.losses([Plan()])
    start = time.perf_counter()
    probe.losses([Plan(frozenset(teacher.anatomy.alive()[:1]))])
    one = time.perf_counter() - start
    layout = probe.arrange(len(teacher.anatomy.sites))
    evaluation = 2 * one * held_out.tokens / calibration.tokens
    return {
        "model": teacher.name,
        "remove": recipe.remove or str(given),
        "losses": count,
        "data": {"calibration": calibration.describe(), "evaluation": held_out.describe()},
        "memory_bytes": {
            "weights": teacher.weight_bytes,
            "kept_for_the_search": layout.kept,
            "free": psutil.virtual_memory().available,
        },
        "layout": str(layout),
        "disk_bytes": teacher.anatomy.total("bytes"),
        "expected_seconds": {"search_at_most": round(count * one, 1), "evaluate": round(evaluation, 1)},
    }


def count_losses(search: str, problem: Problem, seed: int) -> int:
    """How many losses a search asks for, by running it on losses drawn at random."""
    draw = random.Random(seed)
    seen: set[Plan] = set()

    def pretend(ask: Ask) -> list[Loss]:
        seen.update(ask.plans)
        return [Loss("pretended", (draw.random(),), (1,)) for _ in ask.plans]

    settle(SEARCHES[search](problem), pretend)
    return len(seen)
