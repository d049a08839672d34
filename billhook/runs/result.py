"""Parts of the result of a run: its model, sizes, reasons, and the documents that it has seen."""

from __future__ import annotations

import datetime
from dataclasses import replace
from typing import Any

from billhook.core.anatomy import Anatomy
from billhook.core.events import ignore_events
from billhook.core.plan import Plan
from billhook.core.results.run import ModelInfo, RunReason, SizeChange
from billhook.data.texts import SOURCE_SEPARATOR
from billhook.data.token_sets import TokenSet
from billhook.models.device import dtype_name
from billhook.models.load import Teacher
from billhook.runs import evaluation
from billhook.runs.prepare import recovery_tokens, validation_and_test
from billhook.runs.recipe import Recipe
from billhook.runs.recovery import RecoveryResult


def all_seen_digests(
    recipe: Recipe, teacher: Teacher, calibration: TokenSet, held_out: TokenSet, got: RecoveryResult
) -> list[str]:
    """Digests of all documents and items that a choice, a fit or an earlier pruning of this model has looked at."""
    found = {*calibration.digests, *got.seen}
    if recipe.margin is not None:
        found |= set(validation_and_test(recipe, recipe.margin, teacher, held_out)[0].digests)
    if recipe.fold_in_search:
        found |= set(recovery_tokens(recipe, teacher, ignore_events).digests)
    return sorted(found | set(evaluation.seen_digests(teacher.folder)))


def run_reasons(
    recipe: Recipe, teacher: Teacher, student: Any, calibration: TokenSet, got: RecoveryResult
) -> tuple[RunReason, ...]:
    """What a reader of a run's numbers must know."""
    text = calibration.choices is None and recipe.plan is None
    alone = text and recipe.self_share > 0 and "self" not in calibration.source.split(SOURCE_SEPARATOR)
    holds: dict[RunReason, bool] = {
        "zeroed": bool(student.config.billhook.get("zeroed")),
        "streamed": teacher.weights is not None,
        "adapter_beside": got.adapter is not None,
        "calibrated_on_text_alone": alone,
    }
    return tuple(reason for reason, so in holds.items() if so)


def model_info(teacher: Teacher) -> ModelInfo:
    """What a report says of the teacher."""
    return ModelInfo(
        name=teacher.name,
        type=teacher.anatomy.model_type,
        fingerprint=teacher.fingerprint,
        blocks=teacher.anatomy.blocks,
        dtype=dtype_name(teacher.dtype),
        compute_dtype=dtype_name(teacher.model.dtype),
        device=str(teacher.device),
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


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
