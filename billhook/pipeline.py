"""The main job, in order: load, calibrate, search, apply, evaluate, time, save, report."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

import billhook
from billhook import report, speed
from billhook.data import TokenSet, Wanted, token_sets
from billhook.errors import FingerprintError, PlanError
from billhook.evaluate import EVALUATIONS
from billhook.execute import Executor
from billhook.export.checkpoint import aside_of, check_equal, check_target, save
from billhook.loading import Teacher, load
from billhook.losses import LOSSES
from billhook.plan import Anatomy, Ask, Budget, Plan, Problem, protection
from billhook.probe import Probe
from billhook.recipe import Recipe, read_plan
from billhook.records import Environment, EvalResult, Event, Loss, Step, Watch, steps
from billhook.search import SEARCHES, settle
from billhook.speed import Protocol
from billhook.stats import paired_difference
from billhook.store import Run, Store
from billhook.surgery import apply, leaves

PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Write a short story about a gardener who finds an old tool.",
    "Explain in two sentences why the sky is blue.",
)
ANSWER_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Job:
    """What every stage of one run shares."""

    recipe: Recipe
    store: Store
    run: str
    out: Path
    watch: Watch
    seconds: dict[str, float]

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage, and tell and file that it began."""
        self.store.add_event(self.run, Event(name))
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
        self.store.add_event(self.run, Event(name, 1, 1, f"{self.seconds[name]:.1f} s"))


def environment(device: str) -> Environment:
    """Where numbers of this process are measured."""
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    if device.startswith("cuda"):
        machine = torch.cuda.get_device_name(device)
    return Environment(
        billhook.__version__,
        platform.python_version(),
        torch.__version__,
        transformers.__version__,
        device,
        machine,
        torch.get_num_threads(),
    )


def execute(store: Store, run: Run, watch: Watch) -> dict[str, Any]:
    """Carry out a filed run, from its beginning or from where an earlier attempt left it. Returns its result.

    Nothing appears at the run's `out` before everything in it is proven.
    """
    job = Job(Recipe(**run.recipe), store, run.id, Path(run.out), watch, {})
    aside = aside_of(job.out, job.run)
    with store.hold(run.id):
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


def _stages(job: Job, bound: dict[str, str], aside: Path) -> dict[str, Any]:
    recipe = job.recipe
    with job.stage("load"):
        teacher = load(
            recipe.model,
            device=recipe.device,
            dtype=recipe.dtype,
            trust_remote_code=recipe.trust_remote_code,
            watch=job.watch,
        )
        problem, given = targets(recipe, teacher)
        check_target(job.out, teacher.folder, int(1.05 * teacher.anatomy.total("bytes")))
    with job.stage("calibrate"):
        calibration, held_out = tokens_for(recipe, teacher)
        _bind(job, bound, teacher, calibration)
    with job.stage("search"):
        plan, told = find(job, teacher, calibration, problem, given)
    with job.stage("apply"):
        student = apply(teacher, plan, stock=recipe.stock)
    with job.stage("evaluate"):
        perplexity = _perplexity(job, teacher, student, plan, held_out)
        answers = [_answers(teacher.tokenizer, teacher.model, student, prompt, job.watch) for prompt in PROMPTS]
    with job.stage("save"):
        save(student, teacher.tokenizer, plan, aside, teacher=teacher, watch=job.watch)
        probe_row = calibration.rows[:1, : calibration.lengths[0]]
        check_equal(student, aside, probe_row, job.watch)
    with job.stage("speed"):
        timed = _speed(job, teacher, student, plan, aside)
    with job.stage("report"):
        result = {
            **_describe(job, teacher, student, plan),
            "data": {"calibration": calibration.describe(), "evaluation": held_out.describe()},
            "steps": [step.to_json() for step in told],
            "perplexity": perplexity,
            **_sizes(teacher.anatomy, leaves(teacher, plan, recipe.stock)),
            "speed": timed,
            "answers": answers,
            "seconds": job.seconds,
        }
        _write_report(result, aside)
        if job.out.exists():
            job.out.rmdir()  # empty: checked before anything was computed, and rmdir refuses anything else
        aside.rename(job.out)
    return result


# -- the stages -----------------------------------------------------------------------------------------------------


