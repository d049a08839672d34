"""Forecast: how a search will end, what other sizes will lose, and what a model needs on other machines."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from billhook.core.anatomy import Anatomy
from billhook.core.errors import BudgetError, option, writing
from billhook.core.events import EventListener, ignore_events
from billhook.core.outlook.history import History, MeasuredCurve, recipe_key
from billhook.core.outlook.loss_curve import forecast as forecast_loss
from billhook.core.outlook.loss_curve import shipped_errors
from billhook.core.outlook.machines import HERE, Machine
from billhook.core.outlook.roofline import Workload, resources, shrunk
from billhook.core.outlook.search_end import SearchForecast
from billhook.core.plan import Plan
from billhook.core.results.json_form import decode
from billhook.core.results.outlook import (
    CurveForecast,
    ForecastReport,
    MachineReport,
    MeasuredPoint,
    ModelOnMachine,
    RooflineCheck,
)
from billhook.core.results.run import SpeedChange
from billhook.core.results.specs import PRUNE
from billhook.runs import STORE
from billhook.runs.store import Store
from billhook.studies.outlook.reading import (
    Subject,
    anatomy_of,
    chosen_machines,
    measured_here,
    reading_store,
    search_forecast,
    subject_of,
    traces_of,
    workload_of,
)

DTYPE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
SIZES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)  # that are forecast where none is named


def forecast(
    of: str = "",
    *,
    remove: str | float | Sequence[str | float] = (),
    machine: str | Sequence[str] = (),
    context: int = 2048,
    batch: int = 1,
    prompt_tokens: int = 512,
    bits: float | None = None,
    store: str | Path = STORE,
) -> ForecastReport:
    """Forecast perplexity at other sizes, resources on other machines, and the end of a search that goes on.

    Arguments:
        of: a run of the store, or a model; left out, the newest pruning.
        remove: sizes as shares of the parameters, such as 20%.
        machine: names of machines, such as rtx-4090, or `here` once it was measured.
        context, batch, prompt_tokens: what a machine serves: tokens of a full context, sequences at a time, prompts.
        bits: of a weight as it is served; left out, as in the checkpoint.

    Losses are forecast from the sizes that the store holds of the same recipe and text. Nothing is measured, and no
    model is read where a run of the store knows its anatomy. Raises UnknownName, UsageError, RunError, BudgetError.
    """
    workload = workload_of(context, batch, prompt_tokens, bits)
    shares = [_share(size) for size in ([remove] if isinstance(remove, str | float) else remove)]
    with reading_store(store) as opened:
        subject = subject_of(of, opened)
        machines = chosen_machines(machine, measured_here(subject.runs))
        search = None if opened is None else _search(opened, subject)
        curve = _curve(subject, shares)
    model = subject.history.model or "demo"
    rows = _on_machines(subject, anatomy_of(subject.history, model), shares, machines, workload)
    check = _check(subject, machines)
    return ForecastReport(model, subject.run.id if subject.run else "", search, curve, tuple(rows), check)


def measure_here(
    *, device: str = "auto", store: str | Path = STORE, watch: EventListener = ignore_events
) -> MachineReport:
    """Measure this machine in about ten seconds, and keep it in the store as the machine `here`."""
    from billhook.methods.evaluate.machine import measure_machine
    from billhook.models.device import environment, pick_device

    place = str(pick_device(device))
    with writing(), closing(Store(Path(store))) as opened:
        run = opened.new_run(MachineReport.kind, {"device": device}, {}, "-")
        with opened.lock_and_track(run):
            report = MachineReport(measure_machine(device, watch), environment(place))
            opened.update(run, result=report.to_json(), state="done")
    return report


def curve_of(subject: Subject) -> MeasuredCurve | None:
    """The measured sizes that a forecast rests on: those of the run's recipe and text, else of the most sizes."""
    curves = subject.history.curves
    run = subject.run
    if run is None:
        return next(iter(curves), None)
    own = subject.history.curves_of(run)
    key = recipe_key(run.spec) if run.kind == PRUNE else ""
    return next(iter([*own, *(curve for curve in curves if curve.key == key)]), None)


