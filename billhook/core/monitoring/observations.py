"""What a finished run lets rules observe. Pure functions of results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import singledispatch

from billhook.core.monitoring.alerts import Observation, Unit, exact
from billhook.core.results.comparisons import GateReport
from billhook.core.results.json_form import Result
from billhook.core.results.measured import Estimate
from billhook.core.results.model import SpeedReport
from billhook.core.results.run import PredictedSpeed, RunResult, SpeedRatio
from billhook.core.results.studies import SweepResult
from billhook.core.statistics import exp_capped


@singledispatch
def observations_of(result: Result, at: float) -> tuple[Observation, ...]:
    """Return what rules may be about in a result; nothing of kinds that measure no loss. `at`: seconds since 1970."""
    return ()


def percent_lost(nats: Estimate) -> Estimate:
    """Return a rise in nats per token as percent of perplexity."""
    return nats.mapped(lambda x: 100 * (exp_capped(x) - 1))


def points_lost(gained: Estimate) -> Estimate:
    """Return a gain in accuracy, a share of the items, as points that were lost."""
    return replace(gained, value=-100 * gained.value, low=-100 * gained.high, high=-100 * gained.low)


@observations_of.register
def _of_pruning(result: RunResult, at: float) -> tuple[Observation, ...]:
    found = []
    if result.perplexity is not None:
        lost = result.perplexity.ratio.mapped(lambda ratio: 100 * (ratio - 1))
        found.append(Observation("quality", result.data.evaluation.source, "%ppl", lost, at))
    found += [Observation("quality", task.file, "pp", points_lost(task.change), at) for task in result.tasks]
    if (speed := result.speed) is not None:
        found += _of_predicted(speed.ratio, speed.predicted, at)
        if speed.student.peak_bytes is not None:
            found.append(Observation("memory", "student", "bytes", exact(float(speed.student.peak_bytes)), at))
    return tuple(found)


@observations_of.register
def _of_speed(result: SpeedReport, at: float) -> tuple[Observation, ...]:
    peaks = {each.model: each.rates.peak_bytes for each in result.models}
    found = [Observation("memory", name, "bytes", exact(float(peak)), at) for name, peak in peaks.items() if peak]
    if result.ratio is not None and result.predicted is not None:
        found += _of_predicted(result.ratio, result.predicted, at)
    return tuple(found)


def _of_predicted(ratio: SpeedRatio, predicted: PredictedSpeed, at: float) -> list[Observation]:
    """Return both phases' share of the speed that was predicted."""
    phases = (("prefill", ratio.prefill, predicted.prefill), ("decode", ratio.decode, predicted.decode))
    return [Observation("speed", name, "%", found.mapped(_over(times)), at) for name, found, times in phases]


def _over(predicted: float) -> Callable[[float], float]:
    """Return what turns a ratio of speeds into percent of the predicted one."""
    return lambda ratio: 100 * ratio / predicted


@observations_of.register
def _of_gate(result: GateReport, at: float) -> tuple[Observation, ...]:
    def observe(source: str, lost: Estimate, unit: Unit) -> Observation:
        return Observation("quality", source, unit, lost, at)

    return tuple(observe(check.source, check.lost, "%ppl" if check.is_text else "pp") for check in result.checks)


@observations_of.register
def _of_sweep(result: SweepResult, at: float) -> tuple[Observation, ...]:
    found = []
    for trial in result.trials:
        for source, outcome in trial.results.items():
            what = f"{source}, {trial.recipe} {trial.remove}"
            if outcome.kind == "perplexity":
                found.append(Observation("quality", what, "%ppl", percent_lost(outcome.change), at))
            else:
                found.append(Observation("quality", what, "pp", points_lost(outcome.change), at))
    return tuple(found)
