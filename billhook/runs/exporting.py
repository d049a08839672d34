"""A checkpoint in the form that other software serves, and what that software can express."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from billhook.core.errors import ResourceError, UsageError, option
from billhook.core.events import EventListener, ignore_events
from billhook.core.files.target_folder import check_target, publish, staging_folder
from billhook.core.plan import Plan
from billhook.core.registry import OptionValues, resolve_options, split_names
from billhook.core.results.exports import ExportReport, TargetTable
from billhook.methods.export import EXPORTS, Exported, Student, export_student, form_of
from billhook.methods.export.serving import limits_of, table
from billhook.methods.export.verification import PROBE_TEXTS, require_runtime
from billhook.models.architectures import base_type
from billhook.models.load import Model, Teacher, model_config, name_of
from billhook.runs.recipes.effort import WHOLE_SITES

CARD = "README.md"
PROBE_TOKENS = 192  # on which an export and its student are compared


def targets(
    model: Model = "demo", *, trust_remote_code: bool = False, watch: EventListener = ignore_events
) -> TargetTable:
    """Return what every target, software that serves models, can express of a model."""
    config = model_config(model, trust_remote_code=trust_remote_code, watch=watch)
    return TargetTable(name_of(model), base_type(config.model_type), table(config))


def recipe_for_targets(chosen: Path, model: Model, options: Mapping[str, Any]) -> Path:
    """Return the default recipe of ours for a model and its targets, where `chosen` is the one without targets.

    Where no site may have a width of its own, it narrows all of them alike; where none may be narrowed, it removes
    whole blocks. Raises UnknownName, ModelError for a target that takes no student of the model.
    """
    config = model_config(model, trust_remote_code=bool(options.get("trust_remote_code")))
    most = limits_of(split_names(str(options["target"])), config)
    if chosen.name != WHOLE_SITES and (most.sites, most.mlp_widths) != ("removed", "any"):
        return Path("billhook-width" if most.mlp_widths != "none" else WHOLE_SITES)
    return chosen


def export_model(
    teacher: Teacher,
    to: str,
    out: Path,
    *,
    verify: bool | None = None,
    card: Callable[[ExportReport], str] | None = None,
    watch: EventListener = ignore_events,
    **options: object,
) -> ExportReport:
    """Write a loaded checkpoint to the new folder `out` by the export `to`; it is there whole, or not at all.

    `verify`: True demands that the runtime is there, False leaves it out, None verifies where it is installed.
    `card`: makes the README.md of a folder that has none. `options`: of the export. Raises PlanError where the target
    cannot express the model, and as `export_student`.
    """
    given: OptionValues = {name: value for name, value in options.items() if value is not None}
    (own,) = resolve_options(given, EXPORTS[to])
    form = form_of(to, teacher, Plan())
    if verify and not form.runtimes:
        raise UsageError(f"No runtime verifies the export {to}. Leave {option('verify', True)} out.")
    if verify:
        require_runtime(form.runtimes[0])
    if teacher.weights is not None:
        raise ResourceError(f"{teacher.name} is larger than the memory that is free, so it cannot be exported here.")
    check_target(out, teacher.folder, teacher.anatomy.total("bytes"))
    student = Student(teacher.model, teacher, Plan(), probe_tokens(teacher), watch=watch, verify=verify is not False)
    aside = staging_folder(out, secrets.token_hex(3))
    try:
        exported = export_student(to, student, aside, **own)
        if card is not None and not (aside / CARD).exists():
            told = card(_report(teacher, to, exported, aside, str(out)))
            (aside / CARD).write_text(told, encoding="utf-8", errors="backslashreplace")
        publish(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return _report(teacher, to, exported, out, str(out))


def export_beside(name: str, student: Student, folder: Path) -> ExportReport:
    """Write the export `name` of a run's student beside its checkpoint in `folder`, in which `out` of the report is."""
    place = f"exports/{name}"
    return _report(student.teacher, name, export_student(name, student, folder / place), folder / place, place)


def _report(teacher: Teacher, name: str, exported: Exported, folder: Path, out: str) -> ExportReport:
    """The report of an export that stands in `folder` now, and will in `out`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return ExportReport(
        teacher.name, name, exported.form, out, tuple(str(path.relative_to(folder)) for path in files),
        sum(path.stat().st_size for path in files), exported.verified, exported.notes,
    )  # fmt: skip


def probe_tokens(teacher: Teacher) -> torch.Tensor:
    """Return token ids [1, time] on which an export is compared: of texts in several scripts."""
    if teacher.tokenizer is None:
        return torch.arange(64)[None] % int(teacher.model.config.vocab_size)
    most = min(PROBE_TOKENS, (getattr(teacher.model.config, "max_position_embeddings", None) or 256) // 2)
    return torch.tensor([teacher.tokenizer("\n".join(PROBE_TEXTS))["input_ids"][:most]])