def _curve(subject: Subject, shares: Sequence[float]) -> CurveForecast | None:
    """The forecasts of a curve: at the sizes asked for, or at some that were not measured."""
    curve = curve_of(subject)
    if curve is None:
        return None
    past = subject.history.past(curve).combined_with(shipped_errors())
    known = [size.point.share for size in curve.sizes]
    wanted = shares or [share for share in SIZES if all(abs(share - each) > 0.01 for each in known)]
    useful = any(point.nats > 0 for point in curve.points)
    return CurveForecast(
        curve.recipe,
        _source(subject.history, curve),
        curve.sizes[0].teacher,
        tuple(MeasuredPoint(s.point.share, s.point.nats, s.point.se, s.perplexity, s.run) for s in curve.sizes),
        tuple(forecast_loss(curve.points, share, past) for share in wanted) if useful else (),
    )


def _source(history: History, curve: MeasuredCurve) -> str:
    """The name of the text with a hash, as the run that measured on it tells."""
    first = next((run for run in history.runs if run.id == curve.sizes[0].run and run.result is not None), None)
    told = {} if first is None or first.result is None else first.result
    if first is not None and first.kind == PRUNE:
        return str(told["data"]["evaluation"]["source"])
    return next((name for name, info in told.get("evaluation", {}).items() if info["hash"] == curve.text), curve.text)


def _search(store: Store, subject: Subject) -> SearchForecast | None:
    run = subject.run
    if run is None or run.kind != PRUNE or run.state == "done":
        return None
    return search_forecast(store, run, lambda: traces_of(store, subject.runs, run.spec.get("search")))


def _check(subject: Subject, machines: Sequence[Machine]) -> RooflineCheck | None:
    """The speed that a run measured on this machine, against its roofline for the same prompt, batch and dtype."""
    here = next((each for each in machines if each.name == HERE), None)
    runs = [subject.run] if subject.run is not None else subject.history.runs
    told = next((r.result for r in runs if r.kind == PRUNE and r.result is not None and r.result.get("speed")), None)
    anatomy = subject.history.anatomy
    if here is None or told is None or anatomy is None:
        return None
    speed, protocol = decode(SpeedChange, told["speed"]), decode(SpeedChange, told["speed"]).protocol
    item = DTYPE_BYTES.get(str(told["model"]["compute_dtype"]))
    context = protocol.prompt_tokens + protocol.new_tokens // 2
    work = Workload(context, protocol.batch, protocol.prompt_tokens, item, item)
    predicted = resources(anatomy, here, work).decode_tokens_per_s
    return RooflineCheck(str(told["run"]), speed.teacher.decode_tokens_per_s, predicted, context, protocol.batch)


def _on_machines(
    subject: Subject, anatomy: Anatomy, shares: Sequence[float], machines: Sequence[Machine], workload: Workload
) -> list[ModelOnMachine]:
    """The teacher, the student of the run, and the sizes asked for, on each machine."""
    models: list[tuple[str, float, bool, Anatomy, Plan]] = [("unpruned", 0.0, False, anatomy, Plan())]
    run = subject.run
    if run is not None and run.kind == PRUNE and run.result is not None and "plan" in run.result:
        plan = decode(Plan, run.result["plan"])
        share = 1 - anatomy.total("parameters", plan) / anatomy.total("parameters")
        models.append((run.id, share, False, anatomy, plan))
    models += [(f"{100 * share:.3g}% removed", share, True, shrunk(anatomy, share), Plan()) for share in shares]
    return [
        ModelOnMachine(label, share, even, resources(parts, each, workload, plan))
        for each in machines
        for label, share, even, parts, plan in models
    ]


def _share(size: str | float) -> float:
    """A share of the parameters: `20%`, `20%params` or 0.2. Raises BudgetError."""
    if isinstance(size, float):
        share = size
    elif match := re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*(params)?\s*", size):
        share = float(match[1]) / 100
    else:
        raise BudgetError(f"{size!r} is not a share of the parameters, and forecasts are made for these. Write 20%.")
    if not 0 < share < 1 or not math.isfinite(share):
        raise BudgetError(f"{option('remove', str(size))} is not between 0% and 100%. Write 20%.")
    return share