def targets(recipe: Recipe, teacher: Teacher) -> tuple[Problem | None, Plan | None]:
    """The problem to solve, or the plan that was given. Raises UsageError before anything is computed."""
    LOSSES[recipe.loss], SEARCHES[recipe.search]
    protected = protection(recipe.protect, teacher.anatomy)
    if recipe.plan is not None:
        plan = read_plan(recipe.plan, teacher.anatomy, teacher.fingerprint)
        if not plan.removed:
            raise PlanError(f"--plan {recipe.plan!r} removes nothing. Name sites to remove: attention.7,mlp.16.")
        return None, teacher.anatomy.check(plan, protected)
    assert recipe.remove is not None
    return Problem(teacher.anatomy, Budget.parse(recipe.remove), protected, recipe.seed).check(), None


def tokens_for(recipe: Recipe, teacher: Teacher) -> tuple[TokenSet, TokenSet]:
    """Calibration and held-out tokens of a recipe."""
    wanted = Wanted(
        *(recipe.data, recipe.eval_data, recipe.field),
        *(recipe.tokens, recipe.length, recipe.eval_tokens, recipe.eval_length, recipe.seed),
    )
    return token_sets(wanted, teacher.model, teacher.tokenizer)


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
) -> tuple[Plan, list[Step]]:
    """The plan and the steps to it: by search, or the given one as a single step."""
    measure = Executor(Probe(teacher, calibration, job.recipe.loss), job.store, job.run)
    if problem is None:
        assert given is not None
        path = [given]
    else:
        total = count_losses(job.recipe.search, problem, job.recipe.seed)
        path = settle(SEARCHES[job.recipe.search](problem), partial(_round, job, problem, measure, total))
    if not path or not path[-1].removed:
        return Plan(), []
    rounds = [(ask.plans, losses) for ask, losses in measure.rounds]
    told = partial(_tell, job, "along the path", 0, len(path))
    measured = {plan for plans, _ in rounds for plan in plans}
    on_path = measure(Ask(tuple(path)), *([] if measured.issuperset(path) else [told]))
    return path[-1], steps(path, rounds, on_path)


def _round(job: Job, problem: Problem, measure: Executor, total: int, ask: Ask) -> list[Loss]:
    """Measure one Ask of a search that has `total` losses to measure, and show how far it is."""
    common = Plan(frozenset.intersection(*(plan.removed for plan in ask.plans)))
    need = math.ceil(problem.budget.needed(problem.anatomy))
    sofar = f"{problem.budget.spent(problem.anatomy, common):,} of {need:,} {problem.budget.unit} gone"
    before = sum(len(earlier.plans) for earlier, _ in measure.rounds)
    losses = measure(ask, partial(_tell, job, sofar, before, total))
    best = min((loss for loss in losses if not loss.bound), key=lambda loss: loss.mean)
    chosen = ask.plans[losses.index(best)]
    job.store.add_event(job.run, Event("search", before + len(losses), total, f"{chosen}: {best.mean:.6f}"))
    return losses


def _tell(job: Job, sofar: str, before: int, total: int, done: int, of: int, best: float) -> None:
    job.watch(Event("search", before + done, total, f"{sofar}, lowest {job.recipe.loss} {best:.4f}"))


def _perplexity(job: Job, teacher: Teacher, student: Any, plan: Plan, tokens: TokenSet) -> dict[str, Any]:
    dtype = str(teacher.model.dtype).removeprefix("torch.")
    results: list[EvalResult] = []
    for who, model, which in (("teacher", teacher.model, Plan()), ("student", student, plan)):
        found = job.store.evaluation(teacher.fingerprint, which, "perplexity", tokens.hash, dtype)
        if found is None:
            found = EVALUATIONS["perplexity"](model, tokens, watch=job.watch, who=who)
            job.store.add_evaluation(teacher.fingerprint, which, dtype, found, job.run)
        results.append(found)
    change = paired_difference(results[0], results[1], job.recipe.seed)
    return {
        "teacher": math.exp(results[0].mean),
        "student": _exp(results[1].mean),
        "ratio": _exp(change.value),
        "ci95": [_exp(change.low), _exp(change.high)],
        "n": change.n,
        "clusters": change.clusters,
        "reliable": change.reliable,
        "note": change.note,
    }


