"""A checkpoint into the form that other software serves: `billhook export`."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path

import torch

from billhook.core.errors import ResourceError, UsageError, option
from billhook.core.events import EventListener, ignore_events
from billhook.core.plan import Plan
from billhook.core.registry import OptionValues, resolve_options
from billhook.core.results.exports import ExportReport
from billhook.methods.export import EXPORTS, Student, export_student, form_of
from billhook.methods.export.target_folder import check_target, publish, staging_folder
from billhook.methods.export.verification import PROBE_TEXTS, require_runtime
from billhook.models.load import Teacher

PROBE_TOKENS = 192  # on which an export and its student are compared


def export_model(
    teacher: Teacher,
    to: str,
    out: Path,
    *,
    verify: bool | None = None,
    watch: EventListener = ignore_events,
    **options: object,
) -> ExportReport:
    """Write a loaded checkpoint to the new folder `out` by the export `to`; it is there whole, or not at all.

    `verify`: True demands that the runtime is there, False leaves it out, None verifies where it is installed.
    `options`: of the export. Raises PlanError where the target cannot express the model, and as `export_student`.
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
        publish(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return ExportReport(
        teacher.name, to, exported.form, str(out), tuple(str(path.relative_to(out)) for path in files),
        sum(path.stat().st_size for path in files), exported.verified, exported.notes,
    )  # fmt: skip


def probe_tokens(teacher: Teacher) -> torch.Tensor:
    """Return token ids [1, time] on which an export is compared: of texts in several scripts."""
    if teacher.tokenizer is None:
        return torch.arange(64)[None] % int(teacher.model.config.vocab_size)
    most = min(PROBE_TOKENS, (getattr(teacher.model.config, "max_position_embeddings", None) or 256) // 2)
    return torch.tensor([teacher.tokenizer("\n".join(PROBE_TEXTS))["input_ids"][:most]])
