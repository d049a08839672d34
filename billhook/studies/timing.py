"""Speed as a run of the store: of one model, or of two in turn, here or in the runtime that serves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from billhook.core.errors import ResourceError, UsageError, option
from billhook.core.events import EventListener, ignore_events
from billhook.core.results.measured import TimingProtocol
from billhook.core.results.model import ModelRates, SpeedReport
from billhook.core.results.specs import SpeedSpec
from billhook.methods.evaluate import speed
from billhook.methods.evaluate.runtime_speed import check_protocol, speed_in_runtime
from billhook.models.device import environment
from billhook.models.load import Model, Teacher, as_teacher, name_of
from billhook.runs.job import store_and_watch
from billhook.runs.store import STORE
from billhook.runtimes.artefacts import find_artefact, require_checkpoint
from billhook.studies.monitoring.alerting import Alarm, RulesFile, check_result
from billhook.studies.run_study import NO_FOLDER, begin_run

Measure = Callable[[EventListener], SpeedReport]


def measure_speed(
    model: Model = "demo",
    other: Model | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    engine: str | None = None,
    protocol: TimingProtocol = TimingProtocol(),  # noqa: B008 - an immutable value
    rules: RulesFile = None,
    webhook: str | None = None,
    store: str | Path = STORE,
    watch: EventListener = ignore_events,
) -> SpeedReport:
    """Prefill and decode speed and peak memory of one model, or of two timed in turn (A B A B).

    Arguments:
        model, other: checkpoints; with `engine` files of a runtime.
        engine: the runtime that serves both, such as llama.cpp, which chooses device and dtype.
        protocol: prompts, tokens and repeats.
        rules, webhook: as for `prune`.
        store: the run store, which keeps what was measured.

    Raises UnknownName, MissingExtra, UsageError, ResourceError, ModelError, RuntimeFailed where a runtime does not take
    a file. Rules are about the ratio of two models, held against that of their weights, and about memory.
    """
    alarm = Alarm.read(rules, webhook, "runs")
    names = [name_of(each) for each in (model, other) if each is not None]
    if engine is None:
        measure, where = _here([each for each in (model, other) if each is not None], protocol, device, dtype, watch)
    elif (device, dtype) != ("auto", "auto"):
        raise UsageError(f"{engine} chooses device and dtype. Leave {option('device')} and {option('dtype')} out.")
    else:
        measure, where = _served(engine, names, protocol), "cpu"  # as far as this process goes
    spec = SpeedSpec(names[0], names[1] if len(names) > 1 else None, engine, device, dtype, protocol)
    with begin_run(spec, where, Path(store), NO_FOLDER) as (opened, run):
        report = measure(store_and_watch(opened, run, watch))
        opened.update(run, result=report.to_json())
        check_result(opened, run, watch, report, alarm, target=names[-1])
    return report


def _served(engine: str, names: list[str], protocol: TimingProtocol) -> Measure:
    """What times files in a runtime. Raises as `find_artefact` where a file or the runtime is missing."""
    artefacts = [find_artefact(f"{engine}:{name}") for name in names]
    check_protocol(protocol)
    return lambda watch: speed_in_runtime(names, artefacts, protocol, watch)


def _here(
    given: list[Model], protocol: TimingProtocol, device: str, dtype: str, watch: EventListener
) -> tuple[Measure, str]:
    """What times loaded models, and their device. Raises UsageError, ResourceError for what cannot be timed."""
    for each in given:
        if not isinstance(each, Teacher):
            require_checkpoint(str(each))
    teachers = [as_teacher(each, device=device, dtype=dtype, watch=watch) for each in given]
    if large := [teacher.name for teacher in teachers if teacher.weights is not None]:
        raise ResourceError(f"{large[0]} is larger than the memory that is free, so it cannot be timed here.")
    models = [teacher.model for teacher in teachers]
    most, asked = speed.max_positions(models), protocol.prompt_tokens + protocol.new_tokens
    if most is not None and asked > most:
        raise UsageError(f"{asked} tokens of prompt and answer are more than the {most} positions. Ask for fewer.")
    place = str(models[0].device)

    def measure(watch: EventListener) -> SpeedReport:
        meter = speed.meter_of(models[0].device)
        timings = speed.time_interleaved(models, [t.folder for t in teachers], protocol, meter=meter, watch=watch)
        rates = tuple(ModelRates(t.name, speed.rates(each)) for t, each in zip(teachers, timings, strict=True))
        two = len(teachers) == 2
        return SpeedReport(
            rates, protocol, environment(place), speed.speed_ratio(*timings) if two else None,
            predicted=speed.predicted_by_weights(*(t.anatomy for t in teachers)) if two else None,
            energy=speed.counters_of(meter),
        )  # fmt: skip

    return measure, place