def _exp(nats: float) -> float:
    """exp, with a finite answer for a model that is broken beyond what a float holds."""
    return math.exp(min(nats, 700.0))


@torch.inference_mode()
def _answers(tokenizer: Any, teacher: Any, student: Any, prompt: str, watch: Watch) -> dict[str, str]:
    """What both models make of one prompt, greedily."""
    text = prompt
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False).to(teacher.device)
    told = {"prompt": prompt}
    for who, model in (("teacher", teacher), ("student", student)):
        watch(Event("evaluate", note=f"{who} answers"))
        fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        written = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=fill)
        told[who] = tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    return told


def _speed(job: Job, teacher: Teacher, student: Any, plan: Plan, aside: Path) -> dict[str, Any]:
    """Speed of both models, timed in turn; a pair that the store holds for this environment is not timed again."""
    protocol = Protocol()
    where = json.dumps(asdict(environment(str(teacher.model.device))), sort_keys=True)
    dtype = str(teacher.model.dtype).removeprefix("torch.")
    shape = "stock" if job.recipe.stock else ""
    keys = [
        (teacher.fingerprint, mine.key(), other.key(), where, dtype, json.dumps(asdict(protocol)) + shape)
        for mine, other in ((Plan(), plan), (plan, Plan()))
    ]
    timings = [found for key in keys if (found := job.store.timing(key)) is not None]
    if len(timings) != 2:
        timings = speed.time_in_turn((teacher.model, student), (teacher.folder, aside), protocol, watch=job.watch)
        for key, timing in zip(keys, timings, strict=True):
            job.store.add_timing(key, timing, job.run)
    promised = speed.predicted(teacher.anatomy, leaves(teacher, plan, job.recipe.stock))
    told: dict[str, Any] = {"teacher": speed.rates(timings[0]), "student": speed.rates(timings[1])}
    told |= {"ratio": speed.ratio(*timings), "predicted": promised, "protocol": asdict(protocol)}
    model = teacher.model
    note = speed.what_dominates(timings[0], teacher.anatomy, told, model.device, model.dtype.itemsize)
    return told | {"note": note}


# -- the report -----------------------------------------------------------------------------------------------------


def _describe(job: Job, teacher: Teacher, student: Any, plan: Plan) -> dict[str, Any]:
    device = str(teacher.model.device)
    zeroed = student.config.billhook.get("zeroed")
    return {
        "billhook": billhook.__version__,
        "run": job.run,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "kind": student.config.model_type + (", zeroed: no speed-up" if zeroed else ""),
        "note": "The removed sites hold zeros: equal outputs everywhere, no speed-up." if zeroed else "",
        "model": {
            "name": teacher.name,
            "type": teacher.anatomy.model_type,
            "fingerprint": teacher.fingerprint,
            "blocks": teacher.anatomy.blocks,
            "dtype": str(teacher.dtype).removeprefix("torch."),
            "compute_dtype": str(teacher.model.dtype).removeprefix("torch."),
            "device": device,
        },
        "out": str(job.out),
        "recipe": job.recipe.model_dump(),
        "environment": asdict(environment(device)),
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
    teacher = load(
        recipe.model, device=recipe.device, dtype=recipe.dtype, trust_remote_code=recipe.trust_remote_code, watch=watch
    )
    problem, given = targets(recipe, teacher)
    calibration, held_out = tokens_for(recipe, teacher)
    count = 1 if problem is None else count_losses(recipe.search, problem, recipe.seed)
    probe = Probe(teacher, calibration, recipe.loss)
    list(probe.losses([Plan()]))
    start = time.perf_counter()
    list(probe.losses([Plan()]))
    one = time.perf_counter() - start
    weights = sum(p.numel() * p.element_size() for p in teacher.model.parameters())
    evaluation = 2 * one * held_out.tokens / calibration.tokens
    return {
        "model": teacher.name,
        "remove": recipe.remove or str(given),
        "losses": count,
        "data": {"calibration": calibration.describe(), "evaluation": held_out.describe()},
        "memory_bytes": {
            "weights": weights,
            "kept_for_the_search": probe.kept_bytes(),
            "free": psutil.virtual_memory().available,
        },
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
