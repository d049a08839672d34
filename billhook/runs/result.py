"""The result of a run: what its student is measured by, and all that its stages found, put together."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import billhook
from billhook.core.anatomy import Anatomy
from billhook.core.events import ignore_events
from billhook.core.plan import Plan
from billhook.core.results.exports import ExportReport, VocabularyChange
from billhook.core.results.run import (
    Answer,
    ModelInfo,
    PerplexityChange,
    RunData,
    RunReason,
    RunResult,
    SizeChange,
    SkillChange,
    SpeedChange,
    TaskChange,
)
from billhook.data.texts import SOURCE_SEPARATOR
from billhook.data.token_sets import TokenSet
from billhook.engine.losses import loss_facts, parse_loss
from billhook.engine.workers.team import Team
from billhook.methods.export.serving import fits
from billhook.models.device import dtype_name, environment
from billhook.models.load import Teacher
from billhook.models.pruned_config import read_config
from billhook.models.repair import Repair
from billhook.models.surgery import effective_plan
from billhook.runs import evaluation
from billhook.runs.choose_plan import PlanChoice
from billhook.runs.job import RunContext
from billhook.runs.prepare import recovery_tokens, validation_and_test
from billhook.runs.recipe import Recipe
from billhook.runs.recovery import RecoveryResult
from billhook.runs.vocabulary.stage import Pruned, vocabulary_change


@dataclass(frozen=True, slots=True)
class Texts:
    """The tokens of a run: `calibration` for searches, `held_out`, and the part of it that no choice has seen."""

    calibration: TokenSet
    held_out: TokenSet
    proof: TokenSet


@dataclass(frozen=True, slots=True)
class Measured:
    """What a run measured of its student."""

    perplexity: PerplexityChange | None
    tasks: tuple[TaskChange, ...]
    speed: SpeedChange | None
    answers: tuple[Answer, ...]
    exports: tuple[ExportReport, ...] = ()
    skills: tuple[SkillChange, ...] = ()
    vocabulary: VocabularyChange | None = None


def measure_student(
    job: RunContext, models: Pruned, variant: tuple[Plan, Repair], text: TokenSet, *, student: Any, team: Team | None
) -> Measured:
    """What is measured of a student before it is saved; where the vocabulary was cut, against the model as given.

    `team`: workers that have the teacher, for perplexities.
    """
    shared = replace(job, team=team)
    (plan, repair), teacher, recipe = variant, models.teacher, job.recipe
    cut = vocabulary_change(shared, models, plan, repair, text)
    perplexity = evaluation.compare_perplexity(shared, teacher, plan, text, repair) if cut is None else None
    files = evaluation.task_files(recipe)
    tasks = tuple(evaluation.task_accuracy(job, models.pair, plan, file, repair) for file in files)
    if recipe.proof != "full" or teacher.weights is not None:
        return Measured(perplexity, tasks, None, (), vocabulary=cut)
    pupil = replace(teacher, model=student)
    answering = partial(evaluation.sample_answers, models.given, pupil, job.watch)
    testing = partial(evaluation.skills_of, job, models.pair, plan, repair)
    unanswered: tuple[Answer, ...] = ()
    untested: tuple[SkillChange, ...] = ()
    skills = evaluation.courtesy(job, "skills", testing, untested)
    answers = evaluation.courtesy(job, "answer", answering, unanswered)
    return Measured(perplexity, tasks, None, answers, skills=skills, vocabulary=cut)


def run_result(
    job: RunContext, models: Pruned, student: Any, *, texts: Texts, choice: PlanChoice, recovered: RecoveryResult,
    measured: Measured,
) -> RunResult:  # fmt: skip
    """Return the result of a run whose stages are done."""
    recipe, (given, teacher) = job.recipe, models.pair
    left = effective_plan(teacher, choice.plan, recipe.stock)
    patched = recovered.repair.parameters()
    return RunResult(
        billhook=billhook.__version__,
        run=job.run,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        out=str(job.out),
        checkpoint=student.config.model_type,
        reasons=run_reasons(recipe, teacher, student, texts.calibration, recovered)
        + left_out(recipe, teacher, measured),
        model=model_info(given),
        anatomy=teacher.anatomy,
        already_removed=teacher.removed_earlier,
        recipe=recipe.model_dump(),
        environment=environment(teacher.place),
        loss=recipe.loss,
        loss_unit=loss_facts(parse_loss(recipe.loss).name).unit,
        plan=choice.plan,
        data=RunData(texts.calibration.info(), texts.proof.info()),
        seen=tuple(all_seen_digests(recipe, models, texts, recovered, choice)),
        steps=tuple(choice.steps),
        search=choice.search_summary,
        within=choice.within,
        perplexity=measured.perplexity,
        tasks=measured.tasks,
        sizes=replace(
            size_change(teacher.anatomy, left, patched, teacher.dtype.itemsize), teacher=given.anatomy.sizes()
        ),
        recoveries=recovered.reports,
        speed=measured.speed,
        answers=measured.answers,
        seconds=job.seconds,
        targets=fits(teacher, choice.plan, recovered.repair),
        exports=tuple(replace(each, out=str(job.out / each.out)) for each in measured.exports),
        changed=tuple(recipe.model_dump(exclude_defaults=True)),
        alone=choice.alone,
        skills=measured.skills,
        vocabulary=measured.vocabulary,
    )


def all_seen_digests(
    recipe: Recipe, models: Pruned, texts: Texts, got: RecoveryResult, choice: PlanChoice
) -> list[str]:
    """Digests of all documents and items that a choice, a fit or an earlier pruning of this model has looked at."""
    given, teacher = models.pair
    counted = models.cut.digests if models.cut is not None else ()
    found = {*texts.calibration.digests, *got.seen, *choice.judged_on, *counted}
    if recipe.margin is not None:
        found |= set(validation_and_test(recipe, recipe.margin, teacher, texts.held_out)[0].digests)
    if recipe.fold_in_search:
        found |= set(recovery_tokens(recipe, teacher, ignore_events).digests)
    return sorted(found | set(evaluation.seen_digests(given.folder)))


def run_reasons(
    recipe: Recipe, teacher: Teacher, student: Any, calibration: TokenSet, got: RecoveryResult
) -> tuple[RunReason, ...]:
    """What a reader of a run's numbers must know."""
    text = calibration.choices is None and recipe.plan is None and not recipe.vocabulary_alone
    alone = text and recipe.self_share > 0 and "self" not in calibration.source.split(SOURCE_SEPARATOR)
    holds: dict[RunReason, bool] = {
        "zeroed": bool(read_config(student.config).zeroed),
        "streamed": teacher.weights is not None,
        "adapter_beside": got.adapter is not None,
        "calibrated_on_text_alone": alone,
        "loss_alone": recipe.proof == "loss" and teacher.weights is None,
        "recovery_left_out": len(got.reports) < len(recipe.recoveries),
    }
    return tuple(reason for reason, so in holds.items() if so)


