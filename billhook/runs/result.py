"""The result of a run as report.json holds it."""

from __future__ import annotations

import datetime
from dataclasses import asdict
from typing import Any

import billhook
from billhook.core.anatomy import Anatomy
from billhook.core.events import ignore_events
from billhook.core.plan import Plan
from billhook.data.texts import SOURCE_SEPARATOR
from billhook.data.token_sets import TokenSet
from billhook.models.device import dtype_name, environment
from billhook.models.load import Teacher
from billhook.runs import evaluation
from billhook.runs.job import RunContext
from billhook.runs.prepare import recovery_tokens, validation_and_test
from billhook.runs.recipe import Recipe
from billhook.runs.recovery import RecoveryResult

ZEROED = "The removed sites hold zeros: equal outputs everywhere, no speed-up."
ALONE = "Calibrated on the given text alone: this model cannot write its share of it here."
APART = (
    "The weights are those without the adapter, which is in the folder adapter beside them; all that was measured is "
    "both together, merged."
)
STREAMED = "The model was larger than the memory that it might use: read block by block, it was not timed nor asked."


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


# -- the report -----------------------------------------------------------------------------------------------------


def run_reasons(recipe: Recipe, teacher: Teacher, calibration: TokenSet, got: RecoveryResult) -> list[str]:
    """What a reader of a run's numbers must know."""
    text = calibration.choices is None and recipe.plan is None
    alone = text and recipe.self_share > 0 and "self" not in calibration.source.split(SOURCE_SEPARATOR)
    told = ((STREAMED, teacher.weights is not None), (APART, got.adapter is not None), (ALONE, alone))
    return [note for note, so in told if so]


def describe_run(job: RunContext, teacher: Teacher, student: Any, plan: Plan, notes: list[str]) -> dict[str, Any]:
    """What a run was about: model, recipe, environment, plan."""
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
        "environment": asdict(environment(device)),
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


def run_sizes(anatomy: Anatomy, plan: Plan, patched: int, item_bytes: int) -> dict[str, Any]:
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
