"""Cost: what a student saves against its teacher, and against another way to a smaller model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from billhook.core.anatomy import Anatomy
from billhook.core.errors import ModelError, RunError, UsageError, option
from billhook.core.outlook.costs import EnergyCost, Figure, ModelCost, Prices, model_cost
from billhook.core.outlook.machines import Machine
from billhook.core.outlook.roofline import Workload, resources
from billhook.core.plan import Plan
from billhook.core.plan_files import find_path
from billhook.core.results.comparisons import Comparison
from billhook.core.results.exports import ExportReport
from billhook.core.results.json_form import JsonObject, decode
from billhook.core.results.measured import Estimate
from billhook.core.results.model import SpeedReport
from billhook.core.results.outlook import CostReport
from billhook.core.results.run import PerplexityChange, SizeChange, SpeedChange
from billhook.core.results.specs import PRUNE
from billhook.core.results.stored import Run, read_result
from billhook.core.statistics import exp_capped
from billhook.runs import RUN_ID, STORE
from billhook.runs.store import Store
from billhook.runtimes.artefacts import is_served
from billhook.studies.outlook.reading import (
    chosen_machines,
    measured_here,
    reading_store,
    require_pruned,
    subject_of,
    workload_of,
)

WEIGHT_FILES = ("*.safetensors", "*.gguf", "*.onnx", "*.onnx_data", "*.bin")
MADE_BY = ("search", "recover")  # stages of a run that a student costs


def cost(
    run: str = "",
    *,
    tokens_per_day: float | None = None,
    price_per_hour: float | None = None,
    price_per_kwh: float | None = None,
    watts: float | None = None,
    machine: str = "",
    context: int = 2048,
    batch: int = 1,
    bits: float | None = None,
    against: str = "",
    store: str | Path = STORE,
) -> CostReport:
    """Work out what a student saves: cost per million tokens, payback of search and recovery, quality lost for it.

    Arguments:
        run: a pruning of the store that is done; left out, the newest.
        tokens_per_day: decoded; left out, payback is for a machine that serves all day.
        price_per_hour, price_per_kwh: one of them, in any currency; a kWh needs a run that measured its energy, or
            `watts`, or a machine that states them.
        machine: rates by its roofline; left out, the rates that the run measured.
        context, batch, bits: for `machine`: tokens of a context, sequences at a time, bits of a weight.
        against: a run (a pruning, or a comparison or a measurement with the speed of two models), or a model's folder,
            file, or ENGINE:FILE. Its speed is that which a run of the store measured, else that of its bytes.

    Raises UsageError, UnknownName, RunError.
    """
    workload = workload_of(context, batch, Workload().prompt_tokens, bits)
    with reading_store(store) as opened:
        subject = subject_of(run, opened)
        told = require_pruned(subject)
        found = chosen_machines(machine, measured_here(subject.runs))[0] if machine else None
        prices = _prices(tokens_per_day, price_per_hour, price_per_kwh, watts, (found, told))
        assert subject.run is not None
        speeds = _speeds(told, found, workload)
        making = _making(told)
        whole = speeds.energy(prices, student=False)
        teacher = model_cost("teacher", speeds.teacher, prices, bytes_=speeds.sizes.teacher.bytes, energy=whole)
        student = model_cost(
            subject.run.id, speeds.student, prices, bytes_=speeds.sizes.student.bytes, teacher=teacher,
            speedup=speeds.ratio, making_seconds=making, ratio=_quality(told, subject.run.id),
            energy=speeds.energy(prices, student=True),
        )  # fmt: skip
        rival = [] if not against or opened is None else [_rival(against, _Setting(opened, teacher, speeds, prices))]
    return CostReport(
        subject.history.model, subject.run.id, found.name if found else "", speeds.workload.batch, prices, making,
        (teacher, student, *rival),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Speeds:
    """Rates of teacher and student, and their ratio: as the run measured them, or by the roofline of a `machine`.

    `joules`: per token of the teacher, of the student, and their ratio, where a counter was read.
    """

    sizes: SizeChange
    teacher: Figure
    student: Figure
    ratio: Figure
    machine: Machine | None
    workload: Workload
    joules: tuple[Figure, Figure, Figure] | None = None

    def energy(self, prices: Prices, *, student: bool) -> EnergyCost | None:
        """Return what the energy of a model costs; None where an hour is paid."""
        if prices.per_kwh is None or self.joules is None:
            return None
        return EnergyCost.of(self.joules[student], prices.per_kwh, self.joules[2] if student else None)


def _speeds(told: JsonObject, machine: Machine | None, workload: Workload) -> _Speeds:
    """Raises RunError where the run measured no speed and no machine is named."""
    sizes = decode(SizeChange, told["sizes"])
    if machine is not None:
        anatomy, plan = decode(Anatomy, told["anatomy"]), decode(Plan, told["plan"])
        first, other = (resources(anatomy, machine, workload, each).decode_tokens_per_s for each in (Plan(), plan))
        teacher, student, ratio = (
            Figure(value, source=f"roofline of {machine.name}, no interval") for value in (first, other, other / first)
        )
        return _Speeds(sizes, teacher, student, ratio, machine, workload)
    if told.get("speed") is None:
        raise RunError(
            f"Run {told['run']} did not measure speed. Name a machine instead: {option('machine', 'rtx-4090')}."
        )
    speed = decode(SpeedChange, told["speed"])
    source = f"run {told['run']}, {speed.teacher.decode_tokens_per_s.n} timings"
    return _Speeds(
        sizes, Figure.of(speed.teacher.decode_tokens_per_s, source),
        Figure.of(speed.student.decode_tokens_per_s, source), Figure.of(speed.ratio.decode, f"{source}, in pairs"),
        None, replace(workload, batch=speed.protocol.batch), _joules(speed, source),
    )  # fmt: skip


def _joules(speed: SpeedChange, source: str) -> tuple[Figure, Figure, Figure] | None:
    found = speed.teacher.decode_joules, speed.student.decode_joules, speed.ratio.decode_joules
    first, other, ratio = (None if each is None else Figure.of(each, f"{source}, joules") for each in found)
    return None if first is None or other is None or ratio is None else (first, other, ratio)


def _prices(
    tokens: float | None, hour: float | None, kwh: float | None, watts: float | None,
    known: tuple[Machine | None, JsonObject],
) -> Prices:  # fmt: skip
    """What an hour costs. Raises UsageError where that is not said, or said twice. `known`: machine, and result."""
    machine, told = known
    if (hour is None) == (kwh is None):
        raise UsageError(
            f"Say what the machine costs, once: {option('price_per_hour', 0.8)}, or {option('price_per_kwh', 0.3)}."
        )
    for name, value in (("tokens_per_day", tokens), ("price_per_hour", hour), ("price_per_kwh", kwh), ("watts", watts)):
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"{option(name, value)} is not above 0. Give a number above 0.")
    if hour is not None:
        if watts is not None:
            raise UsageError(f"{option('watts')} has no effect with a price of an hour. Leave one of them out.")
        return Prices(hour, "an hour", tokens)
    assert kwh is not None
    if watts is None and machine is None and told.get("speed") is not None:
        speed = decode(SpeedChange, told["speed"])
        if (joules := _joules(speed, "")) is not None:
            used = joules[0].value * speed.teacher.decode_tokens_per_s.value
            return Prices(used / 1000 * kwh, f"{used:.3g} W of the teacher, measured, at {kwh:g} a kWh", tokens, kwh)
    power = watts if watts is not None else machine.watts if machine is not None else None
    if power is None:
        raise UsageError(
            f"The power of this machine is not known, and the run measured no energy. Say it: {option('watts', 350)}, "
            "or name a machine that states it."
        )
    return Prices(power / 1000 * kwh, f"{power:g} W at {kwh:g} a kWh", tokens)


def _making(told: JsonObject) -> float:
    """Seconds of search and recovery."""
    return sum(float(told["seconds"].get(stage, 0.0)) for stage in MADE_BY)


def _quality(told: JsonObject, run: str) -> Figure | None:
    if told.get("perplexity") is None:
        return None
    ratio = decode(PerplexityChange, told["perplexity"]).ratio
    return Figure.of(ratio, f"run {run}, {ratio.n} documents of {ratio.clusters} texts")


# -- against another model --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Setting:
    """What another model is held against, and the store that may know it."""

    store: Store
    teacher: ModelCost
    speeds: _Speeds
    prices: Prices


def _rival(against: str, given: _Setting) -> ModelCost:
    """Another model: a pruning, the second one of a comparison or of a measured speed, an export, or files."""
    if not RUN_ID.fullmatch(against) or find_path(against) is not None:
        size = _file_bytes(against)
        known = None if given.speeds.machine is not None else _known_speed(against, given.store)
        return _by_size(against, size, given) if known is None else _by_speed(against, size, known, given)
    run = given.store.run(against)
    if run.kind == ExportReport.kind and run.result is not None:
        return _by_size(run.id, int(run.result["bytes"]), given)
    if run.kind == SpeedReport.kind and run.result is not None:
        return _timed(run, given)
    if run.kind != PRUNE or run.result is None:
        return _compared(run, given)
    told = run.result
    other = _speeds(told, given.speeds.machine, given.speeds.workload)
    return model_cost(
        run.id, other.student, given.prices, bytes_=other.sizes.student.bytes, teacher=given.teacher,
        speedup=other.ratio, making_seconds=_making(told), ratio=_quality(told, run.id),
        energy=other.energy(given.prices, student=True),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Timed:
    """How many times faster a model is than the first model of a run, and in which runtime, if any."""

    run: str
    ratio: Estimate
    runtime: str = ""


def _timed(run: Run, given: _Setting) -> ModelCost:
    """The second model of a measurement of speed. Raises RunError where one model was measured alone."""
    assert run.result is not None
    report, known = SpeedReport.from_json(run.result), _pair_of(run)
    if known is None:
        raise RunError(f"Run {run.id} timed one model alone. Time it with the teacher: billhook speed TEACHER MODEL.")
    return _by_speed(report.models[1].model, None, known, given)


def _pair_of(run: Run) -> _Timed | None:
    """The second model of a measurement of speed; None of one model."""
    report = SpeedReport.from_json(run.result) if run.result is not None else None
    if report is None or report.ratio is None:
        return None
    return _Timed(run.id, report.ratio.decode, report.runtime)


def _known_speed(name: str, store: Store) -> _Timed | None:
    """The newest run that timed a model against another one, as the second of both."""
    for run in store.runs():
        if run.result is None:
            continue
        if run.kind == SpeedReport.kind:
            engine, other = run.spec.get("engine"), run.spec.get("other")
            if name in (other, f"{engine}:{other}") and (pair := _pair_of(run)) is not None:
                return pair
        elif run.kind == Comparison.kind and name in run.spec.get("others", ()):
            found = read_result(run.kind, run.result)
            both = found.speed[run.spec["others"].index(name)] if isinstance(found, Comparison) else None
            if both is not None:
                return _Timed(run.id, both.decode_ratio)
    return None


def _by_speed(name: str, size: int | None, known: _Timed, given: _Setting) -> ModelCost:
    """A model that a run timed in turn with the teacher: as many times the rate of this."""
    where = f" in {known.runtime}" if known.runtime else ""
    speedup = Figure.of(known.ratio, f"run {known.run}, {known.ratio.n} timings{where}, in pairs")
    rate, quality = speedup.mapped(lambda times: times * given.teacher.rate.value), _known_quality(name, given.store)
    return model_cost(
        name, rate, given.prices, bytes_=size, teacher=given.teacher, speedup=speedup, ratio=_ratio_of(quality)
    )


def _ratio_of(known: tuple[str, Estimate] | None) -> Figure | None:
    return None if known is None else Figure.of(known[1], f"run {known[0]}, {known[1].n} documents")


def _compared(run: Run, given: _Setting) -> ModelCost:
    """The second model of a comparison that measured speed."""
    found = None if run.result is None else read_result(run.kind, run.result)
    pair = found.speed[0] if isinstance(found, Comparison) and found.speed else None
    if not isinstance(found, Comparison) or pair is None:
        raise RunError(
            f"Run {run.id} is {run.kind} and holds no speed of two models. Compare them first: "
            "billhook compare MODEL OTHER."
        )
    source = f"run {run.id}, {pair.decode_ratio.n} timings"
    text = next((each for each in found.sets if each.is_text and each.pairs[0] is not None), None)
    change = None if text is None or text.pairs[0] is None else text.pairs[0].change.mapped(exp_capped)
    return model_cost(
        found.models[1].model, Figure.of(pair.other.decode, source), given.prices,
        bytes_=found.models[1].sizes.bytes, teacher=given.teacher, speedup=Figure.of(pair.decode_ratio, source),
        ratio=None if change is None else Figure.of(change, f"run {run.id}, {change.n} documents"),
    )  # fmt: skip


def _by_size(name: str, size: int, given: _Setting) -> ModelCost:
    """A model of which the bytes are known: as many times faster as it is smaller than the teacher's weights."""
    source, speeds, teacher = "bytes of the files, read once a token; no interval", given.speeds, given.teacher
    if speeds.machine is None:
        speedup = Figure(speeds.sizes.teacher.bytes / size, source=source)
    else:
        per_token = size + speeds.sizes.teacher.kv_bytes_per_token * speeds.workload.context * speeds.workload.batch
        rate = speeds.workload.batch * speeds.machine.bandwidth / per_token
        speedup = Figure(rate / teacher.rate.value, source=f"{source}; bandwidth of {speeds.machine.name}")
    ratio = _ratio_of(_known_quality(name, given.store))
    rate_figure = Figure(teacher.rate.value * speedup.value, source=speedup.source)
    return model_cost(name, rate_figure, given.prices, bytes_=size, teacher=teacher, speedup=speedup, ratio=ratio)


def _file_bytes(name: str) -> int:
    place = find_path(name.partition(":")[2] if is_served(name) else name)
    if place is None:
        raise ModelError(f"There is no model {name}. Give a folder or a file of weights, or a run of the store.")
    files = [place] if place.is_file() else [file for kind in WEIGHT_FILES for file in place.glob(kind)]
    if not files:
        raise ModelError(f"{name} holds no weights ({', '.join(WEIGHT_FILES)}). Give the folder that does.")
    return sum(file.stat().st_size for file in files)


def _known_quality(name: str, store: Store) -> tuple[str, Estimate] | None:
    """The run that compared a model on text, and its perplexity over that of the first."""
    for run in store.runs(brief=True):
        if run.kind != Comparison.kind or run.result is None or name not in run.spec.get("others", ()):
            continue
        found = read_result(run.kind, run.result)
        if isinstance(found, Comparison):
            other = run.spec["others"].index(name)
            for each in found.sets:
                if each.is_text and (pair := each.pairs[other]) is not None:
                    return run.id, pair.change.mapped(exp_capped)
    return None