def left_out(recipe: Recipe, teacher: Teacher, measured: Measured) -> tuple[RunReason, ...]:
    """What could not be made of a model that is in memory."""
    missing: dict[RunReason, bool] = {
        "no_answers": not measured.answers, "no_speed": measured.speed is None,
        "no_skills": len(measured.skills) < len(recipe.tested_skills),
    }  # fmt: skip
    return tuple(name for name, so in missing.items() if so and recipe.proof == "full" and teacher.weights is None)


def model_info(teacher: Teacher) -> ModelInfo:
    """What a report says of the teacher."""
    return ModelInfo(
        name=teacher.name,
        type=teacher.anatomy.model_type,
        fingerprint=teacher.fingerprint,
        blocks=teacher.anatomy.blocks,
        dtype=dtype_name(teacher.dtype),
        compute_dtype=dtype_name(teacher.model.dtype),
        device=teacher.place,
    )


def size_change(anatomy: Anatomy, plan: Plan, patched: int, item_bytes: int) -> SizeChange:
    """Sizes of both models; the student's with the `patched` parameters that a repair put in."""
    left = anatomy.sizes(plan)
    student = replace(
        left,
        parameters=left.parameters + patched,
        bytes=left.bytes + patched * item_bytes,
        flops_per_token=left.flops_per_token + 2 * patched,
    )
    return SizeChange(anatomy.sizes(), student)
