"""Exports: each makes a folder of a student that other software loads, and proves that it loads back equal.

An export is a function of a Student and a folder that is not there yet, with options, that returns what it wrote. Its
decorator says what its target can express. It raises where the folder does not load back, and leaves no folder then.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from billhook.core.errors import UsageError, option
from billhook.core.events import EventListener, ignore_events
from billhook.core.plan import Plan
from billhook.core.registry import RegistryWithFacts, wrong_return
from billhook.core.results.exports import Verification
from billhook.methods.export.targets import Form, first_form, student_shape
from billhook.models.load import Teacher
from billhook.models.repair import NO_REPAIR, Repair


@dataclass(frozen=True)
class Student:
    """What is exported. `model`: what `plan` leaves of `teacher` with `repair`, as `apply` makes it.

    `tokens`: [rows, time], on which what is loaded back must agree. `adapter`: the folder of an adapter that was
    trained beside the weights; then `model` has it merged, and `base` is the repair without it. `verify`: in the
    runtime that serves the export, where it is installed.
    """

    model: Any
    teacher: Teacher
    plan: Plan
    tokens: torch.Tensor
    repair: Repair = NO_REPAIR
    base: Repair | None = None
    adapter: Path | None = None
    verify: bool = True
    watch: EventListener = ignore_events


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote.

    `form`: what the export says that it is, such as its model type. `difference`: of logits, at most, where it was
    read back here. `verified`: what its runtime computed; None where that is not installed. `notes`: sentences for the
    user.
    """

    folder: Path
    files: tuple[Path, ...]
    form: str
    difference: float = 0.0
    verified: Verification | None = None
    notes: tuple[str, ...] = ()


Export = Callable[..., Exported]
EXPORTS: RegistryWithFacts[Export, tuple[Form, ...]] = RegistryWithFacts("export", unstated=(Form(),))


def export(*forms: Form) -> Callable[[Export], Export]:
    """Return the decorator that adds an export under its own name; `forms`: what it can write, the plainest first.

    Without any, its target can express everything.
    """
    return EXPORTS.add_with(forms or (Form(),))


def form_of(name: str, teacher: Teacher, plan: Plan, repair: Repair = NO_REPAIR) -> Form:
    """Return the form in which an export writes a student. Raises PlanError if there is none, with what there is."""
    others = [other for other in EXPORTS if other != name]
    return first_form(name, EXPORTS.facts(name), student_shape(teacher, plan, repair), others)


def arranged(names: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Return the export that writes a run's checkpoint itself, and those that stand beside it.

    What has a runtime of its own stands beside the checkpoint that transformers loads. Raises UnknownName, UsageError
    where two would write the checkpoint itself.
    """
    beside = tuple(name for name in names if any(form.runtimes for form in EXPORTS.facts(name)))
    own = [name for name in names if name not in beside]
    if len(own) > 1:
        raise UsageError(
            f"{option('export', ','.join(names))} writes the checkpoint twice: {', '.join(own)}. Take one."
        )
    return (own or ["transformers"])[0], beside


def export_student(name: str, student: Student, folder: Path, **options: Any) -> Exported:
    """Write a student to a new folder by the export `name`; the folder is there and proven, or is not there.

    Raises UnknownName, PlanError where the target cannot express the student, and what the export raises.
    """
    function = EXPORTS[name]
    form_of(name, student.teacher, student.plan, student.repair)
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
    deci_folder,
    gguf,
    graphs,
    hugging_face,
)
