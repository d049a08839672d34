"""Exports: each makes a folder of a student that other software loads, and proves that it loads back equal.

An export is a function of a Student and a folder that is not there yet, with options, that returns what it wrote. Its
decorator says what its target can express. It raises where the folder does not load back, and leaves no folder then.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import torch

from billhook.core.errors import PlanError
from billhook.core.events import EventListener, ignore_events
from billhook.core.plan import Plan
from billhook.core.registry import RegistryWithFacts, wrong_return
from billhook.models.load import Teacher
from billhook.models.repair import NO_REPAIR, Repair


@dataclass(frozen=True)
class Student:
    """What is exported. `model`: what `plan` leaves of `teacher` with `repair`, as `apply` makes it.

    `tokens`: [rows, time], on which what is loaded back must agree. `adapter`: the folder of an adapter that was
    trained beside the weights; then `model` has it merged, and `base` is the repair without it.
    """

    model: Any
    teacher: Teacher
    plan: Plan
    tokens: torch.Tensor
    repair: Repair = NO_REPAIR
    base: Repair | None = None
    adapter: Path | None = None
    watch: EventListener = ignore_events


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote. `model_type`: what the folder says that it is; `difference`: of logits, at most."""

    folder: Path
    files: tuple[Path, ...]
    model_type: str
    difference: float = 0.0


@dataclass(frozen=True, slots=True)
class Target:
    """What the checkpoints of an export can express.

    `sites`: a block that lacks one of its sites is written without it (`removed`), with `zeros` in its place, or not at
    all (`none`). `widths`: sites narrower than those of other blocks (`any`), all blocks alike (`alike`), or `none`.
    `inserts`: what a repair put in the place of a site. `architectures`: model types; None is every one.
    """

    sites: Literal["removed", "zeros", "none"] = "removed"
    widths: Literal["any", "alike", "none"] = "any"
    inserts: bool = True
    architectures: tuple[str, ...] | None = None


Export = Callable[..., Exported]
EXPORTS: RegistryWithFacts[Export, Target] = RegistryWithFacts("export", unstated=Target())


@overload
def export(function: Export, /) -> Export:
    """Add an export whose target can express everything."""


@overload
def export(
    *,
    sites: Literal["removed", "zeros", "none"] = ...,
    widths: Literal["any", "alike", "none"] = ...,
    inserts: bool = ...,
    architectures: tuple[str, ...] | None = ...,
) -> Callable[[Export], Export]:
    """Return the decorator that adds an export whose target can express this."""


def export(
    function: Export | None = None,
    /,
    *,
    sites: Literal["removed", "zeros", "none"] = "removed",
    widths: Literal["any", "alike", "none"] = "any",
    inserts: bool = True,
    architectures: tuple[str, ...] | None = None,
) -> Export | Callable[[Export], Export]:
    """Add an export under its own name, with what its target can express: see Target."""
    add = EXPORTS.add_with(Target(sites, widths, inserts, architectures))
    return add if function is None else add(function)


def check_expressible(name: str, teacher: Teacher, plan: Plan, repair: Repair = NO_REPAIR) -> None:
    """Raise PlanError if the target of an export cannot express a plan and its repair, with what it can."""
    target, model_type = EXPORTS.facts(name), teacher.anatomy.model_type
    removed = Plan(teacher.removed_earlier.removed | plan.removed)
    whole = set(removed.blocks())
    single = [site for site in removed.sites() if site.block not in whole]
    others = ", ".join(other for other in EXPORTS if other != name)
    faults = {
        f"models of type {model_type}; it takes {', '.join(target.architectures or ())}": (
            target.architectures is not None and model_type not in target.architectures
        ),
        f"a block without its {single[0].part if single else 'site'}; remove whole blocks": (
            target.sites == "none" and bool(single)
        ),
        "a width of its own for a site; remove sites or blocks": target.widths == "none" and bool(plan.narrowed),
        "what a repair puts in the place of a site; recover by fold alone": not target.inserts and bool(repair.patches),
    }
    for fault, found in faults.items():
        if found:
            raise PlanError(f"The export {name} has no place for {fault}, or take another export: {others}.")


def export_student(name: str, student: Student, folder: Path, **options: Any) -> Exported:
    """Write a student to a new folder by the export `name`; the folder is there and proven, or is not there.

    Raises UnknownName, PlanError where the target cannot express the student, and what the export raises.
    """
    function = EXPORTS[name]
    check_expressible(name, student.teacher, student.plan, student.repair)
    try:
        exported = function(student, folder, **options)
        if not isinstance(exported, Exported) or not folder.is_dir():
            got = exported if folder.is_dir() else f"{type(exported).__name__} without the folder"
            raise wrong_return("export", name, "an Exported, and write the folder", got)
        return exported
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


from billhook.methods.export import (  # noqa: E402, F401 - they add themselves to the registry above
    adapter,
    hugging_face,
)
