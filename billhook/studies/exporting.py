"""An export as a run of the store: what was asked, and how the export does in the software that serves it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from billhook.core.events import EventListener, ignore_events
from billhook.core.files.target_folder import check_target, named_folder
from billhook.core.registry import resolve_options
from billhook.core.results.exports import ExportReport
from billhook.core.results.specs import ExportSpec
from billhook.methods.export import EXPORTS
from billhook.models.device import environment
from billhook.models.load import Model, as_teacher, name_of
from billhook.report.run.export_card import export_card
from billhook.runs.exporting import export_model
from billhook.runs.job import store_and_watch
from billhook.runs.store import STORE
from billhook.studies.run_study import begin_run


def export(
    model: Model,
    to: str,
    *,
    out: str | Path | None = None,
    dtype: str | None = None,
    verify: bool | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    store: str | Path = STORE,
    watch: EventListener = ignore_events,
) -> ExportReport:
    """Write a checkpoint in the form `to`, an export's name, for the software that serves it.

    `out`: default MODEL-TO. `dtype`: of the export's weights. `verify`: True demands that the runtime which serves it
    is installed, False leaves it out; where it runs, its next tokens are compared with the checkpoint's. The folder
    appears whole or not at all, with a README.md; `store` keeps what was found. Raises BillhookError.
    """
    resolve_options({} if dtype is None else {"dtype": dtype}, EXPORTS[to])
    where = named_folder(out if out is not None else f"{Path(name_of(model)).name}-{to}")
    check_target(where)
    teacher = as_teacher(model, device=device, trust_remote_code=trust_remote_code, watch=watch)
    spec = ExportSpec(name_of(model), to, dtype, verify)
    with begin_run(spec, device, Path(store), str(where)) as (opened, run):
        told = store_and_watch(opened, run, watch)
        card = partial(export_card, version=environment(teacher.place).billhook)
        report = export_model(teacher, to, where, verify=verify, card=card, dtype=dtype, watch=told)
        opened.update(run, result=report.to_json())
    return report
