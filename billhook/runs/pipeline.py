"""The main job, in order: load, calibrate, search, apply, evaluate, save, time, report."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from billhook.core.budget import parse_budgets
from billhook.core.errors import FingerprintError, ResourceError, RunError, cannot_write, either, option, writing
from billhook.core.events import EventListener
from billhook.core.files.target_folder import check_target, publish, staging_folder
from billhook.core.plan import Plan
from billhook.core.plan_files import find_path
from billhook.core.registry import options
from billhook.core.results.model import ExpectedSeconds, MemoryUse, WorkEstimate
from billhook.core.results.run import RunData, RunResult
from billhook.core.results.stored import Run
from billhook.data.calibration import generated_token_count
from billhook.data.choice_tasks import load_items
from billhook.data.prefixes import computed_positions
from billhook.data.splits import disjoint_parts, halves
from billhook.data.texts import SELF, external_sources, split_sources
from billhook.data.token_sets import TokenSet
from billhook.engine.losses import parse_loss
from billhook.methods.export import Student, export_student
from billhook.methods.search import SEARCHES
from billhook.models.accelerator.spreading import summed_free
from billhook.models.load import Teacher
from billhook.models.surgery import apply
from billhook.models.vocabulary.entries import Vocabulary
from billhook.runs import evaluation
from billhook.runs.choose_plan import choose_plan
from billhook.runs.exporting import export_beside, probe_tokens
from billhook.runs.job import RunContext, store_and_watch, with_team
from billhook.runs.prepare import (
    NOTHING,
    calibration_spec,
    counts_time,
    exports_beside,
    load_teacher,
    probe_of,
    problem_of,
    recovery_tokens,
    tokens_for,
    validate,
)
from billhook.runs.recipe import Recipe
from billhook.runs.recovery import (
    RecoveryResult,
    digest_of,
    load_recovery_tokens,
    recovering_tokens,
    recovery_in_rounds,
    recovery_options,
    run_recoveries,
    train_in_rounds,
)
from billhook.runs.result import Texts, measure_student, run_result
from billhook.runs.search import expected_losses, method_options, tell_shares
from billhook.runs.store import Store
from billhook.runs.vocabulary.choosing import of_that_size, share_of_rows
from billhook.runs.vocabulary.stage import Pruned, cut_first, note_models, preview_cut

WriteReport = Callable[[RunResult, Path], None]  # writes the report of a result into a folder


def run_pruning(
    store: Store,
    run: Run,
    watch: EventListener,
    write_report: WriteReport,
    loaded: Mapping[str, Teacher] = NOTHING,
    *,
    out: Path | None = None,
) -> RunResult:
    """Carry out a filed run, from its beginning or from where an earlier attempt left it. Returns its result.

    `loaded`: models that need not be loaded, by name. `out`: another folder than the filed one, for the result. Nothing
    appears there before everything in it is proven. Raises ResourceError where the disk takes no more, or the folder is
    taken; what was found stays, and the run resumes from it.
    """
    job = RunContext(
        Recipe(**run.spec), store, run.id, Path(run.out), store_and_watch(store, run.id, watch), {}, loaded
    )
    again = either(f"call billhook.resume({run.id!r})", f"billhook prune --resume --run {run.id}")
    with writing(f"go on: {again}"), store.lock(run.id):
        if out is not None and out != job.out:
            job = _moved(job, out)
        store.update(run.id, state="running")
        try:
            result = _finished(job, write_report)
            if result is None:
                shutil.rmtree(staging_folder(job.out, job.run), ignore_errors=True)
                result = _stages(job, run.fingerprints, write_report)
        except BaseException as error:
            _sweep(job, interrupted=isinstance(error, KeyboardInterrupt))
            store.end(run.id, error)
            raise
        for folder in (work_folder(job), _smaller_folder(job)):
            shutil.rmtree(folder, ignore_errors=True)
        store.update(run.id, state="done", result=result.to_json())
    return result


# -- the folders of a run -------------------------------------------------------------------------------------------


def work_folder(job: RunContext) -> Path:
    """Where a run keeps what its recoveries have found so far, beside its folder, until it is done."""
    return staging_folder(job.out, job.run).with_suffix(".recovery")


def _beside(job: RunContext) -> Path:
    """Where a result waits whose folder was taken meanwhile."""
    return job.out.resolve().with_name(f"{job.out.resolve().name}-{job.run}")


def _smaller_folder(job: RunContext) -> Path:
    """Where the model with the smaller vocabulary stands while a run prunes it."""
    return staging_folder(job.out, job.run).with_suffix(".vocabulary")


def _folders(job: RunContext) -> tuple[Path, Path, Path, Path]:
    return staging_folder(job.out, job.run), _beside(job), work_folder(job), _smaller_folder(job)


def _moved(job: RunContext, out: Path) -> RunContext:
    """The run with another folder for its result, beside which all that it has found is moved."""
    check_target(out)
    moved = replace(job, out=out)
    for old, new in zip(_folders(job), _folders(moved), strict=True):
        if old.exists():
            new.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(old, new)
    job.store.update(job.run, out=str(out))
    return moved


def _sweep(job: RunContext, *, interrupted: bool) -> None:
    """Delete what an attempt left that nobody can use: an unfinished result, and, unless the run was only interrupted,
    a work folder without a file."""
    aside, work = staging_folder(job.out, job.run), work_folder(job)
    if _result_in(aside, job.run) is None:
        shutil.rmtree(aside, ignore_errors=True)
    if not interrupted:
        shutil.rmtree(_smaller_folder(job), ignore_errors=True)
    if not interrupted and not any(path.is_file() and path.suffix != ".partial" for path in work.rglob("*")):
        shutil.rmtree(work, ignore_errors=True)


def delete_unfinished(store: Store) -> None:
    """Delete the unfinished results of runs that were killed: nobody can use them, and one that resumes begins anew."""
    for run in store.killed():
        aside = staging_folder(Path(run.out), run.id)
        with suppress(RunError), store.lock(run.id):
            if _result_in(aside, run.id) is None:
                shutil.rmtree(aside, ignore_errors=True)


def _result_in(folder: Path, run: str) -> RunResult | None:
    """The result of a run that a folder holds; its report is written when all the rest is proven."""
    try:
        value = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return RunResult.from_json(value) if isinstance(value, dict) and value.get("run") == run else None


def _finished(job: RunContext, write_report: WriteReport) -> RunResult | None:
    """The result of a run that ended after its folder was complete and before the store knew, published if need be."""
    result = _result_in(job.out, job.run)
    if result is not None:
        return result
    for folder in _folders(job)[:2]:
        result = _result_in(folder, job.run)
        if result is not None:
            result = replace(result, out=str(job.out))
            write_report(result, folder)
            _publish(job, folder)
            return result
    return None


def _publish(job: RunContext, aside: Path) -> None:
    """Give the result its name. Raises ResourceError where that is taken; then it stays beside it."""
    try:
        publish(aside, job.out)
    except OSError as error:
        if cannot_write(error):
            raise
        kept = _beside(job)
        if aside != kept:
            with suppress(OSError):
                aside.rename(kept)
        kept = kept if kept.exists() else aside
        again = either(
            f"billhook.resume({job.run!r}, out='FOLDER')", f"billhook prune --resume --run {job.run} --out FOLDER"
        )
        raise ResourceError(
            f"{option('out', str(job.out))} was taken while the run worked ({error.strerror}). The result is complete, "
            f"in {kept}. Put it elsewhere: {again}"
        ) from error


# -- the stages -----------------------------------------------------------------------------------------------------


def _stages(job: RunContext, bound: dict[str, str], write_report: WriteReport) -> RunResult:
    recipe, aside = job.recipe, staging_folder(job.out, job.run)
    check_target(job.out, find_path(recipe.model))
    with job.stage("load"):
        model, vocabulary, given = _checked(job)
    models = cut_first(job, model, vocabulary, _smaller_folder(job))
    teacher = models.teacher
    with job.stage("calibrate"):
        calibration, held_out = tokens_for(recipe, teacher, job.watch, job)
        learn = load_recovery_tokens(job, teacher, held_out)
        folded = recovery_tokens(recipe, teacher, job.watch) if recipe.fold_in_search and learn is None else learn
        texts = {"tokens": calibration, "held-out text": held_out, "recovery text": folded}
        _bind(job, bound, models, texts, given)
    with with_team(job, teacher) if learn is None else nullcontext(job) as shared:  # memory of workers is for training
        with job.stage("search"):
            rounds = train_in_rounds(job, teacher, calibration, learn=learn, work=work_folder(job))
            plans = rounds.plans if rounds is not None else () if given is None else (given,)
            found = choose_plan(shared, teacher, calibration, held_out, plans)
            plan, proof_text = found.plan, test_text(recipe, held_out)
        got = RecoveryResult()
        if learn is not None:
            with job.stage("recover"):
                seen = {} if calibration.choices or recipe.proof == "loss" else {"calibration": calibration}
                proved = seen | {"held-out": proof_text}
                work = work_folder(job)
                got = run_recoveries(job, teacher, plan, learn=learn, texts=proved, work=work, rounds=rounds)
        with job.stage("apply"):
            student = apply(teacher, plan, stock=recipe.stock, repair=got.repair)
        with job.stage("evaluate"):
            proof = measure_student(job, models, (plan, got.repair), proof_text, student=student, team=shared.team)
    with job.stage("save"):
        probe_row = calibration.rows[:1, : calibration.lengths[0]]
        whole = Student(student, teacher, plan, probe_row, got.repair, got.base, got.adapter, watch=job.watch)
        export_student(recipe.writes if got.adapter is None else "adapter", whole, aside)
        probed = replace(whole, tokens=probe_tokens(teacher))
        beside = tuple(export_beside(name, probed, aside) for name in exports_beside(recipe))
        note_models(aside, models)
    with job.stage("speed"):
        timing = partial(evaluation.compare_speed, job, models.pair, student, (plan, got.repair), aside)
        full = recipe.proof == "full" and teacher.weights is None
        timed = evaluation.courtesy(job, "speed", timing, None) if full else None
    with job.stage("report"):
        tokens, measured = Texts(calibration, held_out, proof_text), replace(proof, speed=timed, exports=beside)
        result = run_result(job, models, student, texts=tokens, choice=found, recovered=got, measured=measured)
        write_report(result, aside)
        _publish(job, aside)
    return result


def _checked(job: RunContext) -> tuple[Teacher, Vocabulary | None, Plan | None]:
    """The loaded model, its vocabulary where that is cut, and the plan if no search chooses one.

    Raises where a recipe asks for what cannot be done, before any text is read.
    """
    recipe = job.recipe
    model = load_teacher(recipe, job.watch, job.loaded)
    sized, vocabulary = of_that_size(recipe, model)
    given = validate(recipe, sized)
    tell_shares(recipe, sized.anatomy, job.watch, partial(share_of_rows, recipe, model))
    recovery_options(recipe)
    recovery_in_rounds(recipe, sized)
    twice = 1 if vocabulary is None else 2  # the smaller model stands beside its student until that is done
    check_target(job.out, model.folder, int(1.05 * twice * sized.anatomy.total("bytes")))
    return model, vocabulary, given


def test_text(recipe: Recipe, held_out: TokenSet) -> TokenSet:
    """The held-out text on which a run proves its student: what no choice has seen."""
    return halves(held_out)[1] if recipe.margin is not None and recipe.margin.kind == "ppl" else held_out


def _bind(
    job: RunContext, bound: dict[str, str], models: Pruned, texts: Mapping[str, TokenSet | None], given: Plan | None
) -> None:
    """Tie the run to all that decides its result, or see that it is still the same.

    What an older Billhook did not file is not compared.
    """
    teacher = models.given
    now = {"model": teacher.fingerprint, "plan": given.key() if given is not None else "searched"}
    now |= {name: tokens.hash for name, tokens in texts.items() if tokens is not None}
    if models.cut is not None:
        now["vocabulary"] = digest_of(sorted(models.cut.numbers.items()))
    for file in evaluation.task_files(job.recipe):
        now[f"task {file}"] = load_items(file, teacher, "evaluation", seed=job.recipe.seed).hash
    settings = teacher.model.generation_config.to_dict() if teacher.model.generation_config is not None else {}
    settings.pop("transformers_version", None)
    now["chat template"] = digest_of(getattr(teacher.tokenizer, "chat_template", None))
    now["generation settings"] = digest_of(settings)
    changed = [name for name in now if bound.get(name, now[name]) != now[name]]
    if changed:
        raise FingerprintError(
            f"Run {job.run} was begun with another {' and other '.join(changed)}: the files have changed since. Begin "
            f"a new run: {either('call prune', 'leave --resume out')}."
        )
    job.store.update(job.run, fingerprints=now)


# -- the plan of work -----------------------------------------------------------------------------------------------


PREVIEW_TOKENS = 512  # on which a few plans are measured
PREVIEW_SECONDS = 2.0  # of a measurement, above which no more plans are added


def preview_run(recipe: Recipe, watch: EventListener, loaded: Mapping[str, Teacher] = NOTHING) -> WorkEstimate:
    """What a run would do: losses to measure, memory, and time, learnt from a few plans on few tokens.

    Loads the model and reads the texts; the model writes none, and nothing is stored.
    """
    model = load_teacher(recipe, watch, loaded)
    sized, vocabulary = of_that_size(recipe, model)
    given = validate(recipe, sized)
    recovery_in_rounds(recipe, sized)
    tell_shares(recipe, sized.anatomy, watch, partial(share_of_rows, recipe, model))
    teacher = preview_cut(recipe, model, vocabulary, watch)
    text = external_sources(recipe.data) or "pydoc"  # which stands for what the model would write
    of_text = given is None and parse_loss(recipe.loss).file is None
    written = generated_token_count(calibration_spec(recipe), recipe.self_share) if of_text else 0
    tokens = max(16, recipe.tokens - written) if text == recipe.data else recipe.tokens
    read = recipe.model_copy(update={"data": text, "self_share": 0.0, "tokens": tokens})
    calibration, held_out = tokens_for(read, teacher, watch)
    all_tokens = calibration.tokens + recipe.tokens - tokens
    count = int(bool(given)) if given is not None else _count(recipe, teacher)
    work = probe_of(recipe, teacher, calibration).arrange(len(teacher.anatomy.sites))
    forward, one = _seconds_per_token(recipe, teacher, calibration)
    wanted = options(SEARCHES[recipe.search]) | method_options(recipe)[0]
    search = None if count is None else count * one * min(all_tokens, wanted.get("tokens", all_tokens))
    skills = evaluation.skill_sets(recipe, teacher) if recipe.proof == "full" and teacher.weights is None else {}
    asked = sum(map(computed_positions, skills.values()))
    source = calibration.source if written == 0 else "+".join(dict.fromkeys([*split_sources(recipe.data), SELF]))
    return WorkEstimate(
        model=teacher.name,
        remove=recipe.remove or recipe.within or str(given),
        losses=count,
        data=RunData(replace(calibration.info(), tokens=all_tokens, source=source), held_out.info()),
        memory=MemoryUse(teacher.weight_bytes, work.kept, summed_free(teacher.devices)),
        work=work,
        disk_bytes=teacher.anatomy.total("bytes") * (1 if vocabulary is None else 2),  # until the student is done
        seconds=ExpectedSeconds(
            None if search is None else round(search, 1),
            round(2 * forward * (held_out.tokens + asked), 1),
            round(forward * recovering_tokens(recipe, teacher, held_out.tokens), 1),
        ),
    )


def _seconds_per_token(recipe: Recipe, teacher: Teacher, calibration: TokenSet) -> tuple[float, float]:
    """Seconds per token of a forward pass, and of one loss among several, each of one removed site."""
    few = disjoint_parts(calibration, min(PREVIEW_TOKENS, calibration.tokens), 1)[0]
    probe, sites = probe_of(recipe, teacher, few), teacher.anatomy.sites_present()
    probe.losses([Plan()])
    seconds, plans, forward = 0.0, list[Plan](), None
    for most in (1, 4, 16):
        step = max(1, len(sites) // most)
        plans = [Plan(frozenset([site])) for site in sites[::step][:most]]
        start = time.perf_counter()
        probe.losses(plans, 1 if recipe.fast else None)
        seconds = time.perf_counter() - start
        forward = seconds if forward is None else forward
        if seconds > PREVIEW_SECONDS:
            break
    return (forward or 0.0) / few.tokens, seconds / len(plans) / few.tokens


def _count(recipe: Recipe, teacher: Teacher) -> int | None:
    """How many losses the search asks for, if it says so; for half of the sites, where a margin or a time decides."""
    unknown = not recipe.budgets or counts_time(recipe)
    budgets = parse_budgets("50%sites") if unknown else recipe.budgets
    return expected_losses(recipe, problem_of(recipe, teacher, teacher.anatomy, budgets))
